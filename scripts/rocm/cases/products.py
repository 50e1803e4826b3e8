"""Cases of the products and of the sampler, which own no pools."""

import functools

import numpy as np

from gdnjax.pallas_kernels import matmul
from gdnjax.pallas_kernels.grouped_matmul import grouped_matmul
from gdnjax.pallas_kernels.gumbel_argmax import gumbel_argmax
from gdnjax.pallas_kernels.matmul import kernels as matmul_kernels
from gdnjax.pallas_kernels.matmul import tiles as matmul_tiles
from rocm.cases.case import EXACT, Bound, Case, Op
from rocm.cases.recurrent import LAYER, normal, random

PRODUCT = Bound(norm=2.5e-3, place=2**-7, flips=2e-2)
"""A float32 sum of some hundred products, in another order, rounded to bfloat16 once. Where products cancel, a sum's
float32 error is more of it."""

NOISE = Bound(norm=1e-6, place=1e-6)
"""Two logarithms."""


@functools.cache
def grouped_op() -> Op:
    def call(x, layer, backend):
        return {"out": grouped_matmul(x["x"], x["weight"], x["sizes"], backend=backend)}

    return call


def grouped(kind: str, depth: int = 256, width: int = 96) -> Case:
    """Four experts, one of them without rows, and rows past the sum of the sizes: both are poison."""
    name = f"grouped-{kind}-{depth}x{width}"
    r = random(name)
    sizes = np.array([5, 0, 20, 3] if kind == "few" else [70, 0, 130, 3], np.int32)
    used = int(sizes.sum())
    x = {"x": normal(r, (used + 4, depth)), "weight": normal(r, (4, width, depth), scale=depth**-0.5), "sizes": sizes}
    # XLA's ragged product on the CPU selects nothing: it spreads what nobody asks for.
    clean = {name: x[name].copy() for name in ("x", "weight")}
    x["x"][used:] = np.nan
    x["weight"][1] = np.nan
    seen = (np.arange(used + 4) < used)[:, None]
    return Case(name, grouped_op(), x, LAYER, {"out": PRODUCT}, seen={"out": seen}, clean=clean)


@functools.cache
def product_op(kind: str, count: int) -> Op:
    def call(x, layer, backend):
        matrices = [x[f"w{i}"] for i in range(count)]
        if kind == "swiglu":
            return {"out0": matmul.swiglu(x["x"], *matrices, backend=backend)}
        if kind == "wide" and not backend.is_reference:
            # Otherwise a product is wide from 4,097 outputs on.
            tiles = matmul_tiles.of(backend, x["x"].shape[0], x["x"].dtype)
            assert tiles is not None
            found = matmul_kernels.project(x["x"], matrices, tiles.wide, backend)
        else:
            found = matmul.project(x["x"], *matrices, backend=backend)
        return {f"out{i}": part for i, part in enumerate(found)}

    return call


def product(kind: str, rows: int, depth: int = 192, outputs: tuple[int, ...] = (80, 24)) -> Case:
    """Of kind "narrow", "wide", "split" (narrow, and so deep that its inputs are split) or "swiglu"."""
    name = f"matmul-{kind}-{depth}x{'+'.join(map(str, outputs))}-{rows}"
    r = random(name)
    x = {"x": normal(r, (rows, depth))}
    x |= {f"w{i}": normal(r, (n, depth), scale=depth**-0.5) for i, n in enumerate(outputs)}
    count = 1 if kind == "swiglu" else len(outputs)
    return Case(name, product_op(kind, len(outputs)), x, LAYER, {f"out{i}": PRODUCT for i in range(count)})


@functools.cache
def draw_op() -> Op:
    def call(x, layer, backend):
        draw = (x["logits"], x["temperature"], x.get("least"), x["seed"], x["position"])
        token, value, top = gumbel_argmax(*draw, first=5, backend=backend)
        return {"token": token, "value": value, "top": top}

    return call


def draw(*, bounded: bool = False, vocabulary: int = 3000) -> Case:
    """A greedy row and two that are drawn; `bounded`: with least logits, the last row left out."""
    name = f"draw-3x{vocabulary}" + "-bounded" * bounded
    r = random(name)
    x = {
        "logits": normal(r, (3, vocabulary), np.float32, 2.0),
        "temperature": np.array([0.0, 0.7, 1.3], np.float32),
        "seed": r.integers(0, 2**32, (3, 2), dtype=np.uint32),
        "position": np.array([0, 7, 123456], np.int32),
    }
    if bounded:
        x["least"] = np.array([0.5, 1.5, -np.inf], np.float32)
        x["logits"][2] = np.nan
    return Case(name, draw_op(), x, LAYER, {"token": EXACT, "value": NOISE, "top": NOISE})
