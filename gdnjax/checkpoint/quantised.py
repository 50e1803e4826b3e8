"""Quantised weights of a checkpoint: their codes and scales, and code times scale as tensors of float32, made when a
slice is read.

Which tensors belong to a weight [N, K], by quant_method (`gdnjax.config.quantization`); experts that are stored as one
have the axis of the experts before all of these:

  fp8                 weight F8_E4M3, weight_scale_inv [N / rows, K / columns], a multiplier in spite of its name
  quark               weight F8_E4M3, weight_scale [N], or [N / rows, K / columns]
  compressed-tensors  weight F8_E4M3 or I8, weight_scale [N, 1], or [N / rows, K / columns]
                      weight_packed I32 [N, K / 8], the lowest bits first, 8 above the code, weight_scale [N, K / group]
                      and weight_shape; without symmetry weight_zero_point I32 [N / 8, K / group]
  gptq                qweight I32 [K / 8, N], qzeros I32 [K / group, N / 8], scales [K / group, N]; g_idx is K / group
  awq                 qweight I32 [K, N / 8], qzeros I32 [K / group, N / 8], scales [K / group, N]; the eight columns of
                      a number in the order 0, 2, 4, 6, 1, 3, 5, 7

Scales are F32, BF16, F16, or U8: the exponent of a power of two (ue8m0). The last row and column of scales may be of
fewer weights. A weight is quantised where its scale is there, whatever lists in config.json say.
"""

import collections
import dataclasses
import math
import re
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from gdnjax.checkpoint.sources import ALLOWED_DTYPES, TensorSource, abbreviate, read_whole
from gdnjax.config.quantization import WHOLE, Quantization

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
FLOAT8_VALUES = np.arange(256, dtype=np.uint8).view(FLOAT8).astype(np.float32)

SCALE_DTYPES = (*ALLOWED_DTYPES, np.dtype(np.float16), np.dtype(np.uint8))

PER_WORD = 8
"""Codes of 4 bits in an int32."""

AWQ_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""Where the codes of eight neighbouring columns stand in AWQ's word."""

BY_COLUMNS = ("gptq", "awq")
"""Methods whose tensors have the inputs first."""

# What the name of a quantised weight's scale ends in.
SCALES = {"fp8": "_scale_inv", "quark": "_scale", "compressed-tensors": "_scale", "gptq": "scales", "awq": "scales"}

OF_ACTIVATIONS = re.compile(r".*(?:\.|_)(?:input_scale|output_scale|k_scale|v_scale|activation_scale)(?:_inv)?")
"""Scales of what is not quantised here: activations, and cached keys and values."""

