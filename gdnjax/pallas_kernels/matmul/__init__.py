"""Products of few rows with large matrices: what a decode step's projections are."""

from gdnjax.pallas_kernels.matmul.api import gate_up, prepare, project, project_in_parts, swiglu
from gdnjax.pallas_kernels.matmul.fp8 import MOST_ROWS
from gdnjax.pallas_kernels.matmul.reference import product

__all__ = ["MOST_ROWS", "gate_up", "prepare", "product", "project", "project_in_parts", "swiglu"]
