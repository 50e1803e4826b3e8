"""Vector instructions that take each lane by itself, and the table by which all vector instructions are found."""

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from rocm.emulator import conversions, lanes, matrices
from rocm.emulator.groups import Group
from rocm.emulator.instruction import VCC, Instruction, Operand
from rocm.emulator.operands import (
    F32,
    F64,
    I32,
    I64,
    SIGN,
    U32,
    U64,
    mask,
    put,
    put64,
    put_mask,
    vector,
    vector64,
    viewed,
)

# --- functions of lanes. Sources are arrays of the type that the table names, results are uint32.


def as_bits(x):
    return np.asarray(x, F32).view(U32)


def rounded(x):
    """Rounded once, from float64."""
    return np.asarray(x, F64).astype(F32).view(U32)


def fma(x, y, z):
    """x y + z, rounded once."""
    return rounded(_odd_fma(x, y, z))


def _odd_fma(x, y, z):
    """x y + z in float64, made odd where it is not exact: rounded again it is what the exact sum is, rounded.

    The product is exact in float64.
    """
    product, addend = np.asarray(x).astype(F64) * y, np.asarray(z).astype(F64)
    total = np.asarray(product + addend)
    part = total - product
    lost = (product - (total - part)) + (addend - part)
    odd = total.view(I64)
    inexact = np.isfinite(lost) & (lost != 0) & (odd & 1 == 0)
    if inexact.any():
        away = np.where((lost > 0) == (total > 0), I64(1), I64(-1))
        total = np.where(inexact, odd + away, odd).view(F64)
    return total


def _shift(x):
    return x & U32(31)


def _half(function):
    """Of the lower 16 bits; the upper ones of the result are 0."""
    return lambda *x: function(*(part & U32(0xFFFF) for part in x)) & U32(0xFFFF)


def _low_24(x):
    """The lower 24 bits, the highest of them as sign."""
    return np.asarray(x) << I32(8) >> I32(8)


def _shift_right_half(x, y):
    return (np.asarray(y).astype(np.uint16).view(np.int16).astype(I32) >> (x & U32(15)).astype(I32)).view(U32)


def _bits_signed(x, y, z):
    """`z` bits of x from bit `y` on, the highest as sign."""
    first, width = _shift(y), _shift(z)
    shifted = np.asarray(x).view(I32) >> np.asarray(first).view(I32)
    by = U32(32) - np.minimum(np.maximum(width, U32(1)), U32(32) - first)
    extended = (shifted.view(U32) << by).view(I32) >> by.view(I32)
    return np.where(width == 0, U32(0), extended.view(U32))


def _permuted_bytes(x, y, z):
    """Four bytes of the eight of (x, y); 8 to 11 are the signs of odd bytes, 12 is 0, and what follows is 255."""
    source = np.asarray(x).astype(U64) << U64(32) | y
    found = U32(0)
    for k in range(4):
        pick = z >> U32(8 * k) & U32(255)
        byte = (source >> np.asarray(pick & U32(7)).astype(U64) * U64(8)).astype(U32) & U32(255)
        if (special := pick >= 8).any():
            signs = np.minimum(pick - U32(8), U32(3)).astype(U64) * U64(16) + U64(15)
            sign = (source >> signs & U64(1)).astype(U32) * U32(255)
            other = np.where(pick == 12, U32(0), np.where(pick > 12, U32(255), sign))
            byte = np.where(special, other, byte)
        found = found | byte << U32(8 * k)
    return found


def _reversed_bits(x):
    for by, ones in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF)):
        x = x >> U32(by) & U32(ones) | (x & U32(ones)) << U32(by)
    return x >> U32(16) | x << U32(16)


def _leading_zeros(x):
    """Bits before the first one; -1 where there is none."""
    _, exponent = np.frexp(np.asarray(x).astype(F64))
    return np.where(x == 0, U32(0xFFFFFFFF), (32 - exponent).astype(U32))


def _leading_signs(x):
    """Bits before the first that differs from the sign; -1 where there is none."""
    return _leading_zeros(np.where(x & SIGN != 0, ~x, x))


