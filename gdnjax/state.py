"""The pytrees that outlive a step. `ServeState` is the sole carry: a step takes it, donates it and returns it.

What a model keeps of its requests is in `gdnjax.cache`; this is what every engine has beside it.

Field comments give the axes in the letters of `gdnjax.shapes`. Sizes along heads, channels and vocabulary are global
(all ranks together) outside a step and those of one rank inside.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gdnjax.cache import Cache, check_cache, empty_cache, partition_specs
from gdnjax.config import EngineConfig
from gdnjax.memory import MemoryPlan, StateGeometry
from gdnjax.sampling_params import MASK_BITS, MAX_BAD_SEQUENCES, MAX_BAD_WORD_TOKENS, MAX_STOP_TOKENS, NO_TOKEN
from gdnjax.shapes import Leaf
from gdnjax.sharding import AXIS, P

NULL_SLOT = 0
NULL_BLOCK = 0

IN_PROMPT = 1 << 15
"""The bit of an entry of `ServeState.token_counts` that says that the token is in the prompt."""

MOST_COUNTED = IN_PROMPT - 1
"""Where a count stops: the other bits of the entry. Occurrences beyond that many change no penalty any more."""

ALL_ALLOWED = np.uint32(0xFFFFFFFF)
"""A word of a mask that forbids nothing."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotTable:
    """What the device knows of each slot's request: progress, blocks, limits, and how to sample.

    With speculation a step folds the tokens that the step before it accepted into the states of the Slot kinds, and
    verifies new ones without writing what comes of them. Until then the accepted ones are pending: the states stand
    behind `length - pending` tokens, and the kinds hold what the last P tokens need to be folded, of which the first
    `pending` are accepted. P is one more than the most drafts of a step. A model without Slots has nothing to fold, and
    none of this.
    """

    length: Leaf  # [s] int32: tokens that the model has been fed
    last_token: Leaf  # [s] int32: the token that the next decode step feeds
    done: Leaf  # [s] bool: nothing more is to be produced
    max_length: Leaf  # [s] int32: prompt and output tokens at which the request ends
    min_length: Leaf  # [s] int32: tokens before which no stop token may be drawn
    stop_tokens: Leaf  # [s, MAX_STOP_TOKENS] int32, NO_TOKEN where unused
    block_table: Leaf  # [s, m] int32: the request's blocks in order, NULL_BLOCK past the last
    temperature: Leaf  # [s] float32, 0 = greedy
    top_k: Leaf  # [s] int32, 0 = all
    top_p: Leaf  # [s] float32, 1 = all
    min_p: Leaf  # [s] float32, 0 = all
    seed: Leaf  # [s, 2] uint32
    repetition: Leaf  # [s] float32 penalties: 1 = none
    frequency: Leaf  # [s] float32, 0 = none
    presence: Leaf  # [s] float32, 0 = none
    count_row: Leaf  # [s] int32: row of ServeState.token_counts, 0 = none
    logit_row: Leaf  # [s] int32: row of LogitRows, 0 = none
    hidden: Leaf  # [s, d] final hidden state of the last token that is not pending: the MTP head's input
    pending: Leaf = None  # [s] int32: tokens that are accepted, and not folded into the states yet
    pending_hidden: Leaf = None  # [s, P, d] those of the pending rows; both None where nothing is ever pending
    drafts: Leaf = None  # [s, k] int32: the tokens that the next decode step verifies; None without speculation
    num_drafts: Leaf = None  # [s] int32: how many of them there are
    draft_hidden: Leaf = None  # [s, k, d] what the head drew them from; None where acceptance does not need it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogitRows:
    """Vocabulary-sized rows for the requests with bias or bans. Requests that do not use them hold row 0 and pay
    nothing. `g` counts the rows.
    """

    bias: Leaf  # [g, V] float32: logit_bias, and -inf where a token may not be drawn
    bad_words: Leaf  # [g, MAX_BAD_SEQUENCES, MAX_BAD_WORD_TOKENS] int32, right-aligned, NO_TOKEN where unused
    recent: Leaf  # [g, MAX_BAD_WORD_TOKENS - 1] int32: the last output tokens, newest last


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ServeState:
    """Everything that outlives a step. `jax.eval_shape` of it is the memory account.

    `token_counts` is what penalties ask for, a row for each running request that has any, so that nobody waits for one:
    the bit IN_PROMPT, and how often the token occurs in the output, up to MOST_COUNTED. Row 0 is null.

    `masks` say which tokens may be drawn in the steps of one turn, 32 of them a word, those of one rank in words of
    their own. Row 0 allows all.
    """

    cache: Cache
    slots: SlotTable
    logit_rows: LogitRows
    token_counts: Leaf  # [c, V] uint16
    masks: Leaf  # [c, W] uint32: W is V / 32, rounded up


