"""Instructions that read and write memory, global or LDS, and those that move lanes by LDS's network."""

import re
from collections.abc import Callable

import numpy as np

from rocm.emulator.groups import LANES, LDS_WRITE, Group, bits
from rocm.emulator.instruction import Instruction, Operand
from rocm.emulator.memory import Fault
from rocm.emulator.operands import I64, U32, U64, scalar, vector, vector64

SIZES = {
    **dict.fromkeys(("ubyte", "sbyte", "byte", "b8", "u8", "i8"), 1),
    **dict.fromkeys(("ushort", "sshort", "short", "b16", "u16", "i16"), 2),
    **dict.fromkeys(("dword", "b32"), 4),
    **dict.fromkeys(("dwordx2", "b64"), 8),
    **dict.fromkeys(("dwordx3", "b96"), 12),
    **dict.fromkeys(("dwordx4", "b128"), 16),
}
"""Bytes of what is read or written, by the last part of a name."""

SIGNED = ("sbyte", "sshort", "i8", "i16")
CACHES = ("sc0", "sc1", "nt")
"""Modifiers that tell caches something; there are none here."""

ADDRESS_BITS = U64((1 << 48) - 1)
MOST_STRIDE = (1 << 14) - 1
"""What a buffer resource has, from its bit 0 and its bit 48 on."""


def _registers(operand: Operand, count: int) -> int:
    return bits(operand.file, operand.index, count)


def _keep(g: Group, to: Operand, first: int, lanes: np.ndarray, raw: np.ndarray, signed: bool = False) -> None:
    """Bytes [lane, size] into registers, from the `first` of the operand on. Less than four are extended."""
    target, index = (g.v if to.file == "v" else g.a), to.index + first
    size = raw.shape[1]
    if size < 4:
        wide = np.zeros((len(raw), 4), np.uint8)
        wide[:, :size] = raw
        words = wide.view(U32)
        if signed:
            by = 32 - 8 * size
            words = ((words << U32(by)).view(np.int32) >> np.int32(by)).view(U32)
    else:
        words = np.ascontiguousarray(raw).view(U32)
    for k in range(words.shape[1]):
        target[index + k][lanes] = words[:, k]


