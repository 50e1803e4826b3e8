"""The steps: admit, fill token counts, fill a logit row, fill masks, prefill, decode, seal. Pure: `(params, ServeState,
batch) -> (ServeState, Emitted)`, those without a model without params, those that draw nothing without Emitted.

A decode step that speculates verifies the drafts of the step before and makes the next ones, so that nothing is read
back in between. Where the model has states, what it accepts is pending: the next step folds it (see SlotTable).

Nothing here knows what a model keeps of its requests: `gdnjax.cache` does, and the model.

Everything per-step (masks, indices, places) is made here, before the layers. No step reads a value back.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding

from gdnjax import sampling, sharding, speculative
from gdnjax.backend import options_of_compiler
from gdnjax.batch import (
    AdmitBatch,
    CountBatch,
    DecodeBatch,
    Emitted,
    LogitRowBatch,
    Logprobs,
    MaskBatch,
    PrefillBatch,
    SealBatch,
)
from gdnjax.cache import LAYOUT, LAYOUT_KV, LAYOUT_VK, copy_row, layout_of
from gdnjax.models import Model, partition
from gdnjax.models.context import Pools, decode_context, fold_context, prefill_context
from gdnjax.pallas_kernels.pools import read_rows, write_rows
from gdnjax.sampling import Change, Draw, Vocab, in_groups
from gdnjax.shapes import Array, Params
from gdnjax.state import NO_TOKEN, NULL_SLOT, LogitRows, ServeState, specs_of
from gdnjax.words import Form, WordStep

PROMPT_LOGPROB_ROWS = 64
"""Prompt positions whose logits are held at once: [64, V] float32 instead of the whole prompt's."""


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What is compiled into a step.

    full             top-k, top-p, logit rows, masks and log-probabilities; the plain step has none of them.
    prompt_logprobs  prefill only: log-probabilities of the prompt's own tokens.
    max_logprobs     alternatives reported with each log-probability.
    state_layout     "kv", "vk" or "mixed"; see EngineConfig.
    num_drafts       drafts that a decode step verifies, and that the steps make for the next one; at most the k that
                     the state has room for.
    rounding_seed    of the noise by which recurrent states are rounded stochastically; None: to the nearest.
    acceptance, forced_length   EngineConfig.draft_acceptance and spec_acceptance_length.
    """

    full: bool = False
    prompt_logprobs: bool = False
    max_logprobs: int = 0
    state_layout: str = "vk"
    rounding_seed: int | None = None
    num_drafts: int = 0
    acceptance: str = "shared_noise"
    forced_length: float | None = None

    @property
    def draft_stream(self) -> int:
        """Which noise drafts are drawn with: the target's own, or one that rejection sampling may compare it with."""
        return speculative.DRAFT_STREAM if self.acceptance == "rejection" else 0


def admit(state: ServeState, batch: AdmitBatch, options: StepOptions) -> ServeState:
    """Hands slots to new requests: nothing of the last owner is left that a later step could read.

    A request with a cached prefix has `length` tokens behind it; its first prefill step reads their state from another
    slot. Blocks are copied as they stood before the step, all of `copy_from` before any of `copy_to`.
    """
    slot = batch.slot
    kept = ("slot", "copy_from", "copy_to")
    replaced = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name not in kept}
    replaced |= {"last_token": 0, "done": slot == NULL_SLOT, "hidden": 0}
    replaced |= {name: 0 for name in ("num_drafts", "pending") if getattr(state.slots, name) is not None}
    table = {name: getattr(state.slots, name).at[slot].set(value) for name, value in replaced.items()}
    cache = state.cache.written(slot, layout_of(options.state_layout, LAYOUT_KV))
    if batch.copy_from is not None:
        cache = cache.with_copied_blocks(batch.copy_from, batch.copy_to)
    return dataclasses.replace(state, slots=dataclasses.replace(state.slots, **table), cache=cache)


def fill_logit_row(state: ServeState, batch: LogitRowBatch) -> ServeState:
    """Hands a logit row to a request. `bias` is this rank's part of the vocabulary."""
    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name != "row"}
    rows = {name: getattr(state.logit_rows, name).at[batch.row].set(value) for name, value in values.items()}
    return dataclasses.replace(state, logit_rows=LogitRows(**rows))


