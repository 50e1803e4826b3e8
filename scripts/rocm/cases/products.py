"""Cases of the products and of the sampler, which own no pools."""

import dataclasses
import functools
from typing import Any
from unittest import mock

import numpy as np

from gdnjax.backend import Backend
from gdnjax.pallas_kernels import matmul
from gdnjax.pallas_kernels.expert_routing import Rule, choose_experts, sort_by_expert
from gdnjax.pallas_kernels.grouped_matmul import grouped_matmul
from gdnjax.pallas_kernels.gumbel_argmax import gumbel_argmax
from gdnjax.pallas_kernels.gumbel_argmax import tiles as draw_tiles
from gdnjax.pallas_kernels.matmul import kernels as matmul_kernels
from gdnjax.pallas_kernels.matmul import tiles as matmul_tiles
from gdnjax.pallas_kernels.normed import Gated, GateUp, Normed, numbers, summed
from gdnjax.pallas_kernels.row_forms import HALVES, WIDE, prepared, rows_of
from gdnjax.quantized import Quantized, Weight
from rocm.cases.case import BFLOAT16, EXACT, FLOAT8, Arrays, Bound, Case, Op, poison
from rocm.cases.recurrent import LAYER, normal, random

PRODUCT = Bound(norm=2.5e-3, place=2**-7, flips=2e-2)
"""A float32 sum of some hundred products, in another order, rounded to bfloat16 once. Where products cancel, a sum's
float32 error is more of it."""

LOGITS = Bound(norm=1e-6, place=1e-5)
"""The sum as it is."""

NORMED = Bound(norm=2.5e-3, place=2**-7, flips=1e-2)
"""Rounded to bfloat16 once."""

SUM = Bound(norm=5e-3, place=2**-5)
"""A term is rounded to bfloat16, and so is what comes of adding it: where the two cancel, the first is more of it."""

CHOICE = Bound(norm=1e-6, place=2e-6)
"""Exponentials, and a sum of them."""

NOISE = Bound(norm=1e-6, place=1e-6)
"""Two logarithms."""


Grid = tuple[int, int]


