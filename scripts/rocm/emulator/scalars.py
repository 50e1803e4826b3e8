"""Scalar instructions: one value of each wave. 32 bits are computed in 64."""

import re
from collections.abc import Callable

import numpy as np

from rocm.emulator.groups import Group, bits
from rocm.emulator.instruction import EXEC, VCC, Instruction, Operand
from rocm.emulator.operands import I64, U32, U64, put_scalar, scalar

END, BARRIER = "end", "barrier"
"""What the closures of s_endpgm and s_barrier return; those of branches return which waves take them."""

ONES = {1: U64(0xFFFFFFFF), 2: U64(0xFFFFFFFFFFFFFFFF)}
SATURATING_MODE = 1 | 23 << 6
"""What s_setreg names: one bit, the 23rd, of hardware register 1: FP16_OVFL of MODE."""

NOTHING = ("s_nop", "s_setprio", "s_sleep")
COMPARE = {
    "eq": np.equal,
    "lg": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
SAVEEXEC = {
    "and": lambda x, e: x & e,
    "or": lambda x, e: x | e,
    "xor": lambda x, e: x ^ e,
    "andn2": lambda x, e: x & ~e,
    "orn2": lambda x, e: x | ~e,
}


def signed(x, parts: int = 1):
    """uint64 -> int64 of the same 32 or 64 bits."""
    x = np.asarray(x, U64)
    return x.astype(U32).view(np.int32).astype(I64) if parts == 1 else x.view(I64)


def unsigned(x):
    return np.asarray(x, I64).view(U64)


def build(p: Instruction) -> Callable[[Group], object]:
    """The closure of a scalar instruction that is neither a branch nor a load."""
    name, operands = p.name, p.operands
    if name in NOTHING:
        return lambda g: None
    if name == "s_endpgm":
        return lambda g: END
    if name == "s_barrier":
        return lambda g: BARRIER
    if name == "s_waitcnt":
        return _waitcnt(p)
    p.only()
    if name == "s_setreg_imm32_b32":
        return _setreg(p)
    if match := re.fullmatch(r"s_cmp(k?)_(\w\w)_([iu])(32|64)", name):
        return _compare(p, *match.groups())
    if match := re.fullmatch(r"s_bitcmp([01])_b32", name):
        x, y, wanted = scalar(operands[0]), scalar(operands[1]), int(match[1])
        return lambda g: _set_scc(g, (x(g) >> (y(g) & U64(31)) & U64(1)) == wanted)
    if match := re.fullmatch(r"s_(\w+)_saveexec_b64", name):
        return _saveexec(p, match[1])
    if match := re.fullmatch(r"s_cselect_b(32|64)", name):
        parts = int(match[1]) // 32
        x, y, write = scalar(operands[1], parts), scalar(operands[2], parts), put_scalar(operands[0], parts)
        return lambda g: write(g, np.where(g.scc, x(g), y(g)))
    if name == "s_movk_i32":
        value, write = scalar(operands[1]), put_scalar(operands[0])
        return lambda g: write(g, np.broadcast_to(value(g), g.scc.shape))
    if match := re.fullmatch(r"s_(add|mul)k_i32", name):
        return _arithmetic(p, f"s_{match[1]}_i32", (operands[0], *operands))
    return _arithmetic(p, name, operands)


def branch(p: Instruction) -> Callable[[Group], np.ndarray]:
    """Which waves take it."""
    vcc, exec_mask = scalar(Operand("s", VCC, 2), 2), scalar(Operand("s", EXEC, 2), 2)
    conditions = {
        "s_branch": lambda g: np.ones(g.scc.shape, bool),
        "s_cbranch_scc0": lambda g: ~g.scc,
        "s_cbranch_scc1": lambda g: g.scc,
        "s_cbranch_vccz": lambda g: vcc(g) == 0,
        "s_cbranch_vccnz": lambda g: vcc(g) != 0,
        "s_cbranch_execz": lambda g: exec_mask(g) == 0,
        "s_cbranch_execnz": lambda g: exec_mask(g) != 0,
    }
    if p.name not in conditions:
        raise NotImplementedError(p.text)
    return conditions[p.name]


def load(p: Instruction) -> Callable[[Group], None]:
    """s_load_dword*: from the address in a pair, plus a register (unsigned) and an offset of the instruction."""
    match = re.fullmatch(r"s_load_dword(?:x(\d+))?", p.name)
    if not match:
        raise NotImplementedError(p.text)
    p.only("offset")
    count, first, text = int(match[1] or 1), p.operands[0].index, p.text
    base, fixed = scalar(p.operands[1], 2), U64(p.get("offset") & 0xFFFFFFFFFFFFFFFF)
    more = scalar(p.operands[2]) if len(p.operands) > 2 else None
    registers = bits("s", first, count)

    def run(g):
        address = base(g) + (more(g) if more else U64(0)) + fixed & ~U64(3)
        raw = g.machine.memory.load(np.broadcast_to(address, g.scc.shape), 4 * count, g.wave, g.machine.epoch, text)
        g.s[:, first : first + count] = np.ascontiguousarray(raw).view(U32)
        g.lgkm.append(registers)
        g.scalar_loads = True
        g.pending |= registers

    return run


def _set_scc(g: Group, value) -> None:
    g.scc = np.broadcast_to(value, g.scc.shape).copy()


def _waitcnt(p: Instruction):
    p.only("vmcnt", "expcnt", "lgkmcnt")
    vm, lgkm = p.get("vmcnt", 63), p.get("lgkmcnt", 15)

    def run(g):
        if len(g.vm) > vm:
            del g.vm[: len(g.vm) - vm]
        if lgkm == 0:
            g.lgkm.clear()
            g.scalar_loads = False
        elif not g.scalar_loads and len(g.lgkm) > lgkm:  # where order is not known, only 0 tells something
            del g.lgkm[: len(g.lgkm) - lgkm]
        g.settle()

    return run


def _setreg(p: Instruction):
    place, value = p.operands
    if place.value != SATURATING_MODE:
        raise NotImplementedError(p.text)
    saturates = bool(value.value & 1)

    def run(g):
        g.saturates = saturates

    return run


def _compare(p: Instruction, short: str, relation: str, kind: str, width: str):
    parts = int(width) // 32
    right = p.operands[1]
    if short and kind == "u":
        right = Operand("integer", value=right.value & 0xFFFF)
    x, y, compare = scalar(p.operands[0], parts), scalar(right, parts), COMPARE[relation]
    if kind == "i":
        return lambda g: _set_scc(g, compare(signed(x(g), parts), signed(y(g), parts)))
    return lambda g: _set_scc(g, compare(x(g), y(g)))


def _saveexec(p: Instruction, kind: str):
    if kind not in SAVEEXEC:
        raise NotImplementedError(p.text)
    exec_pair = Operand("s", EXEC, 2)
    source, write, function = scalar(p.operands[1], 2), put_scalar(p.operands[0], 2), SAVEEXEC[kind]
    now, put_exec = scalar(exec_pair, 2), put_scalar(exec_pair, 2)

    def run(g):
        old = now(g)
        new = function(source(g), old)
        write(g, old)
        put_exec(g, np.broadcast_to(new, old.shape))
        _set_scc(g, new != 0)

    return run


def _reversed(x):
    x = np.asarray(x)
    return np.array([int(f"{int(i):032b}"[::-1], 2) for i in x.reshape(-1)], U64).reshape(x.shape)


def _bits_of(parts: int, is_signed: bool):
    """s_bfe: y has the first bit in its lower half, the number of bits in its upper one."""

    def extract(x, y):
        first, width = y & U64(32 * parts - 1), np.minimum(y >> U64(16) & U64(127), U64(64))
        ones = np.where(width == 0, U64(0), ONES[2] >> U64(64) - np.maximum(width, U64(1)))
        if not is_signed:
            return x >> first & ones
        x = unsigned(signed(x, parts) >> np.asarray(first).astype(I64)) & ones
        top = x >> np.maximum(width, U64(1)) - U64(1) & U64(1)
        return np.where(top == 1, x | ~ones, x)

    return extract


def _sign_of_part(dtype):
    return lambda x: unsigned(np.asarray(x).astype(dtype.replace("i", "u")).view(dtype).astype(I64))


# name without its type -> (function of the sources, whether scc tells that the result is not 0)
PLAIN = {
    "s_mov": (lambda x: x, False),
    "s_not": (lambda x: ~x, True),
    "s_and": (lambda x, y: x & y, True),
    "s_or": (lambda x, y: x | y, True),
    "s_xor": (lambda x, y: x ^ y, True),
    "s_andn2": (lambda x, y: x & ~y, True),
    "s_orn2": (lambda x, y: x | ~y, True),
    "s_nand": (lambda x, y: ~(x & y), True),
    "s_nor": (lambda x, y: ~(x | y), True),
    "s_xnor": (lambda x, y: ~(x ^ y), True),
    "s_abs_i32": (lambda x: unsigned(np.abs(signed(x))), True),
    "s_brev_b32": (_reversed, False),
    "s_mul_i32": (lambda x, y: x * y, False),
    "s_mul_hi_u32": (lambda x, y: x * y >> U64(32), False),
    "s_mul_hi_i32": (lambda x, y: unsigned(signed(x) * signed(y) >> 32), False),
    "s_sext_i32_i16": (_sign_of_part("i2"), False),
    "s_sext_i32_i8": (_sign_of_part("i1"), False),
    "s_bfe_u32": (_bits_of(1, False), True),
    "s_bfe_i32": (_bits_of(1, True), True),
    "s_bfe_u64": (_bits_of(2, False), True),
    "s_bfe_i64": (_bits_of(2, True), True),
}


def _sum(x, y, carry):
    total = x + y + carry
    return total, total > ONES[1]


def _difference(x, y, carry):
    total = x - y - carry
    return total, total > ONES[1]


def _overflow(total):
    return unsigned(total), (total < -(2**31)) | (total >= 2**31)


def _chosen(x, y, first):
    return np.where(first, x, y), first


# name -> function of sources and scc, to the result and scc
WITH_SCC = {
    "s_add_u32": lambda x, y, _: _sum(x, y, U64(0)),
    "s_addc_u32": _sum,
    "s_sub_u32": lambda x, y, _: _difference(x, y, U64(0)),
    "s_subb_u32": _difference,
    "s_add_i32": lambda x, y, _: _overflow(signed(x) + signed(y)),
    "s_sub_i32": lambda x, y, _: _overflow(signed(x) - signed(y)),
    "s_min_i32": lambda x, y, _: _chosen(x, y, signed(x) < signed(y)),
    "s_max_i32": lambda x, y, _: _chosen(x, y, signed(x) > signed(y)),
    "s_min_u32": lambda x, y, _: _chosen(x, y, x < y),
    "s_max_u32": lambda x, y, _: _chosen(x, y, x > y),
} | {f"s_lshl{k}_add_u32": lambda x, y, _, k=k: _sum(x << U64(k), y, U64(0)) for k in range(1, 5)}


def _arithmetic(p: Instruction, name: str, operands: tuple[Operand, ...]):
    parts = 2 if name.endswith("64") else 1
    stem = re.sub(r"_[biu](32|64)$", "", name)
    write = put_scalar(operands[0], parts)
    if name in WITH_SCC:
        both, x, y = WITH_SCC[name], scalar(operands[1]), scalar(operands[2])

        def run_both(g):
            result, scc = both(x(g), y(g), g.scc.astype(U64))
            write(g, result & ONES[1])
            _set_scc(g, scc)

        return run_both
    if stem in ("s_lshl", "s_lshr", "s_ashr"):
        function, tells, second = _shift(stem, parts), True, 1
    elif name in PLAIN or stem in PLAIN:
        (function, tells), second = PLAIN.get(name) or PLAIN[stem], 1 if stem == "s_bfe" else parts
    else:
        raise NotImplementedError(p.text)
    sources = [scalar(x, second if k else parts) for k, x in enumerate(operands[1:])]

    def run(g):
        result = function(*(source(g) for source in sources)) & ONES[parts]
        write(g, result)
        if tells:
            _set_scc(g, result != 0)

    return run


def _shift(stem: str, parts: int):
    most = U64(32 * parts - 1)
    if stem == "s_lshl":
        return lambda x, y: x << (y & most)
    if stem == "s_lshr":
        return lambda x, y: x >> (y & most)
    return lambda x, y: unsigned(signed(x, parts) >> np.asarray(y & most).astype(I64))
