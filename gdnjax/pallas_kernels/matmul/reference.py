"""The definition, by XLA's own products."""

from collections.abc import Sequence

import jax
from jax import lax

from gdnjax.backend import dot_precision
from gdnjax.shapes import Array


def project(x: Array, weights: Sequence[Array]) -> tuple[Array, ...]:
    return tuple(_product(x, weight) for weight in weights)


def swiglu(x: Array, gate: Array, up: Array) -> Array:
    return jax.nn.silu(_product(x, gate)) * _product(x, up)


def _product(x: Array, weight: Array) -> Array:
    dimensions = (((1,), (1,)), ((), ()))
    return lax.dot_general(x, weight, dimensions, precision=dot_precision(x.dtype), preferred_element_type=x.dtype)