def _median(x, y, z):
    """NaN counts as missing: the least of the others."""
    median = np.fmax(np.fmin(x, y), np.fmin(np.fmax(x, y), z))
    least = np.fmin(np.fmin(x, y), z)
    return as_bits(np.where(np.isnan(x) | np.isnan(y) | np.isnan(z), least, median))


def _div_fixup(x, y, z):
    """The quotient x of z over y, put right where either is 0, infinite or NaN, and where it is out of range."""
    plain = np.isfinite(y) & np.isfinite(z) & (y != 0) & (z != 0)
    size = np.where(np.isnan(x), F32(np.inf), np.abs(x))
    size = np.where(np.frexp(z)[1] - np.frexp(y)[1] < -150, F32(0), size)
    sign = np.signbit(y) ^ np.signbit(z)
    return as_bits(np.where(plain, np.where(sign, -size, size), z / y))


def _of64(function):
    return lambda x: rounded(function(np.asarray(x).astype(F64)))


@dataclasses.dataclass(frozen=True)
class Lanewise:
    """`function` of sources seen as `dtype`. `adds`: the result's old value is the last source."""

    dtype: type
    function: Callable
    adds: bool = False


def _table(dtype: type, functions: dict[str, Callable]) -> dict[str, Lanewise]:
    return {name: Lanewise(dtype, function) for name, function in functions.items()}


