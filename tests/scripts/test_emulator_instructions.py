"""Single instructions of the emulator against Python's integers, fractions and AMD's description of each."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from rocm.emulator import Fault

from tests.scripts.emulating import LANE, asm, bits, execute, floats, mask_of

M32, M64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
EDGES = [0, 1, 2, 31, 32, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFE, M32]


def draw(seed: int) -> np.ndarray:
    """A register's lanes, edges among them."""
    r = np.random.default_rng(seed)
    x = r.integers(0, 1 << 32, 64, dtype=np.uint64)
    x[r.permutation(64)[: 2 * len(EDGES)]] = EDGES * 2
    return x


X, Y, Z = (draw(seed) for seed in (1, 2, 3))
INTS = [tuple(int(part[i]) for part in (X, Y, Z)) for i in range(64)]


def sign(x: int, width: int = 32) -> int:
    x &= (1 << width) - 1
    return x - (1 << width) if x >> width - 1 else x


def reversed_bits(x: int) -> int:
    return int(f"{x:032b}"[::-1], 2)


def field(x: int, first: int, width: int, signed: bool) -> int:
    """The pseudocode of V_BFE: shifts up and down, or down alone where the field reaches past the end."""
    first, width = first & 31, width & 31
    if width == 0:
        return 0
    found = (x >> first) & ((1 << min(width, 32 - first)) - 1)
    return sign(found, min(width, 32 - first)) if signed else found


def leading_signs(x: int) -> int:
    text = f"{x:032b}"
    # -1 where there is none, as the instruction has it.
    return text.find("1" if text[0] == "0" else "0")


def permuted(x: int, y: int, z: int) -> int:
    source = (y.to_bytes(4, "little") + x.to_bytes(4, "little")) + bytes(
        255 if (y | x << 32) >> at & 1 else 0 for at in (15, 31, 47, 63)
    )
    return int.from_bytes(((source + b"\0")[k] if k <= 12 else 255 for k in z.to_bytes(4, "little")), "little")


INTEGER = {
    "v_mov_b32": lambda x: x,
    "v_not_b32": lambda x: ~x,
    "v_bfrev_b32": reversed_bits,
    "v_ffbh_u32": lambda x: f"{x:032b}".find("1"),
    "v_ffbh_i32": leading_signs,
    "v_and_b32": lambda x, y: x & y,
    "v_or_b32": lambda x, y: x | y,
    "v_xor_b32": lambda x, y: x ^ y,
    "v_lshlrev_b32": lambda x, y: y << (x & 31),
    "v_lshrrev_b32": lambda x, y: y >> (x & 31),
    "v_ashrrev_i32": lambda x, y: sign(y) >> (x & 31),
    "v_add_u32": lambda x, y: x + y,
    "v_sub_u32": lambda x, y: x - y,
    "v_subrev_u32": lambda x, y: y - x,
    "v_add3_u32": lambda x, y, z: x + y + z,
    "v_lshl_add_u32": lambda x, y, z: (x << (y & 31)) + z,
    "v_add_lshl_u32": lambda x, y, z: (x + y) % (1 << 32) << (z & 31),
    "v_lshl_or_b32": lambda x, y, z: x << (y & 31) | z,
    "v_and_or_b32": lambda x, y, z: x & y | z,
    "v_or3_b32": lambda x, y, z: x | y | z,
    "v_xad_u32": lambda x, y, z: (x ^ y) + z,
    "v_bfi_b32": lambda x, y, z: x & y | ~x & z,
    "v_bfe_u32": lambda x, y, z: field(x, y, z, False),
    "v_bfe_i32": lambda x, y, z: field(x, y, z, True),
    "v_alignbit_b32": lambda x, y, z: (x << 32 | y) >> (z & 31),
    "v_mul_lo_u32": lambda x, y: x * y,
    "v_mul_hi_u32": lambda x, y: x * y >> 32,
    "v_mul_hi_i32": lambda x, y: sign(x) * sign(y) >> 32,
    "v_mul_u32_u24": lambda x, y: (x & 0xFFFFFF) * (y & 0xFFFFFF),
    "v_mul_i32_i24": lambda x, y: sign(x & 0xFFFFFF, 24) * sign(y & 0xFFFFFF, 24),
    "v_mad_u32_u24": lambda x, y, z: (x & 0xFFFFFF) * (y & 0xFFFFFF) + z,
    "v_mad_i32_i24": lambda x, y, z: sign(x & 0xFFFFFF, 24) * sign(y & 0xFFFFFF, 24) + z,
    "v_min_u32": min,
    "v_max_u32": max,
    "v_min_i32": lambda x, y: min(sign(x), sign(y)),
    "v_max_i32": lambda x, y: max(sign(x), sign(y)),
    "v_min3_i32": lambda *x: min(map(sign, x)),
    "v_max3_i32": lambda *x: max(map(sign, x)),
    "v_med3_i32": lambda *x: sorted(map(sign, x))[1],
    "v_add_u16": lambda x, y: (x + y) & 0xFFFF,
    "v_sub_u16": lambda x, y: (x - y) & 0xFFFF,
    "v_mul_lo_u16": lambda x, y: x * y & 0xFFFF,
    "v_lshlrev_b16": lambda x, y: y << (x & 15) & 0xFFFF,
    "v_lshrrev_b16": lambda x, y: (y & 0xFFFF) >> (x & 15),
    "v_ashrrev_i16": lambda x, y: sign(y, 16) >> (x & 15) & 0xFFFF,
}


@pytest.mark.parametrize("name", INTEGER)
def test_integer_instruction_equals_python(name):
    count = INTEGER[name].__code__.co_argcount if hasattr(INTEGER[name], "__code__") else 2
    count = count or 3  # those that take any number
    sources = ", ".join(f"v{k + 1}" for k in range(count))
    group = execute(asm(f"{name} v0, {sources}"), v={1: X, 2: Y, 3: Z})
    assert group.v[0, 0].tolist() == [INTEGER[name](*row[:count]) & M32 for row in INTS]


def test_permuted_bytes_and_their_signs():
    picks = np.random.default_rng(0).integers(0, 16, (64, 4)).astype(np.uint8)
    picks[0] = 255
    group = execute(asm("v_perm_b32 v0, v1, v2, v3"), v={1: X, 2: Y, 3: picks.view(np.uint32)[:, 0]})
    want = [permuted(x, y, int(z)) for (x, y, _), z in zip(INTS, picks.view(np.uint32)[:, 0], strict=True)]
    assert group.v[0, 0].tolist() == want


