"""Times of device work: many calls in one jitted function, the clock around it, the median of many runs."""

import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

AT_LEAST = 30e-3
"""Seconds of device work that one timed run should have, beside which starting it and waiting for it is nothing."""


def time_calls(
    call: Callable, arguments, pools, layers: int, *, chain: str | None = None, runs: int = 12, most: int = 96
) -> tuple[list[float], object]:
    """Seconds a call in each of `runs` runs, and the pools. Calls go through the layers in turn; pools are consumed.

    Equal calls are one to XLA. Where a call does not change what the next one reads of the pools, `chain` names an
    argument that all of its kernels read, "layer" among them: each call adds a zero to it that is computed from the
    outputs before (a kernel of less than 2 us).
    """
    repeat = functools.partial(_repeat, call, layers=layers, chain=chain)
    once = jax.jit(functools.partial(repeat, count=layers), donate_argnums=1)
    _, pools = jax.block_until_ready(once(arguments, pools))
    each, pools = _run(once, arguments, pools, layers, 1)
    count = layers * max(1, min(most // layers, round(AT_LEAST / max(each, 1e-6) / layers)))
    many = jax.jit(functools.partial(repeat, count=count), donate_argnums=1)
    _, pools = jax.block_until_ready(many(arguments, pools))
    each, pools = _run(many, arguments, pools, count, 1)
    starts = max(1, round(AT_LEAST / (each * count)))
    times = []
    for _ in range(runs):
        seconds, pools = _run(many, arguments, pools, count, starts)
        times.append(seconds)
    return times, pools


def _run(many, arguments, pools, count: int, starts: int):
    """Seconds a call of so many starts of a function of `count` calls, one start behind the other."""
    begin = time.perf_counter()
    outputs = None
    for _ in range(starts):
        outputs, pools = many(arguments, pools)
    jax.block_until_ready((outputs, pools))
    return (time.perf_counter() - begin) / (count * starts), pools


def _repeat(call, arguments, pools, *, layers, chain, count):
    """`count` calls one after another."""
    outputs = None
    for i in range(count):
        # Calls do not fuse.
        arguments, pools, outputs = lax.optimization_barrier((arguments, pools, outputs))
        mine, layer = arguments, i % layers
        if chain and outputs is not None:
            # No product with 0 and no mask of bits, which XLA would fold.
            first = jnp.ravel(jax.tree.leaves(outputs)[0])[0].astype(jnp.float32)
            zero = (first > 1e38).astype(jnp.int32)
            if chain == "layer":
                layer = layer + zero
            else:
                mine = arguments | {chain: arguments[chain] + zero}
        outputs, pools = call(mine, pools, layer)
    return outputs, pools


def copy_ceiling(gibibytes: float = 2.0) -> float:
    """Bytes a second, read and written, of copying much more than caches hold."""
    size = int(gibibytes * 2**30 / 4)

    def call(_, x, __):
        return (), x + 1.0

    times, _ = time_calls(call, (), jnp.zeros((size,), jnp.float32) + jax.random.normal(jax.random.key(0), (1,)), 4)
    return 8 * size / statistics.median(times)


def matmul_ceiling(size: int = 8192) -> float:
    """FLOP/s of a large bfloat16 product by XLA, on random values; the left operand is the product before."""
    keys = jax.random.split(jax.random.key(1))
    x, y = (jax.random.normal(key, (size, size), jnp.float32) for key in keys)
    weight = (y * size**-0.5).astype(jnp.bfloat16)
    times, _ = time_calls(lambda w, x, _: ((), x @ w), weight, x.astype(jnp.bfloat16), 4)
    return 2 * size**3 / statistics.median(times)
