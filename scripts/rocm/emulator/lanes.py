"""Vector instructions that see other lanes, or parts of registers."""

from collections.abc import Callable

import numpy as np

from rocm.emulator.groups import LANES
from rocm.emulator.instruction import DWORD, Instruction, Operand
from rocm.emulator.operands import I32, I64, U32, U64, put, put_mask, put_scalar, scalar, vector

LANE = np.arange(LANES)

PARTS = {0: (0, 8), 1: (8, 8), 2: (16, 8), 3: (24, 8), 4: (0, 16), 5: (16, 16)}
"""What SDWA's sel takes of a register: (first bit, number of bits)."""

PAD, PRESERVE = 0, 2
"""What SDWA's dst_unused makes of the other bits of a result."""


def moved(control: int) -> tuple[np.ndarray, np.ndarray]:
    """Of DPP: the lane that each one reads, and whether there is one."""
    row, place = LANE // 16, LANE % 16
    everywhere = np.ones(LANES, bool)
    kind, by = control & 0x1F0, control & 15
    if control < 0x100:  # quad_perm
        return LANE // 4 * 4 + np.array([control >> 2 * k & 3 for k in range(4)])[LANE % 4], everywhere
    if kind == 0x100 and by:  # row_shl
        return LANE + by, place + by < 16
    if kind == 0x110 and by:  # row_shr
        return LANE - by, place >= by
    if kind == 0x120 and by:  # row_ror
        return row * 16 + (place - by) % 16, everywhere
    if control == 0x140:  # row_mirror
        return row * 16 + 15 - place, everywhere
    if control == 0x141:  # row_half_mirror
        return LANE // 8 * 8 + 7 - LANE % 8, everywhere
    if control == 0x142:  # row_bcast:15
        return row * 16 - 1, row > 0
    if control == 0x143:  # row_bcast:31
        return np.full(LANES, 31), LANE >= 32
    if kind == 0x150:  # row_newbcast
        return row * 16 + by, everywhere
    raise NotImplementedError(f"dpp_ctrl {control:#x}")


