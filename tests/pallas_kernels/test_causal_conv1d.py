"""The convolution against numpy: pieces, windows and steps of one token give what one pass gives."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gdnjax.pallas_kernels import causal_conv1d
from gdnjax.pallas_kernels.rows import Chunks, Rows
from tests.pallas_kernels.backends import jit, running
from tests.pallas_kernels.packed import pack_rows

CHANNELS, TAPS, SLOTS = 10, 4, 11
WIDTH = TAPS - 1

RTOL, ATOL = 1e-5, 1e-6
"""Four products of float32 and a silu; numpy computes in float64."""


def convolve(x, weight, window):
    """y_i = silu(sum_j weight[j] x_(i - w + j)), inputs before the first from the window: [t, x], float64."""
    inputs = np.concatenate([window, x]).astype(np.float64)
    total = np.stack([(weight.T * inputs[i : i + weight.shape[1]]).sum(0) for i in range(len(x))])
    return total / (1 + np.exp(-total))


def random_rows(lengths, seed=0, channels=CHANNELS, taps=TAPS):
    rng = np.random.default_rng(seed)
    rows = [rng.standard_normal((length, channels)).astype(np.float32) for length in lengths]
    return rows, rng.standard_normal((channels, taps)).astype(np.float32)


def poisoned_pool(dtype=np.float32, width=WIDTH):
    return np.full((2, SLOTS, width, CHANNELS), np.nan, dtype)


@jit
def _prefill(x, weight, conv, rows, chunks):
    return causal_conv1d.prefill(x, weight, conv, 1, Rows(**rows), Chunks(**chunks), backend=running())


@jit(static_argnums=3)
def _decode(x, weight, conv, layer, read, write):
    return causal_conv1d.decode(x, weight, conv, layer, read, write, backend=running())


def prefill(packed, rows, weight, pool, dtype=jnp.float32):
    """Runs the op in layer 1; y per row, and the pool."""
    y, conv = _prefill(
        packed.pack(rows).astype(dtype),
        jnp.asarray(weight, dtype),
        jnp.asarray(pool),
        vars(packed.rows),
        vars(packed.chunks),
    )
    return [np.asarray(y)[here] for here in packed.slices], np.asarray(conv)


def decode(x, weight, pool, read, write=None, layer=1):
    slots = [jnp.asarray(s, jnp.int32) for s in (read, read if write is None else write)]
    y, conv = _decode(jnp.asarray(x), jnp.asarray(weight), jnp.asarray(pool), layer, *slots)
    return np.asarray(y), np.asarray(conv)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=ATOL)


LENGTHS = (1, 2, 3, 4, 5, 64, 67)
"""Shorter than the window, as long, and longer."""


@pytest.mark.parametrize("fresh", [True, False])
def test_prefill_equals_the_formula(fresh):
    rows, weight = random_rows(LENGTHS)
    windows = np.random.default_rng(1).standard_normal((len(rows), WIDTH, CHANNELS)).astype(np.float32)
    pool = poisoned_pool()
    if fresh:
        windows[:] = 0
    else:
        pool[1, 1 : len(rows) + 1] = windows
    packed = pack_rows(LENGTHS, read=range(1, len(rows) + 1), fresh=[fresh] * len(rows))
    outputs, conv = prefill(packed, rows, weight, pool)
    for i, row in enumerate(rows):
        close(outputs[i], convolve(row, weight, windows[i]))
        # Windows are raw inputs: exact.
        np.testing.assert_array_equal(conv[1, i + 1], np.concatenate([windows[i], row])[-WIDTH:])


@pytest.mark.short_cases
@pytest.mark.parametrize("taps", [2, 3, 6])
def test_prefill_of_other_kernel_sizes_equals_the_formula(taps):
    rows, weight = random_rows((1, 7), taps=taps)
    pool = poisoned_pool(width=taps - 1)
    windows = np.random.default_rng(2).standard_normal((2, taps - 1, CHANNELS)).astype(np.float32)
    pool[1, [3, 4]] = windows
    outputs, conv = prefill(pack_rows((1, 7), read=[3, 4], fresh=[False] * 2), rows, weight, pool)
    for i, row in enumerate(rows):
        close(outputs[i], convolve(row, weight, windows[i]))
        np.testing.assert_array_equal(conv[1, 3 + i], np.concatenate([windows[i], row])[1 - taps :])


def test_fresh_row_ignores_what_its_slot_holds():
    (row,), weight = random_rows([5])
    packed = pack_rows([5], read=[2], fresh=[True])
    expected, _ = prefill(packed, [row], weight, np.zeros_like(poisoned_pool()))
    outputs, conv = prefill(packed, [row], weight, poisoned_pool())
    np.testing.assert_array_equal(outputs[0], expected[0])
    assert np.isfinite(conv[1, 2]).all()


def test_fresh_row_of_one_token_leaves_zeros_before_it():
    (row,), weight = random_rows([1])
    _, conv = prefill(pack_rows([1], read=[2], fresh=[True]), [row], weight, poisoned_pool())
    np.testing.assert_array_equal(conv[1, 2], np.concatenate([np.zeros((WIDTH - 1, CHANNELS)), row]))


def test_only_the_write_slots_of_the_layer_change():
    rows, weight = random_rows([5, 2])
    pool = np.random.default_rng(3).standard_normal(poisoned_pool().shape).astype(np.float32)
    packed = pack_rows([5, 2], read=[1, 2], write=[6, 7], fresh=[False, False])
    _, conv = prefill(packed, rows, weight, pool)
    kept = np.ones(pool.shape[:2], bool)
    kept[1, [0, 6, 7]] = False
    np.testing.assert_array_equal(conv[kept], pool[kept])
    np.testing.assert_array_equal(conv[1, 7], np.concatenate([pool[1, 2], rows[1]])[-WIDTH:])


CUTS = {1: 1, 2: 2, 3: 3, 16: 4, 48: 5, 63: 6, 65: 7, 100: 8}
"""Checkpoints within the window's reach of the piece's start, on the grid of chunks' neighbours, and anywhere."""


