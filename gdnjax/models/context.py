"""What every layer needs to know of a step, made once per step before the first layer.

The two kinds of step differ in how tokens belong to requests; a layer matches on the context to pick its op.
"""

import dataclasses

import jax.numpy as jnp

from gdnjax.batch import PrefillBatch
from gdnjax.cache import LAYOUT_KV, LAYOUT_VK
from gdnjax.config import CHUNK
from gdnjax.pallas_kernels.gated_delta_rule import Rounding, StateOrder
from gdnjax.pallas_kernels.gated_delta_rule.rounding import keys_of
from gdnjax.pallas_kernels.paged_attention import Tiles
from gdnjax.pallas_kernels.pools import read_rows
from gdnjax.pallas_kernels.rows import Chunks, Rows, make_chunks
from gdnjax.shapes import Array, Bool, Int32, Leaf
from gdnjax.state import NULL_BLOCK, NULL_SLOT, SlotTable


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the entries of each token of the step are stored; padding goes to the null block."""

    block: Leaf  # [t] int32
    offset: Leaf  # [t] int32


@dataclasses.dataclass(frozen=True)
class PrefillContext:
    """Packed pieces of prompts. `orders`, here and below: how rows of each ordered Slot are stored, by its name.
    `rounding`: the noise of recurrent states where they are rounded stochastically; the mixer adds its rank's heads.
    """

    rows: Rows
    chunks: Chunks
    tiles: Tiles
    places: Places
    orders: dict[str, StateOrder]
    position: Leaf  # [t] int32: absolute position of each token
    valid: Leaf  # [t] bool
    rounding: Rounding | None = None

    @property
    def write_slot(self) -> Leaf:
        return self.rows.write_slot


@dataclasses.dataclass(frozen=True)
class DecodeContext:
    """T tokens a request, one after another: the last one and its drafts. t = n * T, request by request. Requests that
    produce nothing write to slot 0 and block 0.

    With `pending` a layer with a state folds so many rows of the slot into it, stores that, and goes on with the new
    tokens for their outputs alone; what it needs to fold those later takes the place of the pending rows. Without,
    such a layer has T = 1, and folds the token at once.
    """

    read_slot: Leaf  # [n] int32
    write_slot: Leaf  # [n] int32
    tiles: Tiles
    places: Places
    orders: dict[str, StateOrder]
    position: Leaf  # [t] int32
    valid: Leaf  # [t] bool
    pending: Leaf = None  # [n] int32
    rounding: Rounding | None = None

    @property
    def rows_per_slot(self) -> int:
        return self.tiles.position.shape[1]


@dataclasses.dataclass(frozen=True)
class FoldContext:
    """No tokens: the first `count` pending rows of `read_slot` are folded, and `write_slot` gets what comes of it."""

    read_slot: Leaf  # [n] int32
    write_slot: Leaf  # [n] int32
    count: Leaf  # [n] int32
    orders: dict[str, StateOrder]
    rounding: Rounding | None = None


@dataclasses.dataclass(frozen=True)
class Pools:
    """What a context needs to know of the pools: the slots, the layout bits of ordered ones, and static facts.

    `rounding_seed`: of the noise by which recurrent states are rounded; None: they are rounded to the nearest.
    """

    slots: SlotTable
    layouts: dict[str, Leaf]  # [s] int8 each
    state_layout: str
    block_size: int
    rounding_seed: int | None = None


def prefill_context(pools: Pools, batch: PrefillBatch) -> PrefillContext:
    """The context of a prefill step. A row with no tokens behind it is fresh: what its slot holds is never read."""
    slots = pools.slots
    read_slot = batch.slot if batch.read_slot is None else batch.read_slot
    before = slots.length[batch.slot]
    offset = jnp.arange(batch.tokens.shape[0], dtype=jnp.int32) - batch.start[batch.token_row]
    position = before[batch.token_row] + offset
    row_blocks = slots.block_table[batch.slot]
    # A row whose state is behind its cached blocks goes over their tokens again, and leaves those blocks as they are.
    stored = batch.token_valid
    if batch.kv_start is not None:
        stored &= position >= batch.kv_start[batch.token_row]
    chunks = make_chunks(
        batch.chunk_row,
        batch.chunk_start,
        batch.chunk_length,
        tokens=batch.tokens.shape[0],
        size=CHUNK,
        checkpoint=batch.chunk_checkpoint,
    )
    return PrefillContext(
        rows=Rows(
            read_slot=read_slot,
            write_slot=batch.slot,
            fresh=before == 0,
            start=batch.start,
            length=batch.length,
            token_row=batch.token_row,
            token_offset=offset,
            token_valid=batch.token_valid,
        ),
        chunks=chunks,
        tiles=Tiles(
            position=jnp.where(chunks.valid, position[chunks.token], -1),
            block_table=row_blocks[batch.chunk_row],
            longest=jnp.max(before + batch.length),
        ),
        places=_places(row_blocks[batch.token_row], position, stored, pools.block_size),
        orders=_orders(pools, read_slot, writes=LAYOUT_KV),
        position=position,
        valid=batch.token_valid,
        rounding=_rounding(
            pools,
            before + batch.length,
            None if batch.chunk_checkpoint is None else position[jnp.maximum(chunks.end - 1, 0)] + 1,
        ),
    )


def decode_context(
    pools: Pools, slot: Int32[Array, "n"], first: Int32[Array, "n"], valid: Bool[Array, "n T"]
) -> DecodeContext:
    """The context of T tokens of each request, at `first` and behind it. The valid ones of a request come first; one
    that has none is inactive.
    """
    blocks = pools.slots.block_table[slot]
    rows, pending = valid.shape[1], pools.slots.pending
    position = first[:, None] + jnp.arange(rows, dtype=jnp.int32)
    flat, flat_valid = position.reshape(-1), valid.reshape(-1)
    active = valid[:, 0]
    return DecodeContext(
        read_slot=slot,
        write_slot=jnp.where(active, slot, NULL_SLOT),
        tiles=Tiles(
            position=jnp.where(valid, position, -1),
            block_table=blocks,
            longest=jnp.max(jnp.where(valid, position + 1, 0)),
        ),
        places=_places(jnp.repeat(blocks, rows, axis=0), flat, flat_valid, pools.block_size),
        orders=_orders(pools, slot, writes=LAYOUT_VK),
        position=flat,
        valid=flat_valid,
        pending=None if pending is None else jnp.where(active, read_rows(pending, slot), 0),
        # What is stored has all tokens before the new ones in it, or where nothing is ever pending the new one, too.
        rounding=_rounding(pools, first + 1 if pending is None else first),
    )


def fold_context(
    pools: Pools, read_slot: Int32[Array, "n"], write_slot: Int32[Array, "n"], count: Int32[Array, "n"]
) -> FoldContext:
    """The context of sealing states. They are stored as a decode step stores them."""
    slots = pools.slots
    return FoldContext(
        read_slot=read_slot,
        write_slot=write_slot,
        count=count,
        orders=_orders(pools, read_slot, writes=LAYOUT_VK),
        rounding=_rounding(pools, slots.length[read_slot] - slots.pending[read_slot] + count),
    )


def _rounding(pools: Pools, behind: Array, behind_chunks: Array | None = None) -> Rounding | None:
    """The noise of the states of rows, and of chunks, by the number of tokens that they stand behind."""
    if pools.rounding_seed is None:
        return None
    checkpoints = None if behind_chunks is None else keys_of(pools.rounding_seed, behind_chunks)
    return Rounding(keys=keys_of(pools.rounding_seed, behind), checkpoints=checkpoints)


def _places(blocks: Array, position: Array, valid: Array, block_size: int) -> Places:
    """A token's block is looked up in its row of the table; a position past the table goes to the null block."""
    width = blocks.shape[1]
    index = position // block_size
    block = jnp.take_along_axis(blocks, jnp.clip(index, 0, width - 1)[:, None], axis=1)[:, 0]
    return Places(block=jnp.where(valid & (index < width), block, NULL_BLOCK), offset=position % block_size)


def _orders(pools: Pools, read_slot: Array, writes: int) -> dict[str, StateOrder]:
    """The order of each ordered Slot's rows."""
    return {name: _order(pools.state_layout, layout, read_slot, writes) for name, layout in pools.layouts.items()}


def _order(state_layout: str, layout: Array, read_slot: Array, writes: int) -> StateOrder:
    """Static for a pool of one layout. In a mixed pool the slots' bits say how to read; `writes` is the step's own."""
    match state_layout:
        case "kv":
            return StateOrder(read=False, write=False)
        case "vk":
            return StateOrder(read=True, write=True)
        case "mixed":
            return StateOrder(read=layout[read_slot] == LAYOUT_VK, write=writes == LAYOUT_VK)
    raise ValueError(f"state_layout must be 'kv', 'vk' or 'mixed', got {state_layout!r}")
