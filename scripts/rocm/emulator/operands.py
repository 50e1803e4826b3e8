"""Where instructions read and write: closures over a group of waves, made once for each operand.

A vector operand is read as [waves, lanes], [waves, 1] or a number, a scalar one as [waves] or a number.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from rocm.emulator.groups import Group, pack, unpack
from rocm.emulator.instruction import EXEC, Operand

U32, I32, F32 = np.uint32, np.int32, np.float32
U64, I64, F64 = np.uint64, np.int64, np.float64
SIGN = U32(0x80000000)
ONES = U32(0xFFFFFFFF)

Read = Callable[[Group], Any]
Write = Callable[[Group, Any], None]


def constant(operand: Operand, part: int = 0) -> np.uint32:
    """32 bits of a constant. Integers have a sign and reach into the upper half of 64 bits, literals do not."""
    match operand.file:
        case "integer":
            return U32(operand.value >> 32 * part & 0xFFFFFFFF)
        case "literal":
            return U32(0 if part else operand.value)
        case "float" if not part:
            return U32(operand.value)
    raise NotImplementedError(f"{operand} as {'the upper half of ' if part else ''}a source")


def vector(operand: Operand, part: int = 0) -> Read:
    """As uint32; `part` is the register to read of those in a row."""
    read = _plain(operand, part)
    if not operand.negate and not operand.absolute:
        return read
    keep, flip = ONES >> U32(operand.absolute), SIGN if operand.negate else U32(0)
    return lambda g: read(g) & keep ^ flip


def _plain(operand: Operand, part: int) -> Read:
    index = operand.index + part
    match operand.file:
        case "v":
            return lambda g: g.v[index]
        case "a":
            return lambda g: g.a[index]
        case "s":
            return lambda g: g.s[:, index, None]
    bits = constant(operand, part)
    return lambda g: bits


def viewed(operand: Operand, dtype: type, part: int = 0) -> Read:
    """As uint32, int32 or float32."""
    read = vector(operand, part)
    return read if dtype is U32 else lambda g: read(g).view(dtype)


def vector64(operand: Operand) -> Read:
    """As uint64."""
    if operand.negate or operand.absolute:
        raise NotImplementedError(f"{operand} of 64 bits")
    low, high = vector(operand), vector(operand, 1)
    if not operand.is_register:
        bits = U64(int(constant(operand)) | int(constant(operand, 1)) << 32)
        return lambda g: bits
    return lambda g: low(g).astype(U64) | high(g).astype(U64) << U64(32)


def put(operand: Operand, part: int = 0) -> Write:
    """Into a vector register, where exec has lanes."""
    if operand.file not in ("v", "a"):
        raise NotImplementedError(f"a vector result in {operand}")
    index, accumulation = operand.index + part, operand.file == "a"

    def write(g, value):
        target = (g.a if accumulation else g.v)[index]
        if g.full:
            target[...] = value
        else:
            np.copyto(target, value, where=g.mask)

    return write


def put64(operand: Operand) -> Write:
    low, high = put(operand), put(operand, 1)

    def write(g, value):
        value = np.asarray(value)
        low(g, value.astype(U32))
        high(g, (value >> U64(32)).astype(U32))

    return write


def mask(operand: Operand) -> Read:
    """A pair of scalar registers as bool [waves, lanes]."""
    if operand.file == "s":
        index = operand.index
        return (lambda g: g.mask) if index == EXEC else lambda g: unpack(g.s[:, index : index + 2])
    bits = np.array([[constant(operand), constant(operand, 1)]], U32)
    lanes = unpack(bits)
    return lambda g: np.broadcast_to(lanes, g.mask.shape)


def put_mask(operand: Operand) -> Write:
    """Lanes into a pair of scalar registers; those without exec become 0."""
    if operand.file != "s":
        raise NotImplementedError(f"a mask of lanes in {operand}")
    index = operand.index

    def write(g, lanes):
        g.s[:, index : index + 2] = pack(np.broadcast_to(lanes, g.mask.shape) & g.mask)
        if index == EXEC:
            g.exec_changed()

    return write


def scalar(operand: Operand, parts: int = 1, part: int = 0) -> Read:
    """32 or 64 bits (`parts` 1 or 2) as uint64."""
    if operand.file == "scc":
        return lambda g: g.scc.astype(U64)
    if operand.file != "s":
        bits = U64(int(constant(operand)) | (int(constant(operand, 1)) << 32 if parts == 2 else 0))
        return lambda g: bits
    index = operand.index + part
    if parts == 1:
        return lambda g: g.s[:, index].astype(U64)
    return lambda g: g.s[:, index].astype(U64) | g.s[:, index + 1].astype(U64) << U64(32)


def put_scalar(operand: Operand, parts: int = 1) -> Write:
    if operand.file != "s":
        raise NotImplementedError(f"a scalar result in {operand}")
    index = operand.index
    to_exec = index + parts > EXEC

    def write(g, value):
        value = np.asarray(value)
        g.s[:, index] = value.astype(U32)
        if parts == 2:
            g.s[:, index + 1] = (value >> U64(32)).astype(U32)
        if to_exec:
            g.exec_changed()

    return write
