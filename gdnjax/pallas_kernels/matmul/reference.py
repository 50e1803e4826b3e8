"""The definition, by XLA's own products; codes are made numbers of the dtype of x first."""

from collections.abc import Sequence

import jax
from jax import lax

from gdnjax.backend import dot_precision
from gdnjax.quantized import Weight, dequantized
from gdnjax.shapes import Array


def project(x: Array, weights: Sequence[Weight]) -> tuple[Array, ...]:
    return tuple(_product(x, weight) for weight in weights)


def swiglu(x: Array, gate: Weight, up: Weight) -> Array:
    return jax.nn.silu(_product(x, gate)) * _product(x, up)


def _product(x: Array, weight: Weight) -> Array:
    weight = dequantized(weight, x.dtype)
    dimensions = (((1,), (1,)), ((), ()))
    return lax.dot_general(x, weight, dimensions, precision=dot_precision(x.dtype), preferred_element_type=x.dtype)
