"""The rotation of queries and keys by their positions (RoPE, arXiv:2104.09864), with half of the pairs apart."""

import jax.numpy as jnp

from gdnjax.shapes import Array, Float


def rotate(x: Float[Array, "t h hd"], angles: tuple[Array, Array] | None) -> Float[Array, "t h hd"]:
    """Rotates the first `rotary_dim` entries of each head, pairs (i, i + rotary_dim / 2); the rest pass, and all of
    them without angles.
    """
    if angles is None:
        return x
    cos, sin = (a[:, None] for a in angles)
    turned, rest = jnp.split(x, [cos.shape[-1]], axis=-1)
    first, second = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
    turned = turned * cos + jnp.concatenate([-second, first], axis=-1) * sin
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)
