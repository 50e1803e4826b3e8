"""Attention over pages of latents against a softmax written out in numpy, with scattered blocks and NaN wherever
nothing is stored.
"""

import jax
import jax.extend
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gdnjax.backend import Backend
from gdnjax.pallas_kernels import paged_attention
from gdnjax.pallas_kernels.paged_attention import Tiles
from tests.pallas_kernels.backends import jit, running

BLOCK = 16
LAYERS, BLOCKS = 2, 60
SCALE = 0.3
"""Of scores: not the root of any width here."""
RTOL, ATOL = 2e-5, 2e-6
"""Float32 dot products of 20 or 32 terms and sums over at most 600 keys of a softmax; numpy computes in float64."""

BF16 = ml_dtypes.bfloat16


class Latents:
    """Requests' latents in numpy, and the same in blocks that are scattered over a pool full of NaN."""

    def __init__(self, lengths, *, value_dim=16, rest=4, dtype=np.float32, table_width=None, block_size=BLOCK):
        rng = np.random.default_rng(0)
        self.value_dim, self.block_size = value_dim, block_size
        needed = [-(-length // block_size) for length in lengths]
        blocks = max(BLOCKS, sum(needed) + 1)
        self.pages = np.full((LAYERS, blocks, block_size, value_dim + rest), np.nan, dtype)
        self.table = np.zeros((len(lengths), table_width or max(needed) + 1), np.int32)
        free = rng.permutation(np.arange(1, blocks)).tolist()
        self.latents = []
        for row, length in enumerate(lengths):
            self.table[row, : needed[row]] = [free.pop() for _ in range(needed[row])]
            latent = rng.standard_normal((length, value_dim + rest)).astype(dtype)
            self.pages[self.place(row, np.arange(length))] = latent
            self.latents.append(latent.astype(np.float64))

    def place(self, row, position):
        return 1, self.table[row, position // self.block_size], position % self.block_size

    def naive(self, row, q, position, first=0):
        """o_i = sum_j softmax_j(scale q_i . c_j) c_j[:value_dim] over first <= j <= position: q [h, lw] -> [h, hd]."""
        seen = self.latents[row][first : position + 1]
        if position < first:
            return np.zeros((q.shape[0], self.value_dim))
        score = SCALE * q.astype(np.float64) @ seen.T
        weight = np.exp(score - score.max(-1, keepdims=True))
        return (weight / weight.sum(-1, keepdims=True)) @ seen[:, : self.value_dim]


@jit(static_argnums=(2, 4, 5))
def _attend(q, pages, layer, tiles, value_dim, first):
    tiles = Tiles(**tiles, first=first)
    return paged_attention.attend_latent(q, pages, layer, tiles, value_dim=value_dim, scale=SCALE, backend=running())


def attend(cache, q, position, rows, longest=None, first=0):
    tiles = {
        "position": jnp.asarray(position, jnp.int32),
        "block_table": jnp.asarray(cache.table[rows]),
        "longest": jnp.int32(np.max(position) + 1 if longest is None else longest),
    }
    return np.asarray(_attend(jnp.asarray(q), jnp.asarray(cache.pages), 1, tiles, cache.value_dim, first))


def random_queries(tiles, queries, heads, width=20):
    return np.random.default_rng(1).standard_normal((tiles, queries, heads, width)).astype(np.float32)


def check(cache, q, position, rows, actual, first=0, rtol=RTOL, atol=ATOL):
    for tile, row in enumerate(rows):
        for i, p in enumerate(position[tile]):
            expected = cache.naive(row, q[tile, i], p, first)
            np.testing.assert_allclose(actual[tile, i].astype(np.float64), expected, rtol=rtol, atol=atol)


@pytest.mark.short_cases
@pytest.mark.parametrize(
    ("heads", "block_size", "value_dim", "rest"),
    # 40 heads are two programs; of the first and of the last a long context is split.
    [(4, 16, 16, 4), (3, 8, 24, 8), (40, 64, 16, 4), (1, 16, 32, 0)],
)
def test_decode_equals_softmax(heads, block_size, value_dim, rest):
    """One query a tile, each at its request's last key; one tile has no query. Widths that are no powers of two, and a
    latent that is all value.
    """
    lengths = [1, 2, 64, 65, 600]
    cache = Latents(lengths, block_size=block_size, value_dim=value_dim, rest=rest)
    q = random_queries(5, 1, heads, value_dim + rest)
    position = np.array(lengths)[:, None] - 1
    position[2] = -1
    check(cache, q, position, range(5), attend(cache, q, position, np.arange(5)))


def test_verify_equals_softmax():
    """Four queries a tile at the end of a request, and rows of a tile that are padded."""
    cache = Latents([300, 21, 4])
    q = random_queries(3, 4, 6)
    position = np.stack([np.arange(296, 300), [18, 19, 20, -1], [3, -1, -1, -1]])
    check(cache, q, position, range(3), attend(cache, q, position, np.arange(3)))


@pytest.mark.short_cases
@pytest.mark.parametrize("first", [0, 17])
def test_prefill_tiles_are_causal_behind_their_prefix(first):
    """Tiles of 64 queries, two of one request and one behind a prefix, the last of them partly empty. Keys before
    `first` are NaN, and a query before it gives 0.
    """
    cache = Latents([150, 70])
    for row in range(2):
        cache.pages[cache.place(row, np.arange(first))] = np.nan
    q = random_queries(3, 64, 3)
    position = np.stack([np.arange(0, 64), np.arange(64, 128), np.arange(6, 70)])
    position[2, 40:] = -1
    rows = np.array([0, 0, 1])
    check(cache, q, position, rows, attend(cache, q, position, rows, first=first), first)


def test_latents_past_the_query_are_never_seen():
    """They are NaN, as the null block is from the start."""
    cache = Latents([40])
    q = random_queries(1, 1, 4)
    for position in (0, 15, 16, 38):
        poisoned = Latents([40])
        poisoned.pages[poisoned.place(0, np.arange(position + 1, 40))] = np.nan
        check(cache, q, [[position]], [0], attend(poisoned, q, [[position]], np.array([0])))


@pytest.mark.parametrize(("queries", "blocks"), [(4, 23)])
def test_there_are_no_latents_behind_the_table(queries, blocks):
    """A query past the end of its table sees what the table has; what stands behind it names blocks that are NaN."""
    end = BLOCK * blocks
    cache = Latents([end, end], table_width=blocks)
    cache.pages[cache.place(1, np.arange(end))] = np.nan
    q = random_queries(2, queries, 4)
    for start in (end + 1 - queries, end + 70):
        position = np.stack([start + np.arange(queries), np.full(queries, -1)])
        actual = attend(cache, q, position, np.arange(2))
        check(cache, q, np.minimum(position, end - 1), range(2), actual)


def test_tiles_without_queries_are_zero():
    cache = Latents([20])
    cache.table[:] = 0
    for longest in (20, 0):
        actual = attend(cache, random_queries(1, 4, 4), np.full((1, 4), -1), np.array([0]), longest=longest)
        np.testing.assert_array_equal(actual, 0)


def test_bfloat16_pages_are_read_exactly(backend):
    """Latents are widened to float32 before any product; the definition reads bits, too."""
    cache = Latents([70], dtype=BF16)
    q = random_queries(1, 1, 4)
    actual = attend(cache, q, [[69]], np.array([0]))
    check(cache, q, [[69]], [0], actual)
    if backend.is_reference:
        cache.pages = cache.pages.view(np.uint16)
        np.testing.assert_array_equal(attend(cache, q, [[69]], np.array([0])), actual)


@pytest.mark.short_cases
@pytest.mark.parametrize("lengths", [[70, 3], [600, 200]])
def test_bfloat16_queries_give_bfloat16(lengths):
    """Probabilities and the output are rounded to 8 bits: of a sum of weights 1 by 2^-9 of the largest value each."""
    cache = Latents(lengths, dtype=BF16)
    q = random_queries(2, 1, 4).astype(BF16)
    position = np.array(lengths)[:, None] - 1
    actual = attend(cache, q, position, np.arange(2))
    assert actual.dtype == BF16
    largest = max(np.abs(latent).max() for latent in cache.latents)
    check(cache, q, position, range(2), actual, rtol=0, atol=2 * 2**-9 * largest)


@pytest.mark.short_cases
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_write_stores_each_latent_in_its_place_and_nothing_else(dtype, backend):
    """Rounded to the pool; one of the tokens goes to the null block."""
    rng = np.random.default_rng(2)
    pages = rng.standard_normal((LAYERS, 6, 8, 20)).astype(dtype)
    entries = rng.standard_normal((4, 20)).astype(np.float32)
    block, offset = np.array([3, 5, 0, 3]), np.array([7, 0, 2, 0])
    arguments = (jnp.asarray(entries), jnp.asarray(block, jnp.int32), jnp.asarray(offset, jnp.int32))
    actual = paged_attention.write_latent(jnp.asarray(pages), 1, *arguments, backend=backend)
    real = block > 0
    pages[1, block[real], offset[real]] = entries[real].astype(dtype)
    # The null block may hold anything.
    np.testing.assert_array_equal(np.asarray(actual)[:, 1:], pages[:, 1:])


def _loads(jaxpr, shape):
    """Shapes that a kernel loads out of an array of `shape`, by the loop in which it does."""
    found = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "masked_load" and getattr(eqn.invars[0].aval, "shape", None) == shape:
            found.setdefault(id(jaxpr), []).append(eqn.outvars[0].aval.shape)
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            found |= _loads(inner, shape)
    return found


@pytest.mark.parametrize("backend", [Backend("pallas", "cuda"), Backend("pallas", "rocm")], ids=["cuda", "rocm"])
@pytest.mark.parametrize(("queries", "heads", "blocks"), [(1, 128, 40), (1, 32, 8), (64, 32, 8)])
def test_kernels_lower_for_gpus_and_read_a_page_once(queries, heads, blocks, backend):
    """At the sizes of DeepSeek-V3: 512 columns that are key and value, and 64 more of the key."""
    shape = (2, 41, 16, 576)
    pages, number = jax.ShapeDtypeStruct(shape, jnp.bfloat16), jax.ShapeDtypeStruct((3,), jnp.int32)
    q = jax.ShapeDtypeStruct((3, queries, heads, 576), jnp.bfloat16)
    position, table = (jax.ShapeDtypeStruct((3, size), jnp.int32) for size in (queries, blocks))

    def step(pages, q, block, offset, position, table):
        pages = paged_attention.write_latent(pages, 0, q[:, 0, 0], block, offset, backend=backend)
        tiles = Tiles(position, table, jnp.max(position) + 1)
        return paged_attention.attend_latent(q, pages, 0, tiles, value_dim=512, scale=0.1, backend=backend)

    traced = jax.jit(step).trace(pages, q, number, number, position, table)
    text = traced.lower(lowering_platforms=(backend.architecture,)).as_text()
    assert "latent_attention_write" in text
    assert ("latent_attention_split" in text) == (blocks == 40)
    # One loop over whole pages, and one over those that are masked.
    loads = list(_loads(traced.jaxpr.jaxpr, shape).values())
    assert len(loads) == 2
    assert all([columns for _, columns in parts] == [512, 64] for parts in loads)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.usefixtures("without_type_checks")
def test_pages_of_8_bits_are_refused(dtype, backend):
    """From shapes alone: nothing has been traced."""
    pages = jax.ShapeDtypeStruct((2, 9, 16, 20), dtype)
    with pytest.raises(ValueError, match=rf"latent pages of {dtype}; allowed: bfloat16 or float32"):
        paged_attention.attend_latent(None, pages, 0, None, value_dim=16, scale=1.0, backend=backend)
    with pytest.raises(ValueError, match=rf"latent pages of {dtype}; allowed: bfloat16 or float32"):
        paged_attention.write_latent(pages, 0, None, None, None, backend=backend)


@pytest.mark.parametrize("value_dim", [0, 21])
@pytest.mark.usefixtures("without_type_checks")
def test_value_that_is_no_part_of_the_latent_is_refused(value_dim, backend):
    pages = jax.ShapeDtypeStruct((2, 9, 16, 20), jnp.float32)
    with pytest.raises(ValueError, match=rf"value_dim={value_dim} of latents of 20; allowed: 1 to 20"):
        paged_attention.attend_latent(None, pages, 0, None, value_dim=value_dim, scale=1.0, backend=backend)
