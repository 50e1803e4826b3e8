"""The forms in which rows meet weights: nothing of a row is lost, a norm is taken on the way."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gdnjax.backend import INTERPRET, REFERENCE
from gdnjax.pallas_kernels import matmul
from gdnjax.pallas_kernels.normed import Normed, numbers
from gdnjax.pallas_kernels.row_forms import FLOAT16, HALVES, PARTS, WIDE, halves, rows_of

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def test_halves_of_a_row_are_the_row():
    """To the bit, above 2^-13 of its largest number; all others to 2^-21 of that."""
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((64, 512)) * np.exp2(rng.integers(-30, 4, (64, 512)))).astype(BFLOAT16)
    x[5], x[6, 0] = 0, 2.0**120
    (both, factor), made = halves(jnp.asarray(x)), rows_of(jnp.asarray(x), HALVES, INTERPRET, wide=False)
    assert both.dtype == jnp.float8_e4m3fn
    # By XLA and by the kernel.
    assert np.asarray(both).tobytes() == np.asarray(made[0]).tobytes()
    assert np.array_equal(factor, made[1])
    parts = np.asarray(both).astype(np.float64) * np.asarray(factor, np.float64)[:, None]
    again = parts.reshape(64, 2, 512).sum(1)
    exact = x.astype(np.float64)
    largest = np.abs(exact).max(1, keepdims=True)
    off = np.abs(again - exact)
    assert np.all(off[np.abs(exact) >= largest * 2.0**-13] == 0)
    assert np.all(off <= largest * 2.0**-21)
    assert (np.abs(exact) < largest * 2.0**-13).any()


def test_halves_keep_what_is_no_number():
    x = jnp.asarray([[1.0, jnp.nan], [1.0, jnp.inf], [1.0, 2.0]], jnp.bfloat16)
    both, factor = rows_of(x, HALVES, INTERPRET, wide=False)
    sums = (np.asarray(both).astype(np.float64) * np.asarray(factor, np.float64)[:, None]).sum(1).reshape(3, 2).sum(1)
    assert np.isfinite(sums).tolist() == [False, False, True]


def test_rows_in_float16_are_the_rows():
    """To the bit, above 2^-29 of the largest; all others to 2^-38 of that."""
    rng = np.random.default_rng(5)
    x = (rng.standard_normal((64, 512)) * np.exp2(rng.integers(-50, 40, (64, 512)))).astype(BFLOAT16)
    x[5] = 0
    rows, factor = rows_of(jnp.asarray(x), FLOAT16, INTERPRET, wide=False)
    exact, again = x.astype(np.float64), np.asarray(rows, np.float64) * np.asarray(factor, np.float64)[:, None]
    largest = np.abs(exact).max(1, keepdims=True)
    off = np.abs(again - exact)
    assert rows.dtype == jnp.float16
    assert np.all(off[np.abs(exact) >= largest * 2.0**-29] == 0)
    assert np.all(off <= largest * 2.0**-38)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=str)
@pytest.mark.parametrize("width", [96, 128])
def test_a_norm_is_taken_on_the_way(width, dtype):
    rng = np.random.default_rng(7)
    x = jnp.asarray((rng.standard_normal((5, width)) * np.exp2(rng.integers(-9, 9, (5, 1)))).astype(dtype))
    weight = jnp.asarray(rng.standard_normal(width).astype(dtype))
    normed = Normed(x, weight, 1e-6, 1.0)
    wide = np.asarray(x, np.float64)
    exact = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-6) * (1 + np.asarray(weight, np.float64))
    tolerance = 2**-8 if dtype == BFLOAT16 else 1e-6
    np.testing.assert_allclose(np.asarray(numbers(normed), np.float64), exact, rtol=tolerance, atol=0)
    for form in (WIDE, HALVES, FLOAT16) if dtype == BFLOAT16 else (WIDE,):
        rows, *formed = rows_of(normed, form, INTERPRET, wide=True)
        assert rows.dtype == dtype
        np.testing.assert_allclose(np.asarray(rows, np.float64), exact, rtol=tolerance, atol=0)
        if form == WIDE:
            continue
        # Formed rows are those that stand beside them.
        parts = np.asarray(formed[0]).astype(np.float64) * np.asarray(formed[1], np.float64)[:, None]
        again = parts.reshape(5, PARTS[form], width).sum(1)
        np.testing.assert_allclose(again, np.asarray(rows, np.float64), rtol=0, atol=np.abs(exact).max() * 2**-20)
        alone = rows_of(normed, form, INTERPRET, wide=False)
        assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(alone, formed, strict=True))


@pytest.mark.parametrize("rows", [3, 200])
def test_products_of_normed_rows_are_those_of_the_rows(rows, backend):
    rng = np.random.default_rng(8)
    x, weight = rng.standard_normal((rows, 96)).astype(np.float32), rng.standard_normal(96).astype(np.float32)
    first, second = (jnp.asarray(rng.standard_normal((size, 96)).astype(np.float32)) for size in (40, 24))
    normed = Normed(jnp.asarray(x), jnp.asarray(weight), 1e-6, 0.0)
    for op, weights in ((matmul.project, (first, second)), (matmul.swiglu, (first, first))):
        actual = op(normed, *weights, backend=backend)
        expected = op(numbers(normed), *weights, backend=REFERENCE)
        for one, other in zip(*(r if isinstance(r, tuple) else (r,) for r in (actual, expected)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
