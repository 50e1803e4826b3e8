"""Rows that an RMS norm is still to be taken of: they stand where rows would, and a kernel may take the norm itself."""

import dataclasses

import jax.numpy as jnp
from jax import lax

from gdnjax.shapes import Array, Float, Float32


@dataclasses.dataclass(frozen=True)
class Normed:
    """x / rms(x) * (centre + weight), by row, in x's dtype."""

    x: Float[Array, "t i"]
    weight: Float[Array, "i"]
    eps: float
    centre: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape

    @property
    def dtype(self):
        return self.x.dtype


def numbers(rows: Array | Normed) -> Float[Array, "t i"]:
    """The rows that they stand for."""
    if not isinstance(rows, Normed):
        return rows
    return rms_norm(rows.x, rows.weight, rows.eps, rows.centre)


def rms_norm(x: Float[Array, "... d"], weight: Float[Array, "d"], eps: float, centre: float) -> Float[Array, "... d"]:
    """x / rms(x) * (centre + weight), in float32, rounded to x's dtype."""
    return (rms_normalise(x, eps) * (centre + weight.astype(jnp.float32))).astype(x.dtype)


def rms_normalise(x: Float[Array, "... d"], eps: float) -> Float32[Array, "... d"]:
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