@pytest.mark.parametrize("fresh", [True, False])
def test_checkpoints_hold_the_inputs_up_to_them(fresh):
    """The second row of a batch, so that places and offsets differ. Kept slots were NaN."""
    (before, row), weight = random_rows([5, 130])
    pool = poisoned_pool()
    window = np.zeros((WIDTH, CHANNELS), np.float32)
    if not fresh:
        window = pool[1, 10] = np.random.default_rng(5).standard_normal(window.shape).astype(np.float32)
    packed = pack_rows([5, 130], read=[9, 10], fresh=[True, fresh], cuts=[{}, CUTS])
    outputs, conv = prefill(packed, [before, row], weight, pool)
    close(outputs[1], convolve(row, weight, window))
    inputs = np.concatenate([window, row])
    for place, slot in {**CUTS, 130: 10}.items():
        np.testing.assert_array_equal(conv[1, slot], inputs[place : place + WIDTH])
    np.testing.assert_array_equal(conv[1, 9], before[-WIDTH:])


def test_only_checkpoints_and_write_slots_of_the_layer_change():
    rows, weight = random_rows([70, 2])
    pool = np.random.default_rng(3).standard_normal(poisoned_pool().shape).astype(np.float32)
    packed = pack_rows([70, 2], read=[1, 2], write=[6, 7], fresh=[False, False], cuts=[{1: 4, 50: 0}, {2: 5}])
    _, conv = prefill(packed, rows, weight, pool)
    kept = np.ones(pool.shape[:2], bool)
    kept[1, [0, 4, 5, 6, 7]] = False
    np.testing.assert_array_equal(conv[kept], pool[kept])
    # A row that is kept where it ends leaves the same in both slots.
    np.testing.assert_array_equal(conv[1, 5], conv[1, 7])


def test_decode_reads_one_slot_and_writes_another():
    (row,), weight = random_rows([3])
    pool = np.random.default_rng(4).standard_normal(poisoned_pool().shape).astype(np.float32)
    y, conv = decode(row, weight, pool, [1, 2, 0], [4, 2, 0], layer=0)
    for i, (read, write) in enumerate(((1, 4), (2, 2))):
        close(y[i : i + 1], convolve(row[i : i + 1], weight, pool[0, read]))
        np.testing.assert_array_equal(conv[0, write], np.concatenate([pool[0, read], row[i : i + 1]])[-WIDTH:])
    kept = np.ones(pool.shape[:2], bool)
    kept[0, [0, 2, 4]] = False
    np.testing.assert_array_equal(conv[kept], pool[kept])


def test_bfloat16_windows_are_the_inputs_themselves():
    (row,), weight = random_rows([6])
    row = row.astype(ml_dtypes.bfloat16).astype(np.float32)
    weight = weight.astype(ml_dtypes.bfloat16).astype(np.float32)
    pool = poisoned_pool(ml_dtypes.bfloat16)
    (y,), conv = prefill(pack_rows([6], read=[2], fresh=[True]), [row], weight, pool, jnp.bfloat16)
    assert y.dtype == conv.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(conv[1, 2].astype(np.float32), row[-WIDTH:])
    # Summed in float32, rounded once: half an ulp of bfloat16 is 2^-8.
    expected = convolve(row, weight, np.zeros((WIDTH, CHANNELS)))
    np.testing.assert_allclose(y.astype(np.float32), expected, rtol=2**-8, atol=1e-6)
