"""One matrix per group of rows: the experts' products."""

from gdnjax.pallas_kernels.grouped_matmul.api import grouped_matmul

__all__ = ["grouped_matmul"]
