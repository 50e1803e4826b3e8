"""Tokens into their places on the pages, one program a token. XLA's scatter takes 50 us for 128 of them, each pool."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gdnjax.backend import Backend
from gdnjax.pallas_kernels.launch import bounded, launch, layer_number, power_of_two
from gdnjax.pallas_kernels.paged_attention import tiles as tables
from gdnjax.quantized import quantise
from gdnjax.shapes import Array


def write(k_blocks, v_blocks, layer: int, k, v, block, offset, backend: Backend) -> tuple[Array, Array]:
    k_blocks, v_blocks = _written("paged_attention_write", (k_blocks, v_blocks), layer, (k, v), block, offset, backend)
    return k_blocks, v_blocks


def write_quantised(k_blocks, v_blocks, scales, layer: int, k, v, block, offset, backend: Backend):
    pools = (k_blocks, v_blocks, *scales)
    name = "paged_attention_write_quantised"
    k_blocks, v_blocks, k_scales, v_scales = _written(name, pools, layer, (k, v), block, offset, backend)
    return k_blocks, v_blocks, (k_scales, v_scales)


def write_latent(pages, layer: int, entries, block, offset, backend: Backend) -> Array:
    # A latent is one head.
    pools, values = (pages[:, :, :, None],), (entries[:, None],)
    return _written("latent_attention_write", pools, layer, values, block, offset, backend)[0][:, :, :, 0]


def most_entering(backend: Backend) -> int:
    """Tokens of a step up to which `enter` is a kernel."""
    return backend.tiles(tables.ENTER).most


def enter(k_blocks, v_blocks, scales, layer: int, q, k, v, turn, block, offset, backend: Backend):
    tile = backend.tiles(tables.ENTER)
    tokens, rows, width = q.shape
    heads = rows // 2 if turn.gated else rows
    pools = (k_blocks, v_blocks, *(scales or ()))
    weights = () if turn.q_weight is None else (turn.q_weight, turn.k_weight)
    rotary = 0 if turn.angles is None else turn.angles[0].shape[1]
    # Both of a pair have one angle: half of them are enough, and nobody needs to put two halves side by side.
    angles = () if turn.angles is None else tuple(part[:, : rotary // 2] for part in turn.angles)
    args = (layer_number(layer), block, offset, *weights, *angles, q, k, v, *pools)
    first, together = len(args) - len(pools), max(n for n in range(1, tile.heads + 1) if heads % n == 0)
    q, k_blocks, v_blocks, *scales = launch(
        _enter,
        backend,
        name="paged_attention_enter" + "_quantised" * (scales is not None),
        programs=tokens * (heads // together + 1),
        args=args,
        out=[jax.ShapeDtypeStruct((tokens, heads, width), q.dtype)]
        + [jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in pools],
        warps=tile.warps,
        aliases={first + i: 1 + i for i in range(len(pools))},
        together=together,
        norm=(turn.eps, turn.centre) if weights else None,
        rotary=rotary,
        gated=turn.gated,
    )
    return q, k_blocks, v_blocks, (scales[0], scales[1]) if scales else None


def _enter(program, layer_ref, block_ref, offset_ref, *refs, together, norm, rotary, gated):
    (q_weight, k_weight), refs = (refs[:2], refs[2:]) if norm else ((None, None), refs)
    angles, refs = (refs[:2], refs[2:]) if rotary else (None, refs)
    q_ref, k_ref, v_ref, *refs = refs
    # The pools as they come in, which is where they go out, and before those the queries.
    out_ref, *pools = refs[len(refs) // 2 :]
    heads, width = out_ref.shape[1:]
    parts = heads // together + 1
    token, part = program // parts, program % parts
    lane = jnp.arange(power_of_two(width), dtype=jnp.int32)[None, :]
    # Half of what is rotated is one half of each pair.
    other = jnp.where(lane < rotary // 2, lane + rotary // 2, lane - rotary // 2)
    other = jnp.where(lane < rotary, other, lane)

    def turned(ref, weight_ref, row, real):
        """Heads [rows, columns] of the token after norm and rotation."""
        mask = real if lane.size == width else lane < width if real is None else real & (lane < width)

        def load(at):
            return plgpu.load(ref.at[token, row, at], mask=mask, other=None if mask is None else 0)

        def weight(at):
            inside = None if lane.size == width else lane < width
            found = plgpu.load(weight_ref.at[at], mask=inside, other=None if inside is None else 0)
            return norm[1] + found.astype(jnp.float32)

        x, factor = load(lane), jnp.ones((1, 1))
        if norm:
            wide = x.astype(jnp.float32)
            factor = lax.rsqrt(jnp.sum(wide * wide, axis=1) / width + norm[0])[:, None]
            x = (wide * factor * weight(lane)).astype(x.dtype)
        if angles is None:
            return x, mask
        pair = load(other)
        if norm:
            pair = (pair.astype(jnp.float32) * factor * weight(other)).astype(x.dtype)
        angle = jnp.where(lane < rotary // 2, lane, lane - rotary // 2)
        cos, sin = (plgpu.load(part.at[token, angle], mask=lane < rotary, other=0.0) for part in angles)
        sin = jnp.where(lane < rotary // 2, -sin, sin)
        both = x.astype(jnp.float32) * cos + pair.astype(jnp.float32) * sin
        return jnp.where(lane < rotary, both, x.astype(jnp.float32)).astype(x.dtype), mask

    def queries():
        number = jnp.arange(power_of_two(together), dtype=jnp.int32)[:, None]
        real = None if number.size == together else number < together
        head = part * together + number
        q, mask = turned(q_ref, q_weight, 2 * head if gated else head, real)
        plgpu.store(out_ref.at[token, head, lane], q, mask=mask)

    def keys_and_values():
        kv_heads = k_ref.shape[1]
        head = jnp.arange(power_of_two(kv_heads), dtype=jnp.int32)[:, None]
        k, mask = turned(k_ref, k_weight, head, None if head.size == kv_heads else head < kv_heads)
        v = plgpu.load(v_ref.at[token, head, lane], mask=mask, other=None if mask is None else 0)
        numbers = layer_ref[0], block_ref[token], offset_ref[token]
        for i, value in enumerate((k, v)):
            _store(value, pools[i], pools[2 + i] if len(pools) > 2 else None, numbers, head, lane, mask)

    pl.when(part < parts - 1)(queries)
    # The null block holds nothing.
    pl.when((part == parts - 1) & (block_ref[token] > 0))(keys_and_values)


def _store(value: Array, pool, scale_ref, numbers: Sequence[Array], head: Array, lane: Array, mask) -> None:
    """The heads of a token at (layer, block, offset) of a pool, and what they are divided by in that of scales."""
    at = (*(bounded(number, count) for number, count in zip(numbers, pool.shape, strict=False)), head)
    if scale_ref is not None:
        value, scale = quantise(value, pool.dtype)
        plgpu.store(scale_ref.at[at], scale, mask=head < pool.shape[3])
    plgpu.store(pool.at[*at, lane], value.astype(pool.dtype), mask=mask)


def _written(name: str, pools: Sequence[Array], layer: int, values: Sequence[Array], block, offset, backend: Backend):
    """The pools with the values of each token, [t, heads, width], stored; pools behind those of values are scales."""
    args = (layer_number(layer), block, offset, *values, *pools)
    first = len(args) - len(pools)
    return launch(
        _write,
        backend,
        name=name,
        programs=block.shape[0],
        args=args,
        out=[jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in pools],
        warps=tables.WRITE_WARPS,
        aliases={first + i: i for i in range(len(pools))},
        count=len(values),
    )


def _write(token, layer_ref, block_ref, offset_ref, *rest, count):
    # Values, then the pools and their scales, if there are any, as they come in and then as they go out.
    values, pools = rest[:count], rest[(len(rest) + count) // 2 :]
    places, scale_refs = pools[:count], pools[count:]
    heads, width = values[0].shape[1:]
    head = jnp.arange(power_of_two(heads), dtype=jnp.int32)[:, None]
    lane = jnp.arange(power_of_two(width), dtype=jnp.int32)[None, :]
    mask = None if (head.size, lane.size) == (heads, width) else (head < heads) & (lane < width)
    other = None if mask is None else 0
    block = block_ref[token]

    def run():
        for i, (tokens, pool) in enumerate(zip(values, places, strict=True)):
            value = plgpu.load(tokens.at[token, head, lane], mask=mask, other=other)
            numbers = layer_ref[0], block, offset_ref[token]
            _store(value, pool, scale_refs[i] if scale_refs else None, numbers, head, lane, mask)

    # The null block holds nothing.
    pl.when(block > 0)(run)
