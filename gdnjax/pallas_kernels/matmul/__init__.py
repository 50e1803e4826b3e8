"""Products of few rows with large matrices: what a decode step's projections are."""

from gdnjax.pallas_kernels.matmul.api import prepare, project, project_in_parts, swiglu

__all__ = ["prepare", "project", "project_in_parts", "swiglu"]