LANEWISE = _table(
    U32,
    {
        "v_mov_b32": lambda x: x,
        "v_accvgpr_write_b32": lambda x: x,
        "v_accvgpr_read_b32": lambda x: x,
        "v_accvgpr_mov_b32": lambda x: x,
        "v_not_b32": lambda x: ~x,
        "v_bfrev_b32": _reversed_bits,
        "v_ffbh_u32": _leading_zeros,
        "v_ffbh_i32": _leading_signs,
        "v_and_b32": lambda x, y: x & y,
        "v_or_b32": lambda x, y: x | y,
        "v_xor_b32": lambda x, y: x ^ y,
        "v_lshlrev_b32": lambda x, y: y << _shift(x),
        "v_lshrrev_b32": lambda x, y: y >> _shift(x),
        "v_ashrrev_i32": lambda x, y: (np.asarray(y).view(I32) >> np.asarray(_shift(x)).view(I32)).view(U32),
        "v_add_u32": lambda x, y: x + y,
        "v_sub_u32": lambda x, y: x - y,
        "v_subrev_u32": lambda x, y: y - x,
        "v_add3_u32": lambda x, y, z: x + y + z,
        "v_lshl_add_u32": lambda x, y, z: (x << _shift(y)) + z,
        "v_add_lshl_u32": lambda x, y, z: (x + y) << _shift(z),
        "v_lshl_or_b32": lambda x, y, z: x << _shift(y) | z,
        "v_and_or_b32": lambda x, y, z: x & y | z,
        "v_or3_b32": lambda x, y, z: x | y | z,
        "v_xad_u32": lambda x, y, z: (x ^ y) + z,
        "v_bfi_b32": lambda x, y, z: x & y | ~x & z,
        "v_bfe_u32": lambda x, y, z: x >> _shift(y) & (U32(1) << _shift(z)) - U32(1),
        "v_bfe_i32": _bits_signed,
        "v_perm_b32": _permuted_bytes,
        "v_alignbit_b32": lambda x, y, z: (
            (np.asarray(x).astype(U64) << U64(32) | y) >> np.asarray(_shift(z)).astype(U64)
        ).astype(U32),
        "v_mul_lo_u32": lambda x, y: x * y,
        "v_mul_hi_u32": lambda x, y: (np.asarray(x).astype(U64) * y >> U64(32)).astype(U32),
        "v_mul_u32_u24": lambda x, y: (x & U32(0xFFFFFF)) * (y & U32(0xFFFFFF)),
        "v_mad_u32_u24": lambda x, y, z: (x & U32(0xFFFFFF)) * (y & U32(0xFFFFFF)) + z,
        "v_min_u32": np.minimum,
        "v_max_u32": np.maximum,
        "v_add_u16": _half(lambda x, y: x + y),
        "v_sub_u16": _half(lambda x, y: x - y),
        "v_mul_lo_u16": _half(lambda x, y: x * y),
        "v_lshlrev_b16": _half(lambda x, y: y << (x & U32(15))),
        "v_lshrrev_b16": _half(lambda x, y: y >> (x & U32(15))),
        "v_ashrrev_i16": _half(_shift_right_half),
        "v_cvt_f32_u32": lambda x: as_bits(np.asarray(x).astype(F32)),
    },
)
LANEWISE |= _table(
    I32,
    {
        "v_min_i32": lambda x, y: np.minimum(x, y).view(U32),
        "v_max_i32": lambda x, y: np.maximum(x, y).view(U32),
        "v_min3_i32": lambda x, y, z: np.minimum(np.minimum(x, y), z).view(U32),
        "v_max3_i32": lambda x, y, z: np.maximum(np.maximum(x, y), z).view(U32),
        "v_med3_i32": lambda x, y, z: np.maximum(np.minimum(x, y), np.minimum(np.maximum(x, y), z)).view(U32),
        "v_mul_hi_i32": lambda x, y: (np.asarray(x).astype(I64) * y >> 32).astype(U32),
        "v_mul_i32_i24": lambda x, y: (_low_24(x) * _low_24(y)).view(U32),
        "v_mad_i32_i24": lambda x, y, z: (_low_24(x) * _low_24(y) + z).view(U32),
        "v_cvt_f32_i32": lambda x: as_bits(np.asarray(x).astype(F32)),
    },
)
LANEWISE |= _table(
    F32,
    {
        "v_add_f32": lambda x, y: as_bits(x + y),
        "v_sub_f32": lambda x, y: as_bits(x - y),
        "v_subrev_f32": lambda x, y: as_bits(y - x),
        "v_mul_f32": lambda x, y: as_bits(x * y),
        "v_max_f32": lambda x, y: as_bits(np.fmax(x, y)),
        "v_min_f32": lambda x, y: as_bits(np.fmin(x, y)),
        "v_max3_f32": lambda x, y, z: as_bits(np.fmax(np.fmax(x, y), z)),
        "v_min3_f32": lambda x, y, z: as_bits(np.fmin(np.fmin(x, y), z)),
        "v_maximum3_f32": lambda x, y, z: as_bits(np.maximum(np.maximum(x, y), z)),
        "v_minimum3_f32": lambda x, y, z: as_bits(np.minimum(np.minimum(x, y), z)),
        "v_med3_f32": _median,
        "v_fma_f32": fma,
        "v_fmaak_f32": fma,
        "v_fmamk_f32": fma,
        "v_exp_f32": _of64(np.exp2),
        "v_log_f32": _of64(np.log2),
        "v_rsq_f32": _of64(lambda x: 1 / np.sqrt(x)),
        "v_rcp_f32": _of64(lambda x: 1 / x),
        "v_sqrt_f32": _of64(np.sqrt),
        "v_rndne_f32": lambda x: as_bits(np.rint(x)),
        "v_floor_f32": lambda x: as_bits(np.floor(x)),
        "v_div_fixup_f32": _div_fixup,
        **conversions.FROM_FLOATS,
    },
)
LANEWISE["v_fmac_f32"] = Lanewise(F32, fma, adds=True)

COMPARE = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "ne": np.not_equal,
    "lg": lambda x, y: (x < y) | (x > y),
    "neq": lambda x, y: ~(x == y),
    "nlt": lambda x, y: ~(x < y),
    "nle": lambda x, y: ~(x <= y),
    "ngt": lambda x, y: ~(x > y),
    "nge": lambda x, y: ~(x >= y),
    "nlg": lambda x, y: ~((x < y) | (x > y)),
    "o": lambda x, y: ~(np.isnan(x) | np.isnan(y)),
    "u": lambda x, y: np.isnan(x) | np.isnan(y),
}


