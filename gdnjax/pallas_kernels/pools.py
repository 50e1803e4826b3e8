"""Rows of a pool, read and written at the cost of the rows, whatever the size of the pool.

XLA moves no bfloat16 on a CPU: it widens the whole operand of a gather or a scatter to float32, and narrows the whole
result, and widens float8 to float16. So an engine whose ops are the reference keeps such pools as their bits
(`CacheSpec.as_bits`): integers are moved, and become numbers when they have been read. Pools of numbers are read and
written, too, and can be differentiated.
"""

import jax.numpy as jnp
from jax import lax

from gdnjax.cache_kinds import BITS, JAX_NAMES
from gdnjax.shapes import Array

_NUMBERS = {bits: JAX_NAMES.get(numbers, numbers) for numbers, bits in BITS.items()}


def dtype_of(pool: Array) -> jnp.dtype:
    """The dtype of the numbers in a pool, held as they are or as bits."""
    return jnp.dtype(_NUMBERS.get(pool.dtype.name, pool.dtype))


def read_rows(pool: Array, *index) -> Array:
    """`pool[index]` as numbers. The rows that arrays in `index` name are the first axis of the result."""
    rows, dtype = pool[_at_least_two(index)], dtype_of(pool)
    if _is_of_one(index):
        rows = rows[:1]
    return rows if rows.dtype == dtype else lax.bitcast_convert_type(rows, dtype)


def write_rows(pool: Array, *index, rows) -> Array:
    """`pool.at[index].set(rows)`, rows rounded to the pool's numbers. The pool is consumed.

    Every array in `index` is [n], and those stand together.
    """
    rows = jnp.asarray(rows, dtype_of(pool))
    if rows.dtype != pool.dtype:
        rows = lax.bitcast_convert_type(rows, pool.dtype)
    if _is_of_one(index):
        rows = jnp.repeat(rows, 2, axis=0)
    return pool.at[_at_least_two(index)].set(rows)


def _stands_alone(place) -> bool:
    return getattr(place, "shape", None) == (1,)


def _is_of_one(index: tuple) -> bool:
    return any(_stands_alone(place) for place in index)


def _at_least_two(index: tuple) -> tuple:
    """The index with a row that stands alone named twice.

    XLA makes a slice of one row's gather and an update of its scatter, and takes such a slice again wherever it is
    used. Where that comes behind the update, XLA copies the pool. Gathers and scatters of two rows stay as they are.
    """
    return tuple(jnp.repeat(place, 2) if _stands_alone(place) else place for place in index)
