"""The forms in which rows meet weights: nothing of a row is lost, a norm is taken on the way."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gdnjax.backend import INTERPRET, REFERENCE
from gdnjax.pallas_kernels import matmul
from gdnjax.pallas_kernels.normed import Gated, GateUp, Normed, Prepared, numbers
from gdnjax.pallas_kernels.row_forms import FLOAT16, HALVES, PARTS, WIDE, halves, rows_of
from gdnjax.quantized import Quantized
from tests.pallas_kernels.backends import once

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@once
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


@once
def test_halves_keep_what_is_no_number():
    x = jnp.asarray([[1.0, jnp.nan], [1.0, jnp.inf], [1.0, 2.0]], jnp.bfloat16)
    both, factor = rows_of(x, HALVES, INTERPRET, wide=False)
    sums = (np.asarray(both).astype(np.float64) * np.asarray(factor, np.float64)[:, None]).sum(1).reshape(3, 2).sum(1)
    assert np.isfinite(sums).tolist() == [False, False, True]


@once
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


@pytest.mark.short_cases
@once
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


@pytest.mark.short_cases
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


@pytest.mark.short_cases
@pytest.mark.parametrize("codes", [None, "float8_e4m3fn"])
@pytest.mark.parametrize("rows", [3, 200])
def test_a_term_is_added_before_the_norm_and_rows_are_prepared_for_their_weights(rows, codes, backend):
    """What comes out is the sum, and products of its norm; 200 rows are more than kernels take."""
    rng = np.random.default_rng(9)
    dtype = jnp.bfloat16 if codes else jnp.float32
    x, *parts = (rng.standard_normal((rows, 96)).astype(np.float32) for _ in range(4))
    scale = jnp.asarray(rng.standard_normal(96), dtype)
    weights = [rng.standard_normal((size, 96)).astype(np.float32) for size in (96, 96)]
    given = [jnp.asarray(weight, dtype) for weight in weights]
    if codes:
        given = [Quantized(weight.astype(codes), jnp.ones((96, 1), jnp.float32), (1, 96)) for weight in given]
    normed = Normed(jnp.asarray(x, dtype), scale, 1e-6, 1.0, jnp.asarray(np.stack(parts)))
    term = np.asarray(jnp.asarray(sum(parts), dtype), np.float64)
    whole = np.asarray(normed.x, np.float64) + term
    exact = whole / np.sqrt((whole**2).mean(1, keepdims=True) + 1e-6) * (1 + np.asarray(scale, np.float64))
    matrices = [np.asarray(w.codes if isinstance(w, Quantized) else w, np.float64) for w in given]
    products = [exact @ matrix.T for matrix in matrices]
    tolerance = 2**-6 if codes else 2e-5
    for gated, op in ((False, matmul.project), (True, matmul.swiglu)):
        stream, prepared = matmul.prepare(normed, *given, gated=gated, backend=backend)
        np.testing.assert_allclose(np.asarray(stream, np.float64), whole, rtol=2**-8 if codes else 1e-6, atol=1e-6)
        found = op(prepared, *given, backend=backend)
        wanted = [products[0] / (1 + np.exp(-products[0])) * products[1]] if gated else products
        for one, other in zip(found if isinstance(found, tuple) else (found,), wanted, strict=True):
            size = np.abs(other).max()
            np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=tolerance, atol=tolerance * size)


@once
def test_rows_that_were_prepared_in_another_form_are_not_numbers():
    rows = Prepared(HALVES, None, jnp.zeros((2, 16)), jnp.zeros(2), shape=(1, 16), dtype=jnp.dtype(jnp.bfloat16))
    with pytest.raises(ValueError, match="rows were prepared as halves alone"):
        numbers(rows)


@once
@pytest.mark.parametrize("width", [32, 24])
def test_an_activation_is_taken_on_the_way(width):
    """Of gate and up side by side or apart, not rounded yet, as they are and in the forms of codes."""
    rng = np.random.default_rng(12)
    both = jnp.asarray(rng.standard_normal((5, 2 * width)) * np.exp2(rng.integers(-9, 5, (5, 1))), jnp.bfloat16)
    gate, up = np.split(np.asarray(both, np.float64), 2, axis=1)
    exact = gate / (1 + np.exp(-gate)) * up
    parts = jnp.stack([both.astype(jnp.float32) * 0.75, both.astype(jnp.float32) * 0.25])
    apart = GateUp(*jnp.split(parts, 2, axis=2), dtype=both.dtype)
    (numbers_apart,) = rows_of(apart, WIDE, INTERPRET, wide=True)
    np.testing.assert_allclose(np.asarray(numbers_apart, np.float64), exact, rtol=2**-8, atol=1e-30)
    (numbers_alone,) = rows_of(GateUp.of(both), WIDE, INTERPRET, wide=True)
    # Gated by XLA: the activation and the product are rounded.
    np.testing.assert_allclose(np.asarray(numbers_alone, np.float64), exact, rtol=2**-6, atol=1e-30)
    for form in (HALVES, FLOAT16):
        rows, *formed = rows_of(GateUp.of(both), form, INTERPRET, wide=True)
        np.testing.assert_allclose(np.asarray(rows, np.float64), exact, rtol=2**-8, atol=1e-30)
        parts = np.asarray(formed[0]).astype(np.float64) * np.asarray(formed[1], np.float64)[:, None]
        again = parts.reshape(5, PARTS[form], width).sum(1)
        largest = np.abs(exact).max(1, keepdims=True)
        assert (np.abs(again - np.asarray(rows, np.float64)) <= largest * 2**-20).all()
        alone = rows_of(GateUp.of(both), form, INTERPRET, wide=False)
        for same, wanted in ((alone, formed), (rows_of(apart, form, INTERPRET, wide=True), [rows, *formed])):
            assert all(np.array_equal(np.asarray(one), np.asarray(two)) for one, two in zip(same, wanted, strict=True))


@pytest.mark.short_cases
@once
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize(("heads", "width"), [(4, 32), (3, 24)])
def test_a_gated_norm_is_taken_on_the_way(heads, width, activation):
    """Head by head, of rows as they are and in the forms of codes."""
    rng = np.random.default_rng(11)
    x = jnp.asarray(rng.standard_normal((5, heads, width)) * np.exp2(rng.integers(-9, 9, (5, heads, 1))), jnp.bfloat16)
    gate = jnp.asarray(rng.standard_normal((5, heads * width)), jnp.bfloat16)
    weight = jnp.asarray(rng.standard_normal(width), jnp.bfloat16)
    gated = Gated(x, gate, weight, 1e-6, activation)
    wide, z = np.asarray(x, np.float64), np.asarray(gate, np.float64).reshape(5, heads, width)
    exact = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(weight, np.float64)
    exact = (exact * (z if activation == "silu" else 1) / (1 + np.exp(-z))).reshape(5, -1)
    (numbers_alone,) = rows_of(gated, WIDE, INTERPRET, wide=True)
    np.testing.assert_allclose(np.asarray(numbers_alone, np.float64), exact, rtol=2**-8, atol=1e-6)
    for form in (HALVES, FLOAT16):
        rows, *formed = rows_of(gated, form, INTERPRET, wide=True)
        np.testing.assert_allclose(np.asarray(rows, np.float64), exact, rtol=2**-8, atol=1e-6)
        parts = np.asarray(formed[0]).astype(np.float64) * np.asarray(formed[1], np.float64)[:, None]
        again = parts.reshape(5, PARTS[form], heads * width).sum(1)
        np.testing.assert_allclose(again, np.asarray(rows, np.float64), rtol=0, atol=np.abs(exact).max() * 2**-20)
