"""Tile table of the ops' kernels, a row per architecture."""

import dataclasses

from gdnjax.backend import Backend


@dataclasses.dataclass(frozen=True)
class Tile:
    """The choice of a token is one program of `choose_warps`.

    A program of the sort finds the places of `pairs`, or counts the pairs of as many experts, looking at `at_once`
    others at a time. Its work grows with the square of the pairs, so there are `most_pairs`.
    """

    choose_warps: int
    sort_warps: int
    pairs: int
    at_once: int
    most_pairs: int = 8192


TILES = {
    "cuda": Tile(choose_warps=4, sort_warps=4, pairs=16, at_once=512),
    "rocm": Tile(choose_warps=4, sort_warps=4, pairs=16, at_once=512),
    "interpret": Tile(choose_warps=1, sort_warps=1, pairs=16, at_once=64, most_pairs=512),
}


def of(backend: Backend) -> Tile:
    return backend.tiles(TILES)
