"""Tile tables of the op's kernels: by architecture and dtype, for the rows of a step, rounded up."""

import dataclasses

from gdnjax.backend import Backend


@dataclasses.dataclass(frozen=True)
class Tile:
    """A program makes `columns` outputs of all rows, `depth` inputs at a time.

    Where fewer than `programs` would run, the inputs are split between several, whose sums XLA adds up. `gated_columns`
    are those of a program that makes gate and up together.
    """

    columns: int
    gated_columns: int
    depth: int
    warps: int
    stages: int
    programs: int


# dtype -> {most rows: tile}
TILES = {
    "cuda": {
        "bfloat16": {
            16: Tile(64, 32, 256, 4, 3, 264),
            64: Tile(64, 64, 128, 4, 3, 264),
            128: Tile(128, 64, 64, 8, 4, 132),
        }
    },
    "rocm": {
        "bfloat16": {
            16: Tile(64, 32, 128, 4, 1, 304),
            64: Tile(64, 32, 64, 4, 1, 304),
            128: Tile(64, 32, 64, 4, 1, 304),
        }
    },
    "interpret": {dtype: {128: Tile(64, 32, 64, 1, 1, 8)} for dtype in ("bfloat16", "float32")},
}


def of(backend: Backend, rows: int, dtype) -> Tile | None:
    """The tile for so many rows; None: XLA's product."""
    if backend.is_reference:
        return None
    table = backend.tiles(TILES).get(str(dtype), {})
    return next((tile for most, tile in sorted(table.items()) if rows <= most), None)
