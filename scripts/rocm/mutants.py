"""Whether the cases can fail: one instruction of a kernel becomes s_nop, and they have to notice.

A mutant is caught by wrong numbers, a fault of the emulator (out of bounds, no end), a missing wait, or a conflict
between waves. It runs alone, from what its launch got in the right run; the launches behind it run again where it
changed anything.
"""

import collections
import dataclasses
import random
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from gdnjax.pallas_kernels.launch import Launch
from rocm import emulation, emulator
from rocm.cases import Case, chunked, conv, conv_prefill, delta
from rocm.emulation import Compiler, Executed

SEED = 7

NUMBERS, FAULT, WAIT, CONFLICT = "numbers", "fault", "wait", "conflict"

KINDS = {
    "waits that something else waits for, and hints": r"s_(waitcnt|barrier|setprio|sleep|clause|inst_prefetch)",
    "guards for infinity, NaN and denormals": r"v_(cmp_class|cmp_o|cmp_u|div_scale|div_fixup|ldexp|frexp)",
    "low terms of exp, log, rsqrt and division": r"v_(pk_)?(fma|fmac|mul|add|sub|rcp|div_fmas|rndne)\w*_f(32|64)",
    "copies of what is there": r"[sv]_(mov|accvgpr)",
    "selections of what is chosen anyway": r"v_cndmask|s_cselect|[vs]_cmp|s_cbranch|s_\w+_saveexec|s_(and|or|xor)_b64",
    "numbers, signs and bounds of places": r"[sv]_\w+_[iub](16|32|64)",
}
"""Of what is missed, by the instruction that was taken away: kind -> pattern, the first that matches."""

OTHER = "other"

FINITE = (0, 1, 6, 7)
"""Sets of gates for the chunked form, which takes differences of sums of them."""

LARGE = (False, True)
"""Whether some channels of a convolution are large: exact where they are not, and other branches where they are."""

NOTHING = ("s_nop", "s_endpgm", "s_code_end", "s_cbranch_execz")
"""Instructions whose absence is no mutant. The last one jumps over what no lane would execute: it saves time."""

SAME = re.compile(r"v_(add|or)\w*_[ub]32\w* (v\d+), 0, \2$")
"""And one that adds 0 to a register."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Cases of one code object, the first of which decides what is mutated; and mutants of each of its kernels."""

    cases: Sequence[Case]
    count: int

    @property
    def name(self) -> str:
        return self.cases[0].name


@dataclasses.dataclass(frozen=True)
class Missed:
    """An instruction that nobody missed. `equal`: all outputs were the same to the bit, in every case."""

    number: int
    text: str
    kind: str
    equal: bool


@dataclasses.dataclass(frozen=True)
class Tally:
    """Of one kernel of a group."""

    kernel: str
    caught: dict[str, int]
    missed: list[Missed]


def groups() -> list[Group]:
    """The kernels that own recurrent state, each at its smallest, with gates of several kinds."""
    f32, kv = np.float32, ("kv", "kv")

    def with_gates(case: Callable[[int], Case]) -> list[Case]:
        return [case(chosen) for chosen in range(8)]

    return [
        Group(with_gates(lambda chosen: delta("decode", gates=chosen)), 32),
        Group(with_gates(lambda chosen: delta("decode", kv, gates=chosen)), 24),
        Group(with_gates(lambda chosen: delta("decode", ("mixed", "vk"), gates=chosen)), 24),
        Group(with_gates(lambda chosen: delta("verify", old=2, new=2, gates=chosen)), 40),
        Group(with_gates(lambda chosen: delta("fold", kv, old=3, new=0, gates=chosen)), 32),
        Group(with_gates(lambda chosen: delta("decode", gates=chosen, channels=True)), 16),
        Group(with_gates(lambda chosen: delta("verify", old=2, new=2, gates=chosen, channels=True)), 16),
        Group(with_gates(lambda chosen: delta("fold", kv, old=3, new=0, gates=chosen, channels=True)), 16),
        Group([chunked(gates=chosen) for chosen in FINITE], 20),
        Group([chunked(act=f32, gates=chosen) for chosen in FINITE], 20),
        Group([chunked(act=f32, gates=chosen, channels=True) for chosen in FINITE], 8),
        *(Group([conv(kind, dtype=f32, large=large) for large in LARGE], 16) for kind in ("decode", "verify", "fold")),
        Group([conv_prefill(kept=True, dtype=f32, large=large) for large in LARGE], 20),
    ]


