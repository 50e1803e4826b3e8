"""Attention over pages in one kernel, split over long contexts where few programs would run.

A program holds some rows (a query of a tile by a head of the group that shares a kv head), walks over the keys that
the tile can see, and keeps a softmax in float32. Decode: bytes are the keys and values, read once for all query heads
of a group; the ceiling is that of reading memory. Prefill: 4 hd operations a pair of query and key.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gdnjax.backend import Backend
from gdnjax.pallas_kernels.launch import LEAST, bounded, dot, launch, layer_number, power_of_two
from gdnjax.pallas_kernels.paged_attention import tiles as tables
from gdnjax.pallas_kernels.paged_attention.scales import quantise
from gdnjax.shapes import Array


def attend(q, k_blocks, v_blocks, layer: int, tiles, scales, backend: Backend) -> Array:
    count, queries, heads, width = q.shape
    kv_heads = k_blocks.shape[3]
    group = heads // kv_heads
    tile = tables.of(backend, queries)
    # As many heads of a group as fit; each program reads the keys for all of them.
    together = max(h for h in range(1, group + 1) if group % h == 0 and (h == 1 or h * queries <= tile.rows))
    parts = heads // together
    length = tiles.block_table.shape[1] * k_blocks.shape[2]
    splits = _splits(count * parts, length, tile)
    rows = power_of_two(together * queries, LEAST)
    static = {"together": together, "group": group, "first": tiles.first, "rows": rows, "page": tile.keys}
    args = (layer_number(layer), tiles.position, tiles.block_table, q, k_blocks, v_blocks, *(scales or ()))
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    if splits == 1:
        return launch(
            _attend,
            backend,
            name="paged_attention",
            programs=count * parts,
            args=args,
            out=[out],
            warps=tile.warps,
            stages=tile.stages,
            splits=1,
            **static,
        )[0]
    total, top, weight = launch(
        _attend,
        backend,
        name="paged_attention_split",
        programs=count * parts * splits,
        args=args,
        out=[
            jax.ShapeDtypeStruct((count, queries, heads, splits, width), jnp.float32),
            jax.ShapeDtypeStruct((count, queries, heads, splits), jnp.float32),
            jax.ShapeDtypeStruct((count, queries, heads, splits), jnp.float32),
        ],
        warps=tile.warps,
        stages=tile.stages,
        splits=splits,
        **static,
    )
    return _merge(total, top, weight).astype(q.dtype)


def _splits(programs: int, length: int, tile) -> int:
    """Parts of the context that run beside each other: enough programs to fill the device, and no part too short."""
    return max(1, min(tile.programs // programs, length // tile.least_split))


def _merge(total: Array, top: Array, weight: Array) -> Array:
    """Softmaxes over parts to that over all: [..., splits, hd], [..., splits] twice -> [..., hd]. Few bytes: XLA's."""
    most = jnp.max(top, axis=-1, keepdims=True)
    share = jnp.where(weight > 0, jnp.exp2(top - jnp.where(jnp.isfinite(most), most, 0.0)), 0.0)
    sums = jnp.sum(share * weight, axis=-1)
    merged = jnp.sum(jnp.where(weight > 0, share, 0.0)[..., None] * total, axis=-2)
    return merged / jnp.where(sums > 0, sums, 1.0)[..., None]


