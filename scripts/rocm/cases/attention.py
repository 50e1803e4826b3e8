"""Cases of attention over pages, of keys and values and of latents, and of writing to them.

Blocks that no table names, places of a block that no query sees, their scales, other layers and the null block are
poison; so are queries that are none.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from unittest import mock

import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from gdnjax.pallas_kernels import paged_attention
from gdnjax.pallas_kernels.paged_attention import tiles as tables
from rocm.cases.case import BFLOAT16, EXACT, FLOAT8, Bound, Case, Op, poison
from rocm.cases.recurrent import LAYER, LAYERS, normal, random

ATTENTION = Bound(norm=5e-3, place=5e-2)
"""Probabilities and 8-bit values are rounded to bfloat16 before their product, and the output is; 2.7e-3 was seen."""

QUANTISED = Bound(norm=5e-3, place=7e-2, flips=3e-3)
"""One step of an 8-bit value, where what is divided by a rounded scale falls to the other side of a half. A step is a
16th of a float8, and less than that of the root mean square of int8."""

SCALE = Bound(norm=2e-7, place=5e-7)
"""A maximum and a division."""

TURNED = Bound(norm=4e-3, place=2**-5)
"""Rounded to bfloat16 by the norm and by the rotation, where two numbers may cancel."""

FLOAT32 = Bound(norm=1e-6, place=1e-5)
"""Float32 sums in another order; 2.5e-7 was seen."""


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


@contextlib.contextmanager
def small_parts() -> Iterator[None]:
    """Contexts of more than 256 keys are cut every 64 meanwhile; there are fewer programs than parts."""

    def smaller(find):
        return lambda *of: dataclasses.replace(find(*of), part=64, programs=8)

    with (
        mock.patch.object(tables, "of", smaller(tables.of)),
        mock.patch.object(tables, "of_latents", smaller(tables.of_latents)),
    ):
        yield


@functools.cache
def attend_op(first: int, *, parts: bool = False) -> Op:
    def call(x, layer, backend):
        tiles = paged_attention.Tiles(x["position"], x["table"], jnp.max(x["position"]) + 1, first)
        options = {
            "scales": (x["k_scale"], x["v_scale"]) if "k_scale" in x else None,
            "gate": x.get("gate"),
            "backend": backend,
        }
        with small_parts() if parts else contextlib.nullcontext():
            return {"o": paged_attention.attend(x["q"], x["k"], x["v"], layer, tiles, **options)}

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
    parts: bool = False,
    gated: bool = False,
) -> Case:
    """Two tiles of queries over contexts of nearly all, and of less than half of `blocks` blocks of 16 keys; and a tile
    that is padding.

    Keys before `first` are masked. With `past` the last query of either context stands so far behind its table, which
    then is full; what follows in memory, the padding's table or nothing, names no block of theirs. With `parts` they
    are cut as `small_parts` says.
    """
    kv = np.dtype(kv)
    name = f"attention-{kind}-{heads}of{kv_heads}x{width}-{kv.name}" + _limits(first, past)
    name += "-gated" * gated
    r = random(name)
    x, places = _contexts(r, queries, blocks, first, past)
    shape = (LAYERS, *_blocks_of(blocks), kv_heads, width)
    pools = {name: poison(shape, kv) for name in ("k", "v")}
    scales = {f"{name}_scale": poison(shape[:-1], np.float32) for name in ("k", "v")}
    for block, seen in places:
        here = max(0, seen.stop - seen.start)
        for pool, scale in zip(pools.values(), scales.values(), strict=True):
            pool[LAYER, block, seen] = values(r, (here, kv_heads, width), kv)
            largest = 3**0.5 / 127 if kv == np.int8 else 0.01
            scale[LAYER, block, seen] = largest * r.uniform(0.5, 1.5, (here, kv_heads))
    x["q"] = normal(r, (*x["position"].shape, heads, width))
    if gated:
        x["gate"] = normal(r, (*x["position"].shape, 2 * heads, width))
        x["gate"][:, :, ::2] = np.nan
    return _attending(name, attend_op(first, parts=parts), x, pools | (scales if eight_bits(kv) else {}), ATTENTION)


SIZE, REQUESTS = 16, 3
"""Keys of a block, and tiles of a case, of which the last is padding."""


def _limits(first: int, past: int) -> str:
    return f"-first{first}" * bool(first) + f"-past{past}" * bool(past)


def _blocks_of(blocks: int) -> tuple[int, int]:
    """Blocks of a pool, one of which is null, and the keys of each."""
    return (REQUESTS - 1) * blocks + 1, SIZE


def _contexts(r: np.random.Generator, queries: int, blocks: int, first: int, past: int):
    """Table and positions of the tiles; and of each block that holds keys its number and the slice of those seen."""
    contexts = (blocks * SIZE - 3, blocks * SIZE // 2 - 5) if not past else (blocks * SIZE,) * 2
    x = {"table": np.zeros((REQUESTS, blocks), np.int32), "position": np.full((REQUESTS, queries), -1, np.int32)}
    free = list(r.permutation(np.arange(1, _blocks_of(blocks)[0])))
    places = []
    # Of a request that is not there, nothing is read, whatever its table says.
    x["table"][2] = NOWHERE
    for row, context in enumerate(contexts):
        for number in range(-(-context // SIZE)):
            block = x["table"][row, number] = free.pop()
            places.append((block, slice(max(0, first - number * SIZE), min(SIZE, context - number * SIZE))))
        # The second tile has two places without a query.
        here = min(queries, context) if row == 0 else min(max(1, queries - 2), context)
        x["position"][row, :here] = context - here + np.arange(here) + past
    return x, places


def _attending(name: str, op: Op, x: dict[str, np.ndarray], pools: dict[str, np.ndarray], bound: Bound) -> Case:
    """The case of an op that reads `pools`. Queries that are none are NaN."""
    real = x["position"] >= 0
    x["q"][~real] = np.nan
    return Case(
        name,
        op,
        x | pools,
        LAYER,
        {"o": bound},
        seen={"o": real[:, :, None, None]},
        padding={"o": ~real[:, :, None, None]},
        rounded=frozenset(pools),
    )


@functools.cache
def latent_op(value_dim: int, first: int, *, parts: bool = False) -> Op:
    def call(x, layer, backend):
        tiles = paged_attention.Tiles(x["position"], x["table"], jnp.max(x["position"]) + 1, first)
        options = {"value_dim": value_dim, "scale": x["q"].shape[-1] ** -0.5, "backend": backend}
        with small_parts() if parts else contextlib.nullcontext():
            return {"o": paged_attention.attend_latent(x["q"], x["c"], layer, tiles, **options)}

    return call


def latent(
    kind: str,
    *,
    queries: int = 1,
    heads: int = 4,
    value_dim: int = 512,
    rest: int = 64,
    blocks: int = 6,
    dtype: DTypeLike = BFLOAT16,
    first: int = 0,
    past: int = 0,
    parts: bool = False,
) -> Case:
    """`attention`, but over latents of `value_dim` columns and `rest` more, which all heads share."""
    dtype = np.dtype(dtype)
    name = f"latent-{kind}-{heads}x{value_dim}+{rest}-{dtype.name}" + _limits(first, past)
    r = random(name)
    x, places = _contexts(r, queries, blocks, first, past)
    pool = poison((LAYERS, *_blocks_of(blocks), value_dim + rest), dtype)
    for block, seen in places:
        pool[LAYER, block, seen] = normal(r, (max(0, seen.stop - seen.start), value_dim + rest), dtype)
    x["q"] = normal(r, (*x["position"].shape, heads, value_dim + rest), dtype)
    bound = ATTENTION if dtype == BFLOAT16 else FLOAT32
    return _attending(name, latent_op(value_dim, first, parts=parts), x, {"c": pool}, bound)


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


PLACES = {"block": np.array([3, 3, 1, 0, 4], np.int32), "offset": np.array([2, 3, 0, 0, 1], np.int32)}
"""Of five tokens, of which one is padding, whose block is null: it goes nowhere."""


def _writing(name: str, op: Op, tokens: dict[str, np.ndarray], pools: dict[str, np.ndarray], bounds) -> Case:
    """The case of an op that writes `tokens` to their places in `pools`, and nothing else."""
    real = PLACES["block"] > 0
    for x in tokens.values():
        x[~real] = np.nan
    written = {name: np.zeros(pool.shape, bool) for name, pool in pools.items()}
    for mask in written.values():
        mask[LAYER, PLACES["block"][real], PLACES["offset"][real]] = True
    return Case(
        name,
        op,
        tokens | PLACES | pools,
        LAYER,
        bounds,
        seen=written,
        kept={name: ~mask for name, mask in written.items()},
        rounded=frozenset(tokens | pools),
    )


def kv_write(kv: DTypeLike = BFLOAT16, *, kv_heads: int = 2, width: int = 128) -> Case:
    """Five tokens, one of which is padding. One has a head of zeros."""
    kv = np.dtype(kv)
    name = f"kv-write-{kv.name}-{kv_heads}x{width}"
    r = random(name)
    shape = (LAYERS, 5, 4, kv_heads, width)
    tokens = {name: normal(r, (5, kv_heads, width)) for name in ("k", "v")}
    tokens["k"][4, 1] = 0
    pools = {name: poison(shape, kv) for name in ("k_blocks", "v_blocks")}
    bounds = dict.fromkeys(pools, QUANTISED if eight_bits(kv) else EXACT)
    if eight_bits(kv):
        pools |= {name: poison(shape[:-1], np.float32) for name in ("k_scales", "v_scales")}
        bounds |= dict.fromkeys(("k_scales", "v_scales"), SCALE)
    return _writing(name, write_op(eight_bits(kv)), tokens, pools, bounds)


def latent_write_op(x, layer, backend):
    pages = paged_attention.write_latent(x["c_blocks"], layer, x["c"], x["block"], x["offset"], backend=backend)
    return {"c_blocks": pages}


def latent_write(dtype: DTypeLike = BFLOAT16, *, width: int = 576) -> Case:
    """The same of latents."""
    dtype = np.dtype(dtype)
    name = f"latent-write-{dtype.name}-{width}"
    tokens = {"c": normal(random(name), (5, width))}
    pools = {"c_blocks": poison((LAYERS, 5, 4, width), dtype)}
    return _writing(name, latent_write_op, tokens, pools, {"c_blocks": EXACT})


@functools.cache
def enter_op(*, gated: bool, normed: bool, rotated: bool) -> Op:
    def call(x, layer, backend):
        weights = (x["q_weight"], x["k_weight"]) if normed else (None, None)
        angles = (x["cos"], x["sin"]) if rotated else None
        turn = paged_attention.Turn(*weights, eps=1e-6, centre=1.0, angles=angles, gated=gated)
        scales = (x["k_scales"], x["v_scales"]) if "k_scales" in x else None
        places = x["block"], x["offset"]
        q, k, v, scales = paged_attention.enter(
            x["k_blocks"], x["v_blocks"], scales, layer, x["q"], x["k"], x["v"], turn, *places, backend=backend
        )
        written = {} if scales is None else {"k_scales": scales[0], "v_scales": scales[1]}
        return {"q": q, "k_blocks": k, "v_blocks": v} | written

    return call


def enter(
    kv: DTypeLike = BFLOAT16,
    *,
    heads: int = 6,
    kv_heads: int = 2,
    width: int = 128,
    rotary: int = 32,
    gated: bool = True,
    normed: bool = True,
) -> Case:
    """Queries and keys of five tokens, of which one is padding, with norm and rotation, and keys and values written."""
    kv = np.dtype(kv)
    name = f"kv-enter-{kv.name}-{heads}of{kv_heads}x{width}-{rotary}" + "-gated" * gated + "-normed" * normed
    written, r = kv_write(kv, kv_heads=kv_heads, width=width), random(name)
    tokens = len(PLACES["block"])
    x = {"q": normal(r, (tokens, heads * (1 + gated), width))}
    if gated:
        x["q"][:, 1::2] = np.nan
    x |= {f"{part}_weight": normal(r, (width,)) for part in "qk"} if normed else {}
    angle = r.uniform(0, 6, (tokens, rotary // 2)).astype(np.float32)
    angle = np.concatenate([angle, angle], axis=1)
    x |= {"cos": np.cos(angle), "sin": np.sin(angle)} if rotary else {}
    pools = {name: x for name, x in written.arrays.items() if name.endswith(("blocks", "scales"))}
    # Keys are rounded by the norm, by the rotation, and by the pool.
    bounds = {"q": TURNED, "v_blocks": written.bounds["v_blocks"], "k_blocks": TURNED}
    if eight_bits(kv):
        bounds |= {"k_blocks": Bound(norm=1e-2, place=0.3), "k_scales": Bound(norm=5e-3, place=1e-2), "v_scales": SCALE}
    return dataclasses.replace(
        written,
        name=name,
        op=enter_op(gated=gated, normed=normed, rotated=rotary > 0),
        arrays=written.arrays | x,
        bounds=bounds,
        # What else is rounded is so by the kernel as by the definition, of the numbers that it is given.
        rounded=frozenset({*pools, "q", "k", "v"}),
    )
