"""Contract of the op. Matrices are [out, in], as in the checkpoint; sums are float32.

Kernels take the few rows of a decode step, where reading the matrices is all the time there is and XLA leaves a part of
it; more rows, and types without a tile, are XLA's. Rows [t, i] may be `Normed`: the norm is then part of the op.
"""

import jax

from gdnjax.backend import REFERENCE, Backend
from gdnjax.pallas_kernels.matmul import kernels, reference, tiles
from gdnjax.pallas_kernels.normed import Normed, numbers
from gdnjax.quantized import Weight
from gdnjax.shapes import Array, Float

Rows = Float[Array, "t i"] | Normed


def project(x: Rows, *weights: Weight, backend: Backend = REFERENCE) -> tuple[Float[Array, "t _"], ...]:
    """x W^T for each of the matrices [_, i], in x's dtype; some may be numbers, and others codes."""
    found = tiles.of(backend, x, *weights)
    if found is None:
        return reference.project(numbers(x), weights, backend)
    return kernels.project(x, weights, found.of_outputs(weight.shape[0] for weight in weights), backend)


def swiglu(x: Rows, gate: Weight, up: Weight, *, backend: Backend = REFERENCE) -> Float[Array, "t o"]:
    """silu(x gate^T) * (x up^T), in x's dtype. Both matrices are [o, i]."""
    found = tiles.of(backend, x, gate, up)
    if found is None:
        return reference.swiglu(numbers(x), gate, up, backend)
    tile = found.of_gated(gate.shape[0])
    if tile is not None:
        return kernels.swiglu(x, gate, up, tile, backend)
    # Sums of a part of the inputs cannot be gated in registers.
    gated, out = kernels.project(x, (gate, up), found.narrow, backend)
    return jax.nn.silu(gated) * out
