"""Products on matrix units of 8 bits by XLA, for weights in float8_e4m3fn with a scale for each row. Two uses:

in halves    rows as two of float8_e4m3fn each, which lose nothing (`gdnjax.pallas_kernels.row_forms`), for the rows of
             a verify step, of which there are too many for the kernels, and for which XLA would widen all of a matrix
by token     rows rounded to float8_e4m3fn, with a scale for each (W8A8), where it is asked for

Gate and up of 9B on an H200, in us: 32 rows 44 by the kernel and 38 by token; 64 rows 58, 36, and 43 in halves; 128
rows 95, 38 and 57. But XLA looks for the fastest of its products in halves for some 10 s each, of those by token for 3,
so the former are left to the kernels as long as these take them.
"""

import jax.numpy as jnp
from jax import lax

from gdnjax.backend import Backend
from gdnjax.pallas_kernels import row_forms
from gdnjax.pallas_kernels.normed import Rows
from gdnjax.quantized import Quantized, Weight, quantise
from gdnjax.shapes import Array

FEW = 32
"""Rows up to which kernels are about as fast, and activations are not rounded."""

MOST_ROWS = 128
"""Of x that kernels take. Halves are for more."""

MOST_IN_HALVES = 512
"""Rows from which on twice as many products take longer than widening the matrix. One H100, 4096 x 12288."""

ALIGNED = 16
"""What cuBLAS wants inputs and outputs to be a multiple of."""


def form(x: Rows, weight: Weight, backend: Backend) -> str | None:
    """ "tokens", "halves", or None: neither, a kernel or XLA's product of numbers."""
    if not isinstance(weight, Quantized) or weight.codes.dtype != jnp.float8_e4m3fn or weight.grid[0] != 1:
        return None
    rows, inputs = x.shape
    if weight.grid[1] < inputs:
        return None
    if backend.quantize_activations and rows > FEW:
        return "tokens"
    aligned = all(size % ALIGNED == 0 for size in weight.shape)
    if backend.has_fp8_products and x.dtype == jnp.bfloat16 and aligned and MOST_ROWS < rows <= MOST_IN_HALVES:
        return "halves"
    return None


def product(x: Array, weight: Quantized, form: str) -> Array:
    """x W^T, in x's dtype."""
    if form == "tokens":
        rows, factor = quantise(x, jnp.float8_e4m3fn)
        # Sums may be kept in fewer bits than float32 has: the rounding of x is far coarser.
        return (_dot(rows, weight.codes, None, x.dtype) * factor * weight.scale[:, 0]).astype(x.dtype)
    halves, factor = row_forms.halves(x)
    total = _dot(halves, weight.codes, lax.Precision.HIGHEST, jnp.float32) * factor[:, None]
    return (jnp.sum(total.reshape(x.shape[0], 2, -1), axis=1) * weight.scale[:, 0]).astype(x.dtype)


def _dot(x: Array, weight: Array, precision: lax.Precision | None, dtype) -> Array:
    dimensions = (((1,), (1,)), ((), ()))
    return lax.dot_general(x, weight, dimensions, precision=precision, preferred_element_type=dtype)