@pytest.mark.parametrize("table", [0x00, 0xFF, 0x80, 0xFE, 0x96, 0xE8, 0xDE, 0x36, 0x6C])
def test_bitop3_is_its_table(table):
    group = execute(asm("v_bitop3_b32 v0, v1, v2, v3", bitop3=table), v={1: X, 2: Y, 3: Z})
    want = [
        sum((table >> (4 * (x >> k & 1) + 2 * (y >> k & 1) + (z >> k & 1)) & 1) << k for k in range(32))
        for x, y, z in INTS
    ]
    assert group.v[0, 0].tolist() == want


def test_sub_u32_with_clamp_stays_at_zero():
    group = execute(asm("v_sub_u32 v0, v1, v2", clamp=1), v={1: X, 2: Y})
    assert group.v[0, 0].tolist() == [max(x - y, 0) for x, y, _ in INTS]


CARRY = np.random.default_rng(4).integers(0, 2, 64).astype(bool)


@pytest.mark.parametrize(
    ("line", "wide"),
    [
        ("v_add_co_u32 v0, vcc, v1, v2", lambda x, y, c: x + y),
        ("v_sub_co_u32 v0, s[4:5], v1, v2", lambda x, y, c: x - y),
        ("v_subrev_co_u32 v0, vcc, v1, v2", lambda x, y, c: y - x),
        ("v_addc_co_u32 v0, vcc, v1, v2, vcc", lambda x, y, c: x + y + c),
        ("v_subb_co_u32 v0, s[4:5], v1, v2, s[4:5]", lambda x, y, c: x - y - c),
        ("v_subbrev_co_u32 v0, vcc, v1, v2, vcc", lambda x, y, c: y - x - c),
    ],
)
def test_carries_of_active_lanes(line, wide):
    active = LANE % 5 != 3
    pair = 106 if "vcc" in line else 4
    group = execute(asm(line), v={0: 7, 1: X, 2: Y}, s={pair: CARRY}, lanes=active)
    totals = [wide(x, y, int(c)) for (x, y, _), c in zip(INTS, CARRY, strict=True)]
    assert group.v[0, 0].tolist() == [t & M32 if on else 7 for t, on in zip(totals, active, strict=True)]
    assert mask_of(group, pair).tolist() == [
        bool(on and not 0 <= t <= M32) for t, on in zip(totals, active, strict=True)
    ]


def test_mad_u64_has_64_bits_and_a_carry():
    group = execute(asm("v_mad_u64_u32 v[0:1], s[4:5], v2, v3, v[4:5]"), v={2: X, 3: Y, 4: Z, 5: Y})
    totals = [x * y + (z | y << 32) for x, y, z in INTS]
    assert group.v[0, 0].tolist() == [t & M32 for t in totals]
    assert group.v[1, 0].tolist() == [t >> 32 & M32 for t in totals]
    assert mask_of(group, 4).tolist() == [t > M64 for t in totals]


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("v_lshlrev_b64 v[0:1], v2, v[4:5]", lambda by, x: x << (by & 63)),
        ("v_lshrrev_b64 v[0:1], v2, v[4:5]", lambda by, x: x >> (by & 63)),
        ("v_ashrrev_i64 v[0:1], v2, v[4:5]", lambda by, x: sign(x, 64) >> (by & 63)),
        ("v_lshl_add_u64 v[0:1], v[4:5], 3, v[4:5]", lambda by, x: (x << 3) + x),
        ("v_mov_b64 v[0:1], -2", lambda by, x: -2),
    ],
)
def test_64_bits(line, want):
    group = execute(asm(line), v={2: Z, 4: X, 5: Y})
    found = [int(low) | int(high) << 32 for low, high in zip(group.v[0, 0], group.v[1, 0], strict=True)]
    assert found == [want(z, x | y << 32) & M64 for x, y, z in INTS]


@pytest.mark.parametrize(
    ("name", "holds"),
    [
        ("v_cmp_lt_u32", lambda x, y: x < y),
        ("v_cmp_le_u32", lambda x, y: x <= y),
        ("v_cmp_gt_u32", lambda x, y: x > y),
        ("v_cmp_ge_u32", lambda x, y: x >= y),
        ("v_cmp_eq_u32", lambda x, y: x == y),
        ("v_cmp_ne_u32", lambda x, y: x != y),
        ("v_cmp_lt_i32", lambda x, y: sign(x) < sign(y)),
        ("v_cmp_le_i32", lambda x, y: sign(x) <= sign(y)),
        ("v_cmp_gt_i32", lambda x, y: sign(x) > sign(y)),
        ("v_cmp_ge_i32", lambda x, y: sign(x) >= sign(y)),
    ],
)
def test_integer_comparison(name, holds):
    active = LANE % 3 > 0
    other = np.where(LANE % 7 == 0, X, Y)
    group = execute(asm(f"{name} s[4:5], v1, v2"), v={1: X, 2: other}, lanes=active)
    assert mask_of(group, 4).tolist() == [
        bool(on and holds(int(x), int(y))) for x, y, on in zip(X, other, active, strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "holds"),
    [
        ("v_cmp_gt_u64", lambda x, y: x > y),
        ("v_cmp_lt_i64", lambda x, y: sign(x, 64) < sign(y, 64)),
    ],
)
def test_comparison_of_64_bits(name, holds):
    group = execute(asm(f"{name} vcc, v[0:1], v[2:3]"), v={0: X, 1: Y, 2: Z, 3: np.where(LANE % 2, Y, X)})
    want = [holds(x | y << 32, z | (y if k % 2 else x) << 32) for k, (x, y, z) in enumerate(INTS)]
    assert mask_of(group, 106).tolist() == want


# --- floats


def random_floats(seed: int) -> np.ndarray:
    """Of all sizes, with zeros, infinities, NaN, denormals and the largest among them."""
    r = np.random.default_rng(seed)
    x = r.integers(0, 1 << 32, 64, dtype=np.uint64).astype(np.uint32).view(np.float32).copy()
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 1e-45, -1e-40, 1.1754944e-38, 3.4028235e38, 2.0**-100]
    x[r.permutation(64)[: len(special)]] = special
    return x


F, G, H = (random_floats(seed) for seed in (5, 6, 7))


