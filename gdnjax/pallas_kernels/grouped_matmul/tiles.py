"""Tile table of the op's kernel, a row per architecture: one entry for few rows a group, one for many."""

import dataclasses

from gdnjax.backend import Backend


@dataclasses.dataclass(frozen=True)
class Grouped:
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


TILES = {
    "cuda": {"few": Grouped(16, 64, 128, 4, 4), "many": Grouped(128, 128, 64, 8, 3)},
    "rocm": {"few": Grouped(16, 64, 128, 4, 1), "many": Grouped(64, 64, 64, 4, 1)},
    "interpret": {"few": Grouped(16, 32, 64, 1, 1), "many": Grouped(32, 32, 64, 1, 1)},
}


def of(backend: Backend, rows_per_group: float, dtype) -> Grouped:
    return backend.tiles(TILES)["few" if rows_per_group <= 32 else "many"]