def dpp(p: Instruction, function: Callable, dtype: type, more: list[Operand]):
    """The first source comes from other lanes. Where there is none, the result stays, or the source is 0."""
    p.only("dpp_ctrl", "row_mask", "bank_mask", "bound_ctrl")
    source, valid = moved(p.get("dpp_ctrl"))
    source = np.clip(source, 0, LANES - 1)
    enabled = (p.get("row_mask", 15) >> LANE // 16 & 1) & (p.get("bank_mask", 15) >> LANE % 16 // 4 & 1) == 1
    zeros = bool(p.get("bound_ctrl"))
    to, first, *rest = p.operands
    if to.file != "v" or any(x.count != 1 for x in (to, first)):
        raise NotImplementedError(p.text)
    rest = rest[:1] if p.name == "v_cndmask_b32" else rest
    index, x, others = to.index, vector(first), [vector(operand) for operand in (*rest, *more)]

    def run(g):
        there = valid & g.mask[:, source]
        sources = [np.where(there, x(g)[:, source], U32(0)), *(other(g) for other in others)]
        result = function(g, *(value.view(dtype) for value in sources))
        np.copyto(g.v[index], result, where=g.mask & enabled if zeros else g.mask & enabled & there)

    return run


def _part(operand: Operand, select: int):
    """A byte or half of a source, with or without its sign."""
    if operand.negate or operand.absolute or not 0 <= select <= DWORD:
        raise NotImplementedError(f"{operand} by part {select}")
    read = vector(operand)
    if select == DWORD:
        return read
    at, width = PARTS[select]
    if not operand.sext:
        return lambda g: read(g) >> U32(at) & U32((1 << width) - 1)
    up, down = U32(32 - at - width), I32(32 - width)
    return lambda g: ((read(g) << up).view(I32) >> down).view(U32)


def sdwa(p: Instruction, function: Callable, dtype: type, more: list[Operand]):
    """Sources and result may be bytes or halves of registers."""
    p.only("dst_sel", "dst_unused", "src0_sel", "src1_sel")
    to, *sources = p.operands
    sources = sources[:2] if p.name == "v_cndmask_b32" else sources
    reads = [_part(x, p.get(f"src{k}_sel", DWORD)) for k, x in enumerate(sources)] + [vector(x) for x in more]
    write, old = put(to), vector(to)
    select, unused = p.get("dst_sel", DWORD), p.get("dst_unused")
    if select == DWORD:
        return lambda g: write(g, function(g, *(np.asarray(read(g)).view(dtype) for read in reads)))
    if unused not in (PAD, PRESERVE) or select not in PARTS:
        raise NotImplementedError(p.text)
    first, width = PARTS[select]
    at, ones = U32(first), U32((1 << width) - 1)

    def run(g):
        result = function(g, *(np.asarray(read(g)).view(dtype) for read in reads))
        rest = old(g) & ~(ones << at) if unused == PRESERVE else U32(0)
        write(g, (result & ones) << at | rest)

    return run


def sdwa_compare(p: Instruction, compare: Callable, dtype: type):
    """The same of a comparison, whose result is a mask."""
    p.only("src0_sel", "src1_sel")
    to, *sources = p.operands
    x, y = (_part(operand, p.get(f"src{k}_sel", DWORD)) for k, operand in enumerate(sources))
    write = put_mask(to)
    return lambda g: write(g, compare(np.asarray(x(g)).view(dtype), np.asarray(y(g)).view(dtype)))


def _readfirstlane(p: Instruction):
    """Of the first lane that exec has; of lane 0 if it has none."""
    write, x = put_scalar(p.operands[0]), vector(p.operands[1])

    def run(g):
        values = np.broadcast_to(x(g), g.mask.shape)
        write(g, values[np.arange(len(values)), np.argmax(g.mask, axis=1)])

    return run


def _lane_of(read, g):
    return np.broadcast_to(read(g) & U64(63), g.scc.shape).astype(I64)


def _readlane(p: Instruction):
    write, x, lane = put_scalar(p.operands[0]), vector(p.operands[1]), scalar(p.operands[2])

    def run(g):
        values = np.broadcast_to(x(g), g.mask.shape)
        write(g, values[np.arange(len(values)), _lane_of(lane, g)])

    return run


def _writelane(p: Instruction):
    """Whether exec has the lane or not."""
    if p.operands[0].file != "v":
        raise NotImplementedError(p.text)
    index, value, lane = p.operands[0].index, scalar(p.operands[1]), scalar(p.operands[2])

    def run(g):
        at = _lane_of(lane, g)
        g.v[index][np.arange(at.size), at] = np.broadcast_to(value(g), g.scc.shape).astype(U32)

    return run


def _permlane_swap(p: Instruction):
    """gfx950: odd rows of 16, or the upper half, of the first change places with even ones of the second."""
    width = 32 if p.name == "v_permlane32_swap_b32" else 16
    x, y, put_x, put_y = vector(p.operands[0]), vector(p.operands[1]), put(p.operands[0]), put(p.operands[1])
    odd = LANE // width % 2 == 1
    before, after = np.clip(LANE - width, 0, LANES - 1), np.clip(LANE + width, 0, LANES - 1)

    def run(g):
        a, b = x(g).copy(), y(g).copy()
        put_x(g, np.where(odd, b[:, before], a))
        put_y(g, np.where(odd, b, a[:, after]))

    return run


def _mbcnt(p: Instruction):
    """Bits of a mask below the lane's own, of the lower or the upper 32 lanes, and a sum."""
    write, bits, more = put(p.operands[0]), vector(p.operands[1]), vector(p.operands[2])
    first = 0 if "lo" in p.name else 32
    below = np.array([(1 << min(max(k - first, 0), 32)) - 1 for k in range(LANES)], U64).astype(U32)
    return lambda g: write(g, np.bitwise_count(bits(g) & below).astype(U32) + more(g))


ACROSS = {
    "v_readfirstlane_b32": _readfirstlane,
    "v_readlane_b32": _readlane,
    "v_writelane_b32": _writelane,
    "v_permlane16_swap_b32": _permlane_swap,
    "v_permlane32_swap_b32": _permlane_swap,
    "v_mbcnt_lo_u32_b32": _mbcnt,
    "v_mbcnt_hi_u32_b32": _mbcnt,
}
"""Closures of instructions that read or write lanes of others, by their names."""