def fill_counts(state: ServeState, batch: CountBatch, vocab: Vocab) -> ServeState:
    """Hands count rows to requests, with the tokens that they bring along."""
    return dataclasses.replace(state, token_counts=sampling.fill_counts(state.token_counts, batch, vocab))


def fill_masks(state: ServeState, batch: MaskBatch) -> ServeState:
    """Says what requests with a structure may draw. `words` are this rank's part of the vocabulary."""
    return dataclasses.replace(state, masks=state.masks.at[1 : 1 + batch.words.shape[0]].set(batch.words))


def prefill(
    model: Model, options: StepOptions, params: Params, state: ServeState, batch: PrefillBatch
) -> tuple[ServeState, Emitted]:
    """Feeds pieces of prompts; rows whose prompt ends here draw their first token, and draft.

    A row reads its state at `read_slot` and writes it to `slot`, so a fork costs no copy. Chunks with a checkpoint
    leave state and last hidden state there, too.
    """
    if batch.block_table is not None:
        table = state.slots.block_table.at[batch.slot].set(batch.block_table)
        state = _with_slots(state, block_table=table)
    context = prefill_context(pools_of(state, options), batch)
    hidden, cache = model.forward(params, batch.tokens, context, state.cache)
    previous = read_rows(state.slots.hidden, context.rows.read_slot)
    if state.slots.drafts is not None:
        # The head's keys have to be there for every token that is, drafting or not.
        before = previous[batch.token_row]
        before = jnp.where(context.rows.token_offset[:, None] > 0, jnp.roll(hidden, 1, axis=0), before)
        before = jnp.where(context.position[:, None] > 0, before, 0)
        _, cache = model.draft(params, batch.tokens, before, context, cache)
    last = hidden[jnp.maximum(batch.start + batch.length - 1, 0)]
    length = state.slots.length[batch.slot] + batch.length
    active = batch.is_last & (batch.slot != NULL_SLOT)
    drawn = _draw(model, options, params, state, batch, length, last[:, None], active[:, None], None)
    prompt = _prompt_logprobs(model, options, params, hidden, batch.target) if options.prompt_logprobs else None
    layout = layout_of(options.state_layout, LAYOUT_KV)
    # A row without tokens has no hidden state in this step: what it had stays.
    kept = jnp.where((batch.length > 0)[:, None], last, previous)
    state = _written(dataclasses.replace(state, cache=cache), batch.slot, kept, layout)
    if batch.chunk_checkpoint is not None:
        behind = hidden[jnp.maximum(context.chunks.end - 1, 0)]
        state = _written(state, batch.chunk_checkpoint, behind, layout)
    state, emitted = _commit(state, drawn, batch.slot, length, active, prompt)
    return _draft(model, options, params, state, batch.slot, last[:, None], emitted), emitted


def decode(
    model: Model, options: StepOptions, params: Params, state: ServeState, batch: DecodeBatch
) -> tuple[ServeState, Emitted]:
    """Feeds each slot's last token and its drafts, and draws what follows. Rows that are done, or null, change
    nothing.
    """
    slot = batch.slot
    active = (slot != NULL_SLOT) & ~state.slots.done[slot]
    if batch.grown_index is not None:
        table = state.slots.block_table.at[slot[:, None], batch.grown_index].set(batch.grown_block, mode="drop")
        state = _with_slots(state, block_table=table)
    before = state.slots.length[slot]
    drafts, num_drafts = _drafts_to_verify(state, options, batch, before)
    tokens = jnp.concatenate([state.slots.last_token[slot][:, None], drafts], axis=1)
    valid = active[:, None] & (jnp.arange(tokens.shape[1]) <= num_drafts[:, None])
    context = decode_context(pools_of(state, options), slot, before, valid)
    hidden, cache = model.forward(params, tokens.reshape(-1), context, state.cache)
    hidden = hidden.reshape(*tokens.shape, -1)
    drawn = _draw(model, options, params, state, batch, before + 1, hidden, valid, drafts)
    state = dataclasses.replace(state, cache=cache)
    state = _accepted(state, options, context, hidden, drawn.count)
    state, emitted = _commit(state, drawn, slot, before + drawn.count, active, None)
    return _draft(model, options, params, state, slot, hidden, emitted), emitted


