"""Matrices of the next launch, read on the way: programs beside those of a kernel that leaves the device idle bring the
beginnings of their rows into its cache.

A kernel of one row is one program, and takes as long as memory takes to answer it three times. Meanwhile the bytes that
the product behind it will wait for may come. Nothing that is computed depends on it: what is read is added up and
thrown away, since a load that nobody needs would be left out.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gdnjax.backend import Backend
from gdnjax.shapes import Array

ROWS = 16
"""Of a matrix that a program looks at in one go."""

WIDEST = 1024
"""Numbers of each of them at most."""


@dataclasses.dataclass(frozen=True)
class Ahead:
    """`programs` read `size` bytes, beside kernels of at most `most` programs of their own; 0: none do. That is so
    wherever it has not been measured yet.
    """

    programs: int
    size: int
    most: int


TABLE = {"cuda": Ahead(0, 8 << 20, 16), "rocm": Ahead(0, 8 << 20, 16), "interpret": Ahead(0, 4096, 16)}


def of(backend: Backend, programs: int, matrices: Sequence[Array]) -> Ahead | None:
    """How to read ahead beside a kernel of so many programs, if at all."""
    found = backend.tiles(TABLE)
    return found if matrices and found.programs and programs <= found.most else None


def widths(found: Ahead, matrices: Sequence[Array]) -> tuple[int, ...]:
    """Numbers of each row, a power of two: about `size` bytes in all, and what registers hold."""
    each = max(64, found.size // sum(matrix.shape[0] for matrix in matrices))
    numbers = (min(matrix.shape[1], WIDEST, each // matrix.dtype.itemsize) for matrix in matrices)
    return tuple(1 << (max(1, number).bit_length() - 1) for number in numbers)


def carrying(program, *refs, kernel: Callable, static: tuple, programs: int, inputs: int, readers: int, widths):
    """`kernel` in the first `programs`, and behind its `inputs` the matrices that the other programs read; behind its
    outputs one that nobody reads.
    """
    own, matrices = refs[:inputs], refs[inputs : inputs + len(widths)]
    *outputs, read_ref = refs[inputs + len(widths) :]
    pl.when(program < programs)(lambda: kernel(program, *own, *outputs, **dict(static)))
    pl.when(program >= programs)(lambda: _read(program - programs, matrices, read_ref, readers, widths))


def _read(reader, matrices, read_ref, readers: int, widths: tuple[int, ...]) -> None:
    total = jnp.zeros((), jnp.float32)
    for ref, width in zip(matrices, widths, strict=True):
        rows = ref.shape[0]
        column = jnp.arange(width, dtype=jnp.int32)[None, :]
        each = -(-rows // readers)
        found = jnp.zeros((ROWS, width), jnp.float32)
        for first in range(0, each, ROWS):
            row = reader * each + first + jnp.arange(ROWS, dtype=jnp.int32)
            there = jnp.broadcast_to((row < rows)[:, None], found.shape)
            # Of the matrix' kind: an integer is not converted to float8.
            zero = 0.0 if jnp.issubdtype(ref.dtype, jnp.floating) else 0
            block = plgpu.load(ref.at[row[:, None], column], mask=there, other=zero)
            if ref.dtype.itemsize == 1:
                # Whatever the numbers are: of float8 they would take several instructions each.
                block = lax.bitcast_convert_type(block, jnp.int8)
            found = found + block.astype(jnp.float32)
        total = total + jnp.sum(jnp.sum(found, axis=1))
    read_ref[reader] = total
