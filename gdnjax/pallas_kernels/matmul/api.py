"""Contract of the op. Matrices are [out, in], as in the checkpoint; sums are float32.

Kernels take the few rows of a decode step, where reading the matrices is all the time there is and XLA leaves a part of
it; more rows, and types without a tile, are XLA's.
"""

from gdnjax.backend import REFERENCE, Backend
from gdnjax.pallas_kernels.matmul import kernels, reference, tiles
from gdnjax.quantized import Weight
from gdnjax.shapes import Array, Float


def project(x: Float[Array, "t i"], *weights: Weight, backend: Backend = REFERENCE) -> tuple[Float[Array, "t _"], ...]:
    """x W^T for each of the matrices [_, i], in x's dtype; some may be numbers, and others codes."""
    found = tiles.of(backend, x, *weights)
    if found is None:
        return reference.project(x, weights, backend)
    few = sum(weight.shape[0] for weight in weights) <= tiles.FEW
    return kernels.project(x, weights, found.narrow if few else found.wide, backend)


def swiglu(x: Float[Array, "t i"], gate: Weight, up: Weight, *, backend: Backend = REFERENCE) -> Float[Array, "t o"]:
    """silu(x gate^T) * (x up^T), in x's dtype. Both matrices are [o, i]."""
    found = tiles.of(backend, x, gate, up)
    return (
        reference.swiglu(x, gate, up, backend) if found is None else kernels.swiglu(x, gate, up, found.gated, backend)
    )
