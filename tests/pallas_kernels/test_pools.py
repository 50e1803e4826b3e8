"""Rows of pools: what is written is read, in pools of numbers and of their bits, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdnjax.pallas_kernels.pools import read_rows, write_rows
from tests.pallas_kernels.backends import once

pytestmark = once

SHAPE = (2, 9, 4, 6)
INDICES = {
    "slots of a layer": lambda n: (1, jnp.array([7, 2, 5, 3][:n])),
    "the first rows of slots": lambda n: (0, jnp.array([7, 2, 5, 3][:n]), slice(3)),
    "places in blocks": lambda n: (1, jnp.array([7, 2, 7, 3][:n]), jnp.array([0, 3, 1, 2][:n])),
    "rows of the first axis": lambda n: (jnp.array([1, 0][:n]),),
}


@pytest.mark.short_cases
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
@pytest.mark.parametrize("dtype", ["bfloat16", "uint16"])
def test_rows_are_read_as_written_and_others_stay(dtype, index, rows):
    """numpy says what a pool is afterwards. Values are far from what 16 bits can hold exactly."""
    place, numbers = index(rows), "bfloat16"
    rng = np.random.default_rng(0)
    before = jnp.asarray(rng.normal(size=SHAPE), numbers)
    pool = jax.lax.bitcast_convert_type(before, jnp.uint16) if dtype == "uint16" else before
    new = jnp.asarray(rng.normal(size=before[place].shape), jnp.float32)
    expected = np.array(before)
    expected[tuple(np.asarray(part) if hasattr(part, "shape") else part for part in place)] = new.astype(numbers)
    np.testing.assert_array_equal(read_rows(pool, *place), before[place])
    after = write_rows(pool, *place, rows=new)
    assert after.dtype == dtype
    np.testing.assert_array_equal(np.asarray(after).view(expected.dtype), expected)
    np.testing.assert_array_equal(read_rows(after, *place), new.astype(numbers))


@pytest.mark.parametrize("rows", [1, 2])
def test_pools_of_numbers_are_differentiated(rows):
    """The derivative of what was written, by the rows and by the pool; a row that stands alone counts once."""
    slot, other = jnp.arange(rows) + 1, jnp.arange(rows) + 2

    def loss(pool, new):
        return jnp.sum(read_rows(write_rows(pool, 0, slot, rows=new), 0, other).astype(jnp.float32))

    pool, new = jnp.ones((1, 5, 3), jnp.bfloat16), jnp.ones((rows, 3), jnp.bfloat16)
    by_pool, by_rows = jax.jit(jax.grad(loss, argnums=(0, 1)))(pool, new)
    # What is read and was not written stands last: the pool's own; the rows that are read again are those written.
    np.testing.assert_array_equal(by_pool[0, :, 0], [0] * (rows + 1) + [1] + [0] * (3 - rows))
    np.testing.assert_array_equal(by_rows[:, 0], [0] + [1] * (rows - 1))
    written = jax.jit(jax.grad(lambda new: jnp.sum(write_rows(pool, 0, slot, rows=new).astype(jnp.float32))))(new)
    np.testing.assert_array_equal(written, np.ones_like(written))
