"""Products with weights of eight bits, against float64 of code times scale."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gdnjax.backend import Backend
from gdnjax.pallas_kernels import codes, matmul
from gdnjax.pallas_kernels.grouped_matmul import grouped_matmul
from gdnjax.pallas_kernels.matmul import fp8, tiles
from gdnjax.quantized import Quantized
from tests.pallas_kernels.backends import once

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
GRIDS = {"blocks": (64, 64), "rows": (1, 10_000), "cut blocks": (16, 16), "odd rows": (7, 48)}


def weight(rng, shape, grid, codes="float8_e4m3fn"):
    """A random one, and the numbers that it stands for."""
    cells = tuple(-(-size // cell) for size, cell in zip(shape[-2:], grid, strict=True))
    scale = (rng.uniform(0.5, 2, (*shape[:-2], *cells)) * shape[-1] ** -0.5).astype(np.float32)
    normal = rng.standard_normal(shape)
    values = normal.astype(codes) if codes != "int8" else np.rint(normal * 40).clip(-128, 127).astype(np.int8)
    scale = scale / (1 if codes != "int8" else 40)
    at = [np.arange(size) // cell for size, cell in zip(shape[-2:], grid, strict=True)]
    exact = values.astype(np.float64) * scale[..., at[0], :][..., at[1]]
    return Quantized(jnp.asarray(values), jnp.asarray(scale), grid), exact


def rows_of(rng, rows, inputs, dtype):
    """Of many sizes, an outlier among them, and one of zeros."""
    x = rng.standard_normal((rows, inputs)) * np.exp2(rng.integers(-20, 20, (rows, 1)))
    x[:, 3] *= 300
    x[-1] *= rows == 1
    return x.astype(dtype)


def assert_close(actual, x, matrix, dtype):
    expected = x.astype(np.float64) @ matrix.T
    # The largest that a sum could be. Float32 loses half a unit in the last place of it with each addition. Weights
    # that XLA widens to bfloat16, with their scales, are rounded to it, and so is the result.
    size = np.abs(x.astype(np.float64)) @ np.abs(matrix.T)
    bound = size * (2**-8 if dtype == BFLOAT16 else x.shape[1] * 2**-24) + np.abs(expected) * 2**-8 * (
        dtype == BFLOAT16
    )
    assert np.all(np.abs(np.asarray(actual, np.float64) - expected) <= bound + 1e-30)


@pytest.mark.short_cases
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=str)
@pytest.mark.parametrize("kind", ["float8_e4m3fn", "int8"])
@pytest.mark.parametrize(("rows", "grid"), [(1, "blocks"), (4, "rows"), (16, "cut blocks"), (40, "odd rows")])
def test_codes_meet_rows(rows, grid, kind, dtype, backend):
    """Codes and numbers in one launch, as the inputs of a Gated DeltaNet layer are."""
    rng = np.random.default_rng(0)
    x = rows_of(rng, rows, 192, dtype)
    first, first_values = weight(rng, (100, 192), GRIDS[grid], kind)
    second, second_values = weight(rng, (64, 192), GRIDS[grid], kind)
    plain = (rng.standard_normal((24, 192)) * 192**-0.5).astype(dtype)
    out = matmul.project(jnp.asarray(x), first, second, jnp.asarray(plain), backend=backend)
    for part, values in zip(out, (first_values, second_values, plain.astype(np.float64)), strict=True):
        assert part.dtype == dtype
        assert_close(part, x, values, dtype)
    (alone,) = matmul.project(jnp.asarray(x), first, backend=backend)
    assert_close(alone, x, first_values, dtype)


@pytest.mark.short_cases
@pytest.mark.parametrize("rows", [1, 16, 200])
def test_gate_and_up_of_codes_meet(rows, backend):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((rows, 128)).astype(BFLOAT16)
    (gate, g), (up, u) = (weight(rng, (96, 128), (32, 32)) for _ in range(2))
    actual = matmul.swiglu(jnp.asarray(x), gate, up, backend=backend)
    g, u = x.astype(np.float64) @ g.T, x.astype(np.float64) @ u.T
    np.testing.assert_allclose(np.asarray(actual, np.float64), g / (1 + np.exp(-g)) * u, rtol=0.03, atol=0.03)


@pytest.mark.short_cases(
    "reference-[3, 0, 5, 1]-float32-float8_e4m3fn",
    "interpret-[3, 0, 5, 1]-bfloat16-float8_e4m3fn",
    "interpret-[40, 60, 0, 20]-bfloat16-float8_e4m3fn",
    "interpret-[100, 100, 20, 30]-bfloat16-float8_e4m3fn",
    "interpret-[40, 60, 0, 20]-bfloat16-int8",
)
@pytest.mark.parametrize("kind", ["float8_e4m3fn", "int8"])
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=str)
@pytest.mark.parametrize("sizes", [[3, 0, 5, 1], [40, 60, 0, 20], [100, 100, 20, 30]], ids=str)
def test_rows_meet_the_codes_of_their_group(sizes, dtype, kind, backend):
    rng = np.random.default_rng(2)
    total = sum(sizes)
    x = rows_of(rng, total + 2, 96, dtype)
    x[total:] = np.nan
    matrices, values = weight(rng, (4, 40, 96), (16, 32), kind)
    out = grouped_matmul(jnp.asarray(x), matrices, jnp.asarray(sizes, jnp.int32), backend=backend)
    ends = np.cumsum(sizes)
    for group, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        assert_close(out[end - size : end], x[end - size : end], values[group], dtype)


@once
def test_kernels_take_float8_only_where_the_device_converts_it():
    """XLA's products serve the others; int8 is taken everywhere."""
    rng = np.random.default_rng(6)
    (fp8, _), (int8, _) = (weight(rng, (32, 64), (1, 64), kind) for kind in ("float8_e4m3fn", "int8"))
    for architecture, taken in (("sm_80", False), ("sm_89", True), ("sm_90a", True), ("gfx942", True)):
        backend = Backend("pallas", architecture)
        assert codes.can_meet(backend, 64, fp8) == taken
        assert codes.can_meet(backend, 64, int8)
        assert backend.has_fp8_products == (taken and architecture.startswith("sm_"))


