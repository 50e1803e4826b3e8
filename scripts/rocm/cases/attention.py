"""Cases of attention over pages, and of writing keys and values to them.

Blocks that no table names, places of a block that no query sees, their scales, other layers and the null block are
poison; so are queries that are none.
"""

import functools

import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from gdnjax.pallas_kernels import paged_attention
from rocm.cases.case import BFLOAT16, EXACT, FLOAT8, Bound, Case, Op, poison
from rocm.cases.recurrent import LAYER, LAYERS, normal, random

ATTENTION = Bound(norm=5e-3, place=5e-2)
"""Probabilities and 8-bit values are rounded to bfloat16 before their product, and the output is; 2.7e-3 was seen."""

QUANTISED = Bound(norm=5e-3, place=7e-2, flips=3e-3)
"""One step of an 8-bit value, where what is divided by a rounded scale falls to the other side of a half. A step is a
16th of a float8, and less than that of the root mean square of int8."""

SCALE = Bound(norm=2e-7, place=5e-7)
"""A maximum and a division."""


NOWHERE = 0x7B7B7B7B
"""A block that there is not, whoever takes it for one."""


def eight_bits(dtype) -> bool:
    return np.dtype(dtype).itemsize == 1


def values(r: np.random.Generator, shape, dtype) -> np.ndarray:
    """Keys or values as they are stored."""
    if dtype == np.int8:
        return r.integers(-127, 128, shape).astype(np.int8)
    if dtype == FLOAT8:
        return np.clip(normal(r, shape, np.float32, 100.0), -440, 440).astype(FLOAT8)
    return normal(r, shape, dtype)


@functools.cache
def attend_op(first: int) -> Op:
    def call(x, layer, backend):
        tiles = paged_attention.Tiles(x["position"], x["table"], jnp.max(x["position"]) + 1, first)
        scales = (x["k_scale"], x["v_scale"]) if "k_scale" in x else None
        return {"o": paged_attention.attend(x["q"], x["k"], x["v"], layer, tiles, scales=scales, backend=backend)}

    return call


def attention(
    kind: str,
    *,
    queries: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 128,
    blocks: int = 6,
    kv: DTypeLike = BFLOAT16,
    first: int = 0,
    past: int = 0,
) -> Case:
    """Two tiles of queries over contexts of nearly all, and of less than half of `blocks` blocks of 16 keys; and a tile
    that is padding.

    Keys before `first` are masked. With `past` the last query of either context stands so far behind its table, which
    then is full; what follows in memory, the padding's table or nothing, names no block of theirs.
    """
    kv = np.dtype(kv)
    name = f"attention-{kind}-{heads}of{kv_heads}x{width}-{kv.name}" + f"-first{first}" * bool(first)
    name += f"-past{past}" * bool(past)
    r = random(name)
    size, requests = 16, 3
    contexts = (blocks * size - 3, blocks * size // 2 - 5) if not past else (blocks * size,) * 2
    shape = (LAYERS, len(contexts) * blocks + 1, size, kv_heads, width)
    x = {"table": np.zeros((requests, blocks), np.int32), "position": np.full((requests, queries), -1, np.int32)}
    pools = {name: poison(shape, kv) for name in ("k", "v")}
    scales = {f"{name}_scale": poison(shape[:-1], np.float32) for name in ("k", "v")}
    free = list(r.permutation(np.arange(1, shape[1])))
    # Of a request that is not there, nothing is read, whatever its table says.
    x["table"][2] = NOWHERE
    for row, context in enumerate(contexts):
        for number in range(-(-context // size)):
            block = x["table"][row, number] = free.pop()
            seen = slice(max(0, first - number * size), min(size, context - number * size))
            here = max(0, seen.stop - seen.start)
            for pool, scale in zip(pools.values(), scales.values(), strict=True):
                pool[LAYER, block, seen] = values(r, (here, kv_heads, width), kv)
                largest = 3**0.5 / 127 if kv == np.int8 else 0.01
                scale[LAYER, block, seen] = largest * r.uniform(0.5, 1.5, (here, kv_heads))
        # The second tile has two places without a query.
        here = min(queries, context) if row == 0 else min(max(1, queries - 2), context)
        x["position"][row, :here] = context - here + np.arange(here) + past
    x["q"] = normal(r, (requests, queries, heads, width))
    real = x["position"] >= 0
    x["q"][~real] = np.nan
    x |= pools | (scales if eight_bits(kv) else {})
    return Case(
        name,
        attend_op(first),
        x,
        LAYER,
        {"o": ATTENTION},
        seen={"o": real[:, :, None, None]},
        padding={"o": ~real[:, :, None, None]},
        rounded=frozenset({"k", "v"}),
    )


@functools.cache
def write_op(quantised: bool) -> Op:
    def call(x, layer, backend):
        pools, rows = (x["k_blocks"], x["v_blocks"]), (x["k"], x["v"], x["block"], x["offset"])
        if not quantised:
            k, v = paged_attention.write(*pools, layer, *rows, backend=backend)
            return {"k_blocks": k, "v_blocks": v}
        scales = (x["k_scales"], x["v_scales"])
        k, v, (k_scales, v_scales) = paged_attention.write_quantised(*pools, scales, layer, *rows, backend=backend)
        return {"k_blocks": k, "v_blocks": v, "k_scales": k_scales, "v_scales": v_scales}

    return call


def kv_write(kv: DTypeLike = BFLOAT16, *, kv_heads: int = 2, width: int = 128) -> Case:
    """Five tokens, of which one is padding, whose block is null: it goes nowhere. One has a head of zeros."""
    kv = np.dtype(kv)
    name = f"kv-write-{kv.name}-{kv_heads}x{width}"
    r = random(name)
    shape = (LAYERS, 5, 4, kv_heads, width)
    x = {name: normal(r, (5, kv_heads, width)) for name in ("k", "v")}
    x |= {"block": np.array([3, 3, 1, 0, 4], np.int32), "offset": np.array([2, 3, 0, 0, 1], np.int32)}
    x["k"][4, 1] = 0
    for name in ("k", "v"):
        x[name][3] = np.nan
    pools = {name: poison(shape, kv) for name in ("k_blocks", "v_blocks")}
    if eight_bits(kv):
        pools |= {name: poison(shape[:-1], np.float32) for name in ("k_scales", "v_scales")}
    written = np.zeros(shape[:-1], bool)
    real = x["block"] > 0
    written[LAYER, x["block"][real], x["offset"][real]] = True

    def mask(places, pool):
        return np.broadcast_to(places[..., None], pool.shape) if pool.ndim == 5 else places

    values_bound = QUANTISED if eight_bits(kv) else EXACT
    return Case(
        f"kv-write-{kv.name}-{kv_heads}x{width}",
        write_op(eight_bits(kv)),
        x | pools,
        LAYER,
        {name: values_bound if name.endswith("blocks") else SCALE for name in pools},
        seen={name: mask(written, pool) for name, pool in pools.items()},
        kept={name: mask(~written, pool) for name, pool in pools.items()},
        rounded=frozenset({"k", "v", "k_blocks", "v_blocks"}),
    )
