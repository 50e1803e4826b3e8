"""The definition, by XLA's own products; codes are made numbers of the dtype of x first."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from gdnjax.backend import Backend, dot_precision
from gdnjax.pallas_kernels.matmul import fp8
from gdnjax.quantized import Quantized, Weight, dequantized
from gdnjax.shapes import Array


def project(x: Array, weights: Sequence[Weight], backend: Backend, out_dtype: DTypeLike) -> tuple[Array, ...]:
    return tuple(_product(x, weight, backend, out_dtype) for weight in weights)


def swiglu(x: Array, gate: Weight, up: Weight, backend: Backend) -> Array:
    return jax.nn.silu(_product(x, gate, backend, x.dtype)) * _product(x, up, backend, x.dtype)


def _product(x: Array, weight: Weight, backend: Backend, out_dtype: DTypeLike) -> Array:
    form = fp8.form(x, weight, backend)
    if form is not None:
        assert isinstance(weight, Quantized)
        return fp8.product(x, weight, form).astype(out_dtype)
    return product(x, weight, out_dtype)


def product(x: Array, weight: Weight, out_dtype: DTypeLike | None = None) -> Array:
    """x W^T, x [..., i], W [o, i], summed in float32; in the dtype of x unless told otherwise."""
    weight, out_dtype = dequantized(weight, x.dtype), out_dtype or x.dtype
    if weight.shape[0] == 1:
        # As a product of a matrix and a vector XLA rounds it on a CPU by the place of the row: the first multiple of 8
        # of them in one way, what is left in another.
        terms = x.astype(jnp.float32) * weight[0].astype(jnp.float32)
        return terms.sum(-1, keepdims=True).astype(out_dtype)
    dimensions = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(x, weight, dimensions, precision=dot_precision(x.dtype), preferred_element_type=out_dtype)
