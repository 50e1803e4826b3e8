"""Waves that stand at one instruction, as a group: split where a branch goes both ways, and joined again."""

from typing import TYPE_CHECKING

import numpy as np

from rocm.emulator.instruction import EXEC
from rocm.emulator.memory import Fault

if TYPE_CHECKING:
    from rocm.emulator.machine import Machine

LANES = 64
SCALARS = 128
"""Scalar registers that an instruction can name, VCC, M0 and EXEC among them."""

POISON = 0x7FFF7FFF
"""What registers and LDS begin with: NaN as float32, in each half (bf16, f16) and in each byte (e4m3)."""

LDS_WRITE = 1
"""Of `Group.lgkm`: a write to LDS, which brings no register."""


class Group:
    """The state of some waves. Registers are [register, wave, lane] and [wave, register].

    `vm` and `lgkm` are the counters of s_waitcnt: the memory accesses under way, oldest first, each as the registers
    that it will bring (`bits`). `pending` is all of them.
    """

    def __init__(self, machine: "Machine", vectors: int, accumulators: int, wave, workgroup):
        n = wave.size
        self.machine = machine
        self.wave, self.workgroup = wave, workgroup
        self.v = np.full((vectors, n, LANES), POISON, np.uint32)
        self.a = np.full((accumulators, n, LANES), POISON, np.uint32)
        self.s = np.full((n, SCALARS), POISON, np.uint32)
        self.scc = np.zeros(n, bool)
        self.pc = 0
        self.saturates = False  # FP16_OVFL of the mode: conversions to float8 give the largest number, not NaN
        self.vm: list[int] = []
        self.lgkm: list[int] = []
        self.scalar_loads = False  # among `lgkm`: they return in any order
        self.pending = 0
        self.s[:, EXEC : EXEC + 2] = 0xFFFFFFFF
        self.exec_changed()

    def exec_changed(self) -> None:
        self.mask = unpack(self.s[:, EXEC : EXEC + 2])
        self.full = bool(self.mask.all())

    def take(self, chosen: np.ndarray, pc: int) -> "Group":
        """The chosen waves as a group of their own."""
        other: Group = object.__new__(Group)
        other.__dict__.update(self.__dict__)
        other.wave, other.workgroup = self.wave[chosen], self.workgroup[chosen]
        other.v, other.a = self.v[:, chosen], self.a[:, chosen]
        other.s, other.scc = self.s[chosen], self.scc[chosen]
        other.pc, other.vm, other.lgkm = pc, list(self.vm), list(self.lgkm)
        other.exec_changed()
        return other

    def copy(self, machine: "Machine") -> "Group":
        """All of the waves, in another machine."""
        other: Group = object.__new__(Group)
        other.__dict__.update(self.__dict__)
        other.machine = machine
        other.v, other.a, other.s, other.scc = self.v.copy(), self.a.copy(), self.s.copy(), self.scc.copy()
        other.vm, other.lgkm = list(self.vm), list(self.lgkm)
        return other

    def join(self, other: "Group") -> None:
        """Takes in a group that stands at the same instruction. What is under way for one is for both."""
        if self.saturates != other.saturates:
            raise Fault("waves that differ in their mode")
        self.wave = np.concatenate([self.wave, other.wave])
        self.workgroup = np.concatenate([self.workgroup, other.workgroup])
        self.v = np.concatenate([self.v, other.v], 1)
        self.a = np.concatenate([self.a, other.a], 1)
        self.s = np.concatenate([self.s, other.s])
        self.scc = np.concatenate([self.scc, other.scc])
        self.vm, self.lgkm = _joined(self.vm, other.vm), _joined(self.lgkm, other.lgkm)
        self.scalar_loads |= other.scalar_loads
        self.settle()
        self.exec_changed()

    def settle(self) -> None:
        self.pending = 0
        for registers in (*self.vm, *self.lgkm):
            self.pending |= registers


def _joined(x: list[int], y: list[int]) -> list[int]:
    """Two queues, aligned at their newest ends."""
    if len(x) < len(y):
        x, y = y, x
    head = len(x) - len(y)
    return x[:head] + [a | b for a, b in zip(x[head:], y, strict=True)]


def pack(mask: np.ndarray) -> np.ndarray:
    """bool [waves, lanes] -> uint32 [waves, 2]."""
    return np.packbits(mask, axis=1, bitorder="little").view(np.uint32)


def unpack(words: np.ndarray) -> np.ndarray:
    """uint32 [waves, 2] -> bool [waves, lanes]."""
    return np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little").view(bool)


_FIRST_BIT = {"s": 1, "v": 1 + SCALARS, "a": 513 + SCALARS}


def bits(file: str, index: int, count: int = 1) -> int:
    """Registers as bits of an int, so that sets of them are cheap."""
    return ((1 << count) - 1) << _FIRST_BIT[file] + index


def names(registers: int) -> list[str]:
    """The registers that such an int has, for messages."""
    found = []
    for at in range(1, registers.bit_length()):
        if registers >> at & 1:
            file = max((file for file in _FIRST_BIT if _FIRST_BIT[file] <= at), key=lambda file: _FIRST_BIT[file])
            found.append(f"{file}{at - _FIRST_BIT[file]}")
    return found
