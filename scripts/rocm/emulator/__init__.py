"""Executes AMD code objects (gfx942 and gfx950, waves of 64) on a CPU: all waves of a launch side by side, in numpy.

program(elf, arch, kernel) -> Program        decodes a kernel
missing(program) -> {name: why}              instructions of it that cannot be executed
run(program, arrays, grid=, warps=, lds=, shadow=, limit=) -> Result
                                             one launch; arrays are changed in place. Raises Fault
Underway(program, arrays, grid=, warps=, lds=, shadow=)      the same, step by step
nop_at(program, i) -> Program                a mutant
Underway.without(i) -> Underway              a mutant from here on
poisoned(shape, dtype) -> array              for an output

A Result has steps, instructions, barriers, splits, conflicts and pages; a Program instructions and descriptor.

Refused, by Fault: accesses outside of arrays (they stand far apart) and of LDS, registers used before their s_waitcnt,
writes to LDS under way at a barrier, programs that do not end. Unknown instructions and modifiers raise
NotImplementedError, before the first step. Registers and LDS begin as NaN. With `shadow`, accesses of one place by
different waves with no barrier between them, and by different workgroups, are told in `Result.conflicts`.

Not modelled: time, caches and the order of memory between waves, distances that matrix instructions need (s_nop), the
precision of exp, log, rcp and rsq (best here), the order of sums in a matrix product (float64 here), atomics, scratch.
"""

from rocm.emulator.instruction import Instruction, Operand
from rocm.emulator.launch import Program, Result, Underway, missing, nop_at, of_instructions, poisoned, program, run
from rocm.emulator.memory import Fault

__all__ = [
    "Fault",
    "Instruction",
    "Operand",
    "Program",
    "Result",
    "Underway",
    "missing",
    "nop_at",
    "of_instructions",
    "poisoned",
    "program",
    "run",
]
