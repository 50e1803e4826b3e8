"""Attention over the paged KV cache and over pages of latents, and the writes into them."""

from gdnjax.pallas_kernels.paged_attention.api import (
    Scales,
    Tiles,
    Turn,
    attend,
    attend_latent,
    enter,
    write,
    write_latent,
    write_quantised,
)
from gdnjax.pallas_kernels.paged_attention.scales import check_device

__all__ = [
    "Scales",
    "Tiles",
    "Turn",
    "attend",
    "attend_latent",
    "check_device",
    "enter",
    "write",
    "write_latent",
    "write_quantised",
]
