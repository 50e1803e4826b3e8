"""The definition, by XLA's own ragged product."""

from jax import lax

from gdnjax.backend import dot_precision
from gdnjax.shapes import Array


def grouped_matmul(x: Array, weight: Array, group_sizes: Array) -> Array:
    return lax.ragged_dot(x, weight.swapaxes(1, 2), group_sizes, precision=dot_precision(x.dtype))
