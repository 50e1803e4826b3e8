"""Stochastic rounding of states that a pool keeps in bfloat16: by noise that belongs to a place of a sequence.

Of a float32 the lower 16 bits are dropped behind the sum with 16 random ones. So it is rounded up as often as it is
near the upper neighbour, the mean is the number itself, and what bfloat16 holds exactly stays as it is. The noise is a
function of (seed, position, layer, head, element): not of rows, slots, neighbours, pieces, order or ranks. It is made
by a counter hash of some ten operations (multiply and xorshift, "lowbias32" of C. Wellons' hash-prospector), where
Threefry takes ninety. Reference and kernels call the same functions.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

from gdnjax.shapes import Array, Int32, Leaf, UInt32

FIRST, SECOND = 0x7FEB352D, 0x846CA68B
"""The odd factors of the hash."""

ODD = 0x9E3779B9
"""Keeps numbers that count, of layers and heads, apart in all bits."""

EXPONENT, KEPT = 0x7F800000, 0xFFFF0000


@dataclasses.dataclass(frozen=True)
class Rounding:
    """The noise of what a step stores: the keys of the positions behind which states stand, and of which rank."""

    keys: Leaf  # [n] uint32: of the state of each row
    checkpoints: Leaf = None  # [c] uint32: of the states behind chunks; None where chunks have no checkpoints
    first_head: Leaf = 0  # [] int32: the number that this rank's first head has among those of all ranks


def keys_of(seed: int, position: Int32[Array, "n"]) -> UInt32[Array, "n"]:
    """The key of the state behind so many tokens. `seed` is static."""
    words = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
    key = jnp.full((), words[0], jnp.uint32)
    key = _mixed(key) ^ jnp.uint32(words[1])
    return _mixed(position.astype(jnp.uint32) + _mixed(key))


def head_keys(key: Array, layer: Array | int, head: Array | int) -> tuple[Array, Array]:
    """Two words for one head of one layer: uint32, broadcast. `head` counts those of all ranks."""
    number = (jnp.asarray(layer).astype(jnp.uint32) << jnp.uint32(16)) + jnp.asarray(head).astype(jnp.uint32)
    first = _mixed(key ^ (number * jnp.uint32(ODD)))
    return first, _mixed(first + jnp.uint32(ODD))


def noise(keys: tuple[Array, Array], element: Array) -> Array:
    """16 random bits, as uint32, for each element k * V + v of a state; broadcast."""
    x = element.astype(jnp.uint32) + keys[0]
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(FIRST)
    # The second word stands between: with the first alone, elements of two states would have the same noise, shifted.
    x = x ^ keys[1]
    x = (x ^ (x >> jnp.uint32(15))) * jnp.uint32(SECOND)
    return x >> jnp.uint32(16)


def rounded(x: Array, bits: Array) -> Array:
    """float32 numbers that bfloat16 holds exactly, for float32 `x` and 16 random `bits`. NaN and infinities stay."""
    number = lax.bitcast_convert_type(x, jnp.uint32)
    finite = (number & jnp.uint32(EXPONENT)) != jnp.uint32(EXPONENT)
    number = jnp.where(finite, (number + bits) & jnp.uint32(KEPT), number)
    return lax.bitcast_convert_type(number, jnp.float32)


def rounded_states(states: Array, keys: Array, first_head: Array | int, layer: Array | int) -> Array:
    """[n, hv, K, V] float32, each state by the noise of its key [n]."""
    heads, key_dim, value_dim = states.shape[1:]
    head = jnp.arange(heads, dtype=jnp.int32) + first_head
    of_heads = head_keys(keys[:, None], layer, head)
    element = jnp.arange(key_dim * value_dim, dtype=jnp.uint32).reshape(key_dim, value_dim)
    first, second = (word[:, :, None, None] for word in of_heads)
    return rounded(states, noise((first, second), element))


def _mixed(x: Array) -> Array:
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(FIRST)
    x = (x ^ (x >> jnp.uint32(15))) * jnp.uint32(SECOND)
    return x ^ (x >> jnp.uint32(16))
