"""What all kernels share: how one is launched, and the few things that the Triton lowering needs said its own way."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gdnjax.backend import FLOAT32_DOT, Backend
from gdnjax.shapes import Array

LEAST = 16
"""Rows and columns that a product on matrix units has at least."""


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is neither below `size` nor below `least`. Blocks in Triton have such sizes."""
    return max(least, 1 << (size - 1).bit_length())


def launch(
    kernel: Callable,
    backend: Backend,
    *,
    name: str,
    programs: int,
    args: Sequence[Array],
    out: Sequence[jax.ShapeDtypeStruct],
    warps: int,
    stages: int = 1,
    aliases: dict[int, int] | None = None,
    **static,
) -> list[Array]:
    """Runs `programs` programs of `kernel(*in_refs, *out_refs, **static)`, every ref a whole array.

    One axis: the kernel takes its number apart itself, so that the order in which programs start is what it says and
    no axis is ever too long for a launch. `aliases` maps inputs to the outputs that they become, in place.
    """
    results = pl.pallas_call(
        functools.partial(kernel, **static),
        grid=(programs,),
        out_shape=list(out),
        input_output_aliases=aliases or {},
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=backend.interpret,
        name=name,
    )(*args)
    return list(results)


def layer_number(layer: int) -> Array:
    """A layer as an operand of a kernel: as a constant in it, every layer of a model would be compiled by itself."""
    return jnp.full((1,), layer, jnp.int32)


def barrier(interpret: bool) -> None:
    """All threads of the program have come here; one that runs in an interpreter has only one."""
    if not interpret:
        plgpu.debug_barrier()


def dot(x: Array, y: Array, *, contract: tuple[int, int] = (1, 0), precision: Any = FLOAT32_DOT) -> Array:
    """Product of two blocks over axis `contract[0]` of x and `contract[1]` of y, summed in float32.

    `precision` is that of float32 blocks.
    """
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    precision = precision if x.dtype == jnp.float32 else None
    return lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def softplus(x: Array) -> Array:
    return jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + jnp.exp(-x))
