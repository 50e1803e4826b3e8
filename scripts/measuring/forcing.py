"""A model fed with given tokens, many requests at once, from whatever state their slots hold. No engine."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdnjax import generation, step
from gdnjax.batch import DecodeBatch, PrefillBatch
from gdnjax.cache import LAYOUT_KV
from gdnjax.config import CHUNK
from gdnjax.models import HybridModel
from gdnjax.models.context import prefill_context
from gdnjax.shapes import Params
from gdnjax.state import NO_TOKEN, NULL_SLOT, ServeState
from gdnjax.step import StepOptions

# Mixed: the steps obey the layout bit, as an engine's do where prefill and decode store states differently.
OPTIONS = StepOptions(state_layout="mixed")

DECODE_STEPS = 8
"""Tokens between two looks of the host at who is done."""


FEW_ROWS = 50
"""Rows of the smaller decode step, for the requests that take longest."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens that a slot is fed, and the token that follows the last of them."""

    slot: int
    ids: Sequence[int]
    following: int = NO_TOKEN


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pools:
    """A ServeState, and the last hidden state of each slot, which the MTP head needs."""

    state: ServeState
    hidden: Any  # [s, d]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """Of each token fed: what the model and its MTP head say of the token that follows it."""

    logprob: Any  # [t] float32: of the token that does follow
    best: Any  # [t] int32: the most probable one
    drafted_logprob: Any  # [t] float32: the same two of a draft made one token ahead
    drafted: Any  # [t] int32


def pack(pieces: Sequence[Piece], tokens: int, rows: int) -> PrefillBatch:
    """Pieces one after another in `tokens` places. Raises ValueError where they do not fit."""
    if sum(len(piece.ids) for piece in pieces) > tokens or len(pieces) > rows:
        raise ValueError(f"{len(pieces)} pieces of {sum(len(p.ids) for p in pieces)} tokens exceed {rows} of {tokens}")
    chunks = tokens // CHUNK + rows
    fields = {name: np.zeros(rows, np.int32) for name in ("slot", "start", "length")}
    fields |= {name: np.zeros(tokens, np.int32) for name in ("tokens", "token_row")}
    fields |= {name: np.zeros(chunks, np.int32) for name in ("chunk_row", "chunk_start", "chunk_length")}
    target = np.full(tokens, NO_TOKEN, np.int32)
    valid = np.zeros(tokens, bool)
    place = chunk = 0
    for row, piece in enumerate(pieces):
        size = len(piece.ids)
        here = slice(place, place + size)
        fields["tokens"][here], fields["token_row"][here], valid[here] = piece.ids, row, True
        target[here] = [*piece.ids[1:], piece.following]
        fields["slot"][row], fields["start"][row], fields["length"][row] = piece.slot, place, size
        for offset in range(0, size, CHUNK):
            fields["chunk_row"][chunk], fields["chunk_start"][chunk] = row, place + offset
            fields["chunk_length"][chunk] = min(CHUNK, size - offset)
            chunk += 1
        place += size
    return PrefillBatch(**fields, token_valid=valid, target=target, is_last=np.ones(rows, bool))


def extend(
    model: HybridModel, params: Params, pools: Pools, batch: PrefillBatch, fresh: jax.Array, attends: jax.Array
) -> tuple[Pools, Scores]:
    """Feeds every piece of a batch to its slot. Traceable.

    Where `fresh` is False, a slot without tokens begins with the state that it happens to hold: a missing reset. Where
    `attends` is False, full attention sees nothing and gives zero.
    """
    state = pools.state
    context = prefill_context(step.pools_of(state, OPTIONS), batch)
    tiles = dataclasses.replace(context.tiles, position=jnp.where(attends, context.tiles.position, -1))
    rows = dataclasses.replace(context.rows, fresh=context.rows.fresh & fresh)
    context = dataclasses.replace(context, tiles=tiles, rows=rows)
    hidden, cache = model.forward(params, batch.tokens, context, state.cache)
    # A padded row starts at 0, too: it is kept from writing there.
    start = jnp.where(batch.length > 0, batch.start, batch.tokens.shape[0])
    previous = jnp.roll(hidden, 1, axis=0).at[start].set(pools.hidden[batch.slot], mode="drop")
    drafts, cache = model.draft(params, batch.tokens, previous, context, cache)
    last = hidden[jnp.maximum(batch.start + batch.length - 1, 0)]
    slots = dataclasses.replace(state.slots, length=state.slots.length.at[batch.slot].add(batch.length))
    state = dataclasses.replace(state, cache=cache.written(batch.slot, LAYOUT_KV), slots=slots)
    pools = Pools(state, pools.hidden.at[batch.slot].set(last))
    return pools, Scores(*_scores(model, params, hidden, batch), *_scores(model, params, drafts, batch))


