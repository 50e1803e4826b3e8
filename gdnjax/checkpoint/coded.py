"""Parameters that are codes and scales on the devices: which of a checkpoint, on what grid, the scales of each rank.

A rank's rows are not the file's (`mapping.py`), and it may cut blocks. So scales lie on a finer grid where need be: the
largest one on which every cell's rows, in the order that the rank has them, share a scale of the file. The numbers are
the same, and nothing is padded.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping

import jax
import numpy as np

from gdnjax import sharding
from gdnjax.checkpoint.mapping import Origin
from gdnjax.checkpoint.quantised import FLOAT8, FLOAT8_VALUES, QuantisedSource
from gdnjax.config.quantization import GRIDS, WHOLE, cell_of
from gdnjax.models import partition
from gdnjax.quantized import LARGEST, CodeFormat
from gdnjax.shapes import Params

OF_GATES = re.compile(r".*\.(in_proj_a|in_proj_b|f_a_proj|f_b_proj|g_a_proj|g_b_proj)\.weight")
"""Projections that are a small part of a layer's weights, and of which all of a head's state depends."""

MADE_AT_ONCE = 1 << 24
"""Numbers of a weight that are quantised at once: in float32 they are four times as large as their codes."""


def formats_of(
    source: QuantisedSource,
    stored_names: Mapping[str, str],
    origins: Mapping[str, Origin],
    shapes: Mapping[str, tuple[int, ...]],
    tp: int,
    *,
    expert_parallel: bool = False,
) -> dict[str, CodeFormat]:
    """How the parameters are held that the checkpoint has as codes, all of each. `shapes` are global."""
    formats = {}
    for name, shape in shapes.items():
        tensors = [stored_names[part.tensor] for part in origins[name].parts]
        if partition.CODED.fullmatch(name) and all(source.kind(tensor) is not None for tensor in tensors):
            codes = "float8_e4m3fn" if source.kind(tensors[0]) == "float8_e4m3fn" else "int8"
            grids = [source.grid(tensor) for tensor in tensors]
            ranks = _ranks(name, shape, tp, expert_parallel=expert_parallel)
            formats[name] = CodeFormat(codes, _grid(origins[name], grids, shape, ranks))
    return formats


def usual_formats(
    abstract: Params, tp: int, quantization: str, *, expert_parallel: bool = False
) -> dict[str, CodeFormat]:
    """FP8 as it is published, by parameter: all projections but those to the gates of heads.

    abstract        the parameters' global shapes, nothing of them as codes
    quantization    a name of `config.quantization.GRIDS`
    """
    formats = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]:
        name = sharding.path_name(path)
        if partition.CODED.fullmatch(name) and not OF_GATES.fullmatch(name):
            ranks = _ranks(name, leaf.shape, tp, expert_parallel=expert_parallel)
            axes = zip(leaf.shape[-2:], ranks, GRIDS[quantization], strict=True)
            rows, columns = (cell_of(size // count, cell, cut=count > 1) for size, count, cell in axes)
            formats[name] = CodeFormat("float8_e4m3fn", (rows, columns))
    return formats


def tensors_of(origins: Mapping[str, Origin], formats: Collection[str]) -> set[str]:
    """The tensors that are codes in a checkpoint whose parameters `formats` are, in module names: those of which
    nothing is a part of another parameter.
    """
    coded = {part.tensor for name, origin in origins.items() if name in formats for part in origin.parts}
    return coded - {part.tensor for name, origin in origins.items() if name not in formats for part in origin.parts}


def _ranks(name: str, shape: tuple[int, ...], tp: int, *, expert_parallel: bool) -> tuple[int, int]:
    """How many ranks share out the rows of a matrix, and how many its columns. Whole experts are not cut."""
    spec = partition.spec_of(name, expert_parallel=expert_parallel)
    rows, columns = (*spec, *(None for _ in shape))[: len(shape)][-2:]
    return tp if rows == sharding.AXIS else 1, tp if columns == sharding.AXIS else 1


def _grid(
    origin: Origin, grids: list[tuple[int, int]], shape: tuple[int, ...], ranks: tuple[int, int]
) -> tuple[int, int]:
    """The grid of a rank's matrices, of which `ranks` share out rows and columns."""
    index = _row_index(origin, shape)
    size = len(index) // ranks[0]
    changes = np.zeros(len(index), bool)
    parts = {(part.start[-2], part.box[-2], grid[0]) for part, grid in zip(origin.parts, grids, strict=True)}
    for start, extent, rows in parts:
        cell = np.where((index >= start) & (index < start + extent), (index - start) // rows, -1)
        changes[1:] |= cell[1:] != cell[:-1]
    places = np.flatnonzero(changes) % size
    rows = math.gcd(*places.tolist()) or size
    columns = math.gcd(*(columns for _, columns in grids))
    whole = WHOLE if columns >= shape[-1] else columns
    return cell_of(size, rows, cut=ranks[0] > 1), cell_of(shape[-1] // ranks[1], whole, cut=ranks[1] > 1)


def _row_index(origin: Origin, shape: tuple[int, ...]) -> np.ndarray:
    """The checkpoint's row of each row of a parameter's matrices."""
    return origin.rows.index if origin.rows.axis == len(shape) - 2 else np.arange(shape[-2])


def read_scales(
    source: QuantisedSource,
    stored_names: Mapping[str, str],
    origin: Origin,
    grid: tuple[int, int],
    shape: tuple[int, ...],
    block: tuple[slice, ...],
) -> np.ndarray:
    """`block` of a parameter's global array of scales. `shape` is that of its codes."""
    *lead, rows, columns = block
    row = _row_index(origin, shape)[np.arange(rows.start, rows.stop) * grid[0]]
    column = np.arange(columns.start, columns.stop) * grid[1]
    values = np.zeros(tuple(part.stop - part.start for part in block), np.float32)
    for part in origin.parts:
        stored = stored_names[part.tensor]
        mine = np.flatnonzero((row >= part.start[-2]) & (row < part.start[-2] + part.box[-2]))
        size = source.grid(stored)
        cells = np.ix_((row[mine] - part.start[-2]) // size[0], column // size[1])
        places = np.ix_(mine, np.arange(len(column)))
        if not lead:
            values[places] = source.scales(stored)[cells]
            continue
        low, high = max(lead[0].start, part.start[0]), min(lead[0].stop, part.start[0] + part.box[0])
        if low < high:
            scales = source.scales(stored)
            scales = scales.reshape(part.box[0], *scales.shape[-2:])
            for expert in range(low, high):
                values[expert - lead[0].start][places] = scales[expert - part.start[0]][cells]
    return values


def quantise_rows(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[..., o, i] numbers -> codes in float8_e4m3fn and scales [..., o, 1] float32: the largest of a row is 448."""
    weight = np.asarray(weight, np.float32)
    largest = np.maximum(weight.max(-1, keepdims=True), -weight.min(-1, keepdims=True))
    scale = np.where(largest > 0, largest / np.float32(LARGEST["float8_e4m3fn"]), np.float32(1))
    return (weight / scale).astype(FLOAT8), scale


def make_codes(
    read: Callable[[tuple[slice, ...]], np.ndarray], shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """A weight [..., o, i] in float8_e4m3fn, its scales [..., o, 1], and the squares of its error and of itself. Rows
    are read whole, some at a time: `read` takes a slice for each axis, and gives float32.

    Raises ValueError where a number is not finite.
    """
    codes, scale = np.empty(shape, FLOAT8), np.empty((*shape[:-1], 1), np.float32)
    off = total = 0.0
    for start in range(0, shape[0], step := max(1, MADE_AT_ONCE // math.prod(shape[1:]))):
        part = slice(start, min(start + step, shape[0]))
        weight = read((part, *(slice(0, size) for size in shape[1:])))
        # What is not finite shows in the sums.
        with np.errstate(invalid="ignore"):
            codes[part], scale[part] = quantise_rows(weight)
            one, other = squared_error(weight, codes[part], scale[part])
        off, total = off + one, total + other
    if not math.isfinite(total):
        raise ValueError("a number is NaN or infinite, and no code stands for it; the file is damaged")
    return codes, scale, (off, total)


def relative_error(errors: Collection[tuple[float, float]]) -> float:
    """The root mean square of what quantising has moved by that of the weights, of their squares."""
    return math.sqrt(sum(off for off, _ in errors) / max(sum(size for _, size in errors), 1e-30))


def squared_error(weight: np.ndarray, codes: np.ndarray, scale: np.ndarray) -> tuple[float, float]:
    """Sums of squares of what quantising has moved, and of the weight."""
    weight = np.asarray(weight, np.float32)
    off = (FLOAT8_VALUES[codes.view(np.uint8)] * scale - weight).ravel()
    return float(np.dot(off, off)), float(np.dot(weight.ravel(), weight.ravel()))
