"""The pytrees of one step: what the host hands to the device, and what comes back.

Padding points at slot 0, block 0 and row 0. Every mask and index that a layer needs is made from these once per step,
in `gdnjax.step`, before the layers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gdnjax.shapes import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdmitBatch:
    """Requests that take over a slot. Each field up to `logit_row` replaces the slot's row of the SlotTable field of
    that name.

    A request whose prefix is cached starts at its `length`. Where the cached prefix ends within a block, the request
    gets a block of its own with what is in there: `copy_from[i]` is copied to `copy_to[i]`, null to null for nothing.
    """

    slot: Leaf  # [r] int32
    length: Leaf  # [r] int32: tokens whose state and KV are cached; 0 for a fresh start
    max_length: Leaf  # [r] int32
    min_length: Leaf  # [r] int32
    stop_tokens: Leaf  # [r, MAX_STOP_TOKENS] int32
    block_table: Leaf  # [r, m] int32
    temperature: Leaf  # [r] float32
    top_k: Leaf  # [r] int32
    top_p: Leaf  # [r] float32
    min_p: Leaf  # [r] float32
    seed: Leaf  # [r, 2] uint32
    repetition: Leaf  # [r] float32
    frequency: Leaf  # [r] float32
    presence: Leaf  # [r] float32
    count_row: Leaf  # [r] int32
    logit_row: Leaf  # [r] int32
    copy_from: Leaf = None  # [r] int32 blocks, or None: nothing is copied
    copy_to: Leaf = None  # [r] int32 blocks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogitRowBatch:
    """One request's logit row, filled before its first step; see LogitRows."""

    row: Leaf  # [] int32
    recent: Leaf  # [MAX_BAD_WORD_TOKENS - 1] int32: the last tokens produced before this admission, newest last
    bias: Leaf  # [V] float32
    bad_words: Leaf  # [MAX_BAD_SEQUENCES, MAX_BAD_WORD_TOKENS] int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CountBatch:
    """Tokens that requests with penalties bring along: entries of ServeState.token_counts, in rows that are emptied
    first. An entry is given once; padding has NO_TOKEN.
    """

    emptied: Leaf  # [r] int32: rows that are handed out; 0 = none
    row: Leaf  # [f] int32
    token: Leaf  # [f] int32
    value: Leaf  # [f] uint16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskBatch:
    """What requests with a structure may draw in the steps of this turn: rows 1 and on of ServeState.masks."""

    words: Leaf  # [m, W] uint32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillBatch:
    """Pieces of prompts, packed one after another, with the chunk table.

    A row's tokens stand at `tokens[start : start + length]` and continue its slot at SlotTable.length. Chunks of one
    row are in order, at most CHUNK tokens long, and cut at absolute multiples of CHUNK and at checkpoints.
    """

    tokens: Leaf  # [t] int32
    token_row: Leaf  # [t] int32: row of each token, r - 1 or less; padding has token_valid False
    token_valid: Leaf  # [t] bool
    slot: Leaf  # [r] int32
    start: Leaf  # [r] int32
    length: Leaf  # [r] int32, 0 for a padded row
    is_last: Leaf  # [r] bool: the prompt ends here, so a token is sampled
    chunk_row: Leaf  # [c] int32
    chunk_start: Leaf  # [c] int32: place in `tokens`
    chunk_length: Leaf  # [c] int32, 0 for a padded chunk
    target: Leaf  # [t] int32: the prompt's next token, for prompt_logprobs; NO_TOKEN where there is none
    read_slot: Leaf = None  # [r] int32: where a row's state is read, if not in `slot`: a fork of a checkpoint
    block_table: Leaf = None  # [r, m] int32: the rows' blocks; None leaves the tables as they are
    kv_start: Leaf = None  # [r] int32: position before which keys and values are cached and not stored; None: 0
    chunk_checkpoint: Leaf = None  # [c] int32: slot that keeps what stands after the chunk, 0 = none; None: never
    mask_row: Leaf = None  # [r] int32: row of ServeState.masks, 0 = none; None: nobody has one


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeBatch:
    """Slots that produce their next tokens.

    A request that has outgrown its blocks gets others with the step: `grown_block[i, j]` becomes entry
    `grown_index[i, j]` of its block table, before the step reads it. An index past the table changes nothing.
    """

    slot: Leaf  # [n] int32
    grown_index: Leaf = None  # [n, j] int32; None: nobody grows
    grown_block: Leaf = None  # [n, j] int32
    max_drafts: Leaf = None  # [n] int32: drafts of the row that may be verified in this step; None: all there are
    mask_row: Leaf = None  # [n] int32: row of ServeState.masks, 0 = none; None: nobody has one


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SealBatch:
    """States to seal, `i` below `count`: what stands in `read_slot[i]`, with so many of its pending rows folded in that
    it is `position[i]` tokens long, goes to `write_slot[i]`, which may be the same slot. No two write one slot, and
    none reads what another writes.

    Nothing is written where the slot has no state of that length: its own is longer, or its pending rows do not reach.
    """

    read_slot: Leaf  # [c] int32
    write_slot: Leaf  # [c] int32
    position: Leaf  # [c] int32
    count: Leaf  # [] int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logprobs:
    """Log-probabilities under the model itself: before temperature, penalties and masks. Of what a step emits the
    axis n is two: [n, T].
    """

    chosen: Leaf  # [n] float32: of the token in question
    rank: Leaf  # [n] int32: 1 = the most probable
    top_tokens: Leaf  # [n, max_logprobs] int32, most probable first
    top: Leaf  # [n, max_logprobs] float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Emitted:
    """What a step produced, row by row of its batch, in one array, since the host reads all of it. T is 1 in a prefill
    step. What steps emitted may be stacked: then there are axes before these.

    A NO_TOKEN that counts, always the last that does, says that no token might be drawn there.
    """

    words: Leaf  # [n, 3 + T] int32: count, done, drafted and the tokens; see the properties
    logprobs: Leaf  # Logprobs of `tokens`, or None
    prompt_logprobs: Leaf  # Logprobs of the targets [t], or None

    @classmethod
    def of(
        cls, *, tokens: Leaf, count: Leaf, done: Leaf, drafted: Leaf, logprobs: Leaf, prompt_logprobs: Leaf
    ) -> "Emitted":
        """Of arrays as the properties have them; of numpy's, where no device is to be waited for."""
        xp = np if isinstance(tokens, np.ndarray) else jnp
        columns = [xp.stack([count, done.astype(xp.int32), drafted], axis=1), tokens]
        return cls(xp.concatenate(columns, axis=1), logprobs, prompt_logprobs)

    @property
    def count(self) -> Leaf:
        """[n] int32: how many of the tokens count."""
        return self.words[..., 0]

    @property
    def done(self) -> Leaf:
        """[n] bool: the request ended on the device (stop token, max_length, no token to draw)."""
        return self.words[..., 1] != 0

    @property
    def drafted(self) -> Leaf:
        """[n] int32: drafts that were put to the test; the first `count` - 1 of them were kept."""
        return self.words[..., 2]

    @property
    def tokens(self) -> Leaf:
        """[n, T] int32, NO_TOKEN past the last that counts."""
        return self.words[..., 3:]
