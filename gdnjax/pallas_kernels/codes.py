"""What kernels of products share about weights of eight bits: how codes meet rows, and where their scales lie.

Three ways, by the form that rows are given. None of them loses anything of a row of bfloat16:

  wide      rows as they are; codes become numbers of their dtype in the tile. For any codes and rows.
  float16   rows of bfloat16 become float16, a power of two taken out, and codes do in the tile: of float8_e4m3fn that
            is one instruction for two, where bfloat16 takes several.
  halves    codes of float8_e4m3fn stay what they are, on matrix units that take them. A row, a power of two taken out,
            is the sum of two rows of float8_e4m3fn: the first is rounded to 4 significant bits, and what is left has 4
            bits, too. Nothing is lost of a number above 2^-13 of the row's largest, and 2^-21 of that largest at most
            of others. 8 rows or fewer have no more products than they had: matrix units take 16 at least.

In each, products are summed in float32, and the scale comes after the product of a step of inputs, which lies within
one column of scales. Sums of fp8 on an H100 keep fewer bits than float32; they are as long as such a step.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from gdnjax.backend import Backend
from gdnjax.memory import check_one_byte_pool
from gdnjax.pallas_kernels.launch import LEAST, dot, power_of_two
from gdnjax.quantized import Quantized, Weight
from gdnjax.shapes import Array

LOW = 16.0
"""What the low halves are multiplied by."""


WIDE, FLOAT16, HALVES = "wide", "float16", "halves"

PARTS = {WIDE: 1, FLOAT16: 1, HALVES: 2}
"""Rows that one becomes."""


def rows_of(x: Array, form: str) -> tuple[Array, ...]:
    """The operands of a launch that rows are: x, and but for `wide` its rows in that form and what each is to be
    multiplied by.
    """
    return (x,) if form == WIDE else (x, *(halves(x) if form == HALVES else as_float16(x)))


def halves(x: Array) -> tuple[Array, Array]:
    """[t, i] bfloat16 -> [2 t, i] float8_e4m3fn, high and low half of each row side by side, and [2 t] float32, what
    each is to be multiplied by.
    """
    scale = _power_of_two(x, 7)
    scaled = x.astype(jnp.float32) / scale
    # Rounded by hand: XLA takes a number that was made float8_e4m3fn and float32 again for what it was before, and
    # nothing would be left. The last place is that of 4 significant bits, and 2^-9 below the least normal number.
    exponent = jnp.maximum(lax.bitcast_convert_type(jnp.abs(scaled), jnp.int32) >> 23, 127 - 6)
    place = lax.bitcast_convert_type((exponent - 3) << 23, jnp.float32)
    high = jnp.round(scaled / place) * place
    low = (scaled - high) * LOW
    both = jnp.stack([high, low], axis=1).reshape(2 * x.shape[0], x.shape[1]).astype(jnp.float8_e4m3fn)
    return both, jnp.concatenate([scale, scale / LOW], axis=1).reshape(-1)


def as_float16(x: Array) -> tuple[Array, Array]:
    """[t, i] bfloat16 -> the same in float16, and [t] float32, what each row is to be multiplied by."""
    scale = _power_of_two(x, 14)
    return (x.astype(jnp.float32) / scale).astype(jnp.float16), scale[:, 0]


def _power_of_two(x: Array, exponent: int) -> Array:
    """[t, 1]: by which to divide each row, so that its largest is from 2^exponent to twice that."""
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(jnp.float32)
    stored = lax.bitcast_convert_type(largest, jnp.int32) >> 23
    return lax.bitcast_convert_type(jnp.clip(stored - exponent, 1, 254) << 23, jnp.float32)


def can_meet(backend: Backend, inputs: int, *weights: Weight) -> bool:
    """Whether kernels take weights of so many inputs on the device. Else their product is XLA's: of float8_e4m3fn
    before sm_89, and where scales change more often than every LEAST inputs, which no file has, nor any number of ranks
    makes of what files have.
    """
    no_fp8 = backend.lacks_float8 and type_of(*weights) == "float8_e4m3fn"
    return not no_fp8 and depth_of(LEAST, inputs, *weights) is not None


def depth_of(depth: int, inputs: int, *weights: Weight) -> int | None:
    """Inputs of a step, at most `depth`: a power of two that divides every column of scales, where there are several.
    None where there is none that a product may have.
    """
    for weight in weights:
        if isinstance(weight, Quantized) and weight.grid[1] < inputs:
            depth = min(depth, weight.grid[1] & -weight.grid[1])
    return depth if depth >= LEAST else None


def type_of(*weights: Weight) -> str | None:
    """The one type of codes among the weights, None where there are none. Raises ValueError where there are two."""
    kinds = {str(weight.codes.dtype) for weight in weights if isinstance(weight, Quantized)}
    if len(kinds) > 1:
        raise ValueError(f"weights of one product have codes of several types: {', '.join(sorted(kinds))}")
    return next(iter(kinds), None)


def flat(*weights: Weight) -> tuple[list[Array], tuple[tuple[int, int] | None, ...]]:
    """The operands of a launch that weights are, and the grid of each; None: numbers.

    Raises ValueError for more codes than a kernel can number (see `memory.UNNUMBERED`).
    """
    arrays, grids = [], []
    for weight in weights:
        coded = isinstance(weight, Quantized)
        if coded:
            try:
                check_one_byte_pool(f"codes {list(weight.shape)}", math.prod(weight.shape))
            except ValueError as error:
                raise ValueError(
                    f"{error}. Use more ranks, quantization='dequantized', or kernels='reference'"
                ) from None
        arrays += [weight.codes, weight.scale] if coded else [weight]
        grids.append(weight.grid if coded else None)
    return arrays, tuple(grids)


@dataclasses.dataclass(frozen=True)
class Operand:
    """A matrix in a kernel: its refs, and its grid, None where it is of numbers. `lead`: what comes before its rows."""

    refs: tuple
    grid: tuple[int, int] | None
    lead: tuple = ()

    @classmethod
    def taken(cls, refs, grids) -> tuple[list["Operand"], list]:
        """The operands that `flat` made, and the other refs behind them."""
        refs, operands = list(refs), []
        for grid in grids:
            count = 1 if grid is None else 2
            operands.append(cls(tuple(refs[:count]), grid))
            refs = refs[count:]
        return operands, refs

    @property
    def shape(self) -> tuple[int, ...]:
        return self.refs[0].shape

    def product(self, weight: Array, x: Array, column: Array, start, there: Array | None) -> Array:
        """[columns, rows] of one step: of `weight`, loaded, with `x`; `column` are its rows, which begin at `start`'s
        inputs. Codes meet x in its own type where that is one of codes, else they are widened.
        """
        if self.grid is None:
            return dot(weight, x, contract=(1, 1))
        part = dot(weight if weight.dtype == x.dtype else weight.astype(x.dtype), x, contract=(1, 1))
        rows, columns = self.grid
        cell = jnp.full(column.shape, start // columns, jnp.int32)
        scale = load(self.refs[1], (*self.lead, column // rows, cell), there)
        return part * scale[:, None]


def load(ref, at: tuple, mask: Array | None) -> Array:
    """A block of numbers or of codes, zeros where the mask is not."""
    if mask is None:
        return plgpu.load(ref.at[at])
    other: Any = 0
    if ref.dtype == jnp.float8_e4m3fn:
        # Triton has no constants of this type.
        shape = jnp.broadcast_shapes(*(index.shape for index in at if getattr(index, "ndim", 0)))
        other = lax.bitcast_convert_type(jnp.zeros(shape, jnp.int8), jnp.float8_e4m3fn)
        mask = jnp.broadcast_to(mask, shape)
    return plgpu.load(ref.at[at], mask=mask, other=other)


def joined(total: Array, factor: Array, parts: int) -> Array:
    """[columns, parts * rows] -> [columns, rows], each part times its factor."""
    total = total * factor[None, :]
    return total if parts == 1 else jnp.sum(total.reshape(total.shape[0], total.shape[1] // parts, parts), axis=-1)


def padded(rows: int, form: str) -> int:
    """Rows of a block that holds so many: as many as a product on matrix units has at least."""
    return power_of_two(PARTS[form] * rows, LEAST) // PARTS[form]
