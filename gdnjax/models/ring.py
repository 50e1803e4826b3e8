"""How layers read and write the rows of a Ring: the last tokens of each request, see `gdnjax.cache_kinds.Ring`.

The entry of the token at position p stands in row p modulo the number of rows. Which token a row holds follows from
what the slot was fed last, so nothing else is kept. A token of the step is read from the step itself, one before it
from the slot, and what stands there for positions below 0 is never read.
"""

import jax.numpy as jnp

from gdnjax.models.context import DecodeContext, FoldContext, PrefillContext
from gdnjax.pallas_kernels.pools import dtype_of, read_rows, write_rows
from gdnjax.shapes import Array, Bool, Int32
from gdnjax.state import NULL_SLOT


def read(
    pool: Array, layer: int, entries: Array, context: PrefillContext | DecodeContext, window: int
) -> tuple[Array, Bool[Array, "t w"]]:
    """What each token sees, [t, w, ...], its own entry first, then that of the token before it, and so on; and which of
    them there are. `entries` [t, ...] are those of the step; the pool is as it stood before it.

    Raises ValueError where the pool has too few rows for the step.
    """
    rows = pool.shape[2]
    fed = 1 if isinstance(context, PrefillContext) else context.rows_per_slot
    if rows < window + fed - 1:
        raise ValueError(f"a ring of {rows} rows for a window of {window} and {fed} tokens: {window + fed - 1} needed")
    slot, offset = _places(context)
    back = jnp.arange(window, dtype=jnp.int32)
    position = context.position[:, None] - back
    place = jnp.arange(entries.shape[0], dtype=jnp.int32)[:, None] - back
    here = entries[jnp.maximum(place, 0)].astype(dtype_of(pool))
    stored = read_rows(pool, layer, jnp.repeat(slot, window), (position % rows).reshape(-1)).reshape(here.shape)
    return jnp.where(_wide(offset[:, None] >= back, here), here, stored), position >= 0


def write(pool: Array, layer: int, entries: Array, context: PrefillContext | DecodeContext) -> Array:
    """The pool with the step's `entries` [t, ...]; whoever goes on from another slot takes the rest from there."""
    match context:
        case DecodeContext():
            slot = jnp.where(context.valid, jnp.repeat(context.write_slot, context.rows_per_slot), NULL_SLOT)
            return write_rows(pool, layer, slot, context.position % pool.shape[2], rows=entries)
        case PrefillContext(rows=rows, chunks=chunks):
            every = jnp.arange(rows.start.shape[0])
            rings = [(rows.write_slot, _behind(pool, layer, entries, context, every, rows.start + rows.length))]
            if chunks.checkpoint is not None:
                rings.append((chunks.checkpoint, _behind(pool, layer, entries, context, chunks.row, chunks.end)))
            # All have been read before any is written.
            for slot, ring in rings:
                pool = write_rows(pool, layer, slot, rows=ring)
            return pool


def copy(pool: Array, layer: int, context: FoldContext) -> Array:
    """The pool with each slot's rows where the folded states go."""
    return write_rows(pool, layer, context.write_slot, rows=read_rows(pool, layer, context.read_slot))


def _places(context: PrefillContext | DecodeContext) -> tuple[Int32[Array, "t"], Int32[Array, "t"]]:
    """Where the past of each token stands, and how many tokens of the step are of that past."""
    match context:
        case PrefillContext(rows=rows):
            return rows.read_slot[rows.token_row], rows.token_offset
        case DecodeContext():
            count, width = context.read_slot.shape[0], context.rows_per_slot
            return jnp.repeat(context.read_slot, width), jnp.tile(jnp.arange(width, dtype=jnp.int32), count)


def _behind(pool, layer, entries, context: PrefillContext, row, end) -> Array:
    """Whole rings [n, R, ...] behind the packed tokens before `end` [n], each of the piece `row` [n]."""
    count, place = pool.shape[2], context.rows.start[row]
    first = context.position[jnp.minimum(place, entries.shape[0] - 1)]
    length = (first + end - place)[:, None]
    number = jnp.arange(count, dtype=jnp.int32)
    # The last position of each row before the end.
    position = length - 1 - (length - 1 - number) % count
    offset = position - first[:, None]
    here = entries[jnp.clip(place[:, None] + offset, 0, entries.shape[0] - 1)].astype(dtype_of(pool))
    stored = read_rows(pool, layer, context.rows.read_slot[row])
    return jnp.where(_wide(offset >= 0, here), here, stored)


def _wide(mask: Array, like: Array) -> Array:
    """A mask [n, m] for arrays [n, m, ...]."""
    return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))