def build(p: Instruction) -> Callable[[Group], None]:
    """The closure of a vector instruction."""
    compared = re.fullmatch(r"v_cmp_(\w+)_([fiu])(32|64)", p.name)
    if compared and p.encoding == "sdwa" and compared[3] == "32":
        return lanes.sdwa_compare(p, _relation(p, compared[1]), VIEWS[compared[2]])
    if p.encoding in ("dpp", "sdwa"):
        return (lanes.dpp if p.encoding == "dpp" else lanes.sdwa)(p, *_parts_of(p))
    if p.name in WITH_MODIFIERS:
        return WITH_MODIFIERS[p.name](p)
    p.only()
    if p.name.startswith("v_mfma_"):
        return matrices.build(p)
    if compared:
        return _compare(p, *compared.groups())
    if p.name in SPECIAL:
        return SPECIAL[p.name](p)
    if p.name not in LANEWISE:
        raise NotImplementedError(p.text)
    return _lanewise(p)


def _lanewise(p: Instruction):
    found, write = LANEWISE[p.name], put(p.operands[0])
    function = found.function
    sources = [viewed(x, found.dtype) for x in (*p.operands[1:], *p.operands[: found.adds])]
    if len(sources) == 1:
        (x,) = sources
        return lambda g: write(g, function(x(g)))
    if len(sources) == 2:
        x, y = sources
        return lambda g: write(g, function(x(g), y(g)))
    x, y, z = sources
    return lambda g: write(g, function(x(g), y(g), z(g)))


def _parts_of(p: Instruction):
    """(function of a group and its sources, their type, further sources): for sources that are moved or cut."""
    if p.name == "v_cndmask_b32":
        chosen = mask(p.operands[3])
        return (lambda g, x, y: np.where(chosen(g), y, x)), U32, []
    found = LANEWISE.get(p.name)
    if found is None:
        raise NotImplementedError(p.text)
    function = found.function
    return (lambda g, *x: function(*x)), found.dtype, list(p.operands[: found.adds])


VIEWS = {"f": F32, "i": I32, "u": U32}


def _relation(p: Instruction, name: str) -> Callable:
    if name not in COMPARE:
        raise NotImplementedError(p.text)
    return COMPARE[name]


def _compare(p: Instruction, relation: str, kind: str, width: str):
    compare, write = _relation(p, relation), put_mask(p.operands[0])
    if width == "32":
        x, y = (viewed(operand, VIEWS[kind]) for operand in p.operands[1:])
        return lambda g: write(g, compare(x(g), y(g)))
    x, y = (vector64(operand) for operand in p.operands[1:])
    if kind == "f":
        raise NotImplementedError(p.text)
    dtype = I64 if kind == "i" else U64
    return lambda g: write(g, compare(np.asarray(x(g)).view(dtype), np.asarray(y(g)).view(dtype)))


# --- those with operands of their own


def _sub_u32(p: Instruction):
    p.only("clamp")
    if not p.get("clamp"):
        return _lanewise(p)
    write, x, y = put(p.operands[0]), vector(p.operands[1]), vector(p.operands[2])
    return lambda g: write(g, np.where(x(g) < y(g), U32(0), x(g) - y(g)))


def _bitop3(p: Instruction):
    """Any function of three bits: bit 4 x + 2 y + z of the table is its value."""
    p.only("bitop3")
    table, write = p.get("bitop3"), put(p.operands[0])
    sources = [vector(x) for x in p.operands[1:]]

    def run(g):
        x, y, z = (source(g) for source in sources)
        found = U32(0)
        for k in range(8):
            if table >> k & 1:
                found = found | (x if k & 4 else ~x) & (y if k & 2 else ~y) & (z if k & 1 else ~z)
        write(g, found)

    return run


def _ldexp(p: Instruction):
    write, x, y = put(p.operands[0]), viewed(p.operands[1], F32), viewed(p.operands[2], I32)
    return lambda g: write(g, rounded(np.ldexp(np.asarray(x(g)).astype(F64), np.clip(y(g), -400, 400))))


def _cndmask(p: Instruction):
    write, x, y, chosen = put(p.operands[0]), vector(p.operands[1]), vector(p.operands[2]), mask(p.operands[3])
    return lambda g: write(g, np.where(chosen(g), y(g), x(g)))