def seal(model: Model, options: StepOptions, params: Params, state: ServeState, batch: SealBatch) -> ServeState:
    """Makes checkpoints of what slots hold: so many pending rows are folded in that the state has the wanted length.

    The states of all Slot kinds, and with them the last hidden state, go to `write_slot`.
    """
    length, read = state.slots.length[batch.read_slot], batch.read_slot
    if state.slots.pending is None:
        write = jnp.where(length == batch.position, batch.write_slot, NULL_SLOT)
        return lax.fori_loop(0, batch.count, lambda i, state: _copied(state, read[i], write[i]), state)
    pending = state.slots.pending[read]
    count = batch.position - (length - pending)
    reached = (jnp.arange(read.shape[0]) < batch.count) & (count >= 0) & (count <= pending)
    write, count = jnp.where(reached, batch.write_slot, NULL_SLOT), jnp.where(reached, count, 0)
    context = fold_context(pools_of(state, options), read, write, count)
    kept = read_rows(state.slots.pending_hidden, read)
    hidden = _hidden_behind(read_rows(state.slots.hidden, read), kept, count)
    state = dataclasses.replace(state, cache=model.fold(params, context, state.cache))
    state = _with_slots(state, pending=state.slots.pending.at[write].set(0))
    return _written(state, write, hidden, layout_of(options.state_layout, LAYOUT_VK))


def _copied(state: ServeState, source: Array, target: Array) -> ServeState:
    """The state with one slot's rows of the pools at another slot, too."""
    state = dataclasses.replace(state, cache=state.cache.with_copied_slot(source, target))
    return _with_slots(state, hidden=copy_row(state.slots.hidden, source, target, axis=0))


def _drafts_to_verify(state: ServeState, options: StepOptions, batch: DecodeBatch, length) -> tuple[Array, Array]:
    """The drafts [n, k] of each row, and how many of them count."""
    slots, slot = state.slots, batch.slot
    if not options.num_drafts:
        return jnp.zeros((slot.shape[0], 0), jnp.int32), jnp.zeros(slot.shape, jnp.int32)
    room = jnp.clip(_room_for_drafts(state, slot, length), 0, options.num_drafts)
    count = jnp.minimum(read_rows(slots.num_drafts, slot), room)
    if batch.max_drafts is not None:
        count = jnp.minimum(count, batch.max_drafts)
    return slots.drafts[slot, : options.num_drafts], count


def _room_for_drafts(state: ServeState, slot: Array, length: Array) -> Array:
    """How many drafts behind the token at position `length` can be verified, [n], below 0 at the end: the last token
    that a request may have is drawn, never fed.
    """
    return state.slots.max_length[slot] - 2 - length


def _accepted(state: ServeState, options: StepOptions, context, hidden, count) -> ServeState:
    """The state after a decode step, whose layers have folded what was pending: `count` new rows are so now. Where
    nothing is ever pending, their hidden states are all that is left of them.
    """
    write, layout = context.write_slot, layout_of(options.state_layout, LAYOUT_VK)
    if state.slots.pending is None:
        last = hidden[:, 0] if hidden.shape[1] == 1 else _hidden_behind(hidden[:, 0], hidden, count)
        return _written(state, write, last, layout)
    rows, width = state.slots.pending_hidden, hidden.shape[1]
    old = read_rows(rows, context.read_slot)
    behind = _hidden_behind(read_rows(state.slots.hidden, context.read_slot), old, context.pending)
    state = _written(state, write, behind, layout)
    # What is written follows from what was read, so that XLA need not keep the old pool beside the new one.
    kept = jnp.where(context.valid.reshape(-1, width, 1), hidden.astype(old.dtype), old[:, :width])
    rows = write_rows(rows, write, slice(width), rows=kept)
    return _with_slots(state, pending=state.slots.pending.at[write].set(count), pending_hidden=rows)


