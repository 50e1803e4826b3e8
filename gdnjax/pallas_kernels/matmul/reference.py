"""The definition, by XLA's own products; codes are made numbers of the dtype of x first."""

from collections.abc import Sequence

import jax
from jax import lax

from gdnjax.backend import Backend, dot_precision
from gdnjax.pallas_kernels.matmul import fp8
from gdnjax.quantized import Quantized, Weight, dequantized
from gdnjax.shapes import Array


def project(x: Array, weights: Sequence[Weight], backend: Backend) -> tuple[Array, ...]:
    return tuple(_product(x, weight, backend) for weight in weights)


def swiglu(x: Array, gate: Weight, up: Weight, backend: Backend) -> Array:
    return jax.nn.silu(_product(x, gate, backend)) * _product(x, up, backend)


def _product(x: Array, weight: Weight, backend: Backend) -> Array:
    form = fp8.form(x, weight, backend)
    if form is not None:
        assert isinstance(weight, Quantized)
        return fp8.product(x, weight, form)
    weight = dequantized(weight, x.dtype)
    dimensions = (((1,), (1,)), ((), ()))
    return lax.dot_general(x, weight, dimensions, precision=dot_precision(x.dtype), preferred_element_type=x.dtype)
