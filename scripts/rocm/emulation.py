"""Cases as AMD machine code: every launch of an op is compiled by XLA's ROCm compiler, and executed by the emulator."""

import contextlib
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from gdnjax.backend import Backend
from gdnjax.pallas_kernels import launch as package
from gdnjax.pallas_kernels.launch import Launch
from rocm import code_object, compiling, emulator
from rocm.cases import Case

LARGE = 1 << 28
"""Bytes from which on an array is neither copied nor given to XLA: it may be larger than the memory."""

FEW = 2
"""Mutants of a launch that do not save what it takes to run it up to them."""


@dataclasses.dataclass(frozen=True)
class Code:
    """A kernel that is ready to run: its program, and the bytes of LDS that it is launched with."""

    program: emulator.Program
    lds: int


class Compiler:
    """Launches to machine code of one architecture. Of those that agree in everything one is compiled.

    `backend` is what cases are told.
    """

    def __init__(self, arch: str, cache: pathlib.Path):
        (self._device,) = compiling.devices(arch)
        self.arch = arch
        self.backend = Backend("pallas", arch)
        self._cache = cache
        self._launches: dict[Any, Code] = {}
        # XLA compiles no kernel twice in a process, whatever module it is in.
        self._kernels: dict[tuple[str, str], Code] = {}

    def code(self, launch: Launch, arguments: Sequence[Any]) -> Code:
        # `without_bounds` changes what a launch is compiled to.
        key = launch, package.bounded, tuple((x.shape, np.dtype(x.dtype)) for x in arguments)
        if key not in self._launches:
            self._launches[key] = self._compile(launch, arguments)
        return self._launches[key]

    def _compile(self, launch: Launch, arguments: Sequence[Any]) -> Code:
        sharding = SingleDeviceSharding(self._device)
        placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arguments]
        before = set(self._cache.iterdir())
        lowered = package.jitted(launch).lower(*placed)
        (found,) = compiling.launches_of(lowered)
        # The emulator is told what the launch says; the hardware, what the compiler made of it.
        if (found.warps, found.grid) != (launch.warps, (launch.programs, 1, 1)):
            raise RuntimeError(f"{launch.name} was lowered to {found.warps} warps and a grid of {found.grid}")
        lowered.compile()
        new = set(self._cache.iterdir()) - before
        shared = compiling.shared_memory({file for file in new if file.name.endswith("thunk_sequence.txt")})
        for elf in (file.read_bytes() for file in sorted(new) if file.suffix == ".hsaco"):
            for kernel in code_object.kernels(elf):
                if kernel.name == launch.name:
                    lds = max(kernel.lds, shared.get(kernel.name, 0))
                    self._kernels[launch.name, found.ir] = Code(emulator.program(elf, self.arch, launch.name), lds)
        return self._kernels[launch.name, found.ir]


@dataclasses.dataclass(frozen=True)
class Executed:
    """A launch that has run: with what, which is None where it was changed in place, what came of it, and how."""

    launch: Launch
    code: Code
    arguments: list[np.ndarray] | None
    outputs: list[np.ndarray]
    result: emulator.Result
    seconds: float

    @property
    def conflicts(self) -> list[str]:
        """What waves did to each other."""
        return [f"{what}, {count} bytes from {at} on" for what, (count, at) in self.result.conflicts.items()]

    def named(self) -> dict[str, np.ndarray]:
        """The outputs, as cases call them."""
        return {f"{self.launch.name}[{i}]": x for i, x in enumerate(self.outputs)}

    def written_pages(self) -> list[tuple[np.ndarray, set[int]]]:
        """(output, its pages that were written) of each output of LARGE bytes."""
        pages = self.result.pages[-len(self.outputs) :]
        return [(x, found) for x, found in zip(self.outputs, pages, strict=True) if x.nbytes >= LARGE]

    def again(self) -> list[np.ndarray]:
        """The arguments, for a launch that may change some of them."""
        assert self.arguments is not None, "they were changed in place"
        return [x.copy() for x in self.arguments]