def nearest(x: Fraction) -> np.float32:
    """A fraction as float32, ties to even: the best of three."""
    with np.errstate(over="ignore"):
        near = np.float32(float(x))
        around = [np.nextafter(near, np.float32(side)) for side in (-np.inf, np.inf)]
    finite = [c for c in (near, *around) if np.isfinite(c)]
    if not np.isfinite(near):
        return near
    return min(finite, key=lambda c: (abs(Fraction(float(c)) - x), int(np.float32(c).view(np.uint32)) & 1))


def exact_fma(x, y, z) -> np.float32:
    if all(map(math.isfinite, (x, y, z))):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        if exact:
            return nearest(exact)
    with np.errstate(all="ignore"):
        return np.float32(np.float64(x) * np.float64(y) + np.float64(z))


def same(x, y) -> bool:
    return np.array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32), equal_nan=True)


def test_fma_is_rounded_once():
    r = np.random.default_rng(8)
    x, y, z = (r.standard_normal(64).astype(np.float32) for _ in range(3))
    # Halfway, but for what float64 has no place for: either side.
    x[:2], y[:2], z[:2] = 1 + 2.0**-12, 1 + 2.0**-12, (2.0**-80, -(2.0**-80))
    z[2:20] = -x[2:20] * y[2:20]
    for a, b, c in ((x, y, z), (F, G, H)):
        group = execute(asm("v_fma_f32 v0, v1, v2, v3"), v={1: a, 2: b, 3: c})
        assert same(floats(group.v[0, 0]), [exact_fma(*row) for row in zip(a, b, c, strict=True)])
    assert floats(execute(asm("v_fma_f32 v0, v1, v1, v2"), v={1: x[0], 2: z[0]}).v[0, 0])[0] == np.float32(
        1 + 2.0**-11 + 2.0**-23
    )


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("v_add_f32 v0, v1, v2", lambda x, y, z: x + y),
        ("v_sub_f32 v0, v1, v2", lambda x, y, z: x - y),
        ("v_subrev_f32 v0, v1, v2", lambda x, y, z: y - x),
        ("v_mul_f32 v0, -v1, |v2|", lambda x, y, z: -x * np.abs(y)),
        ("v_max_f32 v0, v1, v2", lambda x, y, z: y if x != x else x if y != y else max(x, y)),
        ("v_min_f32 v0, v1, v2", lambda x, y, z: y if x != x else x if y != y else min(x, y)),
        ("v_max3_f32 v0, v1, v2, v3", lambda *x: max((k for k in x if k == k), default=np.nan)),
        ("v_minimum3_f32 v0, v1, v2, v3", lambda *x: min(x) if all(k == k for k in x) else np.nan),
        ("v_min3_f32 v0, v1, v2, v3", lambda *x: min((k for k in x if k == k), default=np.nan)),
        ("v_maximum3_f32 v0, v1, v2, v3", lambda *x: max(x) if all(k == k for k in x) else np.nan),
        (
            "v_med3_f32 v0, v1, v2, v3",
            lambda *x: sorted(x)[1] if all(k == k for k in x) else min((k for k in x if k == k), default=np.nan),
        ),
        ("v_rndne_f32 v0, v1", lambda x, y, z: np.rint(x)),
        ("v_floor_f32 v0, v1", lambda x, y, z: np.floor(x)),
        ("v_fmaak_f32 v0, v1, v2, 0x40400000", lambda x, y, z: exact_fma(x, y, 3.0)),
        ("v_fmamk_f32 v0, v1, 0x40400000, v2", lambda x, y, z: exact_fma(x, 3.0, y)),
        ("v_fmac_f32 v0, v1, v2", lambda x, y, z: exact_fma(x, y, 2.5)),
    ],
)
def test_float_instruction(line, want):
    group = execute(asm(line), v={0: 2.5, 1: F, 2: G, 3: H})
    with np.errstate(all="ignore"):
        assert same(floats(group.v[0, 0]), [want(*row) for row in zip(F, G, H, strict=True)])


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("v_exp_f32", lambda x: 2.0**x),
        ("v_log_f32", math.log2),
        ("v_rcp_f32", lambda x: 1 / x),
        ("v_rsq_f32", lambda x: 1 / math.sqrt(x)),
        ("v_sqrt_f32", math.sqrt),
    ],
)
def test_functions_are_exact_but_for_rounding(name, base):
    x = np.linspace(0.1, 20, 64, dtype=np.float32)
    found = floats(execute(asm(f"{name} v0, v1"), v={1: x}).v[0, 0])
    np.testing.assert_allclose(found, [base(float(k)) for k in x], rtol=1e-7)


def test_division_by_div_scale_fmas_and_fixup_is_rounded_rightly():
    """The sequence that LLVM makes of a division: below float32's range, past it, and for what is no number."""
    r = np.random.default_rng(9)
    numbers = r.integers(0, 1 << 32, (2, 8, 64), dtype=np.uint64).astype(np.uint32).view(np.float32)
    below = np.concatenate([numbers[0], [F, G, np.float32(1e-38) * numbers[0, 0].clip(-9, 9)]])
    above = np.concatenate([numbers[1], [G, F, np.full(64, 1.5e-38, np.float32)]])
    # Reciprocals and quotients below float32's normal range.
    below[0] = np.ldexp(1 + r.random(64), r.integers(125, 128, 64))
    above[0] = below[0].astype(np.float64) * np.ldexp(1 + r.random(64), r.integers(-150, -124, 64))
    program = [
        asm("v_div_scale_f32 v3, s[4:5], v1, v1, v2"),
        asm("v_div_scale_f32 v4, vcc, v2, v1, v2"),
        asm("v_rcp_f32 v5, v3"),
        asm("v_fma_f32 v6, -v3, v5, 1.0"),
        asm("v_fma_f32 v5, v6, v5, v5"),
        asm("v_mul_f32 v6, v4, v5"),
        asm("v_fma_f32 v7, -v3, v6, v4"),
        asm("v_fma_f32 v6, v7, v5, v6"),
        asm("v_fma_f32 v3, -v3, v6, v4"),
        asm("v_div_fmas_f32 v3, v3, v5, v6"),
        asm("v_div_fixup_f32 v0, v3, v1, v2"),
    ]
    group = execute(*program, v={1: below, 2: above}, waves=len(below))
    with np.errstate(all="ignore"):
        assert same(floats(group.v[0]), above / below)


