"""The grouped product against a loop over rows."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gdnjax.backend import INTERPRET
from gdnjax.pallas_kernels import row_forms
from gdnjax.pallas_kernels.grouped_matmul import grouped_matmul, reference
from gdnjax.pallas_kernels.row_forms import FLOAT16, HALVES, WIDE
from gdnjax.quantized import Quantized
from tests.pallas_kernels.backends import once


def by_rows(x, weight, sizes):
    """Row i times the transposed weight of its group, for the rows that have one; float64."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    return np.stack([weight[g].astype(np.float64) @ x[i].astype(np.float64) for i, g in enumerate(group)])


def random_operands(rows, groups, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, 24)).astype(dtype), rng.standard_normal((groups, 17, 24)).astype(dtype)


@pytest.mark.parametrize(
    "sizes", [[3, 4, 5], [0, 12, 0], [12, 0, 0], [0, 0, 12], [1, 0, 11], [5, 0, 2], [0, 0, 1]], ids=str
)
def test_rows_meet_the_weight_of_their_group(sizes, backend):
    """Empty groups at either end and in between; rows past the sum belong to none, and hold NaN."""
    x, weight = random_operands(12, 3)
    total = sum(sizes)
    x[total:] = np.nan
    actual = np.asarray(
        grouped_matmul(jnp.asarray(x), jnp.asarray(weight), jnp.asarray(sizes, jnp.int32), backend=backend)
    )
    assert actual.shape == (12, 17)
    # Float32 sums of 24 products of order one.
    np.testing.assert_allclose(actual[:total], by_rows(x, weight, sizes), rtol=1e-5, atol=1e-5)


def test_bfloat16_products_are_summed_in_float32(backend):
    x, weight = random_operands(9, 2, ml_dtypes.bfloat16)
    actual = grouped_matmul(jnp.asarray(x), jnp.asarray(weight), jnp.asarray([4, 5], jnp.int32), backend=backend)
    assert actual.dtype == jnp.bfloat16
    expected = by_rows(x, weight, [4, 5])
    # The result is rounded once, by half an ulp (2^-8); products of bfloat16 are exact in float32.
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_rows_ignore_what_others_asked_for_and_nobody(poison, backend):
    """Bit for bit: rows past the sum, experts without rows, another group's rows and its matrix."""
    x, weight = random_operands(12, 4)
    sizes = jnp.asarray([3, 0, 4, 2], jnp.int32)
    wanted = np.asarray(grouped_matmul(jnp.asarray(x), jnp.asarray(weight), sizes, backend=backend))
    x[9:], weight[1] = poison, poison
    unasked = np.asarray(grouped_matmul(jnp.asarray(x), jnp.asarray(weight), sizes, backend=backend))
    assert np.array_equal(unasked[:9], wanted[:9])
    x[4], weight[3] = poison, poison
    neighbours = np.asarray(grouped_matmul(jnp.asarray(x), jnp.asarray(weight), sizes, backend=backend))
    own = [0, 1, 2, 3, 5, 6]
    assert np.array_equal(neighbours[own], wanted[own])
    assert not np.isfinite(neighbours[[4, 7, 8]]).any()


@once
def test_reference_stores_neither_rows_nor_matrices_for_every_group():
    """The shapes of 512 experts, 10 for each of 128 tokens, in bfloat16, which a CPU widens to float32 in a product."""
    rows, depth, width, experts = 1280, 4096, 2048, 512
    shapes = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((rows, depth), (experts, width, depth)))
    sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
    memory = jax.jit(reference.grouped_matmul).lower(*shapes, sizes).compile().memory_analysis()
    # A few times what one product has; rows of every expert would be 1,000 times as much.
    assert memory.temp_size_in_bytes <= 3 * 4 * (rows * depth + width * depth + rows * width)


@pytest.mark.parametrize("codes", [False, True], ids=["numbers", "codes"])
@pytest.mark.parametrize("expected", [None, 1], ids=["as many", "more than expected"])
def test_rows_are_taken_from_where_they_stand(expected, codes, backend):
    """The same bits as of rows that were put together before, however few were expected, and whoever else is there."""
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((9, 256)), jnp.bfloat16)
    weight = jnp.asarray(rng.standard_normal((3, 70, 256)), jnp.bfloat16)
    if codes:
        scale = jnp.asarray(rng.uniform(1, 2, (3, 1, 2)), jnp.float32)
        weight = Quantized(weight.astype(jnp.float8_e4m3fn), scale, (128, 128))
    sizes = jnp.asarray([70, 0, 25], jnp.int32)
    rows = jnp.asarray(rng.integers(0, 8, 100), jnp.int32)
    wanted = grouped_matmul(x[rows], weight, sizes, backend=backend)
    given = grouped_matmul(x.at[8].set(jnp.nan), weight, sizes, rows=rows, expected_rows=expected, backend=backend)
    assert given.shape == (100, 70)
    assert np.array_equal(np.asarray(given[:95], np.float32), np.asarray(wanted[:95], np.float32))


@pytest.mark.parametrize("expected", [1, 48, 100], ids=["halves", "few in float16", "many in float16"])
@pytest.mark.parametrize("form", [HALVES, FLOAT16, WIDE])
def test_prepared_rows_are_the_rows_that_they_stand_for(form, expected, backend):
    """To the bit, in the form that the product needs and in another one."""
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.standard_normal((9, 128)), jnp.bfloat16)
    codes = jnp.asarray(rng.standard_normal((3, 70, 128)), jnp.float8_e4m3fn)
    weight = Quantized(codes, jnp.ones((3, 1, 1), jnp.float32), (128, 128))
    sizes = jnp.asarray([70, 0, 30], jnp.int32)
    given = {"rows": jnp.asarray(rng.integers(0, 9, 100), jnp.int32), "expected_rows": expected, "backend": backend}
    _, prepared = row_forms.prepared(x, form, INTERPRET, wide=True)
    found = grouped_matmul(prepared, weight, sizes, **given)
    assert np.array_equal(*(np.asarray(out, np.float32) for out in (found, grouped_matmul(x, weight, sizes, **given))))