def execute(code: Code, launch: Launch, arguments: Sequence[Any], *, shadow: bool) -> Executed:
    """Runs `code` as the launch says. Arrays of LARGE bytes are used, and changed, where they are; all others stay."""
    large = any(x.nbytes >= LARGE for x in arguments)
    places = [np.asarray(x) if x.nbytes >= LARGE else np.array(x) for x in arguments]
    kept = None if large else [x.copy() for x in places]
    begin = time.perf_counter()
    return _finished(code, launch, kept, _underway(code, launch, places, shadow=shadow), begin)


def _underway(code: Code, launch: Launch, places: list[np.ndarray], *, shadow: bool) -> emulator.Underway:
    """The launch before its first instruction; it changes arrays of `places` that are outputs, too."""
    results = {result: operand for operand, result in launch.aliases}
    outputs = [
        places[results[i]] if i in results else emulator.poisoned(out.shape, out.dtype)
        for i, out in enumerate(launch.out)
    ]
    return emulator.Underway(
        code.program, [*places, *outputs], grid=launch.programs, warps=launch.warps, lds=code.lds, shadow=shadow
    )


def _finished(code: Code, launch: Launch, kept, underway: emulator.Underway, begin: float) -> Executed:
    result = underway.finish()
    outputs = underway.arrays()[-len(launch.out) :]
    return Executed(launch, code, kept, outputs, result, time.perf_counter() - begin)


def mutants(done: Executed, places: Collection[int]) -> Iterator[tuple[int, Callable[[], Executed]]]:
    """(place, what runs it) of mutants of a launch, each without the instruction at one of these places.

    A mutant goes on from where the launch reaches its place for the first time, which takes a run of the launch as it
    is. Few mutants run from the beginning. Places that are never reached have none.
    """
    launch, left = done.launch, set(places)
    if len(left) <= FEW:
        for place in sorted(left):
            mutant = dataclasses.replace(done.code, program=emulator.nop_at(done.code.program, place))
            yield place, lambda mutant=mutant: execute(mutant, launch, done.again(), shadow=True)
        return
    underway = _underway(done.code, launch, done.again(), shadow=True)
    while left and (place := underway.run_to(left)) is not None:
        left.remove(place)
        mutant = underway.without(place)
        yield place, lambda mutant=mutant: _finished(done.code, launch, None, mutant, time.perf_counter())


Run = Callable[[Launch, Sequence[Any]], Executed]


def run(case: Case, backend: Backend, run_launch: Run) -> tuple[dict[str, np.ndarray], list[Executed]]:
    """(outputs of the case and of its launches, the launches), each run by `run_launch`. All else of the op is computed
    by XLA here.

    Pools of LARGE bytes stay with numpy, and are changed in place.
    """
    executed: list[Executed] = []

    def instead(launch: Launch, arguments: Sequence[Any]) -> list[Any]:
        done = run_launch(launch, arguments)
        executed.append(done)
        return [x if x.nbytes >= LARGE else jnp.asarray(x) for x in done.outputs]

    arrays = {name: x if x.nbytes >= LARGE else jnp.asarray(x) for name, x in case.arrays.items()}
    with mock.patch.object(package, "run", instead):
        outputs = case.call(arrays, backend)
    found = {name: np.asarray(x) for name, x in outputs.items()}
    for done in executed:
        found |= done.named()
    return found, executed


def as_compiled(compiler: Compiler, *, shadow: bool) -> Run:
    """Runs each launch as the code that is compiled from it."""
    return lambda launch, arguments: execute(compiler.code(launch, arguments), launch, arguments, shadow=shadow)


@contextlib.contextmanager
def without_bounds() -> Iterator[None]:
    """Loaded numbers that multiply a stride have no range known to the compiler meanwhile."""
    with contextlib.ExitStack() as stack:
        stack.callback(package.jitted.cache_clear)
        bounded = package.bounded
        for name, module in list(sys.modules.items()):
            if name.startswith("gdnjax.pallas_kernels.") and getattr(module, "bounded", None) is bounded:
                stack.enter_context(mock.patch.object(module, "bounded", unbounded))
        package.jitted.cache_clear()
        yield


def unbounded(number, count):
    """`bounded`, without what it is for."""
    del count
    return number


def same(x: np.ndarray, y: np.ndarray) -> bool:
    """To the bit."""
    return x.tobytes() == y.tobytes()
