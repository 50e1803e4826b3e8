"""Depthwise causal convolution with SiLU, its window kept in the slot pool."""

from gdnjax.pallas_kernels.causal_conv1d.api import decode, prefill

__all__ = ["decode", "prefill"]
