"""The definition: noise for every token, by Threefry, in XLA."""

import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32

from gdnjax.backend import Backend
from gdnjax.shapes import Array, Float32, Int32, UInt32


def gumbel_argmax(logits, temperature, least, seed, position, first, stream: int, backend: Backend):
    del backend
    scaled = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]
    scores = scaled if least is None else jnp.where(scaled >= least[:, None], scaled, -jnp.inf)
    token = jnp.arange(logits.shape[1], dtype=jnp.uint32) + jnp.asarray(first).astype(jnp.uint32)
    noise = gumbel(seed, position, token, stream)
    noisy = scores + jnp.where(temperature[:, None] > 0, noise, 0.0)
    best = jnp.argmax(noisy, axis=-1).astype(jnp.int32)
    value, top = jnp.take_along_axis(noisy, best[:, None], axis=-1)[:, 0], jnp.max(scaled, axis=-1)
    if least is None:
        return best, value, top
    wanted = least > -jnp.inf
    return jnp.where(wanted, best, 0), *(jnp.where(wanted, x, -jnp.inf) for x in (value, top))


def gumbel(
    seed: UInt32[Array, "n 2"], position: Int32[Array, "n"], token: UInt32[Array, "V"], stream: int = 0
) -> Float32[Array, "n V"]:
    """Standard Gumbel noise, a function of (seed, position, token, stream) alone. Streams are independent."""
    # 1 - u keeps full relative precision where it matters: near u = 1, whose tokens win.
    return -jnp.log(-jnp.log1p(-_uniform(seed, position, token, stream)))


def uniform(seed: UInt32[Array, "n 2"], position: Int32[Array, "n"], stream: int) -> Float32[Array, "n"]:
    """Uniform noise, above 0 and below 1, a function of (seed, position, stream) alone.

    It takes the numbers of token 0's Gumbel noise, so a stream serves one of the two.
    """
    return _uniform(seed, position, jnp.zeros((1,), jnp.uint32), stream)[:, 0]


def _uniform(seed: Array, position: Array, token: Array, stream: int) -> Float32[Array, "n V"]:
    """Above 0 and below 1: Threefry of the token, keyed by the rest."""

    def one_row(seed, position):
        key = threefry_2x32(seed, jnp.stack([position.astype(jnp.uint32), jnp.uint32(stream)]))
        bits = threefry_2x32(key, jnp.concatenate([token, jnp.zeros_like(token)]))
        return bits[: token.shape[0]]

    bits = jax.vmap(one_row)(seed, position)
    return jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