Slices: TypeAlias = tuple[slice, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Weight:
    """A quantised weight: the names of its tensors, its shape, and the weights that share a scale."""

    codes: str
    scale: str
    shape: tuple[int, ...]
    grid: tuple[int, int]
    zeros: str | None = None


class QuantisedSource:
    """The tensors of a quantised checkpoint under the names that they would have without being so. A `TensorSource`,
    by which code times scale is read; `codes`, `scales` and `grid` give them apart.

    `kind(name)` is what the codes of a tensor are in the file, None where it is stored as it is. Raises ValueError at
    construction where tensors do not fit together or the configuration, by their names, and from `read` and `codes`
    where a code is NaN.
    """

    def __init__(self, source: TensorSource, quantization: Quantization):
        self._source = source
        self._quantization = quantization
        self._weights, self._names = _sort(source, quantization)

    def names(self) -> tuple[str, ...]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights[name].shape if name in self._weights else self._source.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.float32) if name in self._weights else self._source.dtype(name)

    def kind(self, name: str) -> str | None:
        return self._quantization.codes if name in self._weights else None

    def read(self, name: str, index: Slices) -> np.ndarray:
        if name not in self._weights:
            return self._source.read(name, index)
        weight = self._weights[name]
        scale = self._read_scales(weight, index)
        for axis, size in ((-2, weight.grid[0]), (-1, weight.grid[1])):
            scale = _spread(scale, index[axis], size, axis)
        return _numbers(self.codes(name, index)) * scale

    def grid(self, name: str) -> tuple[int, int]:
        """Rows and columns of a quantised weight that share a scale; with one for all of an axis, its size."""
        weight = self._weights[name]
        rows, columns = (cell or size for cell, size in zip(weight.grid, weight.shape[-2:], strict=True))
        return rows, columns

    def codes(self, name: str, index: Slices) -> np.ndarray:
        """Slices of a quantised weight's codes, float8_e4m3fn or int8; of int4 the code less its zero point."""
        weight = self._weights[name]
        if self._quantization.method in BY_COLUMNS:
            return self._codes_by_columns(weight, index)
        if self._quantization.codes == "int4":
            return self._codes_packed(weight, index)
        codes = self._source.read(weight.codes, index)
        # Either sign. A maximum is found without a copy of the size of a mask.
        if codes.dtype == FLOAT8 and codes.size and (codes.view(np.uint8) & 0x7F).max() == 0x7F:
            raise ValueError(
                f"{weight.codes}: a code is NaN; the file is damaged, or was quantised from weights that were"
            )
        return codes

    def scales(self, name: str) -> np.ndarray:
        """All scales of a quantised weight [..., N / rows, K / columns], float32."""
        weight = self._weights[name]
        return self._read_scales(weight, tuple(slice(0, size) for size in weight.shape))

    def __enter__(self) -> "QuantisedSource":
        self._source.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._source.__exit__(*exception)

    def _read_scales(self, weight: _Weight, index: Slices) -> np.ndarray:
        """Those of the cells that the slices touch, with both axes."""
        stored = self._source.shape(weight.scale)
        *lead, rows, columns = index
        parts = [_cells(part, size) for part, size in zip((rows, columns), weight.grid, strict=True)]
        if self._quantization.method in BY_COLUMNS:
            return self._scale_values(weight.scale, (parts[1], rows)).T
        if math.prod(stored) == 1:
            return self._scale_values(weight.scale, tuple(slice(0, 1) for _ in stored)).reshape(
                (1,) * len(weight.shape)
            )
        flat = len(stored) < len(weight.shape)
        found = self._scale_values(weight.scale, (*lead, parts[0]) if flat else (*lead, *parts))
        return found[..., None] if flat else found

    def _scale_values(self, name: str, index: Slices) -> np.ndarray:
        scales = np.asarray(self._source.read(name, index))
        if scales.dtype == np.uint8:
            return np.asarray(np.ldexp(np.float32(1), scales.astype(np.int32) - 127))
        return np.asarray(scales, np.float32)

    def _codes_packed(self, weight: _Weight, index: Slices) -> np.ndarray:
        *lead, rows, columns = index
        words = self._source.read(weight.codes, (*lead, rows, _cells(columns, PER_WORD)))
        codes = _trim(_unpack(words, -1), columns, PER_WORD, -1)
        zero: Any = np.int8(8)
        if weight.zeros is not None:
            groups = _cells(columns, weight.grid[1])
            zeros = _unpack(self._source.read(weight.zeros, (*lead, _cells(rows, PER_WORD), groups)), -2)
            zero = _spread(_trim(zeros, rows, PER_WORD, -2), columns, weight.grid[1], -1)
        return codes - zero

    def _codes_by_columns(self, weight: _Weight, index: Slices) -> np.ndarray:
        outputs, inputs = index
        awq, group = self._quantization.method == "awq", weight.grid[1]
        groups, packed = _cells(inputs, group), _cells(outputs, PER_WORD)
        if awq:
            words = self._source.read(weight.codes, (inputs, packed))
            codes = _trim(_unpack(words, 1, AWQ_ORDER), outputs, PER_WORD, 1)
        else:
            words = self._source.read(weight.codes, (_cells(inputs, PER_WORD), outputs))
            codes = _trim(_unpack(words, 0), inputs, PER_WORD, 0)
        assert weight.zeros is not None
        zeros = _unpack(self._source.read(weight.zeros, (groups, packed)), 1, AWQ_ORDER if awq else None)
        zeros = _trim(zeros, outputs, PER_WORD, 1) + np.int8(self._quantization.zero_shift)
        return np.ascontiguousarray((codes - _spread(zeros, inputs, group, 0)).T)


