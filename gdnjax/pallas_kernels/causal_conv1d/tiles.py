"""Tile table of the op's kernels, a row per architecture."""

import dataclasses

from gdnjax.backend import Backend


@dataclasses.dataclass(frozen=True)
class Conv:
    """A tile of tokens (a multiple of kernels.GROUP) by channels in prefill, of channels alone in decode."""

    tokens: int
    channels: int
    warps: int
    update_channels: int
    update_warps: int


TILES = {
    "cuda": Conv(tokens=32, channels=512, warps=4, update_channels=512, update_warps=4),
    "rocm": Conv(tokens=32, channels=512, warps=4, update_channels=512, update_warps=4),
    "interpret": Conv(tokens=128, channels=32, warps=1, update_channels=32, update_warps=1),
}


def of(backend: Backend) -> Conv:
    return backend.tiles(TILES)
