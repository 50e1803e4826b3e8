"""Keys and values of 8 bits with a float32 scale for every token and kv head: what is stored times its scale.

The scale is the head's largest magnitude over the largest number of the dtype. Scores and probabilities are multiplied
by it in the place of keys and values, so that those are never widened in memory.
"""

import math
import re

import jax.numpy as jnp

from gdnjax.backend import Backend
from gdnjax.memory import check_one_byte_pool
from gdnjax.pallas_kernels.pools import dtype_of
from gdnjax.shapes import Array

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""The 8-bit dtypes, and the largest magnitude that is stored in each."""

TINY = 1e-30
"""Magnitudes below it are stored as if it were their head's largest: a head of zeros has a scale to divide by."""

FLOAT8_CAPABILITY = 89
"""The lowest compute capability on which Pallas converts float8_e4m3fn (Ada; Hopper is 90)."""


def quantise(x: Array, dtype) -> tuple[Array, Array]:
    """[..., hd] to its 8-bit values and their scale [..., 1]: to the nearest, halves up in int8, to even in float8."""
    x = x.astype(jnp.float32)
    largest = LARGEST[jnp.dtype(dtype).name]
    top = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), TINY)
    values = x * (largest / top)
    if jnp.issubdtype(dtype, jnp.integer):
        values = jnp.floor(values + 0.5)
    return values.astype(dtype), top / largest


def check(k_blocks: Array, v_blocks: Array, scales: tuple[Array, Array] | None, backend: Backend) -> None:
    """Raises ValueError unless pools are of 8 bits with scales of their shape, or of more bits without scales.

    For the reference uint8 is the bits of float8_e4m3fn: see `pallas_kernels/pools.py`. Kernels refuse 8-bit pools of
    2^31 to 2^32 bytes, too: see memory.check_one_byte_pool.
    """
    names = [(dtype_of(pool) if backend.is_reference else pool.dtype).name for pool in (k_blocks, v_blocks)]
    if scales is None:
        if any(pool.dtype.itemsize == 1 for pool in (k_blocks, v_blocks)):
            raise ValueError(
                f"pools of {' and '.join(names)} without scales; allowed: {_allowed()} with scales "
                "(attend(scales=...), write_quantised), bfloat16 or float32 without"
            )
        return
    if names[0] != names[1] or names[0] not in LARGEST:
        raise ValueError(f"pools of {' and '.join(names)} with scales; allowed with scales: both {_allowed()}")
    for name, pool, scale in zip("kv", (k_blocks, v_blocks), scales, strict=True):
        if scale.dtype != jnp.float32 or scale.shape != pool.shape[:-1]:
            raise ValueError(
                f"{name}_scales are {scale.dtype.name}{list(scale.shape)}; allowed: float32{list(pool.shape[:-1])}, "
                "one for every token and kv head of the pool"
            )
    if not backend.is_reference:
        for name, pool in zip("kv", (k_blocks, v_blocks), strict=True):
            check_one_byte_pool(f"{name}_blocks {list(pool.shape)}", math.prod(pool.shape))
    check_device(names[0], backend)


def check_device(dtype: str, backend: Backend) -> None:
    """Raises ValueError for pools of a dtype that kernels cannot convert on their device."""
    capability = re.fullmatch(r"sm_(\d+)a?", backend.architecture)
    if dtype in ("fp8", "float8_e4m3fn") and capability and int(capability[1]) < FLOAT8_CAPABILITY:
        raise ValueError(
            f"pools of {dtype} on {backend.architecture}: its conversion needs sm_{FLOAT8_CAPABILITY} or later; "
            "allowed: int8"
        )


def check_latent(pages: Array) -> None:
    """Raises ValueError for latents of 8 bits: no scales are kept for them yet."""
    if pages.dtype.itemsize == 1:
        raise ValueError(f"latent pages of {pages.dtype.name}; allowed: bfloat16 or float32")


def _allowed() -> str:
    return " or ".join(LARGEST)
