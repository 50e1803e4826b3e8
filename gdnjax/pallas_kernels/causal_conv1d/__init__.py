"""Depthwise causal convolution with SiLU, its window kept in the slot pool."""

from gdnjax.pallas_kernels.causal_conv1d.api import decode, fold, prefill, verify

__all__ = ["decode", "fold", "prefill", "verify"]