def _carry(p: Instruction):
    """Sums and differences that give a carry, and those that take one, too."""
    write, out = put(p.operands[0]), put_mask(p.operands[1])
    first, second = (2, 3) if "rev" not in p.name else (3, 2)
    x, y = vector(p.operands[first]), vector(p.operands[second])
    carry = mask(p.operands[4]) if len(p.operands) > 4 else None
    sign = I64(1 if "add" in p.name else -1)

    def run(g):
        more = np.asarray(y(g)).astype(I64)
        if carry:
            more = more + carry(g)
        total = np.broadcast_to(np.asarray(x(g)).astype(I64) + sign * more, g.mask.shape)
        result = (total & 0xFFFFFFFF).astype(U32)
        out(g, (total > 0xFFFFFFFF) | (total < 0))
        write(g, result)

    return run


def _mad_u64(p: Instruction):
    write, out = put64(p.operands[0]), put_mask(p.operands[1])
    x, y, z = vector(p.operands[2]), vector(p.operands[3]), vector64(p.operands[4])

    def run(g):
        addend = z(g)
        total = np.broadcast_to(np.asarray(x(g)).astype(U64) * y(g) + addend, g.mask.shape)
        out(g, total < addend)
        write(g, total)

    return run


def _div_scale(p: Instruction):
    """Of x = denominator or numerator: scaled where the division would overflow or lose bits on its way.

    The mask tells v_div_fmas to scale the quotient back. AMD's description scales a denominator whose reciprocal and
    whose quotient are denormal up, which overflows; down is what makes the division right.
    """
    write, out = put(p.operands[0]), put_mask(p.operands[1])
    sources = [viewed(x, F32) for x in p.operands[2:5]]
    least = 2.0**-126

    def run(g):
        x, denominator, numerator = (np.broadcast_to(source(g), g.mask.shape) for source in sources)
        below, above = denominator.astype(F64), numerator.astype(F64)
        reciprocal, quotient = np.abs(1 / below), np.abs(above / below)
        tiny_reciprocal = (reciprocal < least) & (reciprocal != 0)
        tiny_quotient = (quotient < least) & (quotient != 0)
        apart = np.frexp(numerator)[1] - np.frexp(denominator)[1] >= 96
        as_is, up, down = as_bits(x), rounded(np.ldexp(x.astype(F64), 64)), rounded(np.ldexp(x.astype(F64), -64))
        is_denominator, is_numerator = as_is == as_bits(denominator), as_is == as_bits(numerator)
        # (when, the scaled value, whether the quotient is scaled back), the first that applies
        cases = [
            ((denominator == 0) | (numerator == 0), as_bits(np.full_like(x, np.nan)), False),
            (apart, np.where(is_denominator, up, as_is), True),
            (np.abs(denominator) < F32(least), up, False),
            (tiny_reciprocal & tiny_quotient, np.where(is_denominator, down, as_is), True),
            (tiny_reciprocal, down, False),
            (tiny_quotient, np.where(is_numerator, up, as_is), True),
            (np.frexp(numerator)[1] <= 23 - 126, up, False),
        ]
        # What is infinite or NaN is v_div_fixup's.
        finite = np.isfinite(denominator) & np.isfinite(numerator)
        when = [case & finite for case, _, _ in cases]
        write(g, np.select(when, [value for _, value, _ in cases], as_is))
        out(g, np.select(when, [np.full(as_is.shape, back) for _, _, back in cases], False))

    return run


def _div_fmas(p: Instruction):
    """x y + z, scaled back where v_div_scale said so.

    AMD's description has 2^32 there. With that divisions of very large and very small quotients would be wrong: what
    v_div_scale took away was 2^64, from the denominator of a large quotient or added to the numerator of a small one.
    """
    write, back = put(p.operands[0]), mask(Operand("s", VCC, 2))
    x, y, z = (viewed(operand, F32) for operand in p.operands[1:4])

    def run(g):
        quotient = z(g)
        exact, scaled = _odd_fma(x(g), y(g), quotient), back(g)
        if scaled.any():
            exact = np.where(scaled, exact * np.where(np.abs(quotient) >= 2, 2.0**64, 2.0**-64), exact)
        write(g, rounded(exact))

    return run


