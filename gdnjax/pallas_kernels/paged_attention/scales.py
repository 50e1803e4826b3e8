"""Keys and values of 8 bits with a float32 scale for every token and kv head: what is stored times its scale.

The scale is the head's largest magnitude over the largest number of the dtype. Scores and probabilities are multiplied
by it in the place of keys and values, so that those are never widened in memory.
"""

import math

import jax.numpy as jnp

from gdnjax.backend import FLOAT8_CAPABILITY, Backend
from gdnjax.memory import check_one_byte_pool
from gdnjax.pallas_kernels.pools import dtype_of
from gdnjax.quantized import LARGEST
from gdnjax.shapes import Array


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
    if dtype in ("fp8", "float8_e4m3fn") and backend.lacks_float8:
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
