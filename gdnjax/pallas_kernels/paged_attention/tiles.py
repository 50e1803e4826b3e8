"""Tile tables of the op's kernels, a row per architecture: one entry for decode, one for tiles of a prefill chunk."""

import dataclasses

from gdnjax.backend import Backend

WRITE_WARPS = 4

FEW = 8
"""Query tokens of a tile up to which it is one of decode."""


@dataclasses.dataclass(frozen=True)
class Attention:
    """`rows` that one program holds at most, `keys` that it looks at in a turn.

    A context is split where fewer than `programs` would run, into parts of at least `least_split` keys.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    programs: int = 0
    least_split: int = 256


TILES = {
    "cuda": {"decode": Attention(64, 32, 4, 3, programs=264), "prefill": Attention(128, 64, 8, 2)},
    "rocm": {"decode": Attention(64, 32, 4, 1, programs=608), "prefill": Attention(64, 32, 4, 1)},
    "interpret": {"decode": Attention(64, 32, 1, 1, programs=16, least_split=64), "prefill": Attention(64, 32, 1, 1)},
}
"""Of keys and values."""

LATENT = {
    "cuda": {"decode": Attention(64, 32, 8, 2, programs=132), "prefill": Attention(64, 32, 8, 2)},
    "rocm": {"decode": Attention(64, 32, 4, 1, programs=304), "prefill": Attention(64, 32, 4, 1)},
    "interpret": {"decode": Attention(32, 32, 1, 1, programs=16, least_split=64), "prefill": Attention(64, 32, 1, 1)},
}
"""Of latents, whose sums are twice as wide: a program has 512 float32 a row."""


def of(table: dict, backend: Backend, queries: int) -> Attention:
    return backend.tiles(table)["decode" if queries <= FEW else "prefill"]
