"""Windows to the bit: a piece computes the very sums of the whole, and a row that is emitted again those of the first
time.
"""

import functools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gdnjax.pallas_kernels import causal_conv1d
from tests.pallas_kernels.backends import jit, running
from tests.pallas_kernels.packed import pack_rows
from tests.pallas_kernels.test_causal_conv1d import (
    CHANNELS,
    WIDTH,
    close,
    convolve,
    decode,
    poisoned_pool,
    prefill,
    random_rows,
)
from tests.pallas_kernels.test_pending_rows import (
    ACCEPTED,
    OTHER,
    ROWS,
    SLOT,
    SLOTS,
    TOKENS,
    both_slots,
    steps,
    verified,
)


@pytest.fixture(scope="module", autouse=True)
def interpreted_code(unoptimised):
    """They are the same whatever the shapes by fusions as users have them."""


@pytest.mark.parametrize("cuts", [(1,), (2, 3), (1, 2, 3, 4, 5), (64,), (3, 67)])
def test_pieces_and_steps_equal_one_pass(cuts):
    """The window goes from piece to piece, and on to decode, whatever their lengths."""
    total = 70
    (row,), weight = random_rows([total])
    pool = poisoned_pool()
    expected = convolve(row, weight, np.zeros((WIDTH, CHANNELS)))
    whole, whole_pool = prefill(pack_rows([total], read=[5], fresh=[True]), [row], weight, pool)
    outputs = []
    for start, end in zip((0, *cuts[:-1]), cuts, strict=True):
        (y,), pool = prefill(pack_rows([end - start], read=[5], fresh=[start == 0]), [row[start:end]], weight, pool)
        outputs.append(y)
    # A piece computes the very sums of the whole.
    np.testing.assert_array_equal(np.concatenate(outputs), whole[0][: cuts[-1]])
    for t in range(cuts[-1], total):
        y, pool = decode(row[t : t + 1], weight, pool, [5])
        outputs.append(y)
    close(np.concatenate(outputs), expected)
    np.testing.assert_array_equal(pool[1, 5], whole_pool[1, 5])


@jit(donate_argnums=2)
def conv_verify(x, weight, conv, pending):
    return causal_conv1d.verify(x, weight, conv, 1, *both_slots(SLOT), pending, backend=running())


@jit
def conv_fold(weight, conv, count):
    return causal_conv1d.fold(weight, conv, 1, *both_slots(OTHER), count, backend=running())


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_convolution_of_verified_rows_equals_one_pass(dtype):
    rows, weight = random_rows([sum(column) for column in zip(*ACCEPTED, strict=True)])
    rows = [row.astype(dtype) for row in rows]
    weight = weight.astype(dtype)
    whole = [convolve(row, weight, np.zeros((WIDTH, CHANNELS))) for row in rows]
    pool = np.full((2, SLOTS, WIDTH + TOKENS, CHANNELS), np.nan, dtype)
    pool[1, SLOT, :WIDTH] = 0
    conv, before = jnp.asarray(pool), None
    near = functools.partial(np.testing.assert_allclose, **({"rtol": 1e-5, "atol": 1e-6} if dtype == np.float32 else
                                                             {"rtol": 8e-3, "atol": 8e-3}))  # fmt: skip
    for begin, pending, accepted in steps():
        y, conv = conv_verify(verified(rows, begin, accepted, np.nan), jnp.asarray(weight), conv, jnp.asarray(pending))
        y, kept = np.asarray(y).astype(np.float32), np.asarray(conv)
        for i in range(ROWS):
            new = y[i, TOKENS : TOKENS + accepted[i]]
            near(new, whole[i][begin[i] : begin[i] + accepted[i]])
            if before is not None:
                # Emitted again, the pending rows are the very values of the first time.
                np.testing.assert_array_equal(y[i, : pending[i]], before[i, TOKENS : TOKENS + pending[i]])
            inputs = np.concatenate([np.zeros((WIDTH, CHANNELS), dtype), rows[i]])
            np.testing.assert_array_equal(kept[1, SLOT[i], :WIDTH], inputs[begin[i] : begin[i] + WIDTH])
        before = y
    untouched = [slot for slot in range(SLOTS) if slot not in SLOT]
    assert np.isnan(kept[1, untouched].astype(np.float32)).all()
    assert np.isnan(kept[0].astype(np.float32)).all()


@pytest.mark.parametrize("count", range(TOKENS + 1))
def test_folded_window_is_the_one_behind_the_last_row_folded(count):
    (row,), weight = random_rows([WIDTH + TOKENS])
    pool = np.full((2, SLOTS, WIDTH + TOKENS, CHANNELS), np.nan, np.float32)
    pool[1, SLOT, : WIDTH + count] = row[: WIDTH + count]
    y, conv = conv_fold(weight, jnp.asarray(pool), jnp.full(ROWS, count, jnp.int32))
    expected = convolve(row, weight, np.zeros((WIDTH, CHANNELS)))[WIDTH : WIDTH + count]
    np.testing.assert_allclose(np.asarray(y)[0, :count], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(conv)[1, OTHER, :WIDTH], np.tile(row[count:][:WIDTH], (ROWS, 1, 1)))
    np.testing.assert_array_equal(np.asarray(conv)[1, SLOT[0]], pool[1, SLOT[0]])
