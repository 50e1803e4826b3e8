"""Conversions between formats of numbers."""

import ml_dtypes
import numpy as np

from rocm.emulator.instruction import Instruction
from rocm.emulator.operands import F32, F64, I32, I64, U32, put, vector, viewed

FLOAT8 = ml_dtypes.float8_e4m3fn
"""OCP's, that of gfx950. gfx942 has another in hardware, which no kernel here uses."""


def to_bfloat16(x):
    """float32 -> its bits, in uint32."""
    return np.asarray(x, F32).astype(ml_dtypes.bfloat16).view(np.uint16).astype(U32)


def _to_int(x):
    """Towards zero, held to the range; NaN gives 0."""
    whole = np.trunc(np.nan_to_num(np.asarray(x).astype(F64), nan=0.0, posinf=2.0**31, neginf=-(2.0**31)))
    return whole.clip(-(2**31), 2**31 - 1).astype(I64).astype(U32)


def _mantissa(x):
    mantissa, _ = np.frexp(x)
    return np.asarray(np.where(np.isfinite(x), mantissa, x), F32).view(U32)


def _exponent(x):
    _, exponent = np.frexp(x)
    return np.where(np.isfinite(x), exponent, 0).astype(I32).view(U32)


FROM_FLOATS = {
    "v_cvt_i32_f32": _to_int,
    "v_cvt_pk_bf16_f32": lambda x, y: to_bfloat16(x) | to_bfloat16(y) << U32(16),
    "v_frexp_mant_f32": _mantissa,
    "v_frexp_exp_i32_f32": _exponent,
}
"""Functions of float32 lanes, by the names of their instructions."""


def _power_of_two(scale):
    """Of a scale only its exponent counts."""
    return np.exp2(np.frexp(scale)[1].astype(F32) - 1)


def _from_float8(p: Instruction):
    """Two bytes of a half, which op_sel names, times the scale, to two bfloat16."""
    p.only("op_sel")
    select = p.get("op_sel")
    if select > 1:
        raise NotImplementedError(p.text)
    write, x, scale, at = put(p.operands[0]), vector(p.operands[1]), viewed(p.operands[2], F32), U32(16 * select)

    def run(g):
        raw, factor = x(g) >> at, _power_of_two(scale(g))
        low, high = (
            np.asarray(raw >> U32(k) & U32(255)).astype(np.uint8).view(FLOAT8).astype(F32) * factor for k in (0, 8)
        )
        write(g, to_bfloat16(low) | to_bfloat16(high) << U32(16))

    return run


def _to_float8(p: Instruction):
    """Two floats over the scale to two bytes of a half, which bit 3 of op_sel names; the other half stays."""
    p.only("op_sel")
    if p.get("op_sel") & 7:
        raise NotImplementedError(p.text)
    write, old = put(p.operands[0]), vector(p.operands[0])
    x, y, scale = (viewed(operand, F32) for operand in p.operands[1:])
    at = U32(16 * (p.get("op_sel") >> 3))

    def run(g):
        factor = _power_of_two(scale(g))
        low, high = (_float8_bits(read(g) / factor, g.saturates) for read in (x, y))
        write(g, old(g) & ~(U32(0xFFFF) << at) | (low | high << U32(8)) << at)

    return run


def _float8_bits(x, saturates: bool):
    """Past the largest number, 448: that one, or NaN."""
    x = np.asarray(x, F32)
    x = np.clip(x, -448, 448) if saturates else x
    return x.astype(FLOAT8).view(np.uint8).astype(U32)


SCALED = {"v_cvt_scalef32_pk_bf16_fp8": _from_float8, "v_cvt_scalef32_pk_fp8_f32": _to_float8}