def test_ldexp_and_frexp_are_inverse():
    group = execute(
        asm("v_frexp_mant_f32 v1, v0"),
        asm("v_frexp_exp_i32_f32 v2, v0"),
        asm("v_ldexp_f32 v3, v1, v2"),
        v={0: F},
    )
    assert same(floats(group.v[3, 0]), F)
    plain = np.isfinite(F) & (F != 0)
    assert ((np.abs(floats(group.v[1, 0]))[plain] >= 0.5) & (np.abs(floats(group.v[1, 0]))[plain] < 1)).all()
    assert group.v[2, 0][~np.isfinite(F)].tolist() == [0] * int((~np.isfinite(F)).sum())


@pytest.mark.parametrize(
    ("relation", "holds"),
    [
        ("lt", lambda x, y: x < y),
        ("le", lambda x, y: x <= y),
        ("gt", lambda x, y: x > y),
        ("ge", lambda x, y: x >= y),
        ("eq", lambda x, y: x == y),
        ("nlt", lambda x, y: not x < y),
        ("nle", lambda x, y: not x <= y),
        ("ngt", lambda x, y: not x > y),
        ("nge", lambda x, y: not x >= y),
        ("nlg", lambda x, y: not (x < y or x > y)),
        ("neq", lambda x, y: x != y),
        ("lg", lambda x, y: x < y or x > y),
        ("u", lambda x, y: x != x or y != y),
        ("o", lambda x, y: x == x and y == y),
    ],
)
def test_float_comparison_with_nan(relation, holds):
    other = np.where(LANE % 7 == 0, F, G)
    group = execute(asm(f"v_cmp_{relation}_f32 vcc, v1, v2"), v={1: F, 2: other})
    assert mask_of(group, 106).tolist() == [bool(holds(x, y)) for x, y in zip(F, other, strict=True)]


# --- packed, by parts, of other lanes


def test_packed_floats_choose_halves_and_signs():
    v = {1: np.float32(2), 2: np.float32(3), 3: np.float32(5), 4: np.float32(7)}
    plain = execute(asm("v_pk_mul_f32 v[6:7], v[1:2], v[3:4]", op_sel_hi=3), v=v)
    assert floats(plain.v[6:8, 0, 0]).tolist() == [10, 21]
    # Lower: upper half of the first, minus lower of the second. Upper: lower of the first, upper of the second.
    line = "v_pk_add_f32 v[6:7], v[1:2], v[3:4]"
    crossed = execute(asm(line, op_sel=1, op_sel_hi=2, neg_lo=2), v=v)
    assert floats(crossed.v[6:8, 0, 0]).tolist() == [3 - 5, 2 + 7]
    fused = execute(asm("v_pk_fma_f32 v[6:7], v[1:2], v[3:4], s[4:5]", op_sel_hi=3, neg_hi=4), v=v, s={4: 1.0, 5: 9.0})
    assert floats(fused.v[6:8, 0, 0]).tolist() == [11, 20]
    constant = execute(asm("v_pk_add_f32 v[6:7], v[1:2], 1.0", op_sel_hi=1), v=v)
    assert floats(constant.v[6:8, 0, 0]).tolist() == [3, 4]


def test_packed_result_may_be_its_source():
    v = {1: np.float32(2), 2: np.float32(3)}
    group = execute(asm("v_pk_add_f32 v[1:2], v[1:2], v[1:2]", op_sel=2, op_sel_hi=1), v=v)
    assert floats(group.v[1:3, 0, 0]).tolist() == [5, 5]
    swapped = execute(asm("v_pk_mov_b32 v[1:2], v[1:2], v[1:2]", op_sel=1, op_sel_hi=3), v=v)
    assert floats(swapped.v[1:3, 0, 0]).tolist() == [3, 2]


def test_sdwa_takes_parts_with_their_sign_and_keeps_others():
    x = X.astype(np.uint32)
    group = execute(
        asm("v_cvt_f32_i32 v0, sext(v1)", encoding="sdwa", src0_sel=2),
        asm("v_or_b32 v2, v3, v1", encoding="sdwa", dst_sel=5, src1_sel=4),
        asm("v_or_b32 v4, v3, v1", encoding="sdwa", dst_sel=1, dst_unused=2),
        asm("v_cndmask_b32 v5, v1, v1, vcc", encoding="sdwa", src0_sel=4, src1_sel=5),
        v={1: x, 3: 0, 4: 0xAABBCCDD},
        s={106: CARRY},
    )
    assert floats(group.v[0, 0]).tolist() == [sign(int(k) >> 16, 8) for k in x]
    assert group.v[2, 0].tolist() == [(int(k) & 0xFFFF) << 16 for k in x]
    assert group.v[4, 0].tolist() == [0xAABB00DD | (int(k) & 0xFF) << 8 for k in x]
    assert group.v[5, 0].tolist() == [int(k) >> 16 if c else int(k) & 0xFFFF for k, c in zip(x, CARRY, strict=True)]


def test_sdwa_compares_parts_with_their_sign():
    group = execute(
        asm("v_cmp_lt_u32 s[4:5], v1, v3", encoding="sdwa", src0_sel=0),
        asm("v_cmp_lt_i32 vcc, sext(v1), v3", encoding="sdwa", src0_sel=5),
        v={1: X, 3: 96},
    )
    assert mask_of(group, 4).tolist() == [int(x) & 0xFF < 96 for x in X]
    assert mask_of(group, 106).tolist() == [sign(int(x) >> 16, 16) < 96 for x in X]


