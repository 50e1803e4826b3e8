"""What kernels of products share about weights of eight bits: how codes meet rows, and where their scales lie.

Two ways. Widened: codes become numbers of the rows' dtype in the tile, for any codes. In halves, for float8_e4m3fn on
matrix units that take it: a row of bfloat16, with a power of two taken out, is the sum of two rows of float8_e4m3fn.
The first rounds to 4 significant bits; what is left has 4 bits, too, so nothing is lost of a number above 2^-13 of the
row's largest, and 2^-21 of that largest at most of others. Nothing is widened, and a step of 8 rows or fewer has no
more products than it had: matrix units take 16 at least.

Either way products are summed in float32, and the scale comes after the product of a step of inputs, which lies within
one column of scales. Sums of fp8 on an H100 keep fewer bits than float32; they are as long as such a step.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from gdnjax.pallas_kernels.launch import LEAST, dot, power_of_two
from gdnjax.quantized import Quantized, Weight
from gdnjax.shapes import Array

LOW = 16.0
"""What the low halves are multiplied by."""


def halves(x: Array) -> tuple[Array, Array]:
    """[t, i] bfloat16 -> [2 t, i] float8_e4m3fn, high and low half of each row side by side, and [2 t] float32, what
    each is to be multiplied by.
    """
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(jnp.float32)
    # The power of two under which the largest is from 128 to 256, by its exponent's bits.
    exponent = lax.bitcast_convert_type(largest, jnp.int32) >> 23
    scale = lax.bitcast_convert_type(jnp.clip(exponent - 7, 1, 254) << 23, jnp.float32)
    scaled = x.astype(jnp.float32) / scale
    high = scaled.astype(jnp.float8_e4m3fn)
    low = ((scaled - high.astype(jnp.float32)) * LOW).astype(jnp.float8_e4m3fn)
    both = jnp.stack([high, low], axis=1).reshape(2 * x.shape[0], x.shape[1])
    return both, jnp.concatenate([scale, scale / LOW], axis=1).reshape(-1)


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
    """The operands of a launch that weights are, and the grid of each; None: numbers."""
    arrays, grids = [], []
    for weight in weights:
        coded = isinstance(weight, Quantized)
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
        scale = plgpu.load(
            self.refs[1].at[(*self.lead, column // rows, cell)], mask=there, other=None if there is None else 0
        )
        return part * scale[:, None]


def joined(total: Array, factor: Array) -> Array:
    """[columns, 2 rows] of halves -> [columns, rows]."""
    total = total * factor[None, :]
    return jnp.sum(total.reshape(total.shape[0], total.shape[1] // 2, 2), axis=-1)


def padded(rows: int, in_halves: bool) -> int:
    """Rows of a block that holds so many: as many as a product on matrix units has at least."""
    return power_of_two(2 * rows, LEAST) // 2 if in_halves else power_of_two(rows, LEAST)
