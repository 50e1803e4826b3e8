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
    "cuda": {
        "bfloat16": {"decode": Attention(64, 64, 8, 3, programs=132), "prefill": Attention(64, 32, 8, 3)},
        "float32": {"decode": Attention(32, 16, 8, 1, programs=132), "prefill": Attention(32, 16, 8, 1)},
    },
    "rocm": {
        "bfloat16": {"decode": Attention(64, 16, 4, 1, programs=304), "prefill": Attention(64, 16, 4, 1)},
        "float32": {"decode": Attention(32, 16, 4, 1, programs=304), "prefill": Attention(32, 16, 4, 1)},
    },
    "interpret": {
        "bfloat16": {
            "decode": Attention(32, 32, 1, 1, programs=16, least_split=64),
            "prefill": Attention(64, 32, 1, 1),
        },
        "float32": {
            "decode": Attention(32, 32, 1, 1, programs=16, least_split=64),
            "prefill": Attention(48, 32, 1, 1),
        },
    },
}
"""Of latents, by the dtype of the queries. A program keeps 512 float32 a row, where one of keys and values has 256: on
AMD more keys a turn spill, and of float32 no more rows fit in what a workgroup shares."""


def of(backend: Backend, queries: int) -> Attention:
    return _row(backend.tiles(TILES), queries)


def of_latents(backend: Backend, queries: int, dtype: str) -> Attention:
    return _row(backend.tiles(LATENT)[dtype], queries)


def _row(entries: dict[str, Attention], queries: int) -> Attention:
    return entries["decode" if queries <= FEW else "prefill"]