def weights_of(source: TensorSource, quantization: Quantization | None) -> TensorSource:
    """The weights of a checkpoint as floating-point tensors, whether they are quantised or not. Raises ValueError where
    they are in another way than `quantization` says.
    """
    if quantization is not None:
        return QuantisedSource(source, quantization)
    other = [f"{name} ({source.dtype(name)})" for name in source.names() if source.dtype(name) not in ALLOWED_DTYPES]
    if other:
        raise ValueError(
            "unsupported dtype without a quantization_config in config.json; allowed: float32, bfloat16. Tensors: "
            f"{abbreviate(other)}"
        )
    return source


def _numbers(codes: np.ndarray) -> np.ndarray:
    return FLOAT8_VALUES[codes.view(np.uint8)] if codes.dtype == FLOAT8 else codes.astype(np.float32)


def _cells(part: slice, size: int) -> slice:
    """The cells of `size` places that a slice of them touches."""
    return slice(0, 1) if size == WHOLE else slice(part.start // size, -(-part.stop // size))


def _spread(cells: np.ndarray, part: slice, size: int, axis: int) -> np.ndarray:
    """A value for each place of a slice, of those of the cells that it touches; as they are where one is for all."""
    return cells if size == WHOLE else _trim(np.repeat(cells, size, axis=axis), part, size, axis)


def _trim(places: np.ndarray, part: slice, size: int, axis: int) -> np.ndarray:
    """Of the places of whole cells those of the slice."""
    begin = part.start - part.start // size * size
    index: list[slice] = [slice(None)] * places.ndim
    index[axis] = slice(begin, begin + part.stop - part.start)
    return places[tuple(index)]


def _unpack(words: np.ndarray, axis: int, order: np.ndarray | None = None) -> np.ndarray:
    """[..., n, ...] int32 -> [..., 8 n, ...] int8: the 4-bit codes of each, the lowest bits first or in `order`."""
    axis %= words.ndim
    shifts = (4 * (np.arange(PER_WORD) if order is None else order)).astype(np.uint32)
    shifts = shifts.reshape((PER_WORD,) + (1,) * (words.ndim - 1 - axis))
    codes = (np.expand_dims(words.view(np.uint32), axis + 1) >> shifts & 0xF).astype(np.int8)
    return codes.reshape(*words.shape[:axis], words.shape[axis] * PER_WORD, *words.shape[axis + 1 :])


def _sort(source: TensorSource, quantization: Quantization) -> tuple[dict[str, _Weight], tuple[str, ...]]:
    """The quantised weights by the name that each stands for, and the names of all tensors."""
    stored = set(source.names())
    weights: dict[str, _Weight] = {}
    used: set[str] = set()
    problems: dict[str, list[str]] = collections.defaultdict(list)
    for name in source.names():
        base = _base_of(name, quantization)
        if base is None:
            continue
        names = _tensors_of(base, quantization)
        used |= {part for part in names.values() if part in stored}
        weight = f"{base}.weight" if quantization.method in BY_COLUMNS else base
        absent = [part for key, part in names.items() if part not in stored and key != "indices"]
        if absent:
            problems["lack what belongs to them"].append(f"{name} (no {', '.join(absent)})")
        elif weight in stored and weight != names["codes"]:
            problems["are stored twice"].append(weight)
        else:
            try:
                found = {key: part for key, part in names.items() if part in stored}
                weights[weight] = _weight_of(source, found, quantization)
            except ValueError as error:
                problems["do not fit"].append(str(error))
    plain = [name for name in source.names() if name not in used and not OF_ACTIVATIONS.fullmatch(name)]
    for name in plain:
        if (dtype := source.dtype(name)) not in ALLOWED_DTYPES:
            what = "are neither float32 nor bfloat16" if dtype == np.float16 else "have no scale"
            problems[what].append(f"{name} ({dtype})")
    if problems:
        told = ". ".join(f"Tensors that {what}: {abbreviate(names)}" for what, names in problems.items())
        raise ValueError(f"quantised as {quantization.method} ({quantization.codes}): {told}")
    return weights, (*plain, *weights)


def _base_of(name: str, quantization: Quantization) -> str | None:
    """The weight whose scale this is; of GPTQ and AWQ the module."""
    suffix = SCALES[quantization.method]
    if quantization.method in BY_COLUMNS:
        return name.removesuffix(f".{suffix}") if name.endswith(f".{suffix}") else None
    if not name.endswith(suffix) or OF_ACTIVATIONS.fullmatch(name):
        return None
    return name.removesuffix(suffix)


def _tensors_of(base: str, quantization: Quantization) -> dict[str, str]:
    """What belongs to one weight, by what it is for."""
    if quantization.method in BY_COLUMNS:
        names = {"codes": f"{base}.qweight", "scale": f"{base}.scales", "zeros": f"{base}.qzeros"}
        return names | ({"indices": f"{base}.g_idx"} if quantization.method == "gptq" else {})
    scale = {"scale": base + SCALES[quantization.method]}
    if quantization.codes != "int4":
        return {"codes": base, **scale}
    names = {"codes": f"{base}_packed", "shape": f"{base}_shape", "indices": f"{base}_g_idx", **scale}
    return names if quantization.symmetric else names | {"zeros": f"{base}_zero_point"}


def _weight_of(source: TensorSource, names: dict[str, str], quantization: Quantization) -> _Weight:
    """Raises ValueError where the tensors' shapes, dtypes or order are not those of a weight."""
    codes, scale = names["codes"], names["scale"]
    expected = {"float8_e4m3fn": FLOAT8, "int8": np.dtype(np.int8), "int4": np.dtype(np.int32)}[quantization.codes]
    if source.dtype(codes) != expected:
        raise ValueError(f"{codes} is {source.dtype(codes)}, expected {expected}")
    if source.dtype(scale) not in SCALE_DTYPES:
        raise ValueError(f"{scale} is {source.dtype(scale)}, expected one of {', '.join(map(str, SCALE_DTYPES))}")
    shape = _shape_of(source, names, quantization)
    if len(shape) < 2:
        raise ValueError(f"{codes} has the shape {shape}, which is no matrix")
    by_columns = quantization.method in BY_COLUMNS
    grid = next((grid for grid in quantization.grids if _fits(source.shape(scale), shape, grid, by_columns)), None)
    if grid is None:
        allowed = " or ".join(f"{rows or 'all'} x {columns or 'all'}" for rows, columns in quantization.grids)
        raise ValueError(
            f"{scale} is {source.shape(scale)} for weights {shape}; expected one for each {allowed} of them"
        )
    zeros = names.get("zeros")
    if zeros is not None:
        groups = _count(shape[-1], grid[1])
        packed = -(-shape[-2] // PER_WORD)
        wanted = (groups, packed) if by_columns else (*shape[:-2], packed, groups)
        if source.shape(zeros) != wanted or source.dtype(zeros) != np.int32:
            raise ValueError(f"{zeros} is {source.dtype(zeros)} {source.shape(zeros)}, expected int32 {wanted}")
    indices = names.get("indices")
    if indices is not None:
        size = grid[1] or shape[-1]
        if not np.array_equal(read_whole(source, indices), np.arange(shape[-1]) // size):
            raise ValueError(f"{indices} orders the inputs by activation, which is not supported")
    return _Weight(codes=codes, scale=scale, shape=shape, grid=grid, zeros=zeros)


def _shape_of(source: TensorSource, names: dict[str, str], quantization: Quantization) -> tuple[int, ...]:
    stored = source.shape(names["codes"])
    if quantization.codes != "int4" or len(stored) < 2:
        return stored
    if quantization.method == "gptq":
        return stored[1], stored[0] * PER_WORD
    if quantization.method == "awq":
        return stored[1] * PER_WORD, stored[0]
    shape = tuple(int(size) for size in read_whole(source, names["shape"]))
    if (*shape[:-1], -(-shape[-1] // PER_WORD)) != stored:
        raise ValueError(f"{names['codes']} is {stored}, and {names['shape']} says {shape}")
    return shape


def _count(size: int, cell: int) -> int:
    return 1 if cell == WHOLE else -(-size // cell)


def _fits(scale: tuple[int, ...], shape: tuple[int, ...], grid: tuple[int, int], by_columns: bool) -> bool:
    rows, columns = (_count(size, cell) for size, cell in zip(shape[-2:], grid, strict=True))
    if by_columns:
        return scale == (columns, rows)
    lead = shape[:-2]
    # One column of scales may be left out, and one scale may have no axis at all.
    return (
        scale == (*lead, rows, columns)
        or (columns == 1 and scale == (*lead, rows))
        or (rows * columns == 1 and math.prod(scale) == 1 and len(scale) <= 1 and not lead)
    )