def kind_of(text: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.match(pattern, text)), OTHER)


@dataclasses.dataclass(frozen=True)
class Right:
    """A case as it should run: its launches, and what is wanted of it."""

    case: Case
    wanted: dict[str, np.ndarray]
    executed: list[Executed]


def record(case: Case, compiler: Compiler) -> Right:
    """Raises RuntimeError where the case is wrong as it is."""
    wanted = case.wanted()
    outputs, executed = emulation.run(case, compiler.backend, emulation.as_compiled(compiler, shadow=True))
    wrong = case.compare(outputs, wanted)[1] + [fault for done in executed for fault in done.conflicts]
    if wrong:
        raise RuntimeError(f"{case.name} has no mutants, it is wrong itself: {wrong[0]}")
    return Right(case, wanted, executed)


def tallies(group: Group, compiler: Compiler) -> Iterable[Tally]:
    """One for each kernel of the group."""
    right = [record(case, compiler) for case in group.cases]
    for number, done in enumerate(right[0].executed):
        kernel = done.launch.name
        code, instructions = done.code, done.code.program.instructions
        if any(one.executed[number].code is not code for one in right):
            raise RuntimeError(f"the cases of {group.name} do not share their code of {kernel}")
        places = [i for i, one in enumerate(instructions) if one.name not in NOTHING and not SAME.match(one.text)]
        chosen = random.Random(f"{SEED} {compiler.arch} {group.name} {kernel}").sample(
            places, min(group.count, len(places))
        )
        verdicts, changed = judge(right, number, chosen, compiler)
        missed = [
            Missed(place, instructions[place].text, kind_of(instructions[place].text), place not in changed)
            for place in sorted(set(chosen) - set(verdicts))
        ]
        yield Tally(kernel, dict(collections.Counter(verdicts[place] for place in sorted(verdicts))), missed)


def judge(
    right: Sequence[Right], number: int, places: Sequence[int], compiler: Compiler
) -> tuple[dict[int, str], set[int]]:
    """Of the mutants of launch `number`: (place -> by what the first case that notices it does, those that changed an
    output of any case)."""
    verdicts: dict[int, str] = {}
    changed: set[int] = set()
    for one in right:
        undecided = [place for place in places if place not in verdicts]
        for place, execute in emulation.mutants(one.executed[number], undecided):
            verdict, same = judge_one(one, number, execute, compiler)
            if verdict:
                verdicts[place] = verdict
            if not same:
                changed.add(place)
    return verdicts, changed


def judge_one(
    right: Right, number: int, execute: Callable[[], Executed], compiler: Compiler
) -> tuple[str | None, bool]:
    """(by what the mutant of launch `number` is caught, if it is; whether it changed no output at all)."""
    done = right.executed[number]
    try:
        changed = execute()
        if changed.conflicts:
            return CONFLICT, False
        if all(emulation.same(x, y) for x, y in zip(changed.outputs, done.outputs, strict=True)):
            return None, True
        # What is wrong in the launch's own outputs need not be seen through those that follow.
        if right.case.compare(changed.named(), right.wanted)[1]:
            return NUMBERS, False
        outputs, executed = replay(right, number, changed, compiler)
    except emulator.Fault as fault:
        return (WAIT if "s_waitcnt" in str(fault) else FAULT), False
    if any(later.conflicts for later in executed):
        return CONFLICT, False
    return (NUMBERS if right.case.compare(outputs, right.wanted)[1] else None), False


def replay(right: Right, number: int, changed: Executed, compiler: Compiler) -> tuple[dict[str, Any], list[Executed]]:
    """The case with the launches before `number` as they were, `changed` in its place, and those behind it run anew."""
    come = 0

    def run_launch(launch: Launch, arguments: Sequence[Any]) -> Executed:
        nonlocal come
        come += 1
        if come <= number:
            return right.executed[come - 1]
        if come == number + 1:
            return changed
        return emulation.execute(compiler.code(launch, arguments), launch, arguments, shadow=True)

    return emulation.run(right.case, compiler.backend, run_launch)