def coded(r: np.random.Generator, shape: tuple[int, ...], dtype, grid: Grid) -> dict[str, np.ndarray]:
    """Codes of a matrix or of several, and scales that make them about as large as `normal` would, each its own."""
    cells = tuple(-(-size // cell) for size, cell in zip(shape[-2:], grid, strict=True))
    if np.dtype(dtype) == FLOAT8:
        codes, typical = r.normal(0, 32, shape).astype(FLOAT8), 32
    else:
        codes, typical = r.integers(-127, 128, shape, dtype=np.int8), 73
    scale = r.uniform(0.25, 2, (*shape[:-2], *cells)) / (typical * shape[-1] ** 0.5)
    return {"codes": codes, "scale": scale.astype(np.float32)}


def matrix(x: Arrays, name: str, grid: Grid | None) -> Weight:
    """An op's argument: codes where there is a grid."""
    return x[name] if grid is None else Quantized(x[f"{name}.codes"], x[f"{name}.scale"], grid)


def exact(x: Arrays, name: str, grid: Grid | None) -> np.ndarray:
    """The matrix in float64, scale by scale: none of the package's ways from codes to numbers."""
    if grid is None:
        return x[name].astype(np.float64)
    codes, scale = x[f"{name}.codes"].astype(np.float64), x[f"{name}.scale"].astype(np.float64)
    row, column = (np.arange(size) // cell for size, cell in zip(codes.shape[-2:], grid, strict=True))
    return codes * scale[..., row[:, None], column[None, :]]


@functools.cache
def grouped_op(grid: Grid | None, expected: int | None) -> Op:
    def call(x, layer, backend):
        weight = matrix(x, "weight", grid)
        taken = {"rows": x.get("rows"), "expected_rows": expected}
        return {"out": grouped_matmul(x["x"], weight, x["sizes"], **taken, backend=backend)}

    return call


def grouped(
    kind: str,
    depth: int = 256,
    width: int = 96,
    *,
    codes: Any = None,
    grid: Grid = (64, 64),
    expected: int | None = None,
) -> Case:
    """Four experts, one of them without rows, and rows past the sum of the sizes: both are poison.

    Of `codes` of that type, the values are those of float64. With `expected` rows, of which there are more, rows stand
    in no order, and are taken from there.
    """
    name = f"grouped-{kind}-{depth}x{width}{_named(codes, grid)}{'' if expected is None else '-taken'}"
    r = random(name)
    sizes = np.array([5, 0, 20, 3] if kind == "few" else [70, 0, 130, 3], np.int32)
    used = int(sizes.sum())
    shape, row = (4, width, depth), np.arange(used + 4)
    x: dict[str, np.ndarray] = {"x": normal(r, (used + 4, depth))}
    if codes is None:
        x["weight"] = normal(r, shape, scale=depth**-0.5)
    else:
        x |= {f"weight.{part}": found for part, found in coded(r, shape, codes, grid).items()}
    x["sizes"] = sizes
    place = row
    if expected is not None:
        place = x["rows"] = r.permutation(used + 4).astype(np.int32)
    # XLA's ragged product on the CPU selects nothing: it spreads what nobody asks for.
    clean = {name: found.copy() for name, found in x.items() if name not in ("sizes", "rows")}
    x["x"][place[used:]] = np.nan
    for name_of, found in x.items():
        if name_of.startswith("weight"):
            found[1] = poison(found.shape[1:], found.dtype)
    seen = (row < used)[:, None]

    def by_hand(arrays: Arrays) -> dict[str, np.ndarray]:
        weight = exact(arrays, "weight", grid)[np.minimum(np.searchsorted(np.cumsum(sizes), row, "right"), 3)]
        return {"out": np.einsum("td,tfd->tf", arrays["x"][place].astype(np.float64), weight)}

    return Case(
        name,
        grouped_op(None if codes is None else grid, expected),
        x,
        LAYER,
        {"out": PRODUCT},
        seen={"out": seen},
        clean=clean,
        exact=None if codes is None else by_hand,
    )


@functools.cache
def product_op(kind: str, grids: tuple[Grid | None, ...]) -> Op:
    def call(x, layer, backend):
        matrices = [matrix(x, f"w{i}", grid) for i, grid in enumerate(grids)]
        # What is said to be wide or gated is so in models from so many outputs on as occupy a device.
        tiles = matmul_tiles.of(backend, x["x"], *matrices)
        if kind == "swiglu":
            if backend.is_reference:
                return {"out0": matmul.swiglu(x["x"], *matrices, backend=backend)}
            assert tiles is not None
            assert tiles.gated is not None
            return {"out0": matmul_kernels.swiglu(x["x"], matrices[0], matrices[1], tiles.gated, backend)}
        dtype = np.float32 if kind == "logits" else x["x"].dtype
        if kind in ("wide", "logits") and not backend.is_reference:
            assert tiles is not None
            found = matmul_kernels.project(x["x"], matrices, tiles.wide, backend, dtype)
        else:
            found = matmul.project(x["x"], *matrices, out_dtype=dtype, backend=backend)
        return {f"out{i}": part for i, part in enumerate(found)}

    return call


def product(
    kind: str,
    rows: int,
    depth: int = 192,
    outputs: tuple[int, ...] = (80, 24),
    *,
    codes: Any = None,
    grid: Grid = (64, 64),
    numbers: tuple[int, ...] = (),
) -> Case:
    """Of kind "narrow", "wide", "logits" (wide, in float32), "split" (narrow, and so deep that its inputs are split) or
    "swiglu".

    Of `codes` of that type, the values are those of float64; the matrices that `numbers` counts are of bfloat16.
    """
    name = f"matmul-{kind}-{depth}x{'+'.join(map(str, outputs))}{_named(codes, grid)}"
    name += "".join(f"-w{i}" for i in numbers) + f"-{rows}"
    r = random(name)
    grids = tuple(None if codes is None or i in numbers else grid for i in range(len(outputs)))
    x: dict[str, np.ndarray] = {"x": normal(r, (rows, depth))}
    for i, (n, own) in enumerate(zip(outputs, grids, strict=True)):
        if own is None:
            x[f"w{i}"] = normal(r, (n, depth), scale=depth**-0.5)
        else:
            x |= {f"w{i}.{part}": found for part, found in coded(r, (n, depth), codes, own).items()}
    return _product(name, kind, x, grids, LOGITS if kind == "logits" else PRODUCT)


def every_code(codes: Any, rows: int = 64) -> Case:
    """Each row takes out one input, so that every code there is comes through as it is, times a power of two."""
    grid, depth, outputs = (16, 16), 64, 80
    name = f"matmul-every-code{_named(codes, grid)}-{rows}"
    bits = np.arange(outputs * depth).reshape(outputs, depth).astype(np.uint8)
    found = bits.view(codes)
    # A zero in place of NaN: elsewhere in its row it meets zeros.
    found = np.where(np.isnan(found.astype(np.float32)), np.zeros((), codes), found)
    x = {
        "x": np.eye(rows, depth).astype(BFLOAT16),
        "w0.codes": found,
        "w0.scale": np.exp2(random(name).integers(-20, 20, (5, 4))).astype(np.float32),
    }
    return _product(name, "narrow", x, (grid,), EXACT)


def _product(name: str, kind: str, x: dict[str, np.ndarray], grids: tuple[Grid | None, ...], bound: Bound) -> Case:
    def by_hand(arrays: Arrays) -> dict[str, np.ndarray]:
        rows = arrays["x"].astype(np.float64)
        found = [rows @ exact(arrays, f"w{i}", grid).T for i, grid in enumerate(grids)]
        if kind == "swiglu":
            gate, up = found
            found = [gate / (1 + np.exp(-gate)) * up]
        return {f"out{i}": part for i, part in enumerate(found)}

    count = 1 if kind == "swiglu" else len(grids)
    return Case(
        name,
        product_op(kind, grids),
        x,
        LAYER,
        {f"out{i}": bound for i in range(count)},
        exact=by_hand if any(grids) else None,
    )


def normed_op(x: Arrays, layer: int, backend: Backend) -> dict[str, Any]:
    """The norm in front of a product, alone."""
    rows = Normed(x["x"], x["weight"], 1e-6, 1.0, x.get("added"))
    if backend.is_reference:
        return {"whole": summed(rows.x, rows.added), "out": numbers(rows)}
    whole, made = prepared(rows, WIDE, backend, wide=True)
    return {"whole": whole, "out": numbers(made)}


def normed(width: int, dtype: Any = BFLOAT16, parts: int = 0) -> Case:
    """Rows of several sizes, or of one, to which a term in so many parts is added before."""
    name = f"matmul-normed-3x{width}-{np.dtype(dtype).name}" + f"-{parts}-parts" * (parts > 0)
    r = random(name)
    x = {"x": normal(r, (3, width), dtype), "weight": normal(r, (width,), dtype)}
    if not parts:
        x["x"] *= np.array([[1e-3], [1], [30]], dtype)
        bounds = {"whole": EXACT, "out": NORMED if dtype == BFLOAT16 else NOISE}
    else:
        x["added"] = normal(r, (parts, 3, width), np.float32)
        bound = SUM if dtype == BFLOAT16 else NOISE
        bounds = {"whole": bound, "out": bound}
    return Case(name, normed_op, x, LAYER, bounds)


def halved(rows: Gated | GateUp, backend: Backend) -> dict[str, Any]:
    """The rows that they stand for, as they are and put together again from their halves."""
    if backend.is_reference:
        return {"out": numbers(rows)}
    wide, formed, factor = rows_of(rows, HALVES, backend, wide=True)
    both = (formed.astype(np.float32) * factor[:, None]).reshape(wide.shape[0], 2, -1)
    return {"out": wide, "formed": both.sum(1)}


def gated_op(x: Arrays, layer: int, backend: Backend) -> dict[str, Any]:
    """The gated norm of rows that become halves."""
    return halved(Gated(x["x"], x["gate"], x["weight"], 1e-6, "silu"), backend)


def gated(heads: int, width: int) -> Case:
    """Three rows of heads; no chip of AMD's has a table that asks for it."""
    name = f"matmul-gated-3x{heads}x{width}"
    r = random(name)
    x = {"x": normal(r, (3, heads, width)), "gate": normal(r, (3, heads * width)), "weight": normal(r, (width,))}

    def by_hand(arrays: Arrays) -> dict[str, np.ndarray]:
        o, z, weight = (arrays[part].astype(np.float64) for part in ("x", "gate", "weight"))
        o = o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-6) * weight
        out = o.reshape(z.shape) * z / (1 + np.exp(-z))
        return {"out": out, "formed": out}

    return Case(name, gated_op, x, LAYER, {"out": NORMED, "formed": Bound(NORMED.norm, NORMED.place)}, exact=by_hand)


def activated_op(x: Arrays, layer: int, backend: Backend) -> dict[str, Any]:
    """The activation of rows that become halves."""
    return halved(GateUp.of(x["both"]), backend)


def activated(width: int) -> Case:
    """Three rows of gate and up; no chip of AMD's has a table that asks for it."""
    name = f"matmul-activated-3x{width}"

    def by_hand(arrays: Arrays) -> dict[str, np.ndarray]:
        gate, up = np.split(arrays["both"].astype(np.float64), 2, axis=1)
        out = gate / (1 + np.exp(-gate)) * up
        return {"out": out, "formed": out}

    x = {"both": normal(random(name), (3, 2 * width))}
    return Case(
        name, activated_op, x, LAYER, {"out": NORMED, "formed": Bound(NORMED.norm, NORMED.place)}, exact=by_hand
    )


def _named(codes: Any, grid: Grid) -> str:
    """How a case's name tells of codes."""
    return "" if codes is None else f"-{np.dtype(codes).name.removesuffix('_e4m3fn')}-{grid[0]}x{grid[1]}"


@functools.cache
def routing(tokens: int, experts: int, rule: Rule, *, biased: bool = False) -> Case:
    """Choices of tokens, of which every third is padding: its logits are poison. And their pairs in order."""
    grouping = f"-{rule.groups}groups" if rule.groups > 1 else ""
    name = f"routing-{tokens}x{experts}-{rule.scoring}{rule.top}{grouping}" + "-biased" * biased
    r = random(name)
    valid = np.arange(tokens) % 3 != 2
    x = {"logits": normal(r, (tokens, experts), np.float32, 2.0), "valid": valid}
    if biased:
        x["bias"] = normal(r, (experts,), np.float32, 0.3)
    clean = {"logits": x["logits"].copy()}
    x["logits"][~valid] = np.nan
    seen = {"weight": valid[:, None]}
    bounds = {"weight": CHOICE, "expert": EXACT, "token": EXACT, "place": EXACT, "sizes": EXACT}
    return Case(name, routing_op(rule), x, LAYER, bounds, seen=seen, clean=clean)


@functools.cache
def routing_op(rule: Rule) -> Op:
    def call(x, layer, backend):
        weight, expert = choose_experts(x["logits"], x.get("bias"), x["valid"], rule, backend=backend)
        token, place, sizes = sort_by_expert(expert, x["logits"].shape[1], backend=backend)
        return {"weight": weight, "expert": expert, "token": token, "place": place, "sizes": sizes}

    return call


def draw_op(*, sparing: bool = False) -> Op:
    def call(x, layer, backend):
        draw = (x["logits"], x["temperature"], x.get("least"), x["seed"], x["position"])
        tile = dataclasses.replace(draw_tiles.of(backend), sparing=sparing)
        with mock.patch.object(draw_tiles, "of", return_value=tile):
            token, value, top = gumbel_argmax(*draw, first=5, backend=backend)
        return {"token": token, "value": value, "top": top}

    return call


def draw(*, bounded: bool = False, sparing: bool = False, vocabulary: int = 3000) -> Case:
    """A greedy row and two that are drawn; `bounded`: with least logits, the last row left out. `sparing`: see Tile."""
    name = f"draw-3x{vocabulary}" + "-bounded" * bounded + "-sparing" * sparing
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
    if sparing:
        # Some stand out so far that of others no noise is made.
        x["logits"][:, 5::700] += 30
    return Case(name, draw_op(sparing=sparing), x, LAYER, {"token": EXACT, "value": NOISE, "top": NOISE})
