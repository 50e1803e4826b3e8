"""The definition in XLA, in the dtype of the inputs with float32 sums."""

import jax
import jax.numpy as jnp

from gdnjax.pallas_kernels.pools import read_rows, write_rows
from gdnjax.pallas_kernels.rows import Chunks, Rows
from gdnjax.shapes import Array


def prefill(x: Array, weight: Array, conv: Array, layer: int, rows: Rows, chunks: Chunks) -> tuple[Array, Array]:
    taps = weight.shape[1]
    width = taps - 1
    window = jnp.where(rows.fresh[:, None, None], 0, read_rows(conv, layer, rows.read_slot, slice(width)))
    total = jnp.zeros(x.shape, jnp.float32)
    for tap in range(taps):
        back = width - tap
        earlier = jnp.roll(x, back, axis=0)
        if back:
            in_piece = (rows.token_offset >= back)[:, None]
            from_window = window[rows.token_row, jnp.clip(rows.token_offset + tap, 0, width - 1)]
            earlier = jnp.where(in_piece, earlier, from_window)
        total += earlier.astype(jnp.float32) * weight[:, tap].astype(jnp.float32)
    y = jnp.where(rows.token_valid[:, None], jax.nn.silu(total), 0).astype(x.dtype)
    last = _last_inputs(x, window, rows.start, rows.length)
    conv = write_rows(conv, layer, rows.write_slot, slice(width), rows=last)
    if chunks.checkpoint is not None:
        start = rows.start[chunks.row]
        kept = _last_inputs(x, window[chunks.row], start, chunks.end - start)
        conv = write_rows(conv, layer, chunks.checkpoint, slice(width), rows=kept)
    return y, conv


def _last_inputs(x: Array, window: Array, start: Array, length: Array) -> Array:
    """The last `w` of `length` inputs from place `start` on, reaching back into the window before them: [n, w, x]."""
    width = window.shape[1]
    offset = length[:, None] - width + jnp.arange(width)
    from_piece = x[jnp.clip(start[:, None] + offset, 0, x.shape[0] - 1)]
    from_window = jnp.take_along_axis(window, jnp.clip(offset + width, 0, width - 1)[:, :, None], axis=1)
    return jnp.where((offset >= 0)[:, :, None], from_piece, from_window)


def decode(
    x: Array, weight: Array, conv: Array, layer: int, read_slot: Array, write_slot: Array
) -> tuple[Array, Array]:
    window = read_rows(conv, layer, read_slot)
    inputs = jnp.concatenate([window, x[:, None].astype(window.dtype)], axis=1)
    total = jnp.sum(inputs.astype(jnp.float32) * weight.T.astype(jnp.float32), axis=1)
    return jax.nn.silu(total).astype(x.dtype), write_rows(conv, layer, write_slot, rows=inputs[:, 1:])


def verify(x, weight, conv, layer: int, read_slot, write_slot, pending) -> tuple[Array, Array]:
    width = weight.shape[1] - 1
    stored = read_rows(conv, layer, read_slot)
    new = x.astype(stored.dtype)
    # The new inputs stand behind the pending ones, of which every row has its own number.
    place = jnp.arange(stored.shape[1] + new.shape[1]) - (width + pending)[:, None]
    inputs = jnp.where(
        (place >= 0)[:, :, None],
        jnp.take_along_axis(new, jnp.clip(place, 0, new.shape[1] - 1)[:, :, None], axis=1),
        jnp.pad(stored, ((0, 0), (0, new.shape[1]), (0, 0))),
    )
    y = _convolve(inputs, weight, x.dtype)
    rows, tokens = stored.shape[1] - width, new.shape[1]
    y = jnp.concatenate([y[:, :rows], _rows_from(y, pending, tokens)], axis=1)
    kept = _rows_from(inputs, pending, width + tokens)
    return y, write_rows(conv, layer, write_slot, slice(width + tokens), rows=kept)


def fold(weight, conv, layer: int, read_slot, write_slot, count) -> tuple[Array, Array]:
    width = weight.shape[1] - 1
    inputs = read_rows(conv, layer, read_slot)
    window = _rows_from(inputs, count, width)
    conv = write_rows(conv, layer, write_slot, slice(width), rows=window)
    return _convolve(inputs, weight, inputs.dtype), conv


def _convolve(inputs: Array, weight: Array, dtype) -> Array:
    """[n, w + i, x] -> [n, i, x]: the activated channels of all inputs but the first w."""
    taps = weight.shape[1]
    count = inputs.shape[1] - taps + 1
    total = sum(
        inputs[:, tap : tap + count].astype(jnp.float32) * weight[:, tap].astype(jnp.float32) for tap in range(taps)
    )
    return jax.nn.silu(jnp.asarray(total)).astype(dtype)


def _rows_from(x: Array, start: Array, count: int) -> Array:
    """[n, i, x] -> [n, count, x]: each row's own part, from `start` on."""
    index = start[:, None] + jnp.arange(count)
    return jnp.take_along_axis(x, index[:, :, None], axis=1)
