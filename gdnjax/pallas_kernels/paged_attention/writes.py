"""Tokens into their places on the pages, one program a token. XLA's scatter takes 50 us for 128 of them, each pool."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
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
            numbers = (layer_ref[0], block, offset_ref[token])
            at = (*(bounded(number, count) for number, count in zip(numbers, pool.shape, strict=False)), head)
            if scale_refs:
                value, scale = quantise(value, pool.dtype)
                plgpu.store(scale_refs[i].at[at], scale, mask=head < heads)
            plgpu.store(pool.at[*at, lane], value.astype(pool.dtype), mask=mask)

    # The null block holds nothing.
    pl.when(block > 0)(run)
