"""Attention over the paged KV cache, and the writes into it."""

from gdnjax.pallas_kernels.paged_attention.api import Tiles, attend, write

__all__ = ["Tiles", "attend", "write"]
