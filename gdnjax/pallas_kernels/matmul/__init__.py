"""Products of few rows with large matrices: what a decode step's projections are."""

from gdnjax.pallas_kernels.matmul.api import prepare, project, project_in_parts, swiglu
from gdnjax.pallas_kernels.matmul.reference import product

__all__ = ["prepare", "product", "project", "project_in_parts", "swiglu"]
