"""Tile table of the op's kernel, a row per architecture."""

import dataclasses

from gdnjax.backend import Backend


@dataclasses.dataclass(frozen=True)
class Tile:
    """A program looks at `tokens` of one row at a time. Rows are split where fewer than `programs` would run.

    `sparing`: tokens of which none can be the best, whatever its noise, get none, and where noise rules them out, its
    logarithms are not taken. What is drawn is the same, to the bit. Not measured, so on nowhere but in the interpreter.
    """

    tokens: int
    warps: int
    programs: int
    sparing: bool = False


TILES = {
    "cuda": Tile(tokens=2048, warps=4, programs=2112),
    "rocm": Tile(tokens=1024, warps=4, programs=1216),
    "interpret": Tile(tokens=64, warps=1, programs=4, sparing=True),
}


def of(backend: Backend) -> Tile:
    return backend.tiles(TILES)