def _scores(model: HybridModel, params: Params, hidden: jax.Array, batch: PrefillBatch) -> tuple[jax.Array, jax.Array]:
    logits = model.logits(params, hidden)
    chosen = jnp.take_along_axis(logits, jnp.maximum(batch.target, 0)[:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1).astype(jnp.int32)


def decode_some(
    model: HybridModel, params: Params, state: ServeState, slots: jax.Array
) -> tuple[ServeState, jax.Array]:
    """DECODE_STEPS tokens for each of `slots`, [n, DECODE_STEPS]; NO_TOKEN past a request's end. Traceable."""

    def one(state, _):
        state, emitted = step.decode(model, OPTIONS, params, state, DecodeBatch(slot=slots))
        return state, emitted.tokens[:, 0]

    state, tokens = jax.lax.scan(one, state, length=DECODE_STEPS)
    return state, tokens.T


class Feeder:
    """A model with room for `rows` requests of `longest` tokens, its functions compiled once each.

    Slots are 1 to `rows`. `tokens` are those of one compiled call; longer work takes several.
    """

    def __init__(
        self, model: HybridModel, params: Params, *, rows: int, longest: int, tokens: int, stops: tuple[int, ...] = ()
    ):
        self.model, self.params = model, params
        self.rows, self.longest, self.tokens, self.stops = rows, longest, tokens, stops
        # Pools are updated in place, by calls on copies of what the caller keeps.
        self._extend = jax.jit(functools.partial(extend, model), donate_argnums=1)
        self._decode = jax.jit(functools.partial(decode_some, model), donate_argnums=1)

    def pools(self, limits: Sequence[int] | None = None) -> Pools:
        """Nothing in them; `limits` are the tokens at which requests end."""
        given = jnp.asarray(limits if limits is not None else [self.longest] * self.rows, jnp.int32)
        state = generation.start(self.model, given, self.longest, stop_token_ids=self.stops)
        width = self.model.config.hidden_size
        return Pools(state, jnp.zeros((self.rows + 1, width), self.model.dtype))

    def feed(
        self, pools: Pools, pieces: Sequence[Piece], *, fresh: bool = True, attends: bool = True
    ) -> tuple[Pools, list[Scores]]:
        """Feeds one piece to each of some slots; the scores of each piece, in order."""
        found: list[Scores] = []
        pools = jax.tree.map(jnp.copy, pools)
        for group in self._groups(pieces):
            batch = pack(group, self.tokens, self.rows)
            pools, scores = self._extend(self.params, pools, batch, jnp.asarray(fresh), jnp.asarray(attends))
            scores = jax.device_get(scores)
            for start, length in zip(batch.start[: len(group)], batch.length[: len(group)], strict=True):
                here = slice(start, start + length)
                found.append(jax.tree.map(lambda x, here=here: x[here], scores))
        return pools, found

    def _groups(self, pieces: Sequence[Piece]) -> list[list[Piece]]:
        """Pieces in order, as many to a call as fit."""
        groups: list[list[Piece]] = []
        room = 0
        for piece in pieces:
            if not groups or len(piece.ids) > room:
                groups.append([])
                room = self.tokens
            groups[-1].append(piece)
            room -= len(piece.ids)
        return groups

    def begin(self, pools: Pools, first: Sequence[int], wanted: np.ndarray | None = None) -> ServeState:
        """The state of requests that have been fed their prompts and have drawn their first tokens.

        Those that are not `wanted` count as done.
        """
        slots = pools.state.slots
        tokens = jnp.asarray(first, jnp.int32)
        done = jnp.isin(tokens, jnp.asarray(self.stops, jnp.int32))
        if wanted is not None:
            done |= ~wanted
        slots = dataclasses.replace(
            slots,
            last_token=slots.last_token.at[1 : 1 + len(first)].set(tokens),
            done=slots.done.at[1 : 1 + len(first)].set(done),
        )
        return dataclasses.replace(pools.state, slots=slots)

    def finish(self, state: ServeState, first: Sequence[int], most: int) -> list[list[int]]:
        """Greedy completions up to their ends, at most about `most` tokens. The batch shrinks as requests end."""
        produced = [[token] for token in first]
        state = jax.tree.map(jnp.copy, state)
        for _ in range(0, most, DECODE_STEPS):
            active = np.flatnonzero(~np.asarray(state.slots.done)[1:]) + 1
            if active.size == 0:
                break
            size = FEW_ROWS if active.size <= FEW_ROWS < self.rows else self.rows
            slots = np.full(size, NULL_SLOT, np.int32)
            slots[: active.size] = active
            state, tokens = self._decode(self.params, state, slots)
            for slot, row in zip(active, np.asarray(tokens), strict=False):
                produced[slot - 1] += [int(token) for token in row if token != NO_TOKEN]
        return produced
