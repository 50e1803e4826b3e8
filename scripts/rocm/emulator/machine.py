"""Runs the waves of a launch, in groups that stand at one instruction."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence

import numpy as np

from rocm.emulator import accesses, scalars, vectors
from rocm.emulator.groups import LDS_WRITE, Group, bits, names
from rocm.emulator.instruction import EXEC, VCC, Instruction
from rocm.emulator.memory import Fault, Memory, Segment
from rocm.emulator.scalars import BARRIER, END


@dataclasses.dataclass(frozen=True)
class Step:
    """An instruction made ready. `touched` and `read` are its registers, as bits.

    `run` returns None, END, BARRIER, or which waves take a branch. `counter` is "vm" or "lgkm" where the instruction
    is a load whose data come in the order of its kind.
    """

    run: Callable[[Group], object]
    touched: int
    read: int
    counter: str | None


@functools.cache
def step(p: Instruction) -> Step:
    """Raises NotImplementedError for what the emulator does not know. The same instruction is made once a process."""
    read, touched = _registers(p)
    return Step(_closure(p), touched, read, _counter(p))


def _closure(p: Instruction) -> Callable[[Group], object]:
    name = p.name
    if name.startswith("s_load_"):
        return scalars.load(p)
    if name.startswith(("s_branch", "s_cbranch")):
        return scalars.branch(p)
    if name.startswith("s_"):
        return scalars.build(p)
    if name.startswith("global_"):
        return accesses.global_access(p)
    if name.startswith("buffer_"):
        return accesses.buffer_access(p)
    if name.startswith("ds_"):
        return accesses.lds_access(p)
    if name.startswith("v_"):
        return vectors.build(p)
    raise NotImplementedError(p.text)


def _counter(p: Instruction) -> str | None:
    if p.name.startswith(("global_load", "buffer_load")):
        return "vm"
    return "lgkm" if p.name.startswith("ds_") else None


_WRITES_NOTHING = ("global_store", "buffer_store", "ds_write", "s_cmp", "s_bitcmp", "s_cbranch")


def _registers(p: Instruction) -> tuple[int, int]:
    """(those that it reads, all that it touches). Of an instruction's results only the first is not counted as read."""
    read = touched = 0
    for k, operand in enumerate(p.operands):
        if operand.is_register:
            registers = bits(operand.file, operand.index, operand.count)
            touched |= registers
            if k or p.name.startswith(_WRITES_NOTHING):
                read |= registers
    # What it reads unsaid.
    if p.name.startswith(("v_div_fmas", "s_cbranch_vcc")):
        read |= bits("s", VCC, 2)
    if p.name.startswith("s_cbranch_exec") or "saveexec" in p.name:
        read |= bits("s", EXEC, 2)
    return read, touched | read


PAUSE = object()
_PAUSED = Step(lambda group: PAUSE, touched=0, read=0, counter=None)


class Machine:
    """One launch of `program`, with its memory and the LDS of all workgroups, `lds_size` bytes each.

    `epoch` counts barriers: accesses of one epoch have none between them.
    """

    def __init__(self, program: Sequence[Instruction], memory: Memory, lds: Segment, lds_size: int):
        self.program, self.memory, self.lds, self.lds_size = program, memory, lds, lds_size
        self._steps = [step(p) for p in program]
        self.epoch = 1
        self.steps = self.instructions = self.barriers = self.splits = 0
        self._index = {p.address: k for k, p in enumerate(program)}
        self._ready: list[Group] = []
        self._waiting: list[Group] = []

    def start(self, group: Group) -> None:
        """Puts the first waves in."""
        self._ready.append(group)

    def without(self, i: int, nop: Instruction) -> "Machine":
        """A machine in the same state, with memory of its own, and `nop` in place of instruction i."""
        other: Machine = object.__new__(Machine)
        other.__dict__.update(self.__dict__)
        other.program, other._steps = [*self.program], [*self._steps]
        other.program[i], other._steps[i] = nop, step(nop)
        other.memory, other.lds = self.memory.copy(), self.lds.copy()
        other._ready = [group.copy(other) for group in self._ready]
        other._waiting = [group.copy(other) for group in self._waiting]
        return other

    def run(self, limit: int, pauses: Collection[int] = ()) -> int | None:
        """To the end of all waves, or to where one of them is about to execute an instruction of `pauses`, which is
        returned. Raises Fault, also after `limit` steps.
        """
        steps = [*self._steps]
        for i in pauses:
            steps[i] = _PAUSED
        with np.errstate(all="ignore"):
            while self._ready or self._waiting:
                if not self._ready:
                    # Nobody else can run: every wave that has not ended waits.
                    self.epoch += 1
                    self.barriers += 1
                    self._ready, self._waiting = self._waiting, []
                ready = self._ready
                # The furthest behind runs first, so that others are met again where branches join.
                ready.sort(key=lambda g: g.pc)
                g = ready.pop(0)
                if g.pc == len(self.program):
                    raise Fault("the kernel has no end")
                while ready and ready[0].pc == g.pc:
                    g.join(ready.pop(0))
                paused = self._run_until(g, ready[0].pc if ready else len(self.program), steps, limit)
                if paused is not None:
                    return paused
        return None

    def _run_until(self, g: Group, until: int, steps: Sequence[Step], limit: int) -> int | None:
        """One group up to an instruction, or to where it ends, waits or splits; what is left of it is put back.

        Gives the instruction that it pauses at.
        """
        n, begin, ready, paused = g.wave.size, self.steps, self._ready, None
        while True:
            i = g.pc
            now = steps[i]
            g.pc = i + 1
            self.steps += 1
            if g.pending & now.touched:
                self._check_hazard(g, now, i)
            try:
                result = now.run(g)
            except Fault as fault:
                raise Fault(f"{fault} ({self._place(i)})") from None
            if result is not None:
                if result is END:
                    break
                if result is PAUSE:
                    g.pc = paused = i
                    self.steps -= 1
                    ready.append(g)
                    break
                if result is BARRIER:
                    if any(access & LDS_WRITE for access in g.lgkm):
                        raise Fault(f"s_waitcnt missing: LDS is being written at a barrier ({self._place(i)})")
                    self._waiting.append(g)
                    break
                if self._branch(g, result, i, ready):
                    break
            if g.pc >= until:
                ready.append(g)
                break
            if self.steps > limit:
                raise Fault(f"no end after {limit} steps ({self._place(i)})")
        self.instructions += (self.steps - begin) * n
        return paused

    def _branch(self, g: Group, taken, i: int, ready: list[Group]) -> bool:
        """Whether the group was split."""
        count = int(taken.sum())
        if not count:
            return False
        p = self.program[i]
        target = self._index.get(p.address + p.size + 4 * p.operands[0].value)
        if target is None:
            raise Fault(f"a branch out of the kernel ({self._place(i)})")
        if count == taken.size:
            g.pc = target
            return False
        self.splits += 1
        ready += [g.take(taken, target), g.take(~taken, g.pc)]
        return True

    def _check_hazard(self, g: Group, now: Step, i: int) -> None:
        """A register is used that a load under way will write. Only a load may write it: those of a kind keep order."""
        here = g.pending & now.touched
        if now.counter and not g.pending & now.read:
            others = g.lgkm if now.counter == "vm" else g.vm
            if not any(here & registers for registers in others):
                return
        raise Fault(f"s_waitcnt missing: {', '.join(names(here))} ({self._place(i)})")

    def _place(self, i: int) -> str:
        return f"instruction {i}: {self.program[i].text}"
