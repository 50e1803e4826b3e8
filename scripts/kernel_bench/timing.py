"""Times of device work: many calls in one compiled function, the clock around it, the median of many runs.

The compiler may leave out what nobody needs, and do once what is the same every time. So each call is made to depend
on all that the call before it gave, and the compiled function is counted: it has as many kernels a call as the call
has that is compiled alone, or there is no time.
"""

import collections
import dataclasses
import functools
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gdnjax.backend import REFERENCE, Backend
from gdnjax.pallas_kernels.launch import launch

AT_LEAST = 30e-3
"""Seconds of device work that one timed run should have, beside which starting it and waiting for it is nothing."""

MOST = 96
"""Calls of one compiled function."""

CALLS = ("custom-call", "dot", "convolution")
"""Operations of HLO that are kernels, or what a kernel is for."""

PARTS = ("scatter", "reduce", "sort", "fusion")
"""What is counted of a call that has none of CALLS: the first of these that it has."""


NEED = "need_outputs"
"""The name of the kernel that stands between two calls."""


class NotMeasuredError(RuntimeError):
    """The figure would be of something else than what was to be measured."""


class DoesNotFitError(RuntimeError):
    """What was compiled wants more memory than the device has."""


def count_of(layers: int, seconds: float) -> int:
    """Calls that one function should have, a multiple of the layers, if each takes about so long."""
    return layers * max(1, min(MOST // layers, round(AT_LEAST / max(seconds, 1e-6) / layers)))


class Calls:
    """A call alone, and `count` of it one after another through the layers: lowered here, compiled by `compile`.

    `call` is (arguments, pools, layer) -> (outputs, pools); pools are consumed. Where a call does not change what the
    next one reads of the pools, `chain` names an argument that all of its kernels read, "layer" among them: each call
    adds a zero to it that is computed from all outputs of the call before (two kernels of less than 2 us). Without a
    chain, outputs and pools are of one kernel; XLA's own may make them apart, and its outputs are kept by a sum of such
    zeros. `count` 0 is the call alone.

    After `compile` there is `alone`, and `fault` says why there is nothing to time.
    """

    def __init__(
        self,
        call: Callable,
        arguments: Any,
        pools: Any,
        layers: int,
        *,
        chain: str | None = None,
        count: int = 0,
        backend: Backend = REFERENCE,
    ):
        began = time.perf_counter()
        arguments, pools = jax.eval_shape(lambda *both: both, arguments, pools)
        # The last layer: only there an offset that is cut to 32 bits shows.
        alone = functools.partial(call, layer=layers - 1)
        self._lowered = jax.jit(lambda x, p: alone(x, p), donate_argnums=1).lower(arguments, pools)
        self._lowered_many = None
        if count:
            repeat = functools.partial(_repeat, call, layers=layers, chain=chain, count=count, backend=backend)
            self._lowered_many = jax.jit(repeat, donate_argnums=1).lower(arguments, pools)
        self.count = count
        self.fault: str | None = None
        self.trace_seconds = time.perf_counter() - began
        self.compile_seconds = 0.0

    def compile(self, bytes_limit: int | None = None) -> "Calls":
        """Compiles, in whichever thread. Raises DoesNotFitError where the call alone wants too much."""
        began = time.perf_counter()
        self.alone = self._lowered.compile()
        check_fits(self.alone, bytes_limit)
        if self._lowered_many is not None:
            self._many = self._lowered_many.compile()
            try:
                check_fits(self._many, bytes_limit)
                check_kernels(self.alone.as_text() or "", self._many.as_text() or "", self.count)
            except (DoesNotFitError, NotMeasuredError) as fault:
                self.fault = f"{fault}"
        self.compile_seconds = time.perf_counter() - began
        return self

    def time(self, arguments: Any, pools: Any, runs: int) -> tuple[list[float], Any]:
        """Seconds a call in each of `runs` runs, and the pools. Raises NotMeasuredError where there is a fault."""
        if self.fault:
            raise NotMeasuredError(self.fault)
        _, pools = jax.block_until_ready(self._many(arguments, pools))
        each, pools = self._run(arguments, pools, 1)
        starts = max(1, round(AT_LEAST / (each * self.count)))
        times = []
        for _ in range(runs):
            seconds, pools = self._run(arguments, pools, starts)
            times.append(seconds)
        return times, pools

    def _run(self, arguments, pools, starts: int):
        """Seconds a call of so many starts of the function, one start behind the other."""
        begin = time.perf_counter()
        outputs = None
        for _ in range(starts):
            outputs, pools = self._many(arguments, pools)
        jax.block_until_ready((outputs, pools))
        return (time.perf_counter() - begin) / (self.count * starts), pools


def _repeat(call, arguments, pools, *, layers, chain, count, backend):
    """`count` calls one after another."""
    outputs, kept = None, jnp.zeros((), jnp.int32)
    for i in range(count):
        # Calls do not fuse.
        arguments, pools, outputs = lax.optimization_barrier((arguments, pools, outputs))
        mine, layer = arguments, i % layers
        if chain and outputs is not None:
            zero = _zero_of(outputs, backend)
            if chain == "layer":
                layer = layer + zero
            else:
                mine = arguments | {chain: arguments[chain] + zero}
        elif jax.tree.leaves(outputs) and not _has_kernels(backend):
            kept += _zero_of(outputs, backend)
        outputs, pools = call(mine, pools, layer)
    return (outputs, kept), pools


def _has_kernels(backend: Backend) -> bool:
    return not (backend.is_reference or backend.interpret)


def _zero_of(outputs, backend: Backend):
    """An int32 zero that needs every leaf of the outputs.

    On a GPU a kernel reads one number of each, so that the compiler cannot make just that one. No product with 0 and
    no mask of bits, which XLA would fold.
    """
    leaves = [jnp.ravel(leaf) for leaf in jax.tree.leaves(outputs)]
    if not _has_kernels(backend):
        return _zero([leaf[0] for leaf in leaves])
    out = [jax.ShapeDtypeStruct((1,), jnp.int32)]
    # In Pallas, whatever the kernels are in that are timed.
    backend = dataclasses.replace(backend, kernels="pallas")
    (zero,) = launch(_zero_kernel, backend, name=NEED, programs=1, args=leaves, out=out, warps=1)
    return zero[0]


def _zero_kernel(_, *refs):
    *leaves, out = refs
    out[0] = _zero([leaf[0] for leaf in leaves])


def _zero(numbers):
    return sum((number.astype(jnp.float32) > 1e38).astype(jnp.int32) for number in numbers)


def check_fits(compiled, bytes_limit: int | None) -> None:
    """Raises DoesNotFitError where arguments, results and temporaries are more than the device has."""
    memory = compiled.memory_analysis()
    if bytes_limit is None or memory is None:
        return
    wanted = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    wanted += memory.temp_size_in_bytes
    if wanted > bytes_limit:
        raise DoesNotFitError(f"does not fit ({wanted / 2**30:.0f} GiB)")


def check_kernels(alone: str, many: str, count: int) -> None:
    """Raises NotMeasuredError where `count` calls have fewer kernels than so many times the one. Both are HLO."""
    one, all_of_them = operations_of(alone), operations_of(many)
    counted = CALLS if any(one[name] for name in CALLS) else [name for name in PARTS if one[name]][:1]
    wanted, found = (sum(each[name] for name in counted) for each in (one, all_of_them))
    if not wanted:
        raise NotMeasuredError("a call alone was compiled to nothing that is counted: what many leave out is not known")
    if found < count * wanted:
        raise NotMeasuredError(
            f"{count} calls were compiled to {found} kernels ({', '.join(counted)}), where each has {wanted}: what is "
            "left out cannot be timed"
        )


def operations_of(hlo: str) -> collections.Counter[str]:
    """How often each operation is run in a module's text; a loop's body counts once."""
    computations: dict[str, tuple[collections.Counter[str], list[str]]] = {}
    entry, operations, called = None, collections.Counter(), []
    for line in hlo.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            operations, called = computations.setdefault(head[2], (collections.Counter(), []))
            entry = head[2] if head[1] else entry
        elif operation := re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = .*?[ )]([a-z][\w\-]*)\(", line):
            # The benchmark's own is not counted.
            operations[operation[1]] += NEED not in line
            called += re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", line)
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
                called += re.findall(r"[\w.\-]+", branches)

    @functools.cache
    def total(name: str) -> collections.Counter[str]:
        operations, called = computations.get(name, (collections.Counter(), []))
        return sum((total(other) for other in called), collections.Counter(operations))

    if entry is None:
        raise ValueError("no entry in the module's text")
    return total(entry)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the device does at most, by large calls of XLA: bytes a second copied and read, operations a second."""

    copy: float
    read: float
    matmul: float

    def least_seconds(self, moved: int, flops: int) -> float:
        """What bytes, at the rate of a copy, or operations need, whichever is more."""
        return max(moved / self.copy, flops / self.matmul)

    def fault_of(self, moved: int, flops: int, seconds: float) -> str | None:
        """Why that time cannot be: more than is possible was moved or computed. None where it can.

        What only reads may be faster than a copy, so bytes are held against the faster of the two.
        """
        for amount, ceiling, unit in ((moved, max(self.copy, self.read), "TB/s"), (flops, self.matmul, "TFLOP/s")):
            if amount / seconds > ceiling * TOLERANCE:
                return (
                    f"{seconds * 1e6:.1f} us would be {amount / seconds / 1e12:.2f} {unit}, and the device has "
                    f"{ceiling / 1e12:.2f}"
                )
        return None


TOLERANCE = 1.05
"""Clocks and temperatures differ by a few percent between a ceiling and what is held against it."""


def ceilings(backend: Backend, *, small: bool) -> Ceilings:
    """Measured. `small` is for CPUs, where what keeps a GPU busy is minutes, and one call is long enough to be timed:
    additions one behind the other would be one to that compiler.
    """
    gibibytes, width, count = (0.25, 1024, 1) if small else (2.0, 8192, 16)
    return Ceilings(
        copy=copy_ceiling(gibibytes, count),
        read=read_ceiling(gibibytes, count, backend),
        matmul=matmul_ceiling(width, count),
    )


def copy_ceiling(gibibytes: float, count: int) -> float:
    """Bytes a second, read and written, of copying much more than caches hold."""
    size = int(gibibytes * 2**30 / 4)

    def call(_, x, layer):
        return (), x + 1.0

    return 8 * size / _median_of(call, (), jax.random.normal(jax.random.key(0), (size,)), count)


def read_ceiling(gibibytes: float, count: int, backend: Backend) -> float:
    """Bytes a second of reading much more than caches hold: sums of its quarters in turn."""
    size = int(gibibytes * 2**30 / 16)

    def call(x, _, layer):
        return jnp.sum(lax.dynamic_index_in_dim(x, layer, keepdims=False)), ()

    x = jax.random.normal(jax.random.key(0), (4, size))
    return 4 * size / _median_of(call, x, (), count, chain="layer", backend=backend)


def matmul_ceiling(size: int, count: int) -> float:
    """FLOP/s of a large bfloat16 product by XLA, on random values; the left operand is the product before."""
    keys = jax.random.split(jax.random.key(1))
    x, y = (jax.random.normal(key, (size, size), jnp.float32) for key in keys)
    weight = (y * size**-0.5).astype(jnp.bfloat16)
    return 2 * size**3 / _median_of(lambda w, x, layer: ((), x @ w), weight, x.astype(jnp.bfloat16), count)


def _median_of(call, arguments, pools, count: int, **options) -> float:
    calls = Calls(call, arguments, pools, 4, count=count, **options).compile()
    return statistics.median(calls.time(arguments, pools, 12)[0])
