"""Instructions written as assembly, executed alone or as a small kernel."""

import re
import types
from typing import Any

import numpy as np
from rocm.emulator import Instruction, Operand, Result, of_instructions, run
from rocm.emulator.code import Descriptor
from rocm.emulator.groups import LANES, Group, pack
from rocm.emulator.instruction import EXEC, M0, VCC
from rocm.emulator.machine import step
from rocm.emulator.memory import Memory, Segment

NAMED = {"vcc": (VCC, 2), "vcc_lo": (VCC, 1), "exec": (EXEC, 2), "m0": (M0, 1)}
FLOATS = {"0.5": 0x3F000000, "1.0": 0x3F800000, "2.0": 0x40000000, "-1.0": 0xBF800000}
LANE = np.arange(LANES)


def operand(text: str | int) -> Operand:
    """v1, v[2:3], a0, s4, vcc, -v1, |v1|, sext(v1), off; 0x12345678 is a literal, other numbers are inline ones."""
    text = str(text)
    if match := re.fullmatch(r"(-?)(\|?)(sext\()?([vas])(?:(\d+)|\[(\d+):(\d+)\])\)?\|?", text):
        negate, absolute, sext, file, index, first, last = match.groups()
        count = 1 if index else int(last) - int(first) + 1
        return Operand(file, int(index or first), count, 0, bool(negate), bool(absolute), bool(sext))
    if text in NAMED:
        return Operand("s", *NAMED[text])
    if text in FLOATS:
        return Operand("float", value=FLOATS[text])
    if text in ("off", "scc"):
        return Operand(text)
    return Operand("literal" if text.startswith("0x") else "integer", value=int(text, 0))


def asm(line: str, *, encoding: str = "", **modifiers: int) -> Instruction:
    """`asm("v_add_u32 v0, v1, 3")`, with modifiers as keywords."""
    name, _, rest = line.partition(" ")
    operands = tuple(operand(part.strip()) for part in rest.split(",")) if rest else ()
    return Instruction(name, encoding, operands, tuple(modifiers.items()))


def execute(*program: Instruction, v=None, s=None, lanes=None, waves: int = 1, lds: int = 1024, arrays=()) -> Group:
    """Straight-line code on `waves` waves. `v` and `s` have registers by number, `lanes` what exec has.

    The LDS of the one workgroup, and global memory with `arrays`, are in `group.machine`.
    """
    memory = Memory(list(arrays) or [np.zeros(16, np.uint8)], waves, False)
    local = Segment(np.zeros(lds, np.uint8), waves, False)
    machine: Any = types.SimpleNamespace(memory=memory, lds=local, lds_size=lds, epoch=1)
    wave = np.arange(waves, dtype=np.int32)
    group = Group(machine, 256, 64, wave, np.zeros(waves, np.int32))
    for index, value in (v or {}).items():
        group.v[index] = bits(value)
    for index, value in (s or {}).items():
        value = np.asarray(value)
        if value.dtype == bool:  # lanes, into a pair
            group.s[:, index : index + 2] = pack(np.broadcast_to(value, (waves, LANES)))
        else:
            group.s[:, index] = bits(value)
    if lanes is not None:
        group.s[:, EXEC : EXEC + 2] = pack(np.broadcast_to(np.asarray(lanes), (waves, LANES)))
        group.exec_changed()
    with np.errstate(all="ignore"):
        for p in program:
            step(p).run(group)
    return group


def bits(value) -> np.ndarray:
    """Of numbers of 32 bits: floats are float32, integers are taken modulo 2^32."""
    value = np.asarray(value)
    if value.dtype.kind == "f":
        return value.astype(np.float32).view(np.uint32)
    return (value.astype(np.int64) & 0xFFFFFFFF).astype(np.uint32)


def floats(registers: np.ndarray) -> np.ndarray:
    return registers.view(np.float32)


def mask_of(group: Group, index: int) -> np.ndarray:
    """The lanes of a pair of scalar registers, of the first wave."""
    words = int(group.s[0, index]) | int(group.s[0, index + 1]) << 32
    return np.array([words >> k & 1 for k in range(LANES)], bool)


DESCRIPTOR = Descriptor(
    lds=0,
    scratch=0,
    kernarg=32,
    user_sgprs=2,
    group_ids=(True, False, False),
    properties=8,
    preload=0,
    float_mode=0xF0,
)
WAIT = asm("s_waitcnt", vmcnt=0, lgkmcnt=0)
END = asm("s_endpgm")


def launch(*program: Instruction, arrays, grid: int = 1, warps: int = 1, lds: int = 256, **options) -> Result:
    """A kernel: s[0:1] points to the arguments, s2 has the workgroup's number, v0 the thread's.

    The pointers of up to four arrays are loaded into s[4:5], s[6:7], ... before it, and it ends behind the last
    instruction.
    """
    pointers = [asm(f"s_load_dwordx2 s[{4 + 2 * k}:{5 + 2 * k}], s[0:1]", offset=8 * k) for k in range(len(arrays))]
    return run(kernel(*pointers, WAIT, *program, END), arrays, grid=grid, warps=warps, lds=lds, **options)


def kernel(*program: Instruction):
    """The instructions one behind the other: a branch counts them from the next one on."""
    placed = [Instruction(p.name, p.encoding, p.operands, p.modifiers, 4 * k) for k, p in enumerate(program)]
    return of_instructions("test", "gfx942", placed, DESCRIPTOR)
