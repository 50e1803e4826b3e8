"""Tile tables of the op's kernels, a row per architecture: one entry for decode, one for tiles of a prefill chunk."""

import dataclasses
import itertools

from gdnjax.backend import Backend

WRITE_WARPS = 4


@dataclasses.dataclass(frozen=True)
class Enter:
    """Where queries and keys get norm and rotation, and are stored, in one kernel: for `most` tokens, 0 for none; a
    program has at most `heads` of the queries of one, or its keys and values.
    """

    most: int
    heads: int
    warps: int


ENTER = {
    "cuda": Enter(most=1024, heads=8, warps=4),
    "rocm": Enter(most=1024, heads=8, warps=4),
    "interpret": Enter(most=1024, heads=2, warps=1),
}

FEW = 8
"""Query tokens of a tile up to which it is one of decode."""


LONG = 4
"""Parts from which on contexts are long: below, a second kernel would cost what the parts of a few of them gain."""

MOST_PARTS = 32
"""Of a long context. The sums of all parts take room in memory: with this many, of 128 requests of Qwen3.5-9B, half of
what their logits take, which are not there yet.
"""


@dataclasses.dataclass(frozen=True)
class Attention:
    """`rows` that one program holds at most, `keys` that it looks at in a turn.

    A context is split where fewer than `programs` would run, into parts of at least `least_split` keys. And where
    contexts may have more than LONG times `part` keys, into parts of at most that many, or MOST_PARTS larger ones; 0:
    they are not. The kernel that merges parts has `merge_warps`.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    programs: int = 0
    least_split: int = 256
    part: int = 0
    merge_warps: int = 2


TILES = {
    "cuda": {
        "decode": Attention(64, 32, 4, 3, programs=264, least_split=128, part=2048),
        "prefill": Attention(128, 64, 8, 2),
    },
    "rocm": {"decode": Attention(64, 32, 4, 1, programs=608, part=2048), "prefill": Attention(64, 32, 4, 1)},
    "interpret": {
        "decode": Attention(64, 32, 1, 1, programs=16, least_split=64, part=64),
        "prefill": Attention(64, 32, 1, 1),
    },
}
"""Of keys and values."""

LATENT = {
    "sm_90": {
        ("bfloat16", "narrow"): Attention(32, 64, 8, 5, programs=132, part=2048),
        ("bfloat16", "wide"): Attention(64, 64, 8, 3, programs=132, part=2048),
        ("bfloat16", "prefill"): Attention(64, 32, 8, 3),
        ("float32", "narrow"): Attention(32, 16, 8, 1, programs=132, part=2048),
        ("float32", "wide"): Attention(32, 16, 8, 1, programs=132, part=2048),
        ("float32", "prefill"): Attention(32, 16, 8, 1),
    },
    "cuda": {
        ("bfloat16", "narrow"): Attention(32, 32, 8, 3, programs=132, part=2048),
        ("bfloat16", "wide"): Attention(32, 32, 8, 3, programs=132, part=2048),
        ("bfloat16", "prefill"): Attention(32, 32, 8, 3),
        ("float32", "narrow"): Attention(16, 16, 8, 1, programs=132, part=2048),
        ("float32", "wide"): Attention(16, 16, 8, 1, programs=132, part=2048),
        ("float32", "prefill"): Attention(16, 16, 8, 1),
    },
    "rocm": {
        ("bfloat16", "narrow"): Attention(32, 16, 8, 1, programs=304, part=2048),
        ("bfloat16", "wide"): Attention(64, 16, 4, 1, programs=304, part=2048),
        ("bfloat16", "prefill"): Attention(64, 16, 4, 1),
        ("float32", "narrow"): Attention(32, 16, 4, 1, programs=304, part=2048),
        ("float32", "wide"): Attention(32, 16, 4, 1, programs=304, part=2048),
        ("float32", "prefill"): Attention(32, 16, 4, 1),
    },
    "interpret": {
        **dict.fromkeys(
            itertools.product(("bfloat16", "float32"), ("narrow", "wide")),
            Attention(32, 32, 1, 1, programs=16, least_split=64, part=64),
        ),
        ("bfloat16", "prefill"): Attention(64, 32, 1, 1),
        # A half of a tile.
        ("float32", "prefill"): Attention(32, 32, 1, 1),
    },
}
"""Of latents, by the dtype of the queries; decode is narrow up to NARROW rows.

A program keeps 512 float32 a row, twice what one of keys and values does. What binds is memory that it shares: 64 KiB
on gfx942, where more keys a turn spill, too; 99 KiB on the smallest chips of CUDA; 227 on sm_90, where two pages are
under way beside the queries. Those of 64 rows are there at three stages, by wgmma, and those of 32 at five: a page
waits for the numbers of its blocks. Timed are those of bfloat16 on sm_90; see WORKSPACE.md.
"""

NARROW = 32
"""Rows, queries of a tile by heads, up to which decode is narrow."""


def of(backend: Backend, queries: int) -> Attention:
    return backend.tiles(TILES)["decode" if queries <= FEW else "prefill"]


def of_latents(backend: Backend, queries: int, heads: int, dtype: str) -> Attention:
    kind = "prefill" if queries > FEW else "narrow" if queries * heads <= NARROW else "wide"
    return backend.tiles(LATENT)[dtype, kind]
