"""Paged attention against a softmax written out in numpy, with scattered blocks and NaN wherever nothing is stored."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gdnjax.pallas_kernels import paged_attention
from gdnjax.pallas_kernels.paged_attention import Tiles
from tests.pallas_kernels.backends import jit, running

WIDTH = 16
LAYERS, BLOCKS = 2, 120
RTOL, ATOL = 2e-5, 2e-6
"""Float32 dot products of 16 terms and sums over at most 600 keys of a softmax; numpy computes in float64."""


class Cache:
    """Requests' keys and values in numpy, and the same in blocks that are scattered over a pool full of NaN."""

    def __init__(self, lengths, *, kv_heads=2, block_size=16, dtype=np.float32, seed=0, table_width=None):
        rng = np.random.default_rng(seed)
        self.block_size = block_size
        needed = [-(-length // block_size) for length in lengths]
        blocks = max(BLOCKS, sum(needed) + 1)
        shape = (LAYERS, blocks, block_size, kv_heads, WIDTH)
        self.k_pool, self.v_pool = (np.full(shape, np.nan, dtype) for _ in range(2))
        self.table = np.zeros((len(lengths), table_width or max(needed) + 1), np.int32)
        free = rng.permutation(np.arange(1, blocks)).tolist()
        self.k, self.v = [], []
        for row, length in enumerate(lengths):
            self.table[row, : needed[row]] = [free.pop() for _ in range(needed[row])]
            k, v = (rng.standard_normal((length, kv_heads, WIDTH)).astype(dtype) for _ in range(2))
            place = (1, self.table[row, np.arange(length) // block_size], np.arange(length) % block_size)
            self.k_pool[place], self.v_pool[place] = k, v
            self.k.append(k.astype(np.float64))
            self.v.append(v.astype(np.float64))

    def naive(self, row, q, position):
        """o_i = sum_j softmax_j(q_i . k_j / sqrt(hd)) v_j over j <= position: q [h, hd] -> [h, hd]."""
        group = q.shape[0] // self.k[row].shape[1]
        out = np.zeros(q.shape)
        for head in range(q.shape[0]):
            k, v = (x[: position + 1, head // group] for x in (self.k[row], self.v[row]))
            score = k @ q[head].astype(np.float64) / np.sqrt(WIDTH)
            weight = np.exp(score - score.max())
            out[head] = weight @ v / weight.sum()
        return out


@jit(static_argnums=(3, 5))
def _attend(q, k, v, layer, tiles, first):
    return paged_attention.attend(q, k, v, layer, Tiles(**tiles, first=first), backend=running())


def attend(cache, q, position, rows, longest=None, first=0):
    tiles = {
        "position": jnp.asarray(position, jnp.int32),
        "block_table": jnp.asarray(cache.table[rows]),
        "longest": jnp.int32(np.max(position) + 1 if longest is None else longest),
    }
    return np.asarray(_attend(jnp.asarray(q), jnp.asarray(cache.k_pool), jnp.asarray(cache.v_pool), 1, tiles, first))


def random_queries(tiles, queries, heads, seed=1):
    return np.random.default_rng(seed).standard_normal((tiles, queries, heads, WIDTH)).astype(np.float32)


def check(cache, q, position, rows, actual):
    for tile, row in enumerate(rows):
        for i, p in enumerate(position[tile]):
            expected = np.zeros(q.shape[2:]) if p < 0 else cache.naive(row, q[tile, i], p)
            np.testing.assert_allclose(actual[tile, i], expected, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("block_size", [8, 16, 64])
@pytest.mark.parametrize("group", [1, 2, 3, 4])
def test_decode_equals_softmax(group, block_size):
    """One query a tile, each at its request's last key; one tile has no query."""
    lengths = [1, 2, 17, 64, 65, 9]
    cache = Cache(lengths, block_size=block_size)
    q = random_queries(6, 1, 2 * group)
    position = np.array(lengths)[:, None] - 1
    position[3] = -1
    check(cache, q, position, range(6), attend(cache, q, position, np.arange(6)))


@pytest.mark.parametrize("block_size", [8, 16, 64])
def test_more_keys_than_a_page_equal_softmax(block_size):
    """Beyond 256 keys the softmax is carried over pages; a short request beside a long one loops as far."""
    lengths = [255, 256, 257, 600, 3]
    cache = Cache(lengths, block_size=block_size)
    q = random_queries(5, 1, 4)
    position = np.array(lengths)[:, None] - 1
    check(cache, q, position, range(5), attend(cache, q, position, np.arange(5)))


@pytest.mark.parametrize("block_size", [8, 64])
def test_prefill_tiles_are_causal(block_size):
    """Tiles of 64 queries within longer contexts, the last of them partly empty, two tiles of one request."""
    cache = Cache([150, 70], block_size=block_size)
    q = random_queries(3, 64, 4)
    position = np.stack([np.arange(0, 64), np.arange(64, 128), np.arange(6, 70)])
    position[2, 40:] = -1
    rows = np.array([0, 0, 1])
    check(cache, q, position, rows, attend(cache, q, position, rows))


def test_keys_past_the_query_are_never_seen():
    """They are NaN: a tile attends to what stands before it only, and the null block holds NaN from the start."""
    cache = Cache([40])
    q = random_queries(1, 1, 4)
    for position in (0, 1, 15, 16, 38):
        poisoned = Cache([40])
        for pool in (poisoned.k_pool, poisoned.v_pool):
            place = np.arange(position + 1, 40)
            pool[1, poisoned.table[0, place // 16], place % 16] = np.nan
        actual = attend(poisoned, q, [[position]], np.array([0]))
        check(cache, q, [[position]], [0], actual)


def test_tiles_without_queries_are_zero():
    cache = Cache([20])
    cache.table[:] = 0
    actual = attend(cache, random_queries(1, 4, 4), np.full((1, 4), -1), np.array([0]), longest=20)
    np.testing.assert_array_equal(actual, 0)
    nothing = attend(cache, random_queries(1, 4, 4), np.full((1, 4), -1), np.array([0]), longest=0)
    np.testing.assert_array_equal(nothing, 0)


def test_tile_ignores_its_neighbours_bit_for_bit():
    """Even how far the loop runs: further pages change nothing."""
    cache = Cache([30, 600, 5])
    q = random_queries(3, 1, 4)
    position = np.array([[29], [599], [4]])
    together = attend(cache, q, position, np.arange(3))
    position[1] = 3
    np.testing.assert_array_equal(attend(cache, q, position, np.arange(3))[[0, 2]], together[[0, 2]])
    position[1] = -1
    np.testing.assert_array_equal(attend(cache, q, position, np.arange(3))[[0, 2]], together[[0, 2]])


def test_large_scores_do_not_overflow():
    cache = Cache([300])
    q = 200 * random_queries(1, 1, 4)
    check(cache, q, [[299]], [0], attend(cache, q, [[299]], np.array([0])))


def test_bfloat16_blocks_are_read_exactly():
    """Keys and values are widened to float32 before any product."""
    cache = Cache([70], dtype=ml_dtypes.bfloat16)
    q = random_queries(1, 1, 4)
    check(cache, q, [[69]], [0], attend(cache, q, [[69]], np.array([0])))


def test_write_stores_each_token_in_its_place_and_nothing_else(backend):
    rng = np.random.default_rng(2)
    pools = rng.standard_normal((2, LAYERS, 6, 8, 3, WIDTH)).astype(np.float32)
    values = rng.standard_normal((2, 4, 3, WIDTH)).astype(np.float32)
    block, offset = np.array([3, 5, 0, 3]), np.array([7, 0, 2, 0])
    arguments = (*map(jnp.asarray, values), jnp.asarray(block, jnp.int32), jnp.asarray(offset, jnp.int32))
    actual = paged_attention.write(*map(jnp.asarray, pools), 1, *arguments, backend=backend)
    pools[:, 1, block, offset] = values
    np.testing.assert_array_equal(np.asarray(actual), pools)


def test_write_rounds_to_the_pool(backend):
    pools = [jnp.zeros((1, 2, 8, 1, WIDTH), jnp.bfloat16) for _ in range(2)]
    values = np.random.default_rng(3).standard_normal((2, 1, 1, WIDTH)).astype(np.float32)
    place = (jnp.array([1]), jnp.array([3]))
    actual = paged_attention.write(*pools, 0, *map(jnp.asarray, values), *place, backend=backend)
    for pool, value in zip(actual, values, strict=True):
        np.testing.assert_array_equal(np.asarray(pool)[0, 1, 3], value[0].astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("first", [1, 17, 300])
def test_keys_before_the_first_are_never_seen(first):
    """As if the sequence began there, NaN or not; a query before the first sees nothing, and gives 0."""
    cache, whole = Cache([310, 3]), Cache([310, 3])
    q = random_queries(2, 1, 4)
    for pool in (cache.k_pool, cache.v_pool):
        place = np.arange(first)
        pool[1, cache.table[0, place // 16], place % 16] = np.nan
    actual = attend(cache, q, [[309], [0]], np.array([0, 1]), first=first)
    whole.k[0], whole.v[0] = whole.k[0][first:], whole.v[0][first:]
    np.testing.assert_allclose(actual[0, 0], whole.naive(0, q[0, 0], 309 - first), rtol=RTOL, atol=ATOL)
    np.testing.assert_array_equal(actual[1], 0)


def test_gradient_is_finite_where_a_query_sees_nothing():
    """A static `longest` makes the loop differentiable. Compared with the derivative of a plain softmax."""
    rng = np.random.default_rng(2)
    q = jnp.asarray(rng.standard_normal((2, 1, 2, WIDTH)), jnp.float32)
    k, v = (jnp.asarray(rng.standard_normal((1, 4, 16, 2, WIDTH)), jnp.float32) for _ in range(2))
    table = jnp.array([[1, 2], [3, 0]])

    def paged(k, v):
        tiles = Tiles(position=jnp.array([[20], [-1]]), block_table=table, longest=21)
        return jnp.sum(jnp.sin(paged_attention.attend(q, k, v, 0, tiles)))

    def plain(k, v):
        keys, values = (x[0, 1:3].reshape(32, 2, WIDTH)[:21] for x in (k, v))
        weight = jax.nn.softmax(jnp.einsum("hd,khd->hk", q[0, 0], keys) * WIDTH**-0.5, axis=-1)
        return jnp.sum(jnp.sin(jnp.einsum("hk,khd->hd", weight, values)))

    for actual, expected in zip(jax.grad(paged, (0, 1))(k, v), jax.grad(plain, (0, 1))(k, v), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
