"""What all kernels share: how one is launched, and the few things that the Triton lowering needs said its own way."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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


@dataclasses.dataclass(frozen=True)
class Launch:
    """All that tells one launch from another: calls that agree in it, and in their operands' types, are one function.

    `order` shuffles the programs of an interpreted kernel, 0 leaves them in order; see `Backend`. `in_triton`: the
    kernel is a `triton.jit` function.
    """

    kernel: Callable
    name: str
    programs: int
    out: tuple[jax.ShapeDtypeStruct, ...]
    warps: int
    stages: int
    aliases: tuple[tuple[int, int], ...]
    static: tuple[tuple[str, Any], ...]
    interpret: bool
    order: int
    in_triton: bool


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
    """Runs `programs` programs of `kernel(program, *in_refs, *out_refs, **static)`, every ref a whole array.

    One axis: the kernel takes its number apart itself, so that the order in which programs start is what it says and
    no axis is ever too long for a launch. `aliases` maps inputs to the outputs that they become, in place. Statics are
    hashable.

    Where `backend` is "triton", `kernel` is a `triton.jit` function of pointers and statics that asks for its program
    itself. Raises ValueError for any other.
    """
    if backend.is_triton and inspect.isfunction(kernel):
        raise ValueError(f"kernels='triton': {name} has no kernel in Triton; allowed: gated_delta_rule.decode alone")
    return run(
        Launch(
            kernel=kernel,
            name=name,
            programs=programs,
            out=tuple(out),
            warps=warps,
            stages=stages,
            aliases=tuple(sorted((aliases or {}).items())),
            static=tuple(sorted(static.items())),
            interpret=backend.interpret,
            order=backend.order,
            in_triton=backend.is_triton,
        ),
        args,
    )


def run(launch: Launch, args: Sequence[Array]) -> list[Array]:
    """Every kernel of the package comes through here; scripts/rocm puts its emulator in this function's place."""
    return list(jitted(launch)(*args))


@functools.cache
def jitted(launch: Launch) -> Callable:
    """The launch as a function of its operands. JAX traces and lowers it once: layers are calls of one function."""
    function = _by_jax_triton(launch) if launch.in_triton else _by_pallas(launch)
    function.__name__ = launch.name
    return jax.jit(function)


def _by_pallas(launch: Launch) -> Callable:
    if launch.order:
        numbers = np.random.default_rng(launch.order).permutation(launch.programs).astype(np.int32)
        return functools.partial(ordered(launch), numbers)
    kernel = functools.partial(launch.kernel, **dict(launch.static))
    return _pallas_call(launch, lambda *refs: kernel(pl.program_id(0), *refs), dict(launch.aliases))


def ordered(launch: Launch) -> Callable:
    """The launch as a function of its programs' numbers, int32 [programs], in the order in which they are to run, and
    of its operands.
    """
    kernel = functools.partial(launch.kernel, **dict(launch.static))
    aliases = {operand + 1: result for operand, result in launch.aliases}
    return _pallas_call(launch, lambda numbers, *refs: kernel(numbers[pl.program_id(0)], *refs), aliases)


def _pallas_call(launch: Launch, kernel: Callable, aliases: dict[int, int]) -> Callable:
    return pl.pallas_call(
        kernel,
        grid=(launch.programs,),
        out_shape=list(launch.out),
        input_output_aliases=aliases,
        compiler_params=plgpu.CompilerParams(num_warps=launch.warps, num_stages=launch.stages),
        interpret=launch.interpret,
        name=launch.name,
    )


def _by_jax_triton(launch: Launch) -> Callable:
    with from_the_triton_extra():
        import jax_triton  # pyright: ignore[reportMissingImports]

    return lambda *args: jax_triton.triton_call(
        *args,
        kernel=launch.kernel,
        name=launch.name,
        grid=(launch.programs,),
        out_shape=list(launch.out),
        input_output_aliases=dict(launch.aliases),
        num_warps=launch.warps,
        num_stages=launch.stages,
        **dict(launch.static),
    )


@contextlib.contextmanager
def from_the_triton_extra() -> Iterator[None]:
    """Around imports of triton and jax_triton. Raises ImportError that says how what is missing is installed."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"kernels='triton' needs `pip install gdnjax[triton]`: {error}") from error


def bounded(number: Array, count: int) -> Array:
    """A number that was loaded and that multiplies a stride, with its range, 0 to `count` - 1, made known.

    It is in range as it comes. But Triton's compiler for AMD takes the offsets of an unbounded number times a large
    stride for small where their product overflows, and cuts them to 32 bits: in pools over 4 GiB that is another place.
    """
    return jnp.minimum(jnp.maximum(number, 0), count - 1)


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


def scaled(x: Array, factor: float) -> Array:
    """x times a static factor; 1 adds no operation."""
    return x if factor == 1 else factor * x
