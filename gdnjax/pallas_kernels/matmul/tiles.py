"""Tile tables of the op's kernels: by architecture and dtype, for the rows of a step, rounded up."""

import dataclasses

from gdnjax.backend import Backend


@dataclasses.dataclass(frozen=True)
class Tile:
    """A program makes `columns` outputs of all rows, `depth` inputs at a time.

    Where fewer than `programs` would run, the inputs are split between several, whose sums XLA adds up.
    """

    columns: int
    depth: int
    warps: int
    stages: int
    programs: int = 0


@dataclasses.dataclass(frozen=True)
class Tiles:
    """For products with many outputs, with few (up to FEW), and with gate and up in one program."""

    wide: Tile
    narrow: Tile
    gated: Tile


FEW = 4096
"""Outputs up to which a product has too few columns to occupy a device."""

# dtype -> {most rows: tiles}
TILES = {
    "cuda": {
        "bfloat16": {
            16: Tiles(Tile(64, 256, 4, 4), Tile(64, 128, 4, 4, programs=264), Tile(64, 256, 4, 3)),
            64: Tiles(Tile(64, 128, 4, 3), Tile(64, 128, 4, 3, programs=132), Tile(64, 128, 4, 3)),
            128: Tiles(Tile(64, 64, 4, 4), Tile(64, 128, 4, 3, programs=132), Tile(64, 64, 8, 3)),
        }
    },
    "rocm": {
        "bfloat16": {
            16: Tiles(Tile(64, 128, 4, 1), Tile(64, 128, 4, 1, programs=304), Tile(32, 128, 4, 1)),
            128: Tiles(Tile(64, 64, 4, 1), Tile(64, 64, 4, 1, programs=304), Tile(32, 64, 4, 1)),
        }
    },
    "interpret": {
        dtype: {128: Tiles(Tile(64, 64, 1, 1), Tile(32, 64, 1, 1, programs=8), Tile(32, 64, 1, 1))}
        for dtype in ("bfloat16", "float32")
    },
}


def of(backend: Backend, rows: int, dtype) -> Tiles | None:
    """The tiles for so many rows; None: XLA's product."""
    if backend.is_reference:
        return None
    table = backend.tiles(TILES).get(str(dtype), {})
    return next((tiles for most, tiles in sorted(table.items()) if rows <= most), None)
