"""Packed prefill batches for the ops' tests: rows of given lengths, padded tokens, padded rows, chunk table."""

import dataclasses
from collections.abc import Sequence

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
) -> Packed:
    """Rows one after another, then padding that points at slot 0 and row 0."""
    count = len(lengths)
    total = sum(lengths)
    starts = np.cumsum([0, *lengths[:-1]])

    def column(values, dtype=np.int32):
        return jnp.asarray([*values, *[0] * (ROWS - count)], dtype)

    row = np.repeat(np.arange(count), lengths)
    offset = np.arange(total) - np.repeat(starts, lengths)
    table = [
        (i, starts[i] + done, min(CHUNK, length - done))
        for i, length in enumerate(lengths)
        for done in range(0, length, CHUNK)
    ]
    table += [(0, 0, 0)] * (CHUNKS - len(table))
    chunk_row, chunk_start, chunk_length = (jnp.asarray(part, jnp.int32) for part in zip(*table, strict=True))
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
    chunks = make_chunks(chunk_row, chunk_start, chunk_length, tokens=TOKENS, size=CHUNK)
    slices = [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    return Packed(rows=rows, chunks=chunks, slices=slices)
