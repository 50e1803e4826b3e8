"""Compiling for AMD GPUs on a machine that has none, with XLA's own ROCm compiler, and reading what came out."""
