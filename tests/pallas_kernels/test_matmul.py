"""Products of few rows against float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gdnjax.pallas_kernels import matmul
from gdnjax.pallas_kernels.matmul import tiles


def operands(rows, inputs, outputs, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, inputs)).astype(dtype)
    return x, [(rng.standard_normal((n, inputs)) * inputs**-0.5).astype(dtype) for n in outputs]


def exact(x, weight):
    return x.astype(np.float64) @ weight.astype(np.float64).T


@pytest.mark.short_cases
@pytest.mark.parametrize("rows", [1, 3, 16, 128, 130])
@pytest.mark.parametrize("outputs", [(64,), (96, 40, 1), (7, 7)], ids=str)
def test_each_matrix_meets_all_rows(rows, outputs, backend):
    """130 rows are more than the kernels take."""
    x, weights = operands(rows, 72, outputs)
    actual = matmul.project(jnp.asarray(x), *map(jnp.asarray, weights), backend=backend)
    assert [part.shape for part in actual] == [(rows, n) for n in outputs]
    for part, weight in zip(actual, weights, strict=True):
        # Float32 sums of 72 products, of order one in all.
        np.testing.assert_allclose(np.asarray(part), exact(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inputs", [16, 256, 1024, 1030])
def test_inputs_are_split_and_added_up(inputs, backend):
    x, (weight,) = operands(5, inputs, (64,))
    (actual,) = matmul.project(jnp.asarray(x), jnp.asarray(weight), backend=backend)
    np.testing.assert_allclose(np.asarray(actual), exact(x, weight), rtol=1e-5, atol=1e-5)
    parts = matmul.project_in_parts(jnp.asarray(x), jnp.asarray(weight), backend=backend)
    assert parts.shape[1:] == actual.shape
    np.testing.assert_allclose(np.asarray(parts).sum(0), exact(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 128, 130])
def test_gate_and_up_meet(rows, backend):
    x, (gate, up) = operands(rows, 72, (100, 100))
    actual = matmul.swiglu(*map(jnp.asarray, (x, gate, up)), backend=backend)
    g = exact(x, gate)
    np.testing.assert_allclose(np.asarray(actual), g / (1 + np.exp(-g)) * exact(x, up), rtol=2e-5, atol=1e-5)


def test_bfloat16_is_rounded_once(backend):
    x, (weight,) = operands(4, 512, (64,), ml_dtypes.bfloat16)
    (actual,) = matmul.project(jnp.asarray(x), jnp.asarray(weight), backend=backend)
    assert actual.dtype == jnp.bfloat16
    # By half an ulp (2^-8); products of bfloat16 are exact in float32.
    np.testing.assert_allclose(np.asarray(actual, np.float64), exact(x, weight), rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("outputs", [24, 200])
def test_gate_and_up_are_rounded_once(outputs, backend):
    """Made in one program, and apart, since they are few."""
    if backend.is_reference:
        # Which rounds each of the two, as published models do.
        return
    x, (gate, up) = operands(4, 512, (outputs, outputs), ml_dtypes.bfloat16)
    assert (tiles.of(backend, jnp.asarray(x)).of_gated(outputs) is None) == (outputs == 24 and backend.interpret)
    actual = matmul.swiglu(*map(jnp.asarray, (x, gate, up)), backend=backend)
    g = exact(x, gate)
    expected = g / (1 + np.exp(-g)) * exact(x, up)
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("outputs", [1, 4, 101])
def test_row_does_not_depend_on_its_place(outputs, backend):
    """The same row at every place of 12, as 4 requests with 2 drafts each have them: to the bit. Invariant mode needs
    it, also of a single output, which XLA would make by a product of its own.
    """
    x, (weight,) = operands(1, 32, (outputs,))
    (actual,) = matmul.project(jnp.asarray(np.repeat(x, 12, axis=0)), jnp.asarray(weight), backend=backend)
    np.testing.assert_array_equal(np.asarray(actual), np.repeat(np.asarray(actual[:1]), 12, axis=0))
    jitted = jax.jit(matmul.product)(jnp.asarray(np.repeat(x, 12, axis=0)), jnp.asarray(weight))
    np.testing.assert_array_equal(np.asarray(jitted), np.repeat(np.asarray(jitted[:1]), 12, axis=0))
