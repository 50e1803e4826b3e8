"""The convolution in three kernels: packed rows, the windows behind them, and the rows of a decode step.

Bytes: every input once in and once out, 40 kB a token at 10,240 channels in bfloat16, so the ceiling is that of a copy.
Taps read their neighbours' rows, which the cache holds. Who writes to the null slot has neither loads nor a window.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gdnjax.backend import Backend
from gdnjax.pallas_kernels.causal_conv1d import tiles
from gdnjax.pallas_kernels.launch import bounded, launch, layer_number, sigmoid
from gdnjax.pallas_kernels.rows import Chunks, Rows
from gdnjax.shapes import Array

GROUP = 8
"""Tokens whose inputs a program of the prefill kernel loads before it uses the first."""


def prefill(x, weight, conv, layer: int, rows: Rows, chunks: Chunks, backend: Backend) -> tuple[Array, Array]:
    tokens, channels = x.shape
    width = weight.shape[1] - 1
    tile = tiles.of(backend)
    # All windows are read before any is written: a checkpoint may need the one that its row overwrites.
    window = jnp.where(rows.fresh[:, None, None], 0, conv[layer, rows.read_slot, :width])
    blocks = -(-channels // tile.channels)
    (y,) = launch(
        _prefill,
        backend,
        name="causal_conv1d_prefill",
        programs=-(-tokens // tile.tokens) * blocks,
        args=(rows.token_row, rows.token_offset, rows.token_valid.astype(jnp.int32), x, weight, window),
        out=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
        warps=tile.warps,
        tokens=tile.tokens,
        columns=tile.channels,
    )
    start, length, slot, row = (
        rows.start,
        rows.length,
        rows.write_slot,
        jnp.arange(rows.start.shape[0], dtype=jnp.int32),
    )
    if chunks.checkpoint is not None:
        first = rows.start[chunks.row]
        start, length = jnp.concatenate([start, first]), jnp.concatenate([length, chunks.end - first])
        slot, row = jnp.concatenate([slot, chunks.checkpoint]), jnp.concatenate([row, chunks.row])
    (conv,) = launch(
        _store_windows,
        backend,
        name="causal_conv1d_windows",
        programs=slot.shape[0] * blocks,
        args=(layer_number(layer), start, length, slot, row, x, window, conv),
        out=[jax.ShapeDtypeStruct(conv.shape, conv.dtype)],
        warps=tile.warps,
        aliases={7: 0},
        columns=tile.channels,
    )
    return y, conv


def _prefill(program, row_ref, offset_ref, valid_ref, x_ref, weight_ref, window_ref, y_ref, *, tokens, columns):
    """Some channels of a stretch of tokens, GROUP tokens at a time; what the taps see again stays in registers."""
    total, channels = x_ref.shape
    width = window_ref.shape[1]
    # Tiles of one stretch of tokens are neighbours.
    blocks = -(-channels // columns)
    block, first = program % blocks, program // blocks * tokens
    channel = block * columns + jnp.arange(columns, dtype=jnp.int32)
    there = channel < channels
    weights = [
        plgpu.load(weight_ref.at[channel, tap], mask=there, other=0).astype(jnp.float32) for tap in range(width + 1)
    ]

    def load(token):
        inside = jnp.broadcast_to((token >= 0) & (token < total), channel.shape)
        return plgpu.load(x_ref.at[token, channel], mask=there & inside, other=0)

    def at_the_beginning(inputs, row, offset):
        """Of a row's first tokens, to which some inputs belong to the row before, and the window has theirs."""
        mine = []
        for tap, x in enumerate(inputs):
            before = jnp.broadcast_to(offset + tap < width, channel.shape)
            at = window_ref.at[row, jnp.minimum(offset + tap, width - 1), channel]
            stored = plgpu.load(at, mask=there & before, other=0)
            mine.append(jnp.where(before, stored.astype(x.dtype), x))
        return _convolve(mine, weights)

    def group(i, history):
        start = first + i * GROUP
        inputs = [*history, *(load(start + j) for j in range(GROUP))]
        for j in range(GROUP):
            at = jnp.minimum(start + j, total - 1)
            row, offset = bounded(row_ref[at], window_ref.shape[0]), offset_ref[at]
            taps = inputs[j : j + width + 1]
            y = lax.cond(
                offset < width,
                lambda taps=taps, row=row, offset=offset: at_the_beginning(taps, row, offset),
                lambda taps=taps: _convolve(taps, weights),
            )
            y = jnp.where(valid_ref[at] != 0, y * sigmoid(y), 0.0)
            inside = jnp.broadcast_to(start + j < total, channel.shape)
            plgpu.store(y_ref.at[at, channel], y.astype(y_ref.dtype), mask=there & inside)
        return tuple(inputs[GROUP:])

    lax.fori_loop(0, tokens // GROUP, group, tuple(load(first - width + j) for j in range(width)))


def _convolve(inputs, weights) -> Array:
    """One token's sum over the taps, oldest first."""
    total = inputs[0].astype(jnp.float32) * weights[0]
    for x, weight in zip(inputs[1:], weights[1:], strict=True):
        total += x.astype(jnp.float32) * weight
    return total


def _store_windows(
    program, layer_ref, start_ref, length_ref, slot_ref, row_ref, x_ref, window_ref, _, conv_ref, *, columns
):
    width = window_ref.shape[1]
    channels = x_ref.shape[1]
    blocks = -(-channels // columns)
    block, entry = program % blocks, program // blocks
    layer, slot = bounded(layer_ref[0], conv_ref.shape[0]), bounded(slot_ref[entry], conv_ref.shape[1])
    start, length = bounded(start_ref[entry], x_ref.shape[0]), bounded(length_ref[entry], x_ref.shape[0] + 1)
    row = bounded(row_ref[entry], window_ref.shape[0])
    channel = block * columns + jnp.arange(columns, dtype=jnp.int32)
    there = channel < channels

    def store():
        for i in range(width):
            offset = length - width + i
            inside = there & (offset >= 0)
            from_piece = plgpu.load(x_ref.at[start + offset, channel], mask=inside, other=0)
            from_window = plgpu.load(window_ref.at[row, offset + width, channel], mask=there & (offset < 0), other=0)
            value = jnp.where(offset >= 0, from_piece.astype(conv_ref.dtype), from_window.astype(conv_ref.dtype))
            plgpu.store(conv_ref.at[layer, slot, i, channel], value, mask=there)

    # The null slot holds nothing.
    pl.when(slot > 0)(store)


def decode(x, weight, conv, layer: int, read_slot, write_slot, backend: Backend) -> tuple[Array, Array]:
    y, conv = _update("decode", x[:, None], weight, conv, layer, (read_slot, write_slot), backend, x.dtype)
    return y[:, 0], conv


def verify(x, weight, conv, layer: int, read_slot, write_slot, pending, backend: Backend) -> tuple[Array, Array]:
    return _update("verify", x, weight, conv, layer, (read_slot, write_slot, pending), backend, x.dtype)


def fold(weight, conv, layer: int, read_slot, write_slot, count, backend: Backend) -> tuple[Array, Array]:
    none = jnp.zeros((read_slot.shape[0], 1, conv.shape[3]), conv.dtype)
    return _update("fold", none, weight, conv, layer, (read_slot, write_slot, count), backend, conv.dtype)


def _update(kind, x, weight, conv, layer, slots, backend: Backend, dtype) -> tuple[Array, Array]:
    count, tokens, channels = x.shape
    new = 0 if kind == "fold" else tokens
    pending = 0 if kind == "decode" else conv.shape[2] - weight.shape[1] + 1
    tile = tiles.of(backend)
    y, conv = launch(
        _update_kernel,
        backend,
        name=f"causal_conv1d_{kind}",
        programs=count * -(-channels // tile.update_channels),
        args=(layer_number(layer), *slots, x, weight, conv),
        out=[
            jax.ShapeDtypeStruct((count, pending + new, channels), dtype),
            jax.ShapeDtypeStruct(conv.shape, conv.dtype),
        ],
        warps=tile.update_warps,
        aliases={len(slots) + 3: 1},
        columns=tile.update_channels,
        pending=pending,
        new=new,
    )
    return y, conv


def _update_kernel(program, layer_ref, read_ref, write_ref, *refs, columns, pending, new):
    count_ref, refs = (refs[0], refs[1:]) if pending else (None, refs)
    x_ref, weight_ref, conv_ref, y_ref, out_ref = refs
    channels, taps = weight_ref.shape
    width = taps - 1
    blocks = -(-channels // columns)
    block, row = program % blocks, program // blocks
    channel = block * columns + jnp.arange(columns, dtype=jnp.int32)
    layer = bounded(layer_ref[0], conv_ref.shape[0])
    source, target = (bounded(ref[row], conv_ref.shape[1]) for ref in (read_ref, write_ref))
    mask = None if channels % columns == 0 else channel < channels
    other = None if mask is None else 0

    def stored(i):
        return plgpu.load(conv_ref.at[layer, source, i, channel], mask=mask, other=other)

    def put(i, value):
        plgpu.store(out_ref.at[layer, target, i, channel], value, mask=mask)

    def nothing():
        # Of padding, and of a request that has ended: zeros are finite, whatever is computed of them.
        for i in range(pending + new):
            plgpu.store(y_ref.at[row, i, channel], jnp.zeros((columns,), y_ref.dtype), mask=mask)

    def run():
        weights = [
            plgpu.load(weight_ref.at[channel, tap], mask=mask, other=other).astype(jnp.float32) for tap in range(taps)
        ]

        def emit(i, inputs):
            total = _convolve(inputs, weights)
            plgpu.store(y_ref.at[row, i, channel], (total * sigmoid(total)).astype(y_ref.dtype), mask=mask)

        # Everything is read before anything is written, since both may be one slot.
        if count_ref is not None:
            inputs = [stored(i) for i in range(width + pending)]
            done = bounded(count_ref[row], pending + 1)
            window = [stored(done + i) for i in range(width)]
        else:
            inputs = []
            window = [stored(i) for i in range(width)]
        tokens = [
            plgpu.load(x_ref.at[row, i, channel], mask=mask, other=other).astype(conv_ref.dtype) for i in range(new)
        ]
        for i in range(pending):
            emit(i, inputs[i : i + taps])
        both = [*window, *tokens]
        for i in range(new):
            emit(pending + i, both[i : i + taps])
        # Without pending rows the token is part of the window at once; with them it takes their place behind it.
        for i, value in enumerate(both if pending else both[new:]):
            put(i, value)

    lax.cond(target > 0, run, nothing)