def _hidden_behind(hidden: Array, pending: Array, count: Array) -> Array:
    """The hidden state [n, d] behind the first `count` of pending rows [n, P, d]; `hidden` is that before them."""
    of_row = jnp.take_along_axis(pending, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where((count > 0)[:, None], of_row, hidden)


def pools_of(state: ServeState, options: StepOptions) -> Pools:
    """What the context of a step is made from."""
    return Pools(
        slots=state.slots,
        layouts={name: pools[LAYOUT] for name, pools in state.cache.slots.items() if LAYOUT in pools},
        state_layout=options.state_layout,
        block_size=state.cache.spec.block_size,
        rounding_seed=options.rounding_seed,
    )


def _with_slots(state: ServeState, **fields: Array) -> ServeState:
    """The state with other fields of its SlotTable."""
    return dataclasses.replace(state, slots=dataclasses.replace(state.slots, **fields))


def _written(state: ServeState, slot: Array, hidden: Array, layout: int) -> ServeState:
    """The layout bit and last hidden state of slots whose rows the layers have written."""
    state = _with_slots(state, hidden=write_rows(state.slots.hidden, slot, rows=hidden))
    return dataclasses.replace(state, cache=state.cache.written(slot, layout))


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """The tokens that a step drew [n, T], how many of each row count [n], and what else it made on the way.

    `drafted` [n] counts the drafts that came to the test: not those behind a stop token that was drafted rightly.
    """

    tokens: Array
    count: Array
    drafted: Array
    logprobs: Logprobs | None
    logit_rows: LogitRows
    token_counts: Array


def _draw(model, options, params, state, batch, first, hidden, valid, drafts) -> _Drawn:
    """Draws behind each of T tokens of a row, whose hidden states [n, T, d] these are; the first token drawn has the
    absolute position `first` [n]. Behind drafts [n, T - 1] those count that are behind right ones. A row with a mask
    has no drafts that count: it says what the first token may be.
    """
    count, rows = valid.shape
    slot, mask_row = batch.slot, batch.mask_row
    sampler = _Sampler.of(model, options, state, slot, first, rows, mask_row)
    logits = model.logits(params, hidden.reshape(count * rows, -1))
    produced = _produced(drafts) if rows > 1 else None
    num_drafts = jnp.sum(valid[:, 1:], axis=1, dtype=jnp.int32)
    if rows > 1 and options.acceptance == "rejection" and options.forced_length is None:
        tokens, accepted = _reject(model, options, params, state, batch, first, logits, drafts, num_drafts)
    else:
        tokens, accepted = sampler.tokens(logits, produced).reshape(count, rows), jnp.zeros((count,), jnp.int32)
        if rows > 1 and options.forced_length is not None:
            length = options.forced_length
            tokens, accepted = speculative.accept_forced(drafts, tokens, num_drafts, length, sampler.draw)
        elif rows > 1:
            accepted = speculative.accept_shared(drafts, tokens, num_drafts)
    # A stop token ends what counts, and so does the lack of any token that may be drawn.
    stops = jnp.any(state.slots.stop_tokens[slot][:, None] == tokens[:, :, None], axis=-1) | (tokens == NO_TOKEN)
    stop = jnp.where(jnp.any(stops, axis=1), jnp.argmax(stops, axis=1), rows)
    kept = jnp.where(valid[:, 0], jnp.minimum(accepted, stop) + 1, 0).astype(jnp.int32)
    drafted = jnp.where(stop < accepted, kept - 1, num_drafts)
    if not options.full:
        return _Drawn(tokens, kept, drafted, None, state.logit_rows, state.token_counts)

    def logprobs(group):
        logits, chosen = group
        return sampling.logprobs(logits, chosen, options.max_logprobs, sampler.vocab)

    found = in_groups(logprobs, (logits, tokens.reshape(-1)), count * rows, sampler.vocab.group_of(count * rows))
    slots = state.slots
    return _Drawn(
        tokens=tokens,
        count=kept,
        drafted=drafted,
        logprobs=jax.tree.map(lambda x: x.reshape(count, rows, *x.shape[1:]), found),
        logit_rows=sampling.remember_tokens(state.logit_rows, slots.logit_row[slot], tokens, kept),
        token_counts=sampling.count_tokens(state.token_counts, slots.count_row[slot], tokens, kept, sampler.vocab),
    )


def _reject(model, options, params, state, batch, first, logits, drafts, valid) -> tuple[Array, Array]:
    """Tokens [n, T], and how many drafts are kept, by rejection, some requests at a time. Beside the target's `logits`
    [n * T, V] it holds those of the drafts, made again from the head's hidden states, which are small.
    """
    count, k = drafts.shape
    hidden = read_rows(state.slots.draft_hidden, batch.slot, slice(k)).reshape(count * k, -1)
    vocab = _vocab_of(model)

    def some_requests(group):
        slot, mask_row, first, logits, proposed, drafts, valid = group
        target = _Sampler.of(model, options, state, slot, first, 1 + k, mask_row)
        drafter = _Sampler.of(model, options, state, slot, first, k)
        p = target.scores(logits, _produced(drafts))
        q = drafter.scores(proposed, _produced(drafts[:, :-1]) if k > 1 else None)
        p, q = (scores.reshape(slot.shape[0], -1, scores.shape[1]) for scores in (p, q))
        return speculative.accept_rejection(p, q, drafts, valid, target.draw, vocab)

    requests = (batch.slot, batch.mask_row, first, logits, model.draft_logits(params, hidden), drafts, valid)
    return in_groups(some_requests, requests, count, max(1, vocab.group_of(logits.shape[0]) // (1 + k)))


def _draft(model, options, params, state, slot, hidden, emitted) -> ServeState:
    """Runs the MTP head over the tokens [n, T] that were drawn behind `hidden` [n, T, d], and drafts the next ones.

    Every token that counts gets its key and value from the target's hidden state before it, in the place of what a
    draft may have left there. Behind the first draft only those are made that the next step may verify: a row that has
    ended makes none, and no position comes to the end of the context.
    """
    if state.slots.drafts is None:
        return state
    pools, length = pools_of(state, options), state.slots.length[slot]
    count, rows = emitted.tokens.shape
    active = emitted.count > 0
    valid = jnp.arange(rows) < emitted.count[:, None]
    tokens = jnp.where(valid, emitted.tokens, 0).reshape(-1)
    context = decode_context(pools, slot, length - emitted.count + 1, valid)
    found, cache = model.draft(params, tokens, hidden.reshape(count * rows, -1), context, state.cache)
    last = found.reshape(count, rows, -1)[jnp.arange(count), jnp.maximum(emitted.count - 1, 0)]
    room = jnp.where(active & ~emitted.done, _room_for_drafts(state, slot, length), 0)
    drafts, outputs = jnp.zeros((count, 0), jnp.int32), []
    for depth in range(options.num_drafts):
        if depth:
            context = decode_context(pools, slot, length + depth, (depth < room)[:, None])
            last, cache = model.draft(params, drafts[:, -1], last, context, cache)
        outputs.append(last)
        sampler = _Sampler.of(model, options, state, slot, length + depth + 1, 1)
        logits = model.draft_logits(params, last)
        draft = sampler.tokens(logits, drafts if depth else None, options.draft_stream)
        drafts = jnp.concatenate([drafts, draft[:, None]], axis=1)
    # Others than those that have drawn a token keep what they have.
    write = jnp.where(active, slot, NULL_SLOT)
    made = {"num_drafts": state.slots.num_drafts.at[write].set(options.num_drafts)}
    if options.num_drafts:
        made["drafts"] = state.slots.drafts.at[write, : options.num_drafts].set(drafts)
    if options.num_drafts and state.slots.draft_hidden is not None:
        kept, rows = state.slots.draft_hidden, jnp.stack(outputs, axis=1)
        made["draft_hidden"] = write_rows(kept, write, slice(options.num_drafts), rows=rows)
    return _with_slots(dataclasses.replace(state, cache=cache), **made)


@dataclasses.dataclass(frozen=True)
class _Sampler:
    """How the tokens at `position` [t] are drawn, each for the request of its `slot` [t], by its `mask_row` [t] if any
    has one.
    """

    options: StepOptions
    state: ServeState
    vocab: Vocab
    slot: Array
    position: Array
    mask_row: Array | None = None

    @classmethod
    def of(cls, model, options, state, slot, first, rows, mask_row=None) -> "_Sampler":
        """`rows` tokens of each slot, from position `first` on."""
        position = (first[:, None] + jnp.arange(rows, dtype=jnp.int32)).reshape(-1)
        vocab = _vocab_of(model)
        mask_row = None if mask_row is None else jnp.repeat(mask_row, rows)
        return cls(options, state, vocab, jnp.repeat(slot, rows), position, mask_row)

    @property
    def draw(self) -> Draw:
        return Draw.of_slots(self.state.slots, self.slot, self.position)

    def scores(self, logits: Array, produced: Array | None = None) -> Array:
        """What they are drawn by. `produced` [t, j] counts as produced, for penalties and bad words."""
        if not self.options.full:
            return sampling.scores(logits, self.draw, self.vocab, full=False)
        state, slots = self.state, self.state.slots
        # Below its minimum a request may not end, so what would end it may not be drawn.
        early = self.position < slots.min_length[self.slot]
        banned = jnp.where(early[:, None], slots.stop_tokens[self.slot], NO_TOKEN)
        change = Change.of_slots(slots, self.slot, banned, produced)
        logits = sampling.adjust(logits, state.logit_rows, state.token_counts, change, self.vocab)
        if self.mask_row is not None:
            logits = sampling.allowed(logits, state.masks, self.mask_row)
        return sampling.scores(logits, self.draw, self.vocab, full=True)

    def tokens(self, logits: Array, produced: Array | None = None, stream: int = 0) -> Array:
        """Tokens drawn from logits, by their scores, with the noise of a stream."""
        if not self.options.full and not self.vocab.backend.is_reference:
            # One pass over the logits that holds nothing beside them.
            return sampling.draw_plain(logits, self.draw, self.vocab, stream)

        def some_rows(rows):
            logits, slot, position, mask_row, produced = rows
            some = dataclasses.replace(self, slot=slot, position=position, mask_row=mask_row)
            return sampling.choose(some.scores(logits, produced), some.draw, self.vocab, stream)

        rows = (logits, self.slot, self.position, self.mask_row, produced)
        return in_groups(some_rows, rows, logits.shape[0], self.vocab.group_of(logits.shape[0]))


def _produced(drafts: Array) -> Array:
    """[n, j] -> [n * (j + 1), j]: what stands before each token of a row that is drawn behind its drafts."""
    count, most = drafts.shape
    before = jnp.arange(most) < jnp.arange(most + 1)[:, None]
    return jnp.where(before, drafts[:, None], NO_TOKEN).reshape(count * (most + 1), most)


def _vocab_of(model: Model) -> Vocab:
    return Vocab(size=model.vocab_size, tp=model.tp, backend=model.backend)


def _prompt_logprobs(model, options, params, hidden, target) -> Logprobs:
    """Log-probabilities of each packed token's successor, a few positions at a time."""
    vocab = _vocab_of(model)

    def some_rows(rows):
        hidden, target = rows
        return sampling.logprobs(model.logits(params, hidden), jnp.maximum(target, 0), options.max_logprobs, vocab)

    return in_groups(some_rows, (hidden, target), hidden.shape[0], PROMPT_LOGPROB_ROWS)


def _commit(state, drawn: _Drawn, slot, length, active, prompt_logprobs) -> tuple[ServeState, Emitted]:
    """Writes progress back to the slots and packs what the host is told. `length` is that behind the tokens fed."""
    slots = state.slots
    last = jnp.take_along_axis(drawn.tokens, jnp.maximum(drawn.count - 1, 0)[:, None], axis=1)[:, 0]
    stopped = jnp.any(slots.stop_tokens[slot] == last[:, None], axis=1) | (last == NO_TOKEN)
    done = active & (stopped | (length + 1 >= slots.max_length[slot]))
    # Rows of a prompt that goes on have no token yet, but their length counts.
    table = dataclasses.replace(
        slots,
        length=slots.length.at[slot].set(jnp.where(slot == NULL_SLOT, 0, length)),
        last_token=slots.last_token.at[slot].set(jnp.where(active, last, slots.last_token[slot])),
        done=slots.done.at[slot].set(jnp.where(active, done, slots.done[slot])),
    )
    counts = jnp.arange(drawn.tokens.shape[1]) < drawn.count[:, None]
    emitted = Emitted.of(
        tokens=jnp.where(counts, drawn.tokens, NO_TOKEN),
        count=drawn.count,
        done=done,
        drafted=drawn.drafted,
        logprobs=drawn.logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    counted = {"logit_rows": drawn.logit_rows, "token_counts": drawn.token_counts}
    return dataclasses.replace(state, slots=table, **counted), emitted


@dataclasses.dataclass(frozen=True)
class Steps:
    """The jitted steps of one engine, or WordSteps. Each donates the state it is given."""

    admit: Callable[[ServeState, AdmitBatch], ServeState]
    fill_counts: Callable[[ServeState, CountBatch], ServeState]
    fill_logit_row: Callable[[ServeState, LogitRowBatch], ServeState]
    fill_masks: Callable[[ServeState, MaskBatch], ServeState]
    prefill: Callable[[StepOptions], Any]  # jitted (params, state, PrefillBatch) -> (state, Emitted)
    decode: Callable[[StepOptions], Any]  # jitted (params, state, DecodeBatch) -> (state, Emitted)
    seal: Any  # jitted (params, state, SealBatch) -> state
    num_traces: Callable[[], int]


def build_steps(model: Model, mesh: Mesh, options: StepOptions, params: Any, state: Any) -> Steps:
    """Jits the steps for a mesh. `params` and `state` give the trees (arrays or shapes), `options` the layout.

    The state is donated and leaves with the shardings it came with, so that its buffers stay where they are.
    """
    return _built(model, mesh, options, params, state, lambda make: make(None))


def build_word_steps(model: Model, mesh: Mesh, options: StepOptions, params: Any, state: Any) -> Steps:
    """The same steps as engines call them: batches of numpy arrays, which go to the device as one, and parameters as
    they are or as FlatParams; see `gdnjax.words`. What is split over ranks goes as it is.
    """
    return _built(model, mesh, options, params, state, WordStep)


def _built(model: Model, mesh: Mesh, options: StepOptions, params: Any, state: Any, of_forms: Callable) -> Steps:
    """`of_forms` makes a step of a function that jits it for a form of batches, or for None: for batches as they
    are.
    """
    param_specs = partition.specs_of(params, expert_parallel=model.expert_parallel)
    flat_specs, tree = tuple(jax.tree.leaves(param_specs)), jax.tree.structure(params)
    state_specs = specs_of(state)
    replicated = sharding.P()
    state_out = jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_specs)
    whole = NamedSharding(mesh, replicated)
    row_specs = LogitRowBatch(
        **{f.name: replicated for f in dataclasses.fields(LogitRowBatch)} | {"bias": sharding.P(sharding.AXIS)}
    )
    vocab = _vocab_of(model)
    told = functools.partial(options_of_compiler, list(mesh.devices.flat), model.backend)

    traces: list[None] = []

    def counted(function):
        """A step is traced once for each compilation, so counting traces counts compilations."""

        def step(*arguments):
            traces.append(None)
            return function(*arguments)

        return step

    def over_state(function, batch_specs):
        mapped = sharding.shard_step(counted(function), mesh, (state_specs, batch_specs), state_specs)
        return jax.jit(mapped, donate_argnums=0, out_shardings=state_out, compiler_options=told(decodes=False))

    def over_state_and_words(function):
        def make(form: Form | None):
            return over_state(function if form is None else _of_words(function, form), replicated)

        return of_forms(make)

    @functools.cache
    def over_model(function, options, *, emits=True):
        compiler_options = told(decodes=function is decode and not options.num_drafts)
        function = functools.partial(function, model, options)
        out_specs, out = (state_specs, replicated), (state_out, whole)

        def make(form: Form | None):
            mapped = sharding.shard_step(
                counted(function if form is None else _of_words(function, form, tree)),
                mesh,
                (param_specs if form is None else flat_specs, state_specs, replicated),
                out_specs if emits else out_specs[0],
            )
            out_shardings = out if emits else out[0]
            return jax.jit(mapped, donate_argnums=1, out_shardings=out_shardings, compiler_options=compiler_options)

        return of_forms(make)

    return Steps(
        admit=over_state_and_words(functools.partial(admit, options=options)),
        fill_counts=over_state_and_words(functools.partial(fill_counts, vocab=vocab)),
        fill_logit_row=over_state(fill_logit_row, row_specs),
        fill_masks=over_state(fill_masks, MaskBatch(words=sharding.P(None, sharding.AXIS))),
        prefill=functools.partial(over_model, prefill),
        decode=functools.partial(over_model, decode),
        seal=over_model(seal, options, emits=False),
        num_traces=lambda: len(traces),
    )


def _of_words(function: Callable, form: Form, tree: Any = None) -> Callable:
    """A step that takes words in the place of a batch, and flat parameters, of this tree, if it takes any."""
    if tree is None:
        return lambda state, words: function(state, form.unpack(words))
    return lambda leaves, state, words: function(tree.unflatten(leaves), state, form.unpack(words))
