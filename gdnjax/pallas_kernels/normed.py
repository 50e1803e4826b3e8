"""Rows that an RMS norm is still to be taken of, and terms added to before: a kernel may do both on the way."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from gdnjax.shapes import Array, Float, Float32


@dataclasses.dataclass(frozen=True)
class Normed:
    """x / rms(x) * (centre + weight), by row, in x's dtype; of x + `added`, if there is any: see `summed`."""

    x: Float[Array, "t i"]
    weight: Float[Array, "i"]
    eps: float
    centre: float
    added: Float[Array, "s t i"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape

    @property
    def dtype(self):
        return self.x.dtype


@dataclasses.dataclass(frozen=True)
class Gated:
    """x / rms(x) * weight * silu(gate), or sigmoid(gate), head by head, in the gate's dtype."""

    x: Float[Array, "t h v"]
    gate: Float[Array, "t i"]
    weight: Float[Array, "v"]
    eps: float
    activation: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.gate.shape

    @property
    def dtype(self):
        return self.gate.dtype


@dataclasses.dataclass(frozen=True)
class GateUp:
    """silu(gate) * up, rounded to `dtype`; each is a sum of parts. Without `up` it stands beside the gate."""

    gate: Float[Array, "s t _"]
    up: Float[Array, "s t i"] | None
    dtype: jnp.dtype

    @classmethod
    def of(cls, both: Float[Array, "t _"]) -> "GateUp":
        """Of both side by side, in their dtype."""
        return cls(both[None], None, both.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        _, rows, width = self.gate.shape
        return rows, width if self.up is not None else width // 2


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Rows in the form in which certain weights meet them; see `gdnjax.pallas_kernels.row_forms`.

    wide            [t, i] as they are; None where nobody needs them so.
    formed, factor  [PARTS * t, i] and [PARTS * t], in another form; None where that is none.
    shape, dtype    of the rows as they are.
    """

    form: str
    wide: Array | None
    formed: Array | None
    factor: Array | None
    shape: tuple[int, ...]
    dtype: jnp.dtype


Rows = Float[Array, "t _"] | Normed | Gated | GateUp | Prepared
"""Rows of a product: as they are, before their norm or activation, or as `matmul.prepare` gives them."""


def numbers(rows: Rows) -> Float[Array, "t i"]:
    """The rows that they stand for. Raises ValueError for rows that were prepared in another form alone."""
    if isinstance(rows, Prepared):
        if rows.wide is None:
            raise ValueError(f"rows were prepared as {rows.form} alone: nobody can have them as they are")
        return rows.wide
    if isinstance(rows, Gated):
        gated = gated_rms_norm(rows.x, rows.gate.reshape(rows.x.shape), rows.weight, rows.eps, rows.activation)
        return gated.reshape(rows.gate.shape)
    if isinstance(rows, GateUp):
        gate = total(rows.gate, rows.gate.dtype)
        gate, up = jnp.split(gate, 2, axis=-1) if rows.up is None else (gate, total(rows.up, rows.up.dtype))
        return (jax.nn.silu(gate) * up).astype(rows.dtype)
    if not isinstance(rows, Normed):
        return rows
    return rms_norm(summed(rows.x, rows.added), rows.weight, rows.eps, rows.centre)


def summed(x: Float[Array, "t d"], added: Float[Array, "s t d"] | None) -> Float[Array, "t d"]:
    """x and what is added to it: the sum of parts, rounded to x's dtype as one term."""
    return x if added is None else x + total(added, x.dtype)


def total(parts: Float[Array, "s t d"], dtype) -> Float[Array, "t d"]:
    """A term of several parts."""
    return (parts[0] if parts.shape[0] == 1 else jnp.sum(parts, axis=0)).astype(dtype)


def rms_norm(x: Float[Array, "... d"], weight: Float[Array, "d"], eps: float, centre: float) -> Float[Array, "... d"]:
    """x / rms(x) * (centre + weight), in float32, rounded to x's dtype."""
    return (rms_normalise(x, eps) * (centre + weight.astype(jnp.float32))).astype(x.dtype)


def gated_rms_norm(
    x: Float[Array, "... v"], gate: Float[Array, "... v"], weight: Float[Array, "v"], eps: float, activation: str
) -> Float[Array, "... v"]:
    """x / rms(x) * weight * silu(gate), or sigmoid(gate), in float32, rounded to the gate's dtype."""
    activate = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}[activation]
    return (rms_normalise(x, eps) * weight.astype(jnp.float32) * activate(gate.astype(jnp.float32))).astype(gate.dtype)


def rms_normalise(x: Float[Array, "... d"], eps: float) -> Float32[Array, "... d"]:
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