def empty_state(geometry: StateGeometry, plan: MemoryPlan, engine: EngineConfig, max_model_len: int) -> ServeState:
    """A state with nothing in it. Global sizes: `geometry` is one rank's, `engine.tensor_parallel_size` ranks.

    Traceable: jit it with the output shardings of `shardings_of` to make each rank's part in place.
    """
    tp, g = engine.tensor_parallel_size, geometry
    slots, rows = plan.num_slots + 1, plan.num_logit_rows + 1
    table_width = -(-max_model_len // g.block_size)
    return ServeState(
        cache=empty_cache(g.cache, slots=slots, blocks=plan.num_blocks + 1, ranks=tp),
        slots=_empty_slots(g, slots, table_width),
        logit_rows=_empty_logit_rows(rows, g.vocab_size * tp),
        token_counts=jnp.zeros((plan.num_count_rows + 1, g.vocab_size * tp), jnp.uint16),
        masks=jnp.full((plan.num_count_rows + 1, -(-g.vocab_size // MASK_BITS) * tp), ALL_ALLOWED),
    )


def _empty_drafts(g: StateGeometry, slots: int) -> dict[str, Leaf]:
    def hidden(rows):
        return jnp.zeros((slots, rows, g.hidden_size), g.hidden_dtype) if rows else None

    def numbers(*shape):
        return jnp.zeros((slots, *shape), jnp.int32)

    fields = {}
    if g.num_drafts:
        fields |= {"drafts": numbers(g.num_drafts), "num_drafts": numbers(), "draft_hidden": hidden(g.draft_rows)}
    if g.pending_rows:
        fields |= {"pending": numbers(), "pending_hidden": hidden(g.pending_rows)}
    return fields


def _empty_slots(geometry: StateGeometry, slots: int, table_width: int) -> SlotTable:
    def zeros(dtype, *shape):
        return jnp.zeros((slots, *shape), dtype)

    return SlotTable(
        length=zeros(jnp.int32),
        last_token=zeros(jnp.int32),
        done=jnp.ones((slots,), bool),
        max_length=zeros(jnp.int32),
        min_length=zeros(jnp.int32),
        stop_tokens=jnp.full((slots, MAX_STOP_TOKENS), NO_TOKEN, jnp.int32),
        block_table=zeros(jnp.int32, table_width),
        temperature=zeros(jnp.float32),
        top_k=zeros(jnp.int32),
        top_p=jnp.ones((slots,), jnp.float32),
        min_p=zeros(jnp.float32),
        seed=zeros(jnp.uint32, 2),
        repetition=jnp.ones((slots,), jnp.float32),
        frequency=zeros(jnp.float32),
        presence=zeros(jnp.float32),
        count_row=zeros(jnp.int32),
        logit_row=zeros(jnp.int32),
        hidden=zeros(geometry.hidden_dtype, geometry.hidden_size),
        **_empty_drafts(geometry, slots),
    )


def _empty_logit_rows(rows: int, vocab: int) -> LogitRows:
    return LogitRows(
        bias=jnp.zeros((rows, vocab), jnp.float32),
        bad_words=jnp.full((rows, MAX_BAD_SEQUENCES, MAX_BAD_WORD_TOKENS), NO_TOKEN, jnp.int32),
        recent=jnp.full((rows, MAX_BAD_WORD_TOKENS - 1), NO_TOKEN, jnp.int32),
    )


def check_state(state: ServeState) -> None:
    """Raises ValueError where the fields' shapes do not fit together. Looks at shapes alone, never at values."""
    slots = state.slots.length.shape[0]
    rows = state.logit_rows.bad_words.shape[0]
    for owner, size, axis in ((state.slots, slots, 0), (state.logit_rows, rows, 0)):
        for field in dataclasses.fields(owner):
            leaf = getattr(owner, field.name)
            if leaf is None:
                continue
            shape = leaf.shape
            if shape[axis] != size:
                raise ValueError(f"{type(owner).__name__}.{field.name} has shape {shape}, expected {size} rows")
    if state.token_counts.shape[1:] != state.logit_rows.bias.shape[1:]:
        raise ValueError(
            f"ServeState.token_counts has shape {state.token_counts.shape}, LogitRows.bias has "
            f"{state.logit_rows.bias.shape}"
        )
    if state.masks.shape[0] != state.token_counts.shape[0]:
        raise ValueError(
            f"ServeState.masks has shape {state.masks.shape}, expected {state.token_counts.shape[0]} rows, as many as "
            "token_counts has"
        )
    check_cache(state.cache, slots)


def specs_of(state: ServeState) -> ServeState:
    """The tree of partition specs of a state: heads, channels and vocabulary are split, slots and blocks are not."""
    whole = jax.tree.map(lambda _: P(), state)
    return dataclasses.replace(
        whole,
        cache=partition_specs(state.cache.spec),
        logit_rows=dataclasses.replace(whole.logit_rows, bias=P(None, AXIS)),
        token_counts=P(None, AXIS),
        masks=P(None, AXIS),
    )


def shardings_of(state: ServeState, mesh: Mesh) -> ServeState:
    """The tree of NamedShardings of a state."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs_of(state))
