"""What kernels of products share about weights of eight bits: how codes meet rows, and where their scales lie.

Three ways, by the form that rows are given (`row_forms`). None of them loses anything of a row of bfloat16:

  wide      rows as they are; codes become numbers of their dtype in the tile. For any codes and rows.
  float16   rows of bfloat16 become float16, a power of two taken out, and codes do in the tile: of float8_e4m3fn that
            is one instruction for two, where bfloat16 takes several.
  halves    codes of float8_e4m3fn stay what they are, on matrix units that take them. A row, a power of two taken out,
            is the sum of two rows of float8_e4m3fn. 8 rows or fewer have no more products than they had: matrix units
            take 16 at least.

In each, products are summed in float32. Where scales change along the inputs, one comes after the product of each step,
which lies within one column of them, and was loaded a step before: the memory's latency would otherwise stand in every
step. Sums of fp8 on an H100 keep fewer bits than float32; they are as long as such a step.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from gdnjax.backend import Backend
from gdnjax.memory import check_one_byte_pool
from gdnjax.pallas_kernels.launch import LEAST, dot
from gdnjax.quantized import Quantized, Weight
from gdnjax.shapes import Array


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

    def product(self, weight: Array, x: Array) -> Array:
        """[columns, rows] of `weight`, loaded, with `x`. Codes meet x in its own type where that is one of codes, else
        they are widened.
        """
        codes = self.grid is not None and weight.dtype != x.dtype
        return dot(weight.astype(x.dtype) if codes else weight, x, contract=(1, 1))

    def scale(self, column: Array, place: Array | int, there: Array | None) -> Array:
        """[columns] float32: the scales of codes at input `place`."""
        assert self.grid is not None, "numbers have none"
        rows, columns = self.grid
        cell = jnp.full(column.shape, place // columns, jnp.int32)
        return load(self.refs[1], (*self.lead, column // rows, cell), there)


def summed(
    operands: Sequence[Operand],
    step_of: Callable[[Array], Sequence[tuple[Array, Array]]],
    steps: tuple[Array | int, Array | int],
    depth: int,
    column: Array,
    there: Sequence[Array | None],
    rows: Sequence[int],
) -> tuple[Array, ...]:
    """[columns, rows] of each operand: the sum over the steps from `steps[0]` to `steps[1]` of `depth` inputs each.

    `step_of` loads a step: what is taken of each operand, and the rows that this meets, so many as `rows` says.
    `column` are the rows of the matrices, and `there` which of them exist; None: all.
    """
    inputs = operands[0].shape[-1]
    changing = [operand.grid is not None and operand.grid[1] < inputs for operand in operands]

    def scales_of(i) -> tuple[Array | None, ...]:
        # Behind the last step nobody reads them.
        place = jnp.minimum(i * depth, inputs - 1)
        return tuple(
            operand.scale(column, place, real) if changes else None
            for operand, real, changes in zip(operands, there, changing, strict=True)
        )

    def one_step(i, carry):
        totals, scales = carry
        ahead = scales_of(i + 1)
        products = [operand.product(*loaded) for operand, loaded in zip(operands, step_of(i), strict=True)]
        products = [
            part if scale is None else part * scale[:, None] for part, scale in zip(products, scales, strict=True)
        ]
        return tuple(total + part for total, part in zip(totals, products, strict=True)), ahead

    begin, end = steps
    zeros = tuple(jnp.zeros((column.size, count), jnp.float32) for count in rows)
    totals, _ = lax.fori_loop(begin, end, one_step, (zeros, scales_of(begin)))
    return tuple(
        total if operand.grid is None or changes else total * operand.scale(column, 0, real)[:, None]
        for operand, total, changes, real in zip(operands, totals, changing, there, strict=True)
    )


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
