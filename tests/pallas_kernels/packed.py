"""Packed prefill batches for the ops' tests: rows of given lengths, padded tokens, padded rows, chunk table."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from gdnjax.pallas_kernels.rows import Chunks, Rows, make_chunks

CHUNK = 64

TOKENS, ROWS, CHUNKS = 336, 8, 16
"""The one bucket that these batches are padded to, so that each op is compiled once a workload."""


@dataclasses.dataclass(frozen=True)
class Packed:
    """The rows of one step. `slices[i]` is where row i's tokens stand."""

    rows: Rows
    chunks: Chunks
    slices: list[slice]

    def pack(self, values: Sequence[np.ndarray], padding: float = np.nan) -> jnp.ndarray:
        """[TOKENS, ...] with each row's values in its place and `padding` elsewhere."""
        packed = np.full((TOKENS, *values[0].shape[1:]), padding, np.float32)
        for here, row in zip(self.slices, values, strict=True):
            packed[here] = row
        return jnp.asarray(packed)


def pack_rows(
    lengths: Sequence[int],
    *,
    read: Sequence[int],
    fresh: Sequence[bool],
    write: Sequence[int] | None = None,
    cuts: Sequence[Mapping[int, int]] | None = None,
    behind: Sequence[int] | None = None,
) -> Packed:
    """Rows one after another, then padding that points at slot 0 and row 0.

    `cuts` says for each row where it is cut besides multiples of CHUNK, and which slot keeps what stands there, 0 for
    none. Without it the chunks have no checkpoints at all. `behind` counts the tokens before a row's piece, which move
    the multiples of CHUNK.
    """
    count = len(lengths)
    total = sum(lengths)
    starts = np.cumsum([0, *lengths[:-1]])

    def column(values, dtype=np.int32):
        return jnp.asarray([*values, *[0] * (ROWS - count)], dtype)

    row = np.repeat(np.arange(count), lengths)
    offset = np.arange(total) - np.repeat(starts, lengths)
    table = []
    for i, length in enumerate(lengths):
        kept = {} if cuts is None else cuts[i]
        first = 0 if behind is None else -behind[i] % CHUNK
        places = sorted({0, *range(first, length, CHUNK), *kept, length})
        table += [(i, starts[i] + begin, end - begin, kept.get(end, 0)) for begin, end in itertools.pairwise(places)]
    table += [(0, 0, 0, 0)] * (CHUNKS - len(table))
    *columns, checkpoint = (jnp.asarray(part, jnp.int32) for part in zip(*table, strict=True))
    rows = Rows(
        read_slot=column(read),
        write_slot=column(read if write is None else write),
        fresh=jnp.asarray([*fresh, *[True] * (ROWS - count)]),
        start=column(starts),
        length=column(lengths),
        token_row=jnp.asarray(np.pad(row, (0, TOKENS - total)), jnp.int32),
        # As `prefill_context` makes it: padding continues row 0.
        token_offset=jnp.asarray([*offset, *range(total, TOKENS)], jnp.int32),
        token_valid=jnp.arange(TOKENS) < total,
    )
    checkpoint = None if cuts is None else checkpoint
    chunks = make_chunks(*columns, tokens=TOKENS, size=CHUNK, checkpoint=checkpoint)
    slices = [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    return Packed(rows=rows, chunks=chunks, slices=slices)
