"""A kernel made ready, and one launch of it on numpy arrays."""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from rocm.emulator import code
from rocm.emulator.code import Descriptor
from rocm.emulator.decode import decode
from rocm.emulator.groups import LANES, POISON, Group
from rocm.emulator.instruction import Instruction, Operand
from rocm.emulator.machine import Machine, step
from rocm.emulator.memory import Memory, Segment

ARCHITECTURES = ("gfx942", "gfx950")
UNWRITTEN = 0xFB
"""Bytes that outputs are filled with, so that what is not written shows."""

STEPS = 200_000
"""Of a launch, unless told otherwise. The longest of the package's kernels takes less than a tenth of it."""

FLOAT_MODE = 0xF0
"""Rounding to even, and denormal numbers are numbers: the only mode that is emulated, and LLVM's own."""

_KERNARG_POINTER = 8  # of Descriptor.properties
_BEFORE_KERNARG = ((1, 4), (2, 2), (4, 2))
"""(property, scalar registers): what stands before the pointer to the arguments."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A kernel ready to be launched. `vectors` and `accumulators` are how many registers of each kind it uses."""

    name: str
    arch: str
    instructions: list[Instruction]
    descriptor: Descriptor
    vectors: int
    accumulators: int


@dataclasses.dataclass(frozen=True)
class Result:
    """What happened.

    `steps` are instructions for all waves of a group at once, `instructions` those of single waves. `splits` counts
    branches that went both ways. `conflicts` are what the shadow found: "array 2: write after read: ds_write_b32 ..."
    -> (bytes, place of the first); empty without shadow. `pages` has for each array the pages of 4,096 bytes that were
    written.
    """

    steps: int
    instructions: int
    barriers: int
    splits: int
    conflicts: dict[str, tuple[int, int]]
    pages: list[set[int]]


def program(elf: bytes, arch: str, kernel: str) -> Program:
    """Decodes a kernel. Raises ValueError where there is none, NotImplementedError for an unknown instruction."""
    if arch not in ARCHITECTURES:
        raise ValueError(f"{arch} is not emulated, only {' and '.join(ARCHITECTURES)}")
    text, address, descriptor = code.kernel(elf, kernel)
    return of_instructions(kernel, arch, decode(text, address), descriptor)


def of_instructions(name: str, arch: str, instructions: list[Instruction], descriptor: Descriptor) -> Program:
    """A program of instructions that are at hand."""
    most = {"v": 1, "a": 0, "s": 0}
    for p in instructions:
        for operand in p.operands:
            if operand.is_register:
                most[operand.file] = max(most[operand.file], operand.index + operand.count)
    return Program(name, arch, instructions, descriptor, most["v"], most["a"])


def nop_at(program: Program, i: int) -> Program:
    """The program with instruction i replaced by one that does nothing: a mutant that a test should notice."""
    instructions = [*program.instructions]
    instructions[i] = _nop(instructions[i])
    return dataclasses.replace(program, instructions=instructions)


def _nop(old: Instruction) -> Instruction:
    """It stands where the old one stood."""
    return Instruction("s_nop", operands=(Operand("integer"),), address=old.address, size=old.size)


def missing(program: Program) -> dict[str, str]:
    """Names of instructions that cannot be executed -> why."""
    found: dict[str, str] = {}
    for p in program.instructions:
        try:
            step(p)
        except NotImplementedError as error:
            found.setdefault(p.name, str(error))
    return found


def poisoned(shape: Sequence[int], dtype) -> np.ndarray:
    """A new array for an output, with what is not written showing."""
    dtype = np.dtype(dtype)
    return np.full(int(np.prod(shape)) * dtype.itemsize, UNWRITTEN, np.uint8).view(dtype).reshape(shape)


