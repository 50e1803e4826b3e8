"""Paged attention against a softmax written out in numpy, with scattered blocks and NaN wherever nothing is stored."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gdnjax.backend import REFERENCE, Backend
from gdnjax.pallas_kernels import paged_attention
from gdnjax.pallas_kernels.paged_attention import Tiles
from tests.pallas_kernels.backends import jit, once, running

WIDTH = 16
LAYERS, BLOCKS = 2, 120
RTOL, ATOL = 2e-5, 2e-6
"""Float32 dot products of 16 terms and sums over at most 600 keys of a softmax; numpy computes in float64."""


class Cache:
    """Requests' keys and values in numpy, and the same in blocks that are scattered over a pool full of NaN."""

    scales = None

    def __init__(self, lengths, *, kv_heads=2, block_size=16, dtype=np.float32, seed=0, table_width=None, width=WIDTH):
        rng = np.random.default_rng(seed)
        self.block_size = block_size
        needed = [-(-length // block_size) for length in lengths]
        blocks = max(BLOCKS, sum(needed) + 1)
        shape = (LAYERS, blocks, block_size, kv_heads, width)
        self.k_pool, self.v_pool = (np.full(shape, np.nan, dtype) for _ in range(2))
        self.table = np.zeros((len(lengths), table_width or max(needed) + 1), np.int32)
        free = rng.permutation(np.arange(1, blocks)).tolist()
        self.k, self.v = [], []
        for row, length in enumerate(lengths):
            self.table[row, : needed[row]] = [free.pop() for _ in range(needed[row])]
            k, v = (rng.standard_normal((length, kv_heads, width)).astype(dtype) for _ in range(2))
            place = self.place(row, np.arange(length))
            self.k_pool[place], self.v_pool[place] = k, v
            self.k.append(k.astype(np.float64))
            self.v.append(v.astype(np.float64))

    def place(self, row, position):
        return 1, self.table[row, position // self.block_size], position % self.block_size

    def naive(self, row, q, position):
        """o_i = sum_j softmax_j(q_i . k_j / sqrt(hd)) v_j over j <= position: q [h, hd] -> [h, hd]."""
        group = q.shape[0] // self.k[row].shape[1]
        out = np.zeros(q.shape)
        for head in range(q.shape[0]):
            k, v = (x[: position + 1, head // group] for x in (self.k[row], self.v[row]))
            score = k @ q[head].astype(np.float64) / np.sqrt(q.shape[1])
            weight = np.exp(score - score.max())
            out[head] = weight @ v / weight.sum()
        return out


LARGEST = {"int8": 127, "float8_e4m3fn": 448}
"""The 8-bit dtypes, and the largest magnitude that each stores."""


class QuantisedCache(Cache):
    """Keys and values of 8 bits, their scales 16-fold apart; `k` and `v` are what is stored times its scale. Where
    nothing is stored, scales are NaN, and values NaN or the largest.
    """

    def __init__(self, lengths, dtype, **options):
        super().__init__(lengths, **options)
        spread = 4 ** np.random.default_rng(5).uniform(-1, 1, self.k_pool.shape[:-1])
        self.k_pool, k_scales, self.k = self._quantised(spread * LARGEST[dtype], self.k_pool, dtype)
        self.v_pool, v_scales, self.v = self._quantised(LARGEST[dtype] / spread, self.v_pool, dtype)
        self.scales = k_scales, v_scales

    def _quantised(self, steps, pool, dtype):
        scales = (np.abs(pool).max(-1) / steps).astype(np.float32)
        values = pool * (LARGEST[dtype] / np.abs(pool).max(-1, keepdims=True))
        values = np.nan_to_num(np.rint(values), nan=127) if dtype == "int8" else values
        stored = values.astype(dtype)
        places = [self.place(row, np.arange(len(k))) for row, k in enumerate(self.k)]
        widened = stored.astype(np.float64) * scales[..., None]
        return stored, scales, [widened[place] for place in places]


@jit(static_argnums=(3, 6))
def _attend(q, k, v, layer, scales, tiles, first):
    return paged_attention.attend(q, k, v, layer, Tiles(**tiles, first=first), scales=scales, backend=running())


def attend(cache, q, position, rows, longest=None, first=0):
    tiles = {
        "position": jnp.asarray(position, jnp.int32),
        "block_table": jnp.asarray(cache.table[rows]),
        "longest": jnp.int32(np.max(position) + 1 if longest is None else longest),
    }
    q, k, v, scales = jax.tree.map(jnp.asarray, (q, cache.k_pool, cache.v_pool, cache.scales))
    return np.asarray(_attend(q, k, v, 1, scales, tiles, first))


def random_queries(tiles, queries, heads, seed=1, width=WIDTH):
    return np.random.default_rng(seed).standard_normal((tiles, queries, heads, width)).astype(np.float32)


def check(cache, q, position, rows, actual):
    for tile, row in enumerate(rows):
        for i, p in enumerate(position[tile]):
            expected = np.zeros(q.shape[2:]) if p < 0 else cache.naive(row, q[tile, i], p)
            np.testing.assert_allclose(actual[tile, i], expected, rtol=RTOL, atol=ATOL)


@pytest.mark.short_cases
@pytest.mark.parametrize(
    ("group", "block_size", "width"),
    [(1, 8, 16), (2, 16, 16), (3, 64, 16), (4, 16, 16), (1, 16, 40), (2, 64, 24), (3, 8, 24)],
)
def test_decode_equals_softmax(group, block_size, width):
    """One query a tile, each at its request's last key; one tile has no query. Heads of any width, which a kernel pads
    to a power of two.
    """
    lengths = [1, 2, 17, 64, 65, 9]
    cache = Cache(lengths, block_size=block_size, width=width)
    q = random_queries(6, 1, 2 * group, width=width)
    position = np.array(lengths)[:, None] - 1
    position[3] = -1
    check(cache, q, position, range(6), attend(cache, q, position, np.arange(6)))


@pytest.mark.short_cases
@pytest.mark.parametrize(("block_size", "width"), [(8, 16), (16, 24), (64, 16)])
def test_more_keys_than_a_page_equal_softmax(block_size, width):
    """Beyond 256 keys the softmax is carried over pages; a short request beside a long one loops as far."""
    lengths = [255, 256, 257, 600, 3]
    cache = Cache(lengths, block_size=block_size, width=width)
    q = random_queries(5, 1, 4, width=width)
    position = np.array(lengths)[:, None] - 1
    check(cache, q, position, range(5), attend(cache, q, position, np.arange(5)))


@pytest.mark.short_cases
@pytest.mark.parametrize(("block_size", "width"), [(8, 16), (64, 24)])
def test_prefill_tiles_are_causal(block_size, width):
    """Tiles of 64 queries within longer contexts, the last of them partly empty, two tiles of one request."""
    cache = Cache([150, 70], block_size=block_size, width=width)
    q = random_queries(3, 64, 4, width=width)
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


@pytest.mark.short_cases
@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize(("queries", "blocks"), [(1, 3), (4, 3), (1, 24), (64, 5)])
def test_there_are_no_keys_behind_the_table(queries, blocks, dtype):
    """A query past the end of its table sees what the table has. What stands behind it, here the table of another
    request whose blocks are NaN, is not taken for blocks. Tables end within a page of a kernel; one is split.
    """
    end, options = 16 * blocks, {"table_width": blocks}
    cache = Cache([end, end], **options) if dtype is None else QuantisedCache([end, end], dtype, **options)
    place = cache.place(1, np.arange(end))
    for pool in cache.scales or (cache.k_pool, cache.v_pool):
        pool[place] = np.nan
    q = random_queries(2, queries, 4)
    # The last query is behind the table; then all of them are, by more than a page.
    for first in (end + 1 - queries, end + 70):
        position = np.stack([first + np.arange(queries), np.full(queries, -1)])
        actual = attend(cache, q, position, np.arange(2))
        check(cache, q, np.minimum(position, end - 1), range(2), actual)


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
    cache = Cache([30, 600, 5])
    q = 200 * random_queries(3, 1, 4)
    position = np.array([[29], [599], [4]])
    check(cache, q, position, range(3), attend(cache, q, position, np.arange(3)))


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
    real = block > 0
    pools[:, 1, block[real], offset[real]] = values[:, real]
    # The null block may hold anything.
    np.testing.assert_array_equal(np.asarray(actual)[:, :, 1:], pools[:, :, 1:])


def test_write_rounds_to_the_pool(backend):
    pools = [jnp.zeros((1, 2, 8, 1, WIDTH), jnp.bfloat16) for _ in range(2)]
    values = np.random.default_rng(3).standard_normal((2, 1, 1, WIDTH)).astype(np.float32)
    place = (jnp.array([1]), jnp.array([3]))
    actual = paged_attention.write(*pools, 0, *map(jnp.asarray, values), *place, backend=backend)
    for pool, value in zip(actual, values, strict=True):
        np.testing.assert_array_equal(np.asarray(pool)[0, 1, 3], value[0].astype(ml_dtypes.bfloat16))


@pytest.mark.short_cases
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


@once
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

    for actual, expected in zip(*(jax.jit(jax.grad(x, (0, 1)))(k, v) for x in (paged, plain)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.short_cases
@pytest.mark.parametrize("block_size", [8, 64])
@pytest.mark.parametrize("dtype", LARGEST)
def test_quantised_decode_equals_softmax(dtype, block_size):
    """Against what is stored times its scale; one tile has no query, and its table is of null blocks."""
    lengths = [1, 2, 17, 64, 65, 600, 9]
    cache = QuantisedCache(lengths, dtype, block_size=block_size)
    q = random_queries(7, 1, 6)
    position = np.array(lengths)[:, None] - 1
    position[3], cache.table[3] = -1, 0
    check(cache, q, position, range(7), attend(cache, q, position, np.arange(7)))


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", LARGEST)
def test_quantised_verify_equals_softmax(dtype):
    """Four queries a tile at the end of a request, and rows of a tile that are padded."""
    cache = QuantisedCache([300, 21, 4], dtype)
    q = random_queries(3, 4, 6)
    position = np.stack([np.arange(296, 300), [18, 19, 20, -1], [3, -1, -1, -1]])
    check(cache, q, position, range(3), attend(cache, q, position, np.arange(3)))


@pytest.mark.short_cases
@pytest.mark.parametrize("dtype", LARGEST)
def test_quantised_prefill_tiles_are_causal(dtype):
    cache = QuantisedCache([150, 70], dtype)
    q = random_queries(3, 64, 4)
    position = np.stack([np.arange(0, 64), np.arange(64, 128), np.arange(6, 70)])
    position[2, 40:] = -1
    rows = np.array([0, 0, 1])
    check(cache, q, position, rows, attend(cache, q, position, rows))


@pytest.mark.short_cases
@pytest.mark.parametrize("dtype", LARGEST)
def test_scales_that_no_query_sees_may_be_anything(dtype):
    """NaN before `first` and past the query, the values beside them the largest."""
    cache, poisoned = (QuantisedCache([310], dtype) for _ in range(2))
    q = random_queries(1, 1, 4)
    unseen = poisoned.place(0, np.r_[0:17, 290:310])
    for pool, scales in zip((poisoned.k_pool, poisoned.v_pool), poisoned.scales, strict=True):
        pool[unseen], scales[unseen] = LARGEST[dtype], np.nan
    expected, actual = (attend(x, q, [[289]], np.array([0]), first=17) for x in (cache, poisoned))
    np.testing.assert_array_equal(actual, expected)
    cache.k[0], cache.v[0] = cache.k[0][17:], cache.v[0][17:]
    check(cache, q, [[289 - 17]], [0], actual)


def rounding(x, scale, dtype):
    """Half the distance of the stored numbers around x: of int8 a scale; of float8, which has three bits behind the
    first, 1/8 of the power of two below, at least 2^-9 scales. Products in float32 before it are off by 2^-23 of up to
    127 scales.
    """
    half = np.maximum(np.abs(x) / 16, scale * 2.0**-10) if dtype != "int8" else np.broadcast_to(scale / 2, x.shape)
    return half * (1 + 1e-4)


def quantisation_bound(cache, row, q, position, dtype):
    """How far attention may be from that over unrounded keys and values, [h, hd].

    Keys that are off by e move a score by at most d_j = |q| . e_j / sqrt(hd), so a weight w_j by a factor of at most
    exp(d_j) sum_i w_i exp(d_i), and with it the sum of the values, each off by its own rounding.
    """
    group = q.shape[0] // cache.k[row].shape[1]
    bound = np.zeros(q.shape)
    for head in range(q.shape[0]):
        k, v = (x[: position + 1, head // group] for x in (cache.k[row], cache.v[row]))
        e_k, e_v = (rounding(x, np.abs(x).max(-1, keepdims=True) / LARGEST[dtype], dtype) for x in (k, v))
        score = k @ q[head] / np.sqrt(WIDTH)
        weight = np.exp(score - score.max())
        weight /= weight.sum()
        moved = np.exp(e_k @ np.abs(q[head]) / np.sqrt(WIDTH))
        factor = moved * (weight @ moved)
        bound[head] = (weight * (factor - 1)) @ np.abs(v) + (weight * factor) @ e_v
    return bound


@pytest.mark.short_cases
@pytest.mark.parametrize("dtype", LARGEST)
def test_written_and_attended_is_within_rounding_of_unquantised(dtype, backend):
    """Every key and value through `write_quantised`, some from padded tokens into the null block."""
    lengths = [1, 17, 70]
    cache = Cache(lengths)
    shape = cache.k_pool.shape
    pools = (jnp.full(shape, LARGEST[dtype], dtype), jnp.full(shape, LARGEST[dtype], dtype))
    scales = (jnp.full(shape[:-1], jnp.nan), jnp.full(shape[:-1], jnp.nan))
    k, v = (np.concatenate([*x, np.full((3, *x[0].shape[1:]), np.nan)]) for x in (cache.k, cache.v))
    places = [cache.place(row, np.arange(length))[1:] for row, length in enumerate(lengths)]
    block, offset = (np.concatenate([*part, np.zeros(3, int)]) for part in zip(*places, strict=True))
    tokens = (jnp.asarray(x, jnp.float32) for x in (k, v))
    place = (jnp.asarray(x, jnp.int32) for x in (block, offset))
    k_blocks, v_blocks, scales = paged_attention.write_quantised(*pools, scales, 1, *tokens, *place, backend=backend)

    stored = Cache(lengths)
    stored.k_pool, stored.v_pool, stored.scales = k_blocks, v_blocks, scales
    # Scores small enough that rounding of the keys, too, leaves the bound far below the outputs.
    q = 0.2 * random_queries(3, 1, 4)
    position = np.array(lengths)[:, None] - 1
    actual = attend(stored, q, position, np.arange(3))
    for row, length in enumerate(lengths):
        error = np.abs(actual[row, 0] - cache.naive(row, q[row, 0], length - 1))
        assert np.all(error <= quantisation_bound(cache, row, q[row, 0], length - 1, dtype))


@pytest.mark.short_cases
@pytest.mark.parametrize("of", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", LARGEST)
def test_quantised_write_rounds_to_the_nearest_in_its_place(dtype, of, backend):
    """Three heads of 12: neither a power of two. The third token is 0, and a head of the second is tiny."""
    rng = np.random.default_rng(2)
    shape = (LAYERS, 6, 8, 3, 12)
    pools = [jnp.asarray(rng.integers(-9, 9, shape), dtype) for _ in range(2)]
    scales = tuple(jnp.asarray(rng.random(shape[:-1]), jnp.float32) for _ in range(2))
    values = rng.standard_normal((2, 4, 3, 12)) * 4.0 ** rng.uniform(-9, 9, (2, 4, 3, 1))
    values[:, 2], values[:, 1, 1] = 0, 1e-38
    values = values.astype(of)
    block, offset = np.array([3, 5, 1, 3]), np.array([7, 0, 2, 0])
    arguments = (*map(jnp.asarray, values), jnp.asarray(block, jnp.int32), jnp.asarray(offset, jnp.int32))
    before = [(np.array(pool), np.array(scale)) for pool, scale in zip(pools, scales, strict=True)]
    *actual, new_scales = paged_attention.write_quantised(*pools, scales, 1, *arguments, backend=backend)
    for x, (pool, scale), new_pool, new_scale in zip(values, before, actual, new_scales, strict=True):
        stored, stored_scale = np.asarray(new_pool)[1, block, offset], np.asarray(new_scale)[1, block, offset]
        x, stored = x.astype(np.float64), stored.astype(np.float64)
        top = np.maximum(np.abs(x).max(-1), 1e-30)
        np.testing.assert_allclose(stored_scale, top / LARGEST[dtype], rtol=1e-6)
        assert np.all(np.abs(stored * stored_scale[..., None] - x) <= rounding(x, stored_scale[..., None], dtype))
        np.testing.assert_array_equal(np.abs(stored[[0, 3]]).max(-1), LARGEST[dtype])
        np.testing.assert_array_equal(stored[2], 0)
        # All else is as it was.
        for old, new in ((pool, new_pool), (scale, new_scale)):
            old[1, block, offset] = np.asarray(new)[1, block, offset]
            np.testing.assert_array_equal(np.asarray(new), old)


@pytest.mark.short_cases
@pytest.mark.parametrize("dtype", LARGEST)
def test_quantised_writes_are_the_same_everywhere(dtype):
    """Bit for bit, ties included: halves of the scale 1 that the last number of each head makes."""
    shape = (1, 4, 8, 2, WIDTH)
    values = np.random.default_rng(4).integers(-2 * 40, 2 * 40, (2, 20, 2, WIDTH)) / 2.0
    values[..., -1] = LARGEST[dtype]
    place = (jnp.arange(20, dtype=jnp.int32) // 8 + 1, jnp.arange(20, dtype=jnp.int32) % 8)

    def written(backend):
        pools, scales = [jnp.zeros(shape, dtype)] * 2, (jnp.zeros(shape[:-1]),) * 2
        tokens = [jnp.asarray(x, jnp.float32) for x in values]
        return paged_attention.write_quantised(*pools, scales, 0, *tokens, *place, backend=backend)

    for actual, expected in zip(*map(jax.tree.leaves, (written(running()), written(REFERENCE))), strict=True):
        np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))
    if dtype == "int8":
        np.testing.assert_array_equal(np.asarray(written(running())[0])[0, 1], np.floor(values[0, :8] + 0.5))


@once
@pytest.mark.parametrize("platform", ["cuda", "rocm"])
@pytest.mark.parametrize("dtype", LARGEST)
def test_quantised_kernels_lower_for_gpus(dtype, platform):
    pool, scale = jax.ShapeDtypeStruct((2, 9, 16, 4, 64), dtype), jax.ShapeDtypeStruct((2, 9, 16, 4), jnp.float32)
    tokens, number = jax.ShapeDtypeStruct((3, 4, 64), jnp.bfloat16), jax.ShapeDtypeStruct((3,), jnp.int32)

    def step(k_blocks, v_blocks, scales, k, v, block, offset):
        backend = Backend("pallas", platform)
        k_blocks, v_blocks, scales = paged_attention.write_quantised(
            k_blocks, v_blocks, scales, 0, k, v, block, offset, backend=backend
        )
        tiles = Tiles(offset[:, None], jnp.zeros((3, 5), jnp.int32), jnp.max(offset) + 1)
        return paged_attention.attend(k[:, None], k_blocks, v_blocks, 0, tiles, scales=scales, backend=backend)

    traced = jax.jit(step).trace(pool, pool, (scale, scale), tokens, tokens, number, number)
    assert "paged_attention_write_quantised" in traced.lower(lowering_platforms=(platform,)).as_text()


SHAPE = (2, 9, 16, 4, 64)


@pytest.mark.parametrize(
    ("dtypes", "scales", "architecture", "said"),
    [
        (("int8", "int8"), None, "", r"pools of int8 and int8 without scales; allowed: int8 or float8_e4m3fn with"),
        (("bfloat16", "float8_e5m2"), None, "", "pools of bfloat16 and float8_e5m2 without scales"),
        (("float32", "float32"), SHAPE[:-1], "", "pools of float32 and float32 with scales; allowed with scales: both"),
        (("int16", "int16"), SHAPE[:-1], "", "pools of int16 and int16 with scales"),
        (("int8", "float8_e4m3fn"), SHAPE[:-1], "", "pools of int8 and float8_e4m3fn with scales"),
        (("int8", "int8"), SHAPE, "", r"k_scales are float32\[2, 9, 16, 4, 64\]; allowed: float32\[2, 9, 16, 4\]"),
        (("float8_e4m3fn",) * 2, SHAPE[:-1], "sm_80", "float8_e4m3fn on sm_80.*sm_89 or later; allowed: int8"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_pools_and_scales_that_do_not_fit_are_refused(dtypes, scales, architecture, said):
    """From shapes alone: nothing has been traced."""
    pools = [jax.ShapeDtypeStruct(SHAPE, dtype) for dtype in dtypes]
    scales = scales and (jax.ShapeDtypeStruct(scales, jnp.float32),) * 2
    backend = Backend("pallas", architecture) if architecture else running()
    with pytest.raises(ValueError, match=said):
        paged_attention.attend(None, *pools, 0, None, scales=scales, backend=backend)
    write = functools.partial(paged_attention.write, *pools)
    if scales is not None:
        write = functools.partial(paged_attention.write_quantised, *pools, scales)
    with pytest.raises(ValueError, match=said):
        write(0, None, None, None, None, backend=backend)


@once
@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize(
    ("blocks", "refused"), [(2**15 - 1, False), (2**15, True), (2**15 + 1, True), (2**16, True), (2**16 + 1, False)]
)
@pytest.mark.usefixtures("without_type_checks")
def test_8_bit_pools_that_32_bits_with_a_sign_cannot_number_are_refused(blocks, refused, dtype):
    """Just below 2^31 numbers, there, above, at 2^32 and above it, where Pallas takes 64 bits. Shapes alone."""
    shape = (4, blocks, 16, 4, 256)
    pools = (jax.ShapeDtypeStruct(shape, dtype),) * 2
    scales = (jax.ShapeDtypeStruct(shape[:-1], jnp.float32),) * 2
    paged_attention.scales.check(*pools, scales, REFERENCE)
    if not refused:
        paged_attention.scales.check(*pools, scales, Backend("pallas", "sm_90"))
        return
    said = rf"k_blocks \[4, {blocks}, 16, 4, 256\] of .* allowed: fewer than 2,147,483,648 or at least 4,294,967,297"
    with pytest.raises(ValueError, match=said):
        paged_attention.attend(None, *pools, 0, None, scales=scales, backend=Backend("pallas", "sm_90"))
    with pytest.raises(ValueError, match=said):
        paged_attention.write_quantised(*pools, scales, 0, None, None, None, None, backend=Backend("pallas", "gfx942"))


@once
@pytest.mark.usefixtures("without_type_checks")
def test_wider_pools_have_no_such_limit():
    pools = (jax.ShapeDtypeStruct((4, 2**15, 16, 4, 256), jnp.bfloat16),) * 2
    paged_attention.scales.check(*pools, None, Backend("pallas", "sm_90"))


@pytest.mark.short_cases
@pytest.mark.parametrize(("rotary", "gated", "normed"), [(8, True, True), (24, False, True), (0, True, False)])
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_queries_and_keys_enter_normed_and_turned(rotary, gated, normed, dtype, backend):
    """Against float64; keys and values are where `write` stores them, and nothing else is."""
    rng = np.random.default_rng(6)
    tokens, heads, kv_heads, width = 5, 6, 3, 24
    q, k, v = (
        rng.standard_normal((tokens, count, width)).astype(np.float32)
        for count in (heads * (1 + gated), kv_heads, kv_heads)
    )
    weights = rng.standard_normal((2, width)).astype(np.float32)
    angle = np.tile(rng.uniform(0, 6, (tokens, rotary // 2)).astype(np.float32), 2)
    block, offset = np.array([3, 5, 0, 3, 1], np.int32), np.array([7, 0, 2, 0, 1], np.int32)
    shape = (LAYERS, 6, 8, kv_heads, width)
    pools = [np.zeros(shape, dtype or np.float32) for _ in range(2)]
    scales = None if dtype is None else tuple(jnp.zeros(shape[:-1]) for _ in range(2))
    turn = paged_attention.Turn(
        *(map(jnp.asarray, weights) if normed else (None, None)),
        eps=1e-6,
        centre=1.0,
        angles=(jnp.cos(angle), jnp.sin(angle)) if rotary else None,
        gated=gated,
    )
    places = jnp.asarray(block), jnp.asarray(offset)
    given = map(jnp.asarray, (q, k, v))
    found, *stored, scales = paged_attention.enter(
        *map(jnp.asarray, pools), scales, 1, *given, turn, *places, backend=backend
    )

    def exact(x, weight):
        x = x.astype(np.float64)
        if normed:
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + weight.astype(np.float64))
        out, half = x.copy(), rotary // 2
        cos, sin = (f(angle.astype(np.float64))[:, None, :half] for f in (np.cos, np.sin))
        first, second = x[..., :half], x[..., half:rotary]
        out[..., :half], out[..., half:rotary] = first * cos - second * sin, second * cos + first * sin
        return out

    np.testing.assert_allclose(np.asarray(found), exact(q[:, ::2] if gated else q, weights[0]), rtol=2e-6, atol=2e-6)
    real = block > 0
    for pool, scale, wanted in zip(stored, scales or (None, None), (exact(k, weights[1]), v), strict=True):
        pool = np.asarray(pool).astype(np.float64)
        others = np.ones(shape[:3], bool)
        others[1, block], others[:, 0] = False, False
        assert not pool[others].any()
        at = 1, block[real], offset[real]
        actual = pool[at] if scale is None else pool[at] * np.asarray(scale, np.float64)[at][..., None]
        # To the nearest of 127 steps.
        step = 0 if scale is None else np.abs(wanted[real]).max(-1, keepdims=True) / 127
        assert (np.abs(actual - wanted[real]) <= 0.5001 * step + 2e-6 * (1 + np.abs(wanted[real]))).all()


@pytest.mark.short_cases
@pytest.mark.parametrize("blocks", [3, 24])
def test_outputs_are_multiplied_by_their_gates(blocks, backend):
    """One context is short, the other cut into parts where there are many blocks."""
    lengths = [16 * blocks - 3, 10]
    cache = Cache(lengths)
    q, gate = random_queries(2, 1, 4), random_queries(2, 1, 8, seed=2)
    position = np.array(lengths)[:, None] - 1
    tiles = Tiles(jnp.asarray(position, jnp.int32), jnp.asarray(cache.table), jnp.int32(max(lengths)))
    actual = paged_attention.attend(
        *map(jnp.asarray, (q, cache.k_pool, cache.v_pool)), 1, tiles, gate=jnp.asarray(gate), backend=backend
    )
    check(cache, q, position, range(2), np.asarray(actual) * (1 + np.exp(-gate[:, :, 1::2])))


def test_parts_of_a_context_are_its_own_bit_for_bit():
    """Ten requests, too many for programs of their own parts: a long one beside long ones, short ones, and none."""
    lengths = [600, 30, 500, 5, 64, 65, 300, 128, 1, 20]
    cache = Cache(lengths, table_width=40)
    q = random_queries(10, 1, 4)
    position = np.array(lengths)[:, None] - 1
    together = attend(cache, q, position, np.arange(10))
    check(cache, q, position, range(10), together)
    for others in (3, -1):
        alone = np.full_like(position, others)
        alone[[0, 6]] = position[[0, 6]]
        np.testing.assert_array_equal(attend(cache, q, alone, np.arange(10))[[0, 6]], together[[0, 6]])
