"""How the packed tokens of a prefill step belong to rows and chunks: made once per step, read by every op."""

import dataclasses

import jax.numpy as jnp

from gdnjax.shapes import Array, Leaf


@dataclasses.dataclass(frozen=True)
class Rows:
    """The requests of a prefill step, and which row each packed token is of."""

    read_slot: Leaf  # [r] int32: where a row's initial state stands
    write_slot: Leaf  # [r] int32: where its final state goes
    fresh: Leaf  # [r] bool: the row has no state yet, whatever its slot holds
    start: Leaf  # [r] int32: place of the row's first token
    length: Leaf  # [r] int32: its tokens, 0 for a padded row
    token_row: Leaf  # [t] int32
    token_offset: Leaf  # [t] int32: place of a token within its row's piece
    token_valid: Leaf  # [t] bool


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The chunk table: at most CHUNK tokens of one row each, the chunks of a row together and in order.

    A row is cut wherever the table cuts it. No two chunks, and no chunk and row, write one slot but the null slot.
    """

    row: Leaf  # [c] int32
    token: Leaf  # [c, q] int32: place of each token in the packed batch; in range where not valid, too
    valid: Leaf  # [c, q] bool
    end: Leaf  # [c] int32: place behind the chunk's last token
    length: Leaf  # [c] int32: its tokens, 0 for a padded chunk
    place: Leaf  # [t] int32: place of each packed token in the flattened [c, q]
    checkpoint: Leaf = None  # [c] int32: slot that keeps what stands after the chunk, 0 = none; None: nothing is kept

    def of_rows(self, rows: int) -> tuple[Array, Array]:
        """First chunk and number of chunks of each row, [r] int32 each."""
        real = self.length > 0
        count = jnp.zeros((rows,), jnp.int32).at[self.row].add(real)
        number = jnp.arange(self.row.shape[0], dtype=jnp.int32)
        first = jnp.full((rows,), number.size, jnp.int32).at[self.row].min(jnp.where(real, number, number.size))
        return first, count

    def gather(self, packed: Array) -> Array:
        """[t, ...] -> [c, q, ...], zero where there is no token (selected, so that padding cannot spread NaN)."""
        tiles = packed[self.token]
        mask = self.valid.reshape(self.valid.shape + (1,) * (packed.ndim - 1))
        return jnp.where(mask, tiles, jnp.zeros((), packed.dtype))

    def scatter(self, tiles: Array) -> Array:
        """[c, q, ...] -> [t, ...], the inverse of gather on valid tokens."""
        return tiles.reshape((-1, *tiles.shape[2:]))[self.place]


def make_chunks(
    row: Array, start: Array, length: Array, *, tokens: int, size: int, checkpoint: Array | None = None
) -> Chunks:
    """Chunks of a table (row, start, length) over `tokens` packed tokens, `size` tokens wide. Padding has length 0."""
    step = jnp.arange(size, dtype=jnp.int32)
    token = start[:, None] + step
    valid = step < length[:, None]
    place = jnp.zeros((tokens,), jnp.int32)
    flat = jnp.arange(token.size, dtype=jnp.int32)
    place = place.at[jnp.where(valid, token, tokens).reshape(-1)].set(flat, mode="drop")
    token = jnp.clip(token, 0, tokens - 1)
    return Chunks(
        row=row, token=token, valid=valid, end=start + length, length=length, place=place, checkpoint=checkpoint
    )
