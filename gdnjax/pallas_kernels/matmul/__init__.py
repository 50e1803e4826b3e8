"""Products of few rows with large matrices: what a decode step's projections are."""

from gdnjax.pallas_kernels.matmul.api import project, swiglu

__all__ = ["project", "swiglu"]
