"""The chunk table: tiles hold the tokens of their chunk and nothing else."""

import jax.numpy as jnp
import numpy as np

from gdnjax.pallas_kernels.rows import make_chunks
from tests.pallas_kernels.backends import once
from tests.pallas_kernels.packed import pack_rows

pytestmark = once


def test_scatter_is_the_inverse_of_gather_on_valid_tokens():
    lengths = (1, 64, 65, 130)
    packed = pack_rows(lengths, read=[0] * 4, fresh=[True] * 4)
    values = packed.pack([np.random.default_rng(n).standard_normal((n, 2, 3)) for n in lengths])
    back = np.asarray(packed.chunks.scatter(packed.chunks.gather(values)))
    np.testing.assert_array_equal(back[: sum(lengths)], np.asarray(values)[: sum(lengths)])


def test_gather_selects_padding_away():
    """Tokens that belong to no chunk are NaN; tiles are zero there."""
    values = jnp.where(jnp.arange(100) < 70, jnp.arange(100.0), jnp.nan)
    table = [jnp.asarray(column, jnp.int32) for column in ([0, 0, 1, 0], [0, 64, 67, 0], [64, 3, 3, 0])]
    chunks = make_chunks(*table, tokens=100, size=64)
    tiles = np.asarray(chunks.gather(values))
    expected = np.zeros((4, 64))
    expected[0], expected[1, :3], expected[2, :3] = np.arange(64), [64, 65, 66], [67, 68, 69]
    np.testing.assert_array_equal(tiles, expected)


def test_chunk_ends_behind_its_last_token():
    packed = pack_rows([70, 3], read=[0] * 2, fresh=[True] * 2, cuts=[{5: 6}, {3: 7}])
    found = {int(slot): int(end) for slot, end in zip(packed.chunks.checkpoint, packed.chunks.end, strict=True)}
    assert (found[6], found[7]) == (5, 73)


def test_chunk_at_the_end_of_the_batch_reads_within_it():
    chunks = make_chunks(*(jnp.asarray([x], jnp.int32) for x in (0, 98, 2)), tokens=100, size=64)
    assert int(chunks.token.max()) == 99
    np.testing.assert_array_equal(np.asarray(chunks.gather(jnp.arange(100.0)))[0, :3], [98, 99, 0])
