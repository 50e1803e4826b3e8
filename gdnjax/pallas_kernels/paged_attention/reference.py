"""The definition in XLA: a softmax carried over pages of keys, so that cost follows the context that is there."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from gdnjax.backend import FLOAT32_DOT
from gdnjax.pallas_kernels.normed import rms_norm
from gdnjax.pallas_kernels.pools import dtype_of, read_rows, write_rows
from gdnjax.pallas_kernels.rotary import rotate
from gdnjax.quantized import quantise
from gdnjax.shapes import Array

PAGE = 256
"""Keys looked at in one turn of the loop."""


def attend(q: Array, k_blocks: Array, v_blocks: Array, layer: int, tiles, scales=None, gate=None) -> Array:
    count, _, heads, width = q.shape
    block_size, kv_heads = k_blocks.shape[2], k_blocks.shape[3]

    def page_of(blocks, seen):
        seen = seen[:, :, None]
        page = seen.shape[1]
        k, v = (
            jnp.where(seen[..., None], read_rows(pool, layer, blocks).reshape(count, page, kv_heads, width), 0)
            for pool in (k_blocks, v_blocks)
        )

        def factor(pool):
            scale = jnp.where(seen, pool[layer, blocks].reshape(count, page, kv_heads), 0)
            return scale.swapaxes(1, 2)[:, :, None, None]

        return k, v, None if scales is None else tuple(map(factor, scales))

    q = q.reshape(*q.shape[:2], kv_heads, heads // kv_heads, width)
    o = _over_pages(q, block_size, tiles, page_of, width=width, scale=width**-0.5)
    if gate is None:
        return o
    return (o.astype(jnp.float32) * jax.nn.sigmoid(gate[:, :, 1::2].astype(jnp.float32))).astype(o.dtype)


def attend_latent(q: Array, pages: Array, layer: int, tiles, value_dim: int, scale: float) -> Array:
    def page_of(blocks, seen):
        rows = read_rows(pages, layer, blocks).reshape(*seen.shape, pages.shape[3])
        latent = jnp.where(seen[..., None], rows, 0)[:, :, None]
        return latent, latent[..., :value_dim], None

    return _over_pages(q[:, :, None], pages.shape[2], tiles, page_of, width=value_dim, scale=scale)


def _over_pages(q: Array, block_size: int, tiles, page_of: Callable, *, width: int, scale: float) -> Array:
    """q [g, q, kh, h / kh, hd] -> [g, q, h, width].

    `page_of` gives of blocks [g, m] the keys and values [g, k, kh, hd or width], 0 where `seen` [g, k] is not, and
    None or what multiplies scores and probabilities [g, kh, 1, 1, k].
    """
    count, queries, kv_heads, group, _ = q.shape
    dtype = q.dtype
    per_page = max(1, PAGE // block_size)
    padded = -tiles.block_table.shape[1] % per_page
    table = jnp.pad(tiles.block_table, ((0, 0), (0, padded)))
    page = per_page * block_size
    q = q.astype(jnp.float32) * scale

    def one_page(i, carry):
        top, weight, total = carry
        blocks = lax.dynamic_slice_in_dim(table, i * per_page, per_page, axis=1)
        position = i * page + jnp.arange(page)
        # Behind the table there are no keys, whatever position a query has.
        visible = (position >= tiles.first) & (position < tiles.block_table.shape[1] * block_size)
        keep = visible & (position <= tiles.position[:, :, None])
        k, v, factors = page_of(blocks, visible & (position <= jnp.max(tiles.position, axis=1)[:, None]))
        k, v = k.astype(jnp.float32), v.astype(jnp.float32)
        scores = jnp.einsum("nqhgd,nkhd->nhgqk", q, k, precision=FLOAT32_DOT)
        if factors is not None:
            scores = scores * factors[0]
        scores = jnp.where(keep[:, None, None], scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(-1))
        # A query that has seen no key yet has top = -inf; its weights must be 0, not exp(-inf + inf).
        base = jnp.where(jnp.isfinite(new_top), new_top, 0.0)
        p = jnp.exp(scores - base[..., None])
        shrink = jnp.exp(top - base)
        weight = weight * shrink + p.sum(-1)
        if factors is not None:
            p = p * factors[1]
        total = total * shrink[..., None] + jnp.einsum("nhgqk,nkhd->nhgqd", p, v, precision=FLOAT32_DOT)
        return new_top, weight, total

    shape = (count, kv_heads, group, queries)
    start = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, width)))
    _, weight, total = lax.fori_loop(0, -(-tiles.longest // page), one_page, start)
    # A query that sees no key has total 0. Divided by its weight of 0 it would be selected away, but not its gradient.
    o = total / jnp.where(weight > 0, weight, 1.0)[..., None]
    return o.transpose(0, 3, 1, 2, 4).reshape(count, queries, kv_heads * group, width).astype(dtype)


def turned(q: Array, k: Array, turn) -> tuple[Array, Array]:
    """Queries without their gates, and keys, after norm and rotation."""
    q = q[:, ::2] if turn.gated else q
    if turn.q_weight is not None:
        q, k = (rms_norm(x, w, turn.eps, turn.centre) for x, w in ((q, turn.q_weight), (k, turn.k_weight)))
    return rotate(q, turn.angles), rotate(k, turn.angles)


def write(k_blocks: Array, v_blocks: Array, layer: int, k: Array, v: Array, block: Array, offset: Array):
    k_blocks = write_rows(k_blocks, layer, block, offset, rows=k)
    return k_blocks, write_rows(v_blocks, layer, block, offset, rows=v)


def write_quantised(k_blocks: Array, v_blocks: Array, scales, layer: int, k: Array, v: Array, block, offset):
    (k, k_scale), (v, v_scale) = (quantise(x, dtype_of(pool)) for x, pool in ((k, k_blocks), (v, v_blocks)))
    k_scales, v_scales = (
        write_rows(pool, layer, block, offset, rows=scale[..., 0])
        for pool, scale in zip(scales, (k_scale, v_scale), strict=True)
    )
    return *write(k_blocks, v_blocks, layer, k, v, block, offset), (k_scales, v_scales)


def write_latent(pages: Array, layer: int, entries: Array, block: Array, offset: Array) -> Array:
    return write_rows(pages, layer, block, offset, rows=entries)
