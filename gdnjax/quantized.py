"""Numbers of eight bits with scales: rows of them, and weights, whose codes and scales meet on a grid. What any format
of quantised weights becomes on a device.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from gdnjax.shapes import Array

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""What codes may be, and the largest magnitude of each. All are exact in bfloat16."""

TINY = 1e-30
"""Magnitudes below it are stored as if it were their row's largest: a row of zeros has a scale to divide by."""


def quantise(x: Array, dtype) -> tuple[Array, Array]:
    """[..., hd] to its 8-bit values and their scale [..., 1]: to the nearest, halves up in int8, to even in float8."""
    x = x.astype(jnp.float32)
    largest = LARGEST[jnp.dtype(dtype).name]
    top = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), TINY)
    values = x * (largest / top)
    if jnp.issubdtype(dtype, jnp.integer):
        values = jnp.floor(values + 0.5)
    return values.astype(dtype), top / largest


@functools.partial(jax.tree_util.register_dataclass, data_fields=("codes", "scale"), meta_fields=("grid",))
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight [..., o, i], code times scale. A pytree; stands where the weight's array would.

    codes   [..., o, i] of a type of LARGEST
    scale   [..., ceil(o / rows), ceil(i / columns)] float32
    grid    (rows, columns) of codes that share a scale; those at the end may be fewer
    """

    # Any: a pytree may hold what stands for arrays, too: shapes, shardings.
    codes: Any
    scale: Any
    grid: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def __getitem__(self, index: Any) -> "Quantized":
        """Along the axes before the matrices."""
        return dataclasses.replace(self, codes=self.codes[index], scale=self.scale[index])


Weight = Array | Quantized
"""What the ops take: numbers as they are, or codes."""


@dataclasses.dataclass(frozen=True)
class CodeFormat:
    """How one parameter is held, before there is any: the type of its codes, and its grid on one rank."""

    codes: str
    grid: tuple[int, int]

    def abstract(self, shape: tuple[int, ...]) -> Quantized:
        """The shapes of a weight of one rank. The result's leaves are ShapeDtypeStructs."""
        cells = tuple(-(-size // cell) for size, cell in zip(shape[-2:], self.grid, strict=True))
        scale = jax.ShapeDtypeStruct((*shape[:-2], *cells), jnp.float32)
        return Quantized(jax.ShapeDtypeStruct(shape, self.codes), scale, self.grid)


def dequantized(weight: Weight, dtype: Any) -> Array:
    """The weight as an array of `dtype`; one that is an array already, as it is.

    Code times scale is made in float32 and rounded once.
    """
    if not isinstance(weight, Quantized):
        return weight
    scale = weight.scale
    for axis, cell in zip((-2, -1), weight.grid, strict=True):
        size = weight.shape[axis]
        if scale.shape[axis] > 1:
            scale = jnp.repeat(scale, cell, axis=axis)
            scale = jax.lax.slice_in_dim(scale, 0, size, axis=axis % scale.ndim)
    return (weight.codes.astype(jnp.float32) * scale).astype(dtype)
