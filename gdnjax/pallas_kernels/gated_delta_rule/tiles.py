"""Tile tables of the op's kernels, a row per architecture. `scripts/bench_kernels.py --sweep` prints such rows."""

import dataclasses
from typing import Any

from jax import lax

from gdnjax.backend import FLOAT32_DOT, Backend
from gdnjax.pallas_kernels.launch import power_of_two


@dataclasses.dataclass(frozen=True)
class Recurrent:
    """`columns` value columns by all of K in each program."""

    columns: int
    warps: int


# (dtype of the state, order of the pool) -> tile. A mixed pool changes the order of a row in place, which only a
# program that holds the whole head can do. Such a tile goes through shared memory, in a way that Triton chooses: the 64
# KiB of gfx942 do not hold heads of 256 x 256, nor of K = 128 and V = 256 in float32, while 192 x 192 takes 1 KiB. So
# what does not fit is known to the compiler alone, which refuses it, with the bytes, when the engine warms up.
RECURRENT = {
    "cuda": {
        ("float32", "vk"): Recurrent(8, 1),
        ("float32", "kv"): Recurrent(64, 4),
        ("bfloat16", "vk"): Recurrent(16, 1),
        ("bfloat16", "kv"): Recurrent(64, 4),
        "mixed": 16,
    },
    "rocm": {
        ("float32", "vk"): Recurrent(8, 1),
        ("float32", "kv"): Recurrent(32, 4),
        ("bfloat16", "vk"): Recurrent(16, 1),
        ("bfloat16", "kv"): Recurrent(32, 4),
        "mixed": 8,
    },
}
RECURRENT["interpret"] = {
    **{(dtype, order): Recurrent(8, 1) for dtype in ("float32", "bfloat16") for order in ("kv", "vk")},
    "mixed": 1,
}


def recurrent(backend: Backend, dtype, order, key_dim: int, value_dim: int) -> Recurrent:
    row = backend.tiles(RECURRENT)
    if not isinstance(order.read, bool):
        return Recurrent(columns=power_of_two(value_dim), warps=row["mixed"])
    return row[str(dtype), "vk" if order.read else "kv"]


# Of the kernel in Triton, by the order that it reads: what spills on no architecture. Nobody has timed it.
TRITON = {"vk": Recurrent(8, 1), "kv": Recurrent(32, 4)}


@dataclasses.dataclass(frozen=True)
class Chunked:
    """`columns` value columns by all of K in each program of the walk. Where channels decay by themselves: so many at a
    time, and how products of decayed keys are rounded.
    """

    columns: int
    walk_warps: int
    walk_stages: int
    scores_warps: int
    inverse_warps: int
    inverse_precision: Any
    channels: int
    channel_warps: int
    channel_precision: Any


# Products in three parts on the matrix units where float32 has none of its own.
TF32X3 = lax.DotAlgorithmPreset.TF32_TF32_F32_X3

# And in one, where what comes of it is rounded to bfloat16: eleven bits, of which that has eight.
TF32 = lax.DotAlgorithmPreset.TF32_TF32_F32

# dtype of the activations -> tile
CHUNKED = {
    "cuda": {
        "bfloat16": Chunked(32, 4, 3, 4, 1, TF32X3, 32, 2, TF32),
        "float32": Chunked(16, 4, 1, 4, 1, TF32X3, 32, 4, TF32X3),
    },
    "rocm": {
        "bfloat16": Chunked(16, 4, 1, 4, 1, FLOAT32_DOT, 32, 4, FLOAT32_DOT),
        "float32": Chunked(16, 4, 1, 4, 1, FLOAT32_DOT, 32, 4, FLOAT32_DOT),
    },
    "interpret": {
        "bfloat16": Chunked(16, 1, 1, 1, 1, FLOAT32_DOT, 32, 1, FLOAT32_DOT),
        "float32": Chunked(16, 1, 1, 1, 1, FLOAT32_DOT, 32, 1, FLOAT32_DOT),
    },
}


def chunked(backend: Backend, dtype, key_dim: int, value_dim: int) -> Chunked:
    return backend.tiles(CHUNKED)[str(dtype)]