def _values(g: Group, source: Operand, size: int, lanes: np.ndarray, high: bool) -> np.ndarray:
    """Registers of the lanes as bytes [lane, size]; `high`: from the upper half of the register."""
    registers = g.v if source.file == "v" else g.a
    words = np.stack([registers[source.index + k][lanes] for k in range(max(1, size // 4))], axis=-1)
    raw = words.view(np.uint8)
    return raw[:, 2 : 2 + size] if high else raw[:, :size]


def _kind(p: Instruction, prefix: str) -> tuple[str, int, bool, bool]:
    """("load" or "store", bytes, whether from the upper half, whether signed)."""
    match = re.fullmatch(rf"{prefix}_(load|store)_(\w+?)(_d16_hi|_d16)?", p.name)
    if not match or match[2] not in SIZES or (match[3] and match[1] == "load"):
        raise NotImplementedError(p.text)
    return match[1], SIZES[match[2]], match[3] == "_d16_hi", match[2] in SIGNED


def global_access(p: Instruction) -> Callable[[Group], None]:
    """At a 64-bit address of each lane, or at a scalar one with 32 bits more of each lane."""
    kind, size, high, signed = _kind(p, "global")
    p.only("offset", *CACHES)
    at, data = (p.operands[1], p.operands[0]) if kind == "load" else p.operands[:2]
    base, offset = p.operands[2], U64(p.get("offset") & 0xFFFFFFFFFFFFFFFF)
    where = _address64(at, offset) if base.file == "off" else _address_of_pair(base, at, offset)
    if kind == "load":
        return _load(p, where, size, data, signed)
    return _store(p, where, size, data, high)


def _address64(at: Operand, offset: np.uint64):
    address = vector64(at)
    return lambda g: address(g) + offset


def _address_of_pair(base: Operand, at: Operand, offset: np.uint64):
    pair, low = scalar(base, 2), vector(at)
    return lambda g: (pair(g) + offset)[:, None] + low(g).astype(U64)


RAW_BUFFER = 0x27000
"""The last word of a resource: no swizzle, words of 32 bits. LLVM makes no other for `make.buffer.rsrc` of Triton's."""


def buffer_access(p: Instruction) -> Callable[[Group], None]:
    """Through a resource in four scalar registers. Past its end loads give 0 and stores are dropped.

    Raises Fault for an access partly past the end, and for resources with a stride or of another format: none of the
    kernels has any of these.
    """
    if p.name in ("buffer_wbl2", "buffer_inv"):
        return lambda g: None
    kind, size, high, signed = _kind(p, "buffer")
    p.only("offset", "offen", *CACHES)
    data, at, resource, more = p.operands
    base, records, format_of = scalar(resource, 2), scalar(resource, part=2), scalar(resource, part=3)
    extra = scalar(more)
    own, fixed = (vector(at) if p.get("offen") else None), I64(p.get("offset"))

    def offsets(g):
        lanes = own(g).astype(I64) if own else np.zeros(g.mask.shape, I64)
        return lanes + fixed

    def where(g):
        return ((base(g) & ADDRESS_BITS) + extra(g))[:, None] + offsets(g).astype(U64)

    def inside(g):
        if (base(g) >> U64(48) & U64(MOST_STRIDE)).any():
            raise Fault("a buffer resource with a stride, which is not emulated")
        if (np.asarray(format_of(g)) != RAW_BUFFER).any():
            raise Fault("a buffer resource of another format than raw words, which is not emulated")
        left = (records(g).astype(I64) - np.asarray(extra(g)).astype(I64))[:, None] - offsets(g)
        if (g.mask & (left > 0) & (left < size)).any():
            raise Fault("partly past the end of a buffer")
        return left > 0

    if kind == "load":
        return _load(p, where, size, data, signed, inside)
    return _store(p, where, size, data, high, inside)


def _asked(g: Group, where, lanes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(addresses, waves) of the lanes."""
    address = np.broadcast_to(where(g), lanes.shape)[lanes]
    return address, np.broadcast_to(g.wave[:, None], lanes.shape)[lanes]


def _load(p: Instruction, where, size: int, data: Operand, signed: bool, inside=None):
    count, text = max(1, size // 4), p.text
    registers = _registers(data, count)

    def run(g):
        lanes = g.mask if inside is None else g.mask & inside(g)
        if lanes.any():
            address, waves = _asked(g, where, lanes)
            raw = g.machine.memory.load(address, size, waves, g.machine.epoch, text)
            _keep(g, data, 0, lanes, raw, signed)
        if inside is not None and (past := g.mask & ~lanes).any():
            _keep(g, data, 0, past, np.zeros((int(past.sum()), 4 * count), np.uint8))
        g.vm.append(registers)
        g.pending |= registers

    return run


def _store(p: Instruction, where, size: int, data: Operand, high: bool, inside=None):
    text = p.text

    def run(g):
        lanes = g.mask if inside is None else g.mask & inside(g)
        if lanes.any():
            address, waves = _asked(g, where, lanes)
            g.machine.memory.store(address, _values(g, data, size, lanes, high), waves, g.machine.epoch, text)
        g.vm.append(0)

    return run


def lds_access(p: Instruction) -> Callable[[Group], None]:
    if p.name in LDS_SPECIAL:
        return LDS_SPECIAL[p.name](p)
    match = re.fullmatch(r"ds_(read|write)(2|2st64)?_([biu]\d+)(_d16_hi|_d16)?", p.name)
    if not match or match[3] not in SIZES or (match[4] and match[1] == "read"):
        raise NotImplementedError(p.text)
    p.only("offset", "offset0", "offset1")
    size = SIZES[match[3]]
    step = size * (64 if match[2] == "2st64" else 1)
    offsets = [step * p.get("offset0"), step * p.get("offset1")] if match[2] else [p.get("offset")]
    if match[1] == "read":
        return _lds_read(p, size, offsets, match[3] in SIGNED)
    return _lds_write(p, size, offsets, match[4] == "_d16_hi")


def _lds_read(p: Instruction, size: int, offsets: list[int], signed: bool):
    data, at, text = p.operands[0], vector(p.operands[1]), p.text
    count = max(1, size // 4)
    registers = _registers(data, count * len(offsets))

    def run(g):
        if g.mask.any():
            place, first, waves = _lds_places(g, at)
            # All addresses are read before any register is written: it may be the address.
            for k, offset in enumerate(offsets):
                where = _in_lds(g, place + offset, first, size)
                _keep(g, data, k * count, g.mask, g.machine.lds.load(where, size, waves, g.machine.epoch, text), signed)
        g.lgkm.append(registers)
        g.pending |= registers

    return run


def _lds_write(p: Instruction, size: int, offsets: list[int], high: bool):
    at, sources, text = vector(p.operands[0]), p.operands[1:], p.text

    def run(g):
        if g.mask.any():
            place, first, waves = _lds_places(g, at)
            for source, offset in zip(sources, offsets, strict=True):
                where = _in_lds(g, place + offset, first, size)
                values = _values(g, source, size, g.mask, high)
                g.machine.lds.store(where, values, waves, g.machine.epoch, text)
        g.lgkm.append(LDS_WRITE)

    return run


def _lds_places(g: Group, at) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of active lanes: the address, where their workgroup's LDS begins, and the wave."""
    place = np.broadcast_to(at(g), g.mask.shape)[g.mask].astype(I64)
    first = np.broadcast_to(g.workgroup[:, None], g.mask.shape)[g.mask].astype(I64) * g.machine.lds_size
    return place, first, np.broadcast_to(g.wave[:, None], g.mask.shape)[g.mask]


def _in_lds(g: Group, place: np.ndarray, first: np.ndarray, size: int) -> np.ndarray:
    if (place + size > g.machine.lds_size).any():
        raise Fault(f"out of LDS: byte {int(place.max()) + size} of {g.machine.lds_size}")
    return place + first


def _bpermute(p: Instruction):
    """Each lane reads another's register, by four times its number; one that is inactive gives 0."""
    p.only("offset")
    to, at, data, offset = p.operands[0], vector(p.operands[1]), vector(p.operands[2]), U32(p.get("offset"))
    registers = _registers(to, 1)

    def run(g):
        lane = ((np.broadcast_to(at(g), g.mask.shape) + offset) >> U32(2) & U32(LANES - 1)).astype(I64)
        values = np.where(g.mask, np.broadcast_to(data(g), g.mask.shape), U32(0))
        _moved(g, to, np.take_along_axis(values, lane, axis=1), registers)

    return run


def _swizzle(p: Instruction):
    """Within four lanes any order, or within 32 the lane's bits masked, set and flipped: the offset tells."""
    p.only("offset")
    code, lane = p.get("offset"), np.arange(LANES)
    if code >> 8 == 0x80:
        source = lane // 4 * 4 + np.array([code >> 2 * k & 3 for k in range(4)])[lane % 4]
    elif code < 0x8000:
        source = lane // 32 * 32 + (lane % 32 & (code & 31) | code >> 5 & 31) ^ (code >> 10 & 31)
    else:
        raise NotImplementedError(p.text)
    to, data = p.operands[0], vector(p.operands[1])
    registers = _registers(to, 1)
    return lambda g: _moved(g, to, np.where(g.mask, data(g), U32(0))[:, source], registers)


def _moved(g: Group, to: Operand, values: np.ndarray, registers: int) -> None:
    np.copyto((g.v if to.file == "v" else g.a)[to.index], values, where=g.mask)
    g.lgkm.append(registers)
    g.pending |= registers


def _transposed(p: Instruction):
    """gfx950: 16 lanes name the rows' quarters of a tile of 16 x 4 halves, and each gets a column of it.

    No document was at hand: it is what the compiler's use of it, and right results, say.
    """
    p.only("offset")
    to, at, offset, text = p.operands[0], vector(p.operands[1]), p.get("offset"), p.text
    registers = _registers(to, 2)
    lane = np.arange(LANES)
    block, place = lane // 16 * 16, lane % 16

    def run(g):
        if not g.full:
            raise Fault("a transposed read with inactive lanes, which is not emulated")
        where, first, waves = _lds_places(g, at)
        raw = g.machine.lds.load(_in_lds(g, where + offset, first, 8), 8, waves, g.machine.epoch, text)
        halves = np.ascontiguousarray(raw).view(np.uint16).reshape(-1, LANES, 4)
        found = np.stack([halves[:, block + 4 * k + place // 4, place % 4] for k in range(4)], axis=-1)
        _keep(g, to, 0, g.mask, found.reshape(-1, 4).view(np.uint8))
        g.lgkm.append(registers)
        g.pending |= registers

    return run


LDS_SPECIAL = {
    "ds_bpermute_b32": _bpermute,
    "ds_swizzle_b32": _swizzle,
    "ds_read_b64_tr_b16": _transposed,
}