def _attend(
    program, layer_ref, position_ref, table_ref, q_ref, k_ref, v_ref, *rest, together, group, first, rows, page, splits
):
    outputs = rest[-1:] if splits == 1 else rest[-3:]
    scale_refs = rest[: -len(outputs)]
    queries, heads, width = q_ref.shape[1:]
    block_size = k_ref.shape[2]
    parts = heads // together
    split, part, tile = program % splits, program // splits % parts, program // (splits * parts)
    kv_head = part * together // group

    row = jnp.arange(rows, dtype=jnp.int32)
    query, head = row // together, part * together + row % together
    real = row < queries * together
    lane = jnp.arange(power_of_two(width, LEAST), dtype=jnp.int32)
    exact = lane.size == width
    lanes = lane < width
    q_mask = real[:, None] if exact else real[:, None] & lanes[None, :]
    position = plgpu.load(position_ref.at[tile, query], mask=real, other=-1)
    # Of places without a query only zeros are stored, and a tile of none has no keys: it moves nothing else.
    asked = q_mask & (position >= 0)[:, None]
    q = plgpu.load(q_ref.at[tile, query[:, None], head[:, None], lane[None, :]], mask=asked, other=0)

    # What no query of the tile sees is not loaded: it may be anything. Nor is what stands behind the table: whatever it
    # is would be taken for the number of a block.
    seen = jnp.minimum(jnp.max(position) + 1, table_ref.shape[1] * block_size)
    pages = pl.cdiv(seen, page)
    per_split = pl.cdiv(pages, splits)
    begin = jnp.maximum(split * per_split, first // page)
    end = jnp.minimum((split + 1) * per_split, pages)
    scale = width**-0.5 * math.log2(math.e)
    # Of the pool's kind: an integer is not converted to float8.
    layer = bounded(layer_ref[0], k_ref.shape[0])
    zero = 0.0 if jnp.issubdtype(k_ref.dtype, jnp.floating) else 0

    def one_page(i, carry, *, whole):
        """`whole`: every query sees all of the page, so that nothing is masked."""
        top, weight, total = carry
        key = i * page + jnp.arange(page, dtype=jnp.int32)
        there = None if whole else (key < seen) & (key >= first)
        block = plgpu.load(table_ref.at[tile, key // block_size], mask=there, other=None if whole else 0)
        block = bounded(block, k_ref.shape[1])
        kv_mask = None if exact else lanes[None, :]
        if there is not None:
            kv_mask = there[:, None] if exact else there[:, None] & lanes[None, :]
        at = (layer, block[:, None], (key % block_size)[:, None], kv_head, lane[None, :])
        other = None if kv_mask is None else zero

        def factor(ref):
            place = ref.at[layer, block, key % block_size, kv_head]
            return plgpu.load(place, mask=there, other=None if whole else 0)[None, :]

        k = plgpu.load(k_ref.at[at], mask=kv_mask, other=other).astype(q.dtype)
        v = plgpu.load(v_ref.at[at], mask=kv_mask, other=other).astype(q.dtype)
        scores = dot(q, k, contract=(1, 1))
        scores = scores * factor(scale_refs[0]) if scale_refs else scores
        if there is not None:
            scores = jnp.where(there[None, :] & (key[None, :] <= position[:, None]), scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        # A row that has seen no key yet has top = -inf; its weights must be 0, not exp(-inf + inf).
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top * scale)
        # One multiply-add each: the scale is applied here, not to the scores.
        p = jnp.exp2(scores * scale - base[:, None])
        shrink = jnp.exp2(top * scale - base)
        weight = weight * shrink + jnp.sum(p, axis=1)
        p = p * factor(scale_refs[1]) if scale_refs else p
        return new_top, weight, total * shrink[:, None] + dot(p.astype(q.dtype), v)

    start = (jnp.full((rows,), -jnp.inf), jnp.zeros((rows,)), jnp.zeros((rows, lane.size)))
    # Pages before the first whole one, whole ones, and those that the last queries see in part.
    head_end = jnp.maximum(begin, jnp.minimum(-(-first // page), end))
    least = jnp.minimum(jnp.min(jnp.where(real, position, seen)) + 1, seen)
    whole_end = jnp.maximum(head_end, jnp.minimum(least // page, end))
    masked, whole = functools.partial(one_page, whole=False), functools.partial(one_page, whole=True)
    carry = lax.fori_loop(begin, head_end, masked, start) if first else start
    carry = lax.fori_loop(head_end, whole_end, whole, carry)
    top, weight, total = lax.fori_loop(whole_end, end, masked, carry)
    if splits == 1:
        (o_ref,) = outputs
        o = total / jnp.where(weight > 0, weight, 1.0)[:, None]
        plgpu.store(o_ref.at[tile, query[:, None], head[:, None], lane[None, :]], o.astype(o_ref.dtype), mask=q_mask)
        return
    total_ref, top_ref, weight_ref = outputs
    plgpu.store(total_ref.at[tile, query[:, None], head[:, None], split, lane[None, :]], total, mask=q_mask)
    plgpu.store(top_ref.at[tile, query, head, split], top * scale, mask=real)
    plgpu.store(weight_ref.at[tile, query, head, split], weight, mask=real)


def write(k_blocks, v_blocks, layer: int, k, v, block, offset, backend: Backend) -> tuple[Array, Array]:
    """One program a token. XLA's scatter takes 50 us for 128 of them, each of the two."""
    k_blocks, v_blocks = launch(
        _write,
        backend,
        name="paged_attention_write",
        programs=k.shape[0],
        args=(layer_number(layer), block, offset, k, v, k_blocks, v_blocks),
        out=[jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in (k_blocks, v_blocks)],
        warps=tables.WRITE_WARPS,
        aliases={5: 0, 6: 1},
    )
    return k_blocks, v_blocks


def write_quantised(k_blocks, v_blocks, scales, layer: int, k, v, block, offset, backend: Backend):
    k_blocks, v_blocks, k_scales, v_scales = launch(
        _write,
        backend,
        name="paged_attention_write_quantised",
        programs=k.shape[0],
        args=(layer_number(layer), block, offset, k, v, k_blocks, v_blocks, *scales),
        out=[jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in (k_blocks, v_blocks, *scales)],
        warps=tables.WRITE_WARPS,
        aliases={5: 0, 6: 1, 7: 2, 8: 3},
    )
    return k_blocks, v_blocks, (k_scales, v_scales)


def _write(token, layer_ref, block_ref, offset_ref, k_ref, v_ref, *pools):
    # The pools and their scales, if there are any, as they come in and then as they go out.
    pools = pools[len(pools) // 2 :]
    places, scale_refs = pools[:2], pools[2:]
    heads, width = k_ref.shape[1:]
    head = jnp.arange(power_of_two(heads), dtype=jnp.int32)[:, None]
    lane = jnp.arange(power_of_two(width), dtype=jnp.int32)[None, :]
    mask = None if (head.size, lane.size) == (heads, width) else (head < heads) & (lane < width)
    other = None if mask is None else 0
    block = block_ref[token]

    def run():
        for i, (values, pool) in enumerate(zip((k_ref, v_ref), places, strict=True)):
            value = plgpu.load(values.at[token, head, lane], mask=mask, other=other)
            numbers = (layer_ref[0], block, offset_ref[token])
            at = (*(bounded(number, count) for number, count in zip(numbers, pool.shape, strict=False)), head)
            if scale_refs:
                value, scale = quantise(value, pool.dtype)
                plgpu.store(scale_refs[i].at[at], scale, mask=head < heads)
            plgpu.store(pool.at[*at, lane], value.astype(pool.dtype), mask=mask)

    # The null block holds nothing.
    pl.when(block > 0)(run)