def _shift64(p: Instruction):
    write, by, x = put64(p.operands[0]), vector(p.operands[1]), vector64(p.operands[2])
    if p.name == "v_lshlrev_b64":
        return lambda g: write(g, x(g) << np.asarray(by(g) & U32(63)).astype(U64))
    if p.name == "v_lshrrev_b64":
        return lambda g: write(g, x(g) >> np.asarray(by(g) & U32(63)).astype(U64))
    return lambda g: write(g, (np.asarray(x(g)).view(I64) >> np.asarray(by(g) & U32(63)).astype(I64)).view(U64))


def _lshl_add_u64(p: Instruction):
    write, x, by, z = put64(p.operands[0]), vector64(p.operands[1]), vector(p.operands[2]), vector64(p.operands[3])
    return lambda g: write(g, (x(g) << np.asarray(by(g) & U32(7)).astype(U64)) + z(g))


def _mov_b64(p: Instruction):
    write, x = put64(p.operands[0]), vector64(p.operands[1])
    return lambda g: write(g, x(g))


PACKED = {
    "v_pk_mul_f32": lambda x, y: as_bits(x * y),
    "v_pk_add_f32": lambda x, y: as_bits(x + y),
    "v_pk_fma_f32": fma,
}


def _half_of(operand: Operand, high: int, negate: int):
    """One of the two floats of an operand. A constant has only its lower one."""
    if operand.is_register:
        return viewed(dataclasses.replace(operand, negate=bool(negate)), F32, high)
    if high and operand.value:
        raise NotImplementedError(f"the upper half of {operand}")
    return viewed(dataclasses.replace(operand, negate=bool(negate)), F32)


def _packed(p: Instruction):
    """The same for two floats: op_sel tells of each source which half is its lower one, op_sel_hi which its upper."""
    p.only("op_sel", "op_sel_hi", "neg_lo", "neg_hi")
    function, sources = PACKED[p.name], p.operands[1:]
    halves = [
        [_half_of(x, p.get(select) >> k & 1, p.get(negate) >> k & 1) for k, x in enumerate(sources)]
        for select, negate in (("op_sel", "neg_lo"), ("op_sel_hi", "neg_hi"))
    ]
    writes = [put(p.operands[0], part) for part in (0, 1)]

    def run(g):
        results = [function(*(np.asarray(read(g)) for read in half)) for half in halves]
        for write, result in zip(writes, results, strict=True):
            write(g, result)

    return run


def _packed_mov(p: Instruction):
    """A half of the first source below a half of the second: op_sel tells which."""
    p.only("op_sel", "op_sel_hi")
    writes = [put(p.operands[0], part) for part in (0, 1)]
    reads = [_half_of(x, p.get("op_sel") >> k & 1, 0) for k, x in enumerate(p.operands[1:])]

    def run(g):
        values = [np.array(read(g)).view(U32) for read in reads]
        for write, value in zip(writes, values, strict=True):
            write(g, value)

    return run


WITH_MODIFIERS = {
    "v_sub_u32": _sub_u32,
    "v_bitop3_b32": _bitop3,
    "v_pk_mov_b32": _packed_mov,
    **dict.fromkeys(PACKED, _packed),
    **conversions.SCALED,
}
SPECIAL = {
    "v_ldexp_f32": _ldexp,
    "v_cndmask_b32": _cndmask,
    "v_mad_u64_u32": _mad_u64,
    "v_div_scale_f32": _div_scale,
    "v_div_fmas_f32": _div_fmas,
    "v_lshl_add_u64": _lshl_add_u64,
    "v_mov_b64": _mov_b64,
    **dict.fromkeys(("v_lshlrev_b64", "v_lshrrev_b64", "v_ashrrev_i64"), _shift64),
    **dict.fromkeys(("v_add_co_u32", "v_sub_co_u32", "v_subrev_co_u32"), _carry),
    **dict.fromkeys(("v_addc_co_u32", "v_subb_co_u32", "v_subbrev_co_u32"), _carry),
    **lanes.ACROSS,
}
