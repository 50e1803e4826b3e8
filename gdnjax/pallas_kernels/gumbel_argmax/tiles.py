"""Tile table of the op's kernel, a row per architecture."""

import dataclasses

from gdnjax.backend import Backend


@dataclasses.dataclass(frozen=True)
class Tile:
    """A program looks at `tokens` of one row at a time. Rows are split where fewer than `programs` would run."""

    tokens: int
    warps: int
    programs: int


TILES = {
    "cuda": Tile(tokens=1024, warps=4, programs=1056),
    "rocm": Tile(tokens=1024, warps=4, programs=1216),
    "interpret": Tile(tokens=64, warps=1, programs=4),
}


def of(backend: Backend) -> Tile:
    return backend.tiles(TILES)
