"""Contract of the op. Matrices are [out, in], as in the checkpoint; sums are float32.

Kernels take the few rows of a decode step, where reading the matrices is all the time there is and XLA leaves a part of
it; more rows, and types without a tile, are XLA's. Rows [t, i] may be `Normed` or `Gated`: the norm is then part of the
op; or `Prepared`, which is made for certain weights, and goes with what else there is to be done of a row.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike

from gdnjax.backend import REFERENCE, Backend
from gdnjax.pallas_kernels import codes, row_forms
from gdnjax.pallas_kernels.matmul import kernels, reference, tiles
from gdnjax.pallas_kernels.normed import GateUp, Normed, Prepared, Rows, numbers, rms_norm, summed
from gdnjax.quantized import Weight
from gdnjax.shapes import Array, Float


def prepare(
    x: Normed, *weights: Weight, gated: bool = False, wide: bool = False, backend: Backend = REFERENCE
) -> tuple[Float[Array, "t i"], Prepared]:
    """x before its norm, with what is added to it, and its rows for `project`, or `swiglu` if `gated`, by just these
    weights; as they are, too, if `wide`. Without weights they are numbers alone.
    """
    found = tiles.of(backend, x, *weights)
    if found is None:
        whole = summed(x.x, x.added)
        normed = rms_norm(whole, x.weight, x.eps, x.centre)
        return whole, Prepared(row_forms.WIDE, normed, None, None, shape=x.shape, dtype=x.dtype)
    outputs = [weight.shape[0] for weight in weights]
    tile = (found.of_gated(outputs[0]) if gated and weights else None) or found.of_outputs(outputs)
    _, grids = codes.flat(*weights)
    coded = any(grid is not None for grid in grids)
    form = tile.form if coded else row_forms.WIDE
    return row_forms.prepared(x, form, backend, wide=wide or None in grids or not weights)


def project(
    x: Rows, *weights: Weight, out_dtype: DTypeLike | None = None, backend: Backend = REFERENCE
) -> tuple[Float[Array, "t _"], ...]:
    """x W^T for each of the matrices [_, i], in x's dtype or `out_dtype`; some may be numbers, and others codes."""
    out_dtype = x.dtype if out_dtype is None else out_dtype
    found = tiles.of(backend, x, *weights)
    if found is None:
        return reference.project(numbers(x), weights, backend, out_dtype)
    return kernels.project(x, weights, found.of_outputs(weight.shape[0] for weight in weights), backend, out_dtype)


def project_in_parts(x: Rows, weight: Weight, *, backend: Backend = REFERENCE) -> Float[Array, "s t _"]:
    """x W^T as a sum that nobody has added up yet, for whoever adds it to something: as one term, rounded to x's dtype
    (`normed.summed`). Parts are float32, and one alone is in x's dtype.
    """
    found = tiles.of(backend, x, weight)
    if found is None:
        return reference.project(numbers(x), (weight,), backend, x.dtype)[0][None]
    (parts,) = kernels.project_in_parts(x, (weight,), found.of_outputs([weight.shape[0]]), backend, x.dtype)
    return parts


def swiglu(x: Rows, gate: Weight, up: Weight, *, backend: Backend = REFERENCE) -> Float[Array, "t o"]:
    """silu(x gate^T) * (x up^T), in x's dtype. Both matrices are [o, i]."""
    return numbers(gate_up(x, gate, up, backend=backend))


def gate_up(x: Rows, gate: Weight, up: Weight, *, backend: Backend = REFERENCE) -> Rows:
    """The same as rows of the next product: where gate and up are made apart, they are activated on its way."""
    found = tiles.of(backend, x, gate, up)
    if found is None:
        return reference.swiglu(numbers(x), gate, up, backend)
    tile = found.of_gated(gate.shape[0])
    if tile is not None:
        return kernels.swiglu(x, gate, up, tile, backend)
    # Not rounded before they are gated, as in registers.
    tile = found.of_outputs([gate.shape[0]] * 2)
    return GateUp(*kernels.project_in_parts(x, (gate, up), tile, backend, jnp.float32), dtype=x.dtype)
