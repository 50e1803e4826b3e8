"""Attention over the paged KV cache, and the writes into it."""

from gdnjax.pallas_kernels.paged_attention.api import Scales, Tiles, attend, write, write_quantised

__all__ = ["Scales", "Tiles", "attend", "write", "write_quantised"]