@pytest.mark.parametrize(
    ("control", "source"),
    [
        (0x1B, lambda k: k // 4 * 4 + 3 - k % 4),
        (0x111, lambda k: k - 1 if k % 16 >= 1 else None),
        (0x108, lambda k: k + 8 if k % 16 < 8 else None),
        (0x128, lambda k: k // 16 * 16 + (k - 8) % 16),
        (0x140, lambda k: k // 16 * 16 + 15 - k % 16),
        (0x141, lambda k: k // 8 * 8 + 7 - k % 8),
        (0x142, lambda k: k // 16 * 16 - 1 if k >= 16 else None),
        (0x143, lambda k: 31 if k >= 32 else None),
        (0x153, lambda k: k // 16 * 16 + 3),
    ],
)
@pytest.mark.parametrize("bound", [0, 1])
def test_dpp_reads_the_lanes_it_names(control, source, bound):
    active = LANE != 30
    modifiers = {"dpp_ctrl": control} | ({"bound_ctrl": 1} if bound else {})
    group = execute(asm("v_add_u32 v0, v1, v2", encoding="dpp", **modifiers), v={0: 7, 1: X, 2: Y}, lanes=active)
    want = []
    for k in range(64):
        there = source(k) is not None and active[source(k)]
        moved = int(X[source(k)]) if there else 0
        want.append((moved + int(Y[k])) & M32 if active[k] and (there or bound) else 7)
    assert group.v[0, 0].tolist() == want


def test_dpp_masks_rows_and_banks():
    p = asm("v_mov_b32 v0, v1", encoding="dpp", dpp_ctrl=0xE4, row_mask=0xA, bank_mask=0x3)
    group = execute(p, v={0: 7, 1: LANE})
    assert group.v[0, 0].tolist() == [k if k // 16 % 2 and k % 16 // 4 < 2 else 7 for k in range(64)]


def test_bpermute_reads_zero_of_inactive_lanes():
    active = LANE % 4 != 1
    at = np.random.default_rng(1).integers(0, 256, 64)
    group = execute(asm("ds_bpermute_b32 v0, v1, v2", offset=4), v={0: 7, 1: at, 2: X}, lanes=active)
    source = (at + 4) // 4 % 64
    assert group.v[0, 0].tolist() == [
        (int(X[j]) if active[j] else 0) if on else 7 for j, on in zip(source, active, strict=True)
    ]


@pytest.mark.parametrize(
    ("offset", "source"),
    [(0x801B, lambda k: k // 4 * 4 + 3 - k % 4), (0x041F, lambda k: k ^ 1), (0x7C1F, lambda k: k ^ 31)],
)
def test_swizzle(offset, source):
    group = execute(asm("ds_swizzle_b32 v0, v1", offset=offset), v={1: X})
    assert group.v[0, 0].tolist() == [int(X[source(k)]) for k in range(64)]


@pytest.mark.parametrize("width", [16, 32])
def test_permlane_swap_changes_rows(width):
    group = execute(asm(f"v_permlane{width}_swap_b32 v0, v1"), v={0: LANE, 1: 100 + LANE})
    odd = LANE // width % 2 == 1
    assert group.v[0, 0].tolist() == [100 + k - width if o else k for k, o in zip(LANE, odd, strict=True)]
    assert group.v[1, 0].tolist() == [100 + k if o else k + width for k, o in zip(LANE, odd, strict=True)]


def test_lanes_to_scalars_and_back():
    active = LANE >= 5
    group = execute(
        asm("v_readfirstlane_b32 s4, v1"),
        asm("v_readlane_b32 s5, v1, 63"),
        asm("v_writelane_b32 v2, s5, 2"),
        asm("v_mbcnt_lo_u32_b32 v3, -1, 0"),
        asm("v_mbcnt_hi_u32_b32 v3, -1, v3"),
        v={1: X, 2: 0, 3: 0},
        lanes=active,
    )
    assert group.s[0, 4:6].tolist() == [int(X[5]), int(X[63])]
    assert group.v[2, 0].tolist() == [int(X[63]) if k == 2 else 0 for k in range(64)]  # exec does not matter
    assert group.v[3, 0].tolist() == [k if on else 0 for k, on in zip(LANE, active, strict=True)]


# --- conversions


def test_float_to_int_is_cut_and_held():
    x = np.resize(np.float32([1.9, -1.9, 3e9, -3e9, np.nan, np.inf, -np.inf, 2147483520, 0.5]), 64)
    found = execute(asm("v_cvt_i32_f32 v0, v1"), v={1: x}).v[0, 0].view(np.int32)
    assert found[:9].tolist() == [1, -1, 2**31 - 1, -(2**31), 0, 2**31 - 1, -(2**31), 2147483520, 0]


def test_int_to_float_is_rounded_to_even():
    x = np.resize([2**24 + 1, 2**24 + 3, M32, 0x80000000], 64)
    group = execute(asm("v_cvt_f32_u32 v0, v1"), asm("v_cvt_f32_i32 v2, v1"), v={1: x})
    assert floats(group.v[0, 0])[:4].tolist() == [2.0**24, 2.0**24 + 4, 2.0**32, 2.0**31]
    assert floats(group.v[2, 0])[:4].tolist() == [2.0**24, 2.0**24 + 4, -1, -(2.0**31)]


def test_two_floats_to_bfloat16():
    group = execute(asm("v_cvt_pk_bf16_f32 v0, v1, v2"), v={1: F, 2: G})
    halves = group.v[0, 0].view(np.uint16).reshape(64, 2)
    for k, source in enumerate((F, G)):
        want = source.astype(ml_dtypes.bfloat16).view(np.uint16)
        assert halves[:, k].tolist() == want.tolist()


def test_float8_to_bfloat16_and_back():
    raw = np.arange(256, dtype=np.uint8).reshape(64, 4).view(np.uint32)[:, 0]
    group = execute(
        asm("v_cvt_scalef32_pk_bf16_fp8 v0, v1, 2.0"),
        asm("v_cvt_scalef32_pk_bf16_fp8 v2, v1, 1.0", op_sel=1),
        v={1: raw},
    )
    values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32).reshape(64, 4)
    assert same(group.v[0, 0].view(ml_dtypes.bfloat16).reshape(64, 2), 2 * values[:, :2])
    assert same(group.v[2, 0].view(ml_dtypes.bfloat16).reshape(64, 2), values[:, 2:])


@pytest.mark.parametrize("saturates", [0, 1])
def test_floats_to_float8_past_the_largest(saturates):
    mode = asm(f"s_setreg_imm32_b32 {1 | 23 << 6}, {saturates}")
    v = {0: 0x11223344, 1: np.float32(1000.0), 2: np.float32(-1.0625)}
    group = execute(mode, asm("v_cvt_scalef32_pk_fp8_f32 v0, v1, v2, 0.5", op_sel=8), v=v)
    first = 0x7E if saturates else 0x7F  # 448 or NaN; -2.125 is a tie and becomes -2
    assert group.v[0, 0, 0] == first << 16 | 0xC0 << 24 | 0x3344


# --- products of matrices


@pytest.mark.parametrize(
    ("size", "depth", "kind"),
    [(16, 16, "bf16"), (16, 32, "bf16"), (32, 8, "bf16"), (32, 16, "bf16"), (16, 4, "f32"), (32, 2, "f32")],
)
@pytest.mark.parametrize("file", ["v", "a"])
def test_mfma_equals_the_product(size, depth, kind, file):
    """The layouts as AMD's matrix instruction calculator has them."""
    r = np.random.default_rng(size + depth)
    dtype = ml_dtypes.bfloat16 if kind == "bf16" else np.float32
    left, right = (r.standard_normal((size, depth)).astype(dtype) for _ in range(2))  # the right one transposed
    addend = r.standard_normal((size, size)).astype(np.float32)
    blocks = 64 // size
    each = depth // blocks
    registers, results = each * left.itemsize // 4, size * size // 64
    v: dict = {}
    for first, matrix in ((0, left), (8, right)):
        for lane in range(64):
            row, block = lane % size, lane // size
            words = matrix[row, block * each : (block + 1) * each].copy().view(np.uint32)
            for k in range(registers):
                v.setdefault(first + k, np.zeros(64, np.uint32))[lane] = words[k]
    place = [
        (8 * (k // 4) + 4 * (lane // 32) + k % 4 if size == 32 else 4 * (lane // 16) + k, lane % size, k, lane)
        for k in range(results)
        for lane in range(64)
    ]
    for row, column, k, lane in place:
        v.setdefault(32 + k, np.zeros(64, np.float32))[lane] = addend[row, column]
    names = [f"v{x}" if registers == 1 else f"v[{x}:{x + registers - 1}]" for x in (0, 8)]
    to = f"{file}[{0 if file == 'a' else 32}:{(0 if file == 'a' else 32) + results - 1}]"
    p = asm(f"v_mfma_f32_{size}x{size}x{depth}_{kind} {to}, {names[0]}, {names[1]}, v[32:{31 + results}]")
    # Inactive lanes take part.
    group = execute(p, v=v, lanes=LANE < 3)
    found = (group.a if file == "a" else group.v[32:])[:, 0].view(np.float32)
    want = left.astype(np.float64) @ right.astype(np.float64).T + addend
    for row, column, k, lane in place:
        assert found[k, lane] == np.float32(want[row, column])


# --- memory


def test_lds_two_places_at_once():
    group = execute(
        asm("ds_write2st64_b32 v0, v1, v2", offset0=1, offset1=3),
        asm("ds_read2st64_b32 v[4:5], v0", offset0=3, offset1=1),
        asm("ds_write2_b64 v6, v[1:2], v[1:2]", offset1=64),
        asm("ds_read2_b32 v[8:9], v6", offset0=128, offset1=1),
        v={0: 4 * LANE, 1: X, 2: Y, 6: 8 * LANE},
    )
    assert group.v[4, 0].tolist() == Y.tolist()
    assert group.v[5, 0].tolist() == X.tolist()
    assert group.v[8, 0].tolist() == X.tolist()
    assert group.v[9, 0].tolist() == Y.tolist()


def test_lds_parts_of_registers():
    group = execute(
        asm("ds_write_b32 v0, v1"),
        asm("ds_write_b16_d16_hi v0, v2", offset=256),
        asm("ds_read_u8 v4, v0", offset=1),
        asm("ds_read_i8 v5, v0", offset=3),
        asm("ds_read_u16 v6, v0", offset=256),
        v={0: 4 * LANE, 1: X, 2: Y},
    )
    assert group.v[4, 0].tolist() == [x >> 8 & 255 for x, _, _ in INTS]
    assert group.v[5, 0].view(np.int32).tolist() == [sign(x >> 24, 8) for x, _, _ in INTS]
    assert group.v[6, 0].tolist() == [y >> 16 for _, y, _ in INTS]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("file", ["v", "a"])
def test_rows_of_registers_go_to_memory_and_back(count, file):
    data = np.zeros(64 * 4, np.uint32)
    base = execute(arrays=[data]).machine.memory.starts[0]
    name = "dword" if count == 1 else f"dwordx{count}"
    source, to = (f"v{x}" if count == 1 else f"v[{x}:{x + count - 1}]" for x in (8, 16))
    to = to.replace("v", file)
    want = np.stack([X + k for k in range(4)], -1).astype(np.uint32)
    v = {0: 16 * LANE} | {8 + k: want[:, k] for k in range(4)}
    s = {4: base & M32, 5: base >> 32, 6: data.nbytes, 7: 0x27000}
    for store, load in (
        (asm(f"global_store_{name} v0, {source}, s[4:5]"), asm(f"buffer_load_{name} {to}, v0, s[4:7], 0", offen=1)),
        (asm(f"buffer_store_{name} {source}, v0, s[4:7], 0", offen=1), asm(f"global_load_{name} {to}, v0, s[4:5]")),
        (asm(f"ds_write_b{32 * count} v0, {source}"), asm(f"ds_read_b{32 * count} {to}, v0")),
    ):
        data[:] = 0
        group = execute(store, load, v=v, s=s, arrays=[data])
        registers = (group.a if file == "a" else group.v)[16 : 16 + count, 0]
        assert registers.T.tolist() == want[:, :count].tolist()
        where = group.machine.lds.words if store.name.startswith("ds_") else data
        assert where.reshape(64, 4)[:, :count].tolist() == want[:, :count].tolist()
        assert not where.reshape(64, 4)[:, count:].any()


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_scalar_loads(count):
    data = np.arange(64, dtype=np.uint32)
    base = execute(arrays=[data]).machine.memory.starts[0]
    name, to = ("s_load_dword", "s16") if count == 1 else (f"s_load_dwordx{count}", f"s[16:{15 + count}]")
    group = execute(asm(f"{name} {to}, s[4:5], s6", offset=12), s={4: base & M32, 5: base >> 32, 6: 20}, arrays=[data])
    assert group.s[0, 16 : 16 + count].tolist() == [*range(8, 8 + count)]


def test_accumulation_registers():
    group = execute(
        asm("v_accvgpr_write_b32 a3, v1"), asm("v_accvgpr_mov_b32 a4, a3"), asm("v_accvgpr_read_b32 v2, a4"), v={1: X}
    )
    assert group.v[2, 0].tolist() == X.tolist()


def test_read_over_its_own_address():
    group = execute(
        asm("ds_write_b64 v0, v[2:3]"), asm("ds_read_b64 v[0:1], v0"), v={0: 8 * LANE, 2: X, 3: Y}, lanes=LANE < 9
    )
    assert group.v[:2, 0, :9].tolist() == [X[:9].tolist(), Y[:9].tolist()]


def test_transposed_read_of_lds():
    """Each 16 lanes name quarters of the rows of 4 x 16 halves; lane j of them gets column j."""
    group = execute(asm("ds_read_b64_tr_b16 v[0:1], v2"), v={2: 8 * LANE})
    local = np.arange(256, dtype=np.uint16)
    group = execute(
        asm("ds_write_b64 v2, v[4:5]"),
        asm("ds_read_b64_tr_b16 v[0:1], v2"),
        v={2: 8 * LANE, 4: local.view(np.uint32)[0::2], 5: local.view(np.uint32)[1::2]},
    )
    found = np.stack([group.v[0, 0], group.v[1, 0]], -1).view(np.uint16)
    tiles = local.reshape(4, 4, 16)  # [lanes' block, row, column]
    assert found.tolist() == [tiles[k // 16, :, k % 16].tolist() for k in range(64)]


def test_buffer_past_its_end():
    data = np.arange(256, dtype=np.uint32)
    probe = execute(arrays=[data])
    base = probe.machine.memory.starts[0]
    s = {4: base & M32, 5: base >> 32, 6: 4 * 61, 7: 0x27000, 8: 0}
    load = asm("buffer_load_dwordx2 v[2:3], v0, s[4:7], s8", offen=1, offset=4)
    group = execute(
        load,
        asm("buffer_store_dword v1, v0, s[4:7], 0", offen=1),
        v={0: 8 * LANE, 1: 1000 + LANE, 2: 7, 3: 7},
        s=s,
        arrays=[data],
    )
    # Two words from 2 k + 1 on must end by the 61st, one by the same.
    assert group.v[2, 0].tolist() == [2 * k + 1 if k < 30 else 0 for k in range(64)]
    assert group.v[3, 0].tolist() == [2 * k + 2 if k < 30 else 0 for k in range(64)]
    assert data.tolist() == [1000 + k // 2 if k < 61 and k % 2 == 0 else k for k in range(256)]
    for change, said in (({8: 4}, "partly past the end"), ({5: base >> 32 | 4 << 16}, "with a stride")):
        with pytest.raises(Fault, match=said):
            execute(load, v={0: 8 * LANE}, s=s | change, arrays=[data])


def test_global_parts_and_offsets():
    data = np.zeros(512, np.uint8)
    base = execute(arrays=[data]).machine.memory.starts[0]
    group = execute(
        asm("global_store_short_d16_hi v0, v1, s[4:5]", offset=-64),
        asm("global_store_byte v0, v1, s[4:5]", offset=128),
        asm("global_load_sbyte v2, v0, s[4:5]", offset=128),
        asm("global_load_ushort v3, v0, s[4:5]", offset=-64),
        v={0: 2 * LANE + 64, 1: X},
        s={4: base & M32, 5: base >> 32},
        arrays=[data],
    )
    assert group.v[2, 0].view(np.int32).tolist() == [sign(x, 8) for x, _, _ in INTS]
    assert group.v[3, 0].tolist() == [x >> 16 for x, _, _ in INTS]


# --- scalars


@pytest.mark.parametrize(
    ("line", "want", "scc"),
    [
        ("s_add_u32 s0, s1, s2", lambda x, y, c: x + y, lambda x, y, c, d: x + y > M32),
        ("s_addc_u32 s0, s1, s2", lambda x, y, c: x + y + c, lambda x, y, c, d: x + y + c > M32),
        ("s_sub_u32 s0, s1, s2", lambda x, y, c: x - y, lambda x, y, c, d: x < y),
        ("s_subb_u32 s0, s1, s2", lambda x, y, c: x - y - c, lambda x, y, c, d: x < y + c),
        (
            "s_add_i32 s0, s1, s2",
            lambda x, y, c: x + y,
            lambda x, y, c, d: not -(2**31) <= sign(x) + sign(y) < 2**31,
        ),
        ("s_lshl2_add_u32 s0, s1, s2", lambda x, y, c: (x << 2) + y, lambda x, y, c, d: (x << 2) + y > M32),
        ("s_lshl1_add_u32 s0, s1, s2", lambda x, y, c: (x << 1) + y, lambda x, y, c, d: (x << 1) + y > M32),
        ("s_lshl4_add_u32 s0, s1, s2", lambda x, y, c: (x << 4) + y, lambda x, y, c, d: (x << 4) + y > M32),
        (
            "s_sub_i32 s0, s1, s2",
            lambda x, y, c: x - y,
            lambda x, y, c, d: not -(2**31) <= sign(x) - sign(y) < 2**31,
        ),
        ("s_max_i32 s0, s1, s2", lambda x, y, c: max(sign(x), sign(y)), lambda x, y, c, d: sign(x) > sign(y)),
        ("s_min_u32 s0, s1, s2", lambda x, y, c: min(x, y), lambda x, y, c, d: x < y),
        ("s_max_u32 s0, s1, s2", lambda x, y, c: max(x, y), lambda x, y, c, d: x > y),
        ("s_lshr_b32 s0, s1, s2", lambda x, y, c: x >> (y & 31), lambda x, y, c, d: d != 0),
        ("s_and_b32 s0, s1, s2", lambda x, y, c: x & y, lambda x, y, c, d: d != 0),
        ("s_or_b32 s0, s1, s2", lambda x, y, c: x | y, lambda x, y, c, d: d != 0),
        ("s_xor_b32 s0, s1, s2", lambda x, y, c: x ^ y, lambda x, y, c, d: d != 0),
        ("s_not_b32 s0, s1", lambda x, y, c: ~x, lambda x, y, c, d: d != 0),
        ("s_nand_b32 s0, s1, s2", lambda x, y, c: ~(x & y), lambda x, y, c, d: d != 0),
        ("s_nor_b32 s0, s1, s2", lambda x, y, c: ~(x | y), lambda x, y, c, d: d != 0),
        ("s_xnor_b32 s0, s1, s2", lambda x, y, c: ~(x ^ y), lambda x, y, c, d: d != 0),
        ("s_abs_i32 s0, s1", lambda x, y, c: abs(sign(x)), lambda x, y, c, d: d != 0),
        ("s_mul_hi_u32 s0, s1, s2", lambda x, y, c: x * y >> 32, lambda x, y, c, d: c),
        ("s_sext_i32_i8 s0, s1", lambda x, y, c: sign(x, 8), lambda x, y, c, d: c),
        ("s_addk_i32 s0, -7", lambda x, y, c: 5 - 7, lambda x, y, c, d: 0),
        ("s_mulk_i32 s0, -7", lambda x, y, c: -35, lambda x, y, c, d: c),
        ("s_min_i32 s0, s1, s2", lambda x, y, c: min(sign(x), sign(y)), lambda x, y, c, d: sign(x) < sign(y)),
        ("s_lshl_b32 s0, s1, s2", lambda x, y, c: x << (y & 31), lambda x, y, c, d: d != 0),
        ("s_ashr_i32 s0, s1, s2", lambda x, y, c: sign(x) >> (y & 31), lambda x, y, c, d: d != 0),
        ("s_andn2_b32 s0, s1, s2", lambda x, y, c: x & ~y, lambda x, y, c, d: d != 0),
        ("s_mul_i32 s0, s1, s2", lambda x, y, c: x * y, lambda x, y, c, d: c),
        ("s_mul_hi_i32 s0, s1, s2", lambda x, y, c: sign(x) * sign(y) >> 32, lambda x, y, c, d: c),
        ("s_brev_b32 s0, s1", lambda x, y, c: reversed_bits(x), lambda x, y, c, d: c),
        ("s_sext_i32_i16 s0, s1", lambda x, y, c: sign(x, 16), lambda x, y, c, d: c),
        ("s_movk_i32 s0, -3", lambda x, y, c: -3, lambda x, y, c, d: c),
        ("s_cselect_b32 s0, s1, s2", lambda x, y, c: x if c else y, lambda x, y, c, d: c),
        ("s_cmpk_lt_i32 s1, -3", None, lambda x, y, c, d: sign(x) < -3),
        ("s_cmpk_gt_u32 s1, -3", None, lambda x, y, c, d: x > 0xFFFD),
        ("s_cmp_lt_i32 s1, s2", None, lambda x, y, c, d: sign(x) < sign(y)),
        ("s_cmp_gt_u32 s1, s2", None, lambda x, y, c, d: x > y),
        ("s_cmp_le_u32 s1, s2", None, lambda x, y, c, d: x <= y),
        ("s_cmp_lg_u32 s1, s2", None, lambda x, y, c, d: x != y),
        ("s_cmp_ge_i32 s1, s2", None, lambda x, y, c, d: sign(x) >= sign(y)),
        ("s_bitcmp1_b32 s1, s2", None, lambda x, y, c, d: x >> (y & 31) & 1),
    ],
)
@pytest.mark.parametrize("carry", [0, 1])
def test_scalar_instruction(line, want, scc, carry):
    group = execute(asm(f"s_cmp_eq_u32 {carry}, 1"), asm(line), s={0: 5, 1: X, 2: Y}, waves=64)
    for k, (x, y, _) in enumerate(INTS):
        result = want(x, y, carry) & M32 if want else 5
        assert int(group.s[k, 0]) == result, k
        assert bool(group.scc[k]) == bool(scc(x, y, carry, result)), k


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("s_and_b64 s[8:9], s[0:1], s[2:3]", lambda x, y: x & y),
        ("s_or_b64 s[8:9], s[0:1], s[2:3]", lambda x, y: x | y),
        ("s_xor_b64 s[8:9], s[0:1], s[2:3]", lambda x, y: x ^ y),
        ("s_andn2_b64 s[8:9], s[0:1], s[2:3]", lambda x, y: x & ~y),
        ("s_orn2_b64 s[8:9], s[0:1], s[2:3]", lambda x, y: x | ~y),
        ("s_nor_b64 s[8:9], s[0:1], s[2:3]", lambda x, y: ~(x | y)),
        ("s_lshl_b64 s[8:9], s[0:1], s2", lambda x, y: x << (y & 63)),
        ("s_lshr_b64 s[8:9], s[0:1], s2", lambda x, y: x >> (y & 63)),
        ("s_ashr_i64 s[8:9], s[0:1], s2", lambda x, y: sign(x, 64) >> (y & 63)),
        ("s_cselect_b64 s[8:9], s[0:1], s[2:3]", lambda x, y: y),
    ],
)
def test_scalar_instruction_of_64_bits(line, want):
    group = execute(asm(line), s={0: X, 1: Y, 2: Z, 3: X}, waves=64)
    for k, (x, y, z) in enumerate(INTS):
        result = want(x | y << 32, z | x << 32) & M64
        assert int(group.s[k, 8]) | int(group.s[k, 9]) << 32 == result
        assert bool(group.scc[k]) == (result != 0 and "cselect" not in line)


@pytest.mark.parametrize(("signed", "width"), [(0, 32), (1, 32), (0, 64), (1, 64)])
def test_scalar_bit_field(signed, width):
    name = f"s_bfe_{'ui'[signed]}{width}"
    cases = [(first, size) for first in (0, 7, width - 8) for size in (0, 1, 8, width - first, width)]
    field_of = np.array([first | size << 16 for first, size in cases])
    n = len(cases)
    to, source = ("s[4:5]", "s[0:1]") if width == 64 else ("s4", "s0")
    group = execute(asm(f"{name} {to}, {source}, s2"), s={0: X[:n], 1: Y[:n], 2: field_of, 5: 0}, waves=n)
    for k, (first, size) in enumerate(cases):
        x = (int(X[k]) | int(Y[k]) << 32) & (1 << width) - 1
        shifted = (sign(x, width) if signed else x) >> first
        found = shifted & (1 << size) - 1
        found = sign(found, size) if signed and size else found
        assert int(group.s[k, 4]) | int(group.s[k, 5]) << 32 == found & (1 << width) - 1, (first, size)


def test_saveexec_keeps_the_old_lanes():
    group = execute(asm("s_and_saveexec_b64 s[4:5], vcc"), s={106: LANE % 2 == 0}, lanes=LANE < 10)
    assert mask_of(group, 4).tolist() == (LANE < 10).tolist()
    assert mask_of(group, 126).tolist() == ((LANE < 10) & (LANE % 2 == 0)).tolist()
    assert group.mask[0].tolist() == mask_of(group, 126).tolist()
    assert group.scc[0]


def test_inactive_lanes_are_not_written():
    group = execute(asm("v_mov_b32 v0, v1"), asm("v_mov_b32 v2, 3"), v={0: 7, 1: X, 2: 8}, lanes=LANE == 9)
    assert group.v[0, 0].tolist() == [int(X[9]) if k == 9 else 7 for k in range(64)]
    assert group.v[2, 0].tolist() == [3 if k == 9 else 8 for k in range(64)]


def test_constants_of_64_bits():
    group = execute(asm("s_mov_b64 s[0:1], -1"), asm("s_mov_b64 s[2:3], 0x80000000"), asm("s_mov_b32 s4, 0.5"))
    assert group.s[0, :5].tolist() == [M32, M32, 0x80000000, 0, int(bits(np.float32(0.5)))]