class Underway:
    """A launch of `grid` workgroups of `warps` waves, or only of those of them that `workgroups` names.

    `arrays` are the kernel's pointers in order, changed in place; one that stands there twice is one place. `lds` are
    the bytes a launch asks for, beyond what the kernel says itself. Raises NotImplementedError before the first step
    for instructions that are not known.
    """

    def __init__(
        self,
        program: Program,
        arrays: Sequence[np.ndarray],
        *,
        grid: int,
        warps: int,
        lds: int,
        shadow: bool = False,
        workgroups: Sequence[int] | None = None,
    ):
        about = program.descriptor
        # Where arguments may come in registers, a prologue loads them there for firmware that does not know how to.
        in_registers = about.preload and not program.instructions[0].name.startswith("s_load_dword")
        if in_registers or about.scratch or not about.properties & _KERNARG_POINTER:
            raise NotImplementedError(f"{program.name}: arguments in registers, scratch, or no pointer to arguments")
        if about.float_mode != FLOAT_MODE:
            raise NotImplementedError(
                f"{program.name}: float mode {about.float_mode:#x}, only {FLOAT_MODE:#x} is emulated"
            )
        if unknown := missing(program):
            raise NotImplementedError(f"{program.name}: {'; '.join(unknown.values())}")
        unique: list[np.ndarray] = []
        place: dict[int, int] = {}
        for x in arrays:
            if id(x) not in place:
                place[id(x)] = len(unique)
                unique.append(x)
        self._types = [(x.dtype, x.shape) for x in arrays]
        self._which = [place[id(x)] for x in arrays]
        # Arguments are read by whole vectors: past their end, but not past the 64 bytes in which they end.
        pointers = np.zeros(-(-about.kernarg // 64) * 8, np.uint64)
        memory = Memory([*unique, pointers], warps, shadow)
        pointers[: len(arrays)] = [memory.starts[i] for i in self._which]
        numbers = np.arange(grid, dtype=np.uint32) if workgroups is None else np.asarray(workgroups, np.uint32)
        size = -(-max(lds, about.lds, 16) // 16) * 16
        local = Segment(np.full(size * numbers.size // 4, POISON, np.uint32).view(np.uint8), warps, shadow)
        self._machine = Machine(program.instructions, memory, local, size)
        self._machine.start(_first_group(program, self._machine, numbers, warps))

    def arrays(self) -> list[np.ndarray]:
        """As they are now."""
        segments = self._machine.memory.segments
        return [
            segments[i].data.view(dtype).reshape(shape)
            for i, (dtype, shape) in zip(self._which, self._types, strict=True)
        ]

    def run_to(self, places: Collection[int], limit: int = STEPS) -> int | None:
        """Up to one of these instructions, which some waves are about to execute; None at the end. Raises Fault."""
        return self._machine.run(limit, places)

    def without(self, i: int) -> "Underway":
        """This launch with arrays of its own, from here on without instruction i (see `nop_at`)."""
        other: Underway = object.__new__(Underway)
        other.__dict__.update(self.__dict__)
        other._machine = self._machine.without(i, _nop(self._machine.program[i]))
        return other

    def finish(self, limit: int = STEPS) -> Result:
        """To the end. Raises Fault for what a kernel must not do."""
        machine, which = self._machine, self._which
        machine.run(limit)
        segments = machine.memory.segments
        spaces = {f"array {which.index(i)}": segments[i] for i in range(len(segments) - 1)}
        spaces |= {"arguments": segments[-1], "LDS": machine.lds}
        return Result(
            steps=machine.steps,
            instructions=machine.instructions,
            barriers=machine.barriers,
            splits=machine.splits,
            conflicts={
                f"{space}: {kind}: {what}": found
                for space, segment in spaces.items()
                if segment.shadow
                for (kind, what), found in segment.shadow.conflicts.items()
            },
            pages=[set(np.flatnonzero(segments[i].written).tolist()) for i in which],
        )


def run(
    program: Program,
    arrays: Sequence[np.ndarray],
    *,
    grid: int,
    warps: int,
    lds: int,
    shadow: bool = False,
    limit: int = STEPS,
    workgroups: Sequence[int] | None = None,
) -> Result:
    """A launch to its end: see `Underway`, `Underway.finish`."""
    launch = Underway(program, arrays, grid=grid, warps=warps, lds=lds, shadow=shadow, workgroups=workgroups)
    return launch.finish(limit)


def _first_group(program: Program, machine: Machine, numbers: np.ndarray, warps: int) -> Group:
    """All waves before the first instruction, with what the hardware puts into registers."""
    about = program.descriptor
    wave = np.arange(numbers.size * warps, dtype=np.int32)
    group = Group(machine, program.vectors, program.accumulators, wave, wave // warps)
    group.v[0] = (wave % warps * LANES)[:, None] + np.arange(LANES)
    at = sum(count for bit, count in _BEFORE_KERNARG if about.properties & bit)
    start = machine.memory.starts[-1]
    group.s[:, at], group.s[:, at + 1] = start & 0xFFFFFFFF, start >> 32
    at = about.user_sgprs
    for enabled, value in zip(about.group_ids, (numbers[group.workgroup], 0, 0), strict=True):
        if enabled:
            group.s[:, at] = value
            at += 1
    return group