@once
def test_larger_steps_are_products_of_fp8_by_xla_where_it_is_asked_for():
    rng = np.random.default_rng(6)
    by_row, blocks, int8 = (
        weight(rng, (128, 128), grid, kind)[0]
        for grid, kind in (((1, 128), "float8_e4m3fn"), ((64, 64), "float8_e4m3fn"), ((1, 128), "int8"))
    )
    exactly = Backend("pallas", "sm_90")
    rounded = dataclasses.replace(exactly, quantize_activations=True)
    for rows, backend, form in (
        (32, rounded, None),
        (33, rounded, "tokens"),
        (600, rounded, "tokens"),
        (128, exactly, None),
        (129, exactly, "halves"),
        (512, exactly, "halves"),
        (513, exactly, None),
    ):
        x = jnp.zeros((rows, 128), jnp.bfloat16)
        assert fp8.form(x, by_row, backend) == form
        assert (tiles.of(backend, x, by_row) is None) == (form is not None or rows > matmul.MOST_ROWS)
        assert (tiles.of(backend, x, blocks, by_row) is None) == (form is not None or rows > matmul.MOST_ROWS)
        for other in (blocks, int8):
            assert fp8.form(x, other, backend) is None
            assert (tiles.of(backend, x, other) is None) == (rows > matmul.MOST_ROWS)


def test_two_types_of_codes_in_one_product_are_named(backend):
    rng = np.random.default_rng(4)
    one, _ = weight(rng, (32, 32), (1, 32))
    other, _ = weight(rng, (32, 32), (1, 32), "int8")
    if backend.is_reference:
        return
    with pytest.raises(ValueError, match="codes of several types: float8_e4m3fn, int8"):
        matmul.project(jnp.zeros((2, 32), jnp.bfloat16), one, other, backend=backend)


@once
def test_more_codes_than_a_kernel_can_number_are_refused():
    """Those of 512 experts of 4096 x 2048; of half as many inputs and outputs they are not."""

    def out_of(inputs, outputs):
        grid = (128, 128)
        scale = jax.ShapeDtypeStruct((512, outputs // 128, inputs // 128), jnp.float32)
        experts = Quantized(jax.ShapeDtypeStruct((512, outputs, inputs), jnp.float8_e4m3fn), scale, grid)
        x, sizes = jax.ShapeDtypeStruct((64, inputs), jnp.bfloat16), jax.ShapeDtypeStruct((512,), jnp.int32)
        call = functools.partial(grouped_matmul, backend=Backend("pallas", "gfx942"))
        return jax.eval_shape(call, x, experts, sizes)

    assert out_of(2048, 1024).shape == (64, 1024)
    with pytest.raises(ValueError, match=r"codes \[512, 2048, 4096\] of 4,294,967,296 .* Use more ranks"):
        out_of(4096, 2048)
