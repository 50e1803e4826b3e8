"""The rows of a product in the form in which weights meet them; a norm that they are still to have is taken on the way.

  wide      numbers as they are
  float16   of bfloat16: with a power of two taken out of each row
  halves    of bfloat16: two rows of float8_e4m3fn, a power of two taken out. The first is rounded to 4 significant
            bits, and what is left has 4 bits, too. Nothing is lost of a number above 2^-13 of the row's largest, and
            2^-21 of that largest at most of others

What a form is for is said in `gdnjax.pallas_kernels.codes`. A program of the kernel makes one row: of 4096 numbers it
takes as long as a launch does, where XLA needs a kernel each for the norm's sum, the largest, the halves, and the
factors.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from gdnjax.backend import Backend
from gdnjax.pallas_kernels.launch import LEAST, launch, power_of_two
from gdnjax.pallas_kernels.normed import Normed
from gdnjax.shapes import Array, Float, Float32

WIDE, FLOAT16, HALVES = "wide", "float16", "halves"

PARTS = {WIDE: 1, FLOAT16: 1, HALVES: 2}
"""Rows that one becomes."""

LOW = 16.0
"""What the low halves are multiplied by."""


def rows_of(x: Array | Normed, form: str, backend: Backend, *, wide: bool) -> tuple[Array, ...]:
    """The operands of a launch that rows [t, i] are: themselves, if `wide` or where that is the form; and but for that
    form [PARTS * t, i] in it, and [PARTS * t] float32, what each of these is to be multiplied by.
    """
    (rows, width), formed = x.shape, form != WIDE
    args, norm = ([x.x, x.weight], (x.eps, x.centre)) if isinstance(x, Normed) else ([x], None)
    wide = wide or not formed
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype)] if norm is not None and wide else []
    if formed:
        dtype = jnp.float16 if form == FLOAT16 else jnp.float8_e4m3fn
        out.append(jax.ShapeDtypeStruct((PARTS[form] * rows, width), dtype))
        out.append(jax.ShapeDtypeStruct((PARTS[form] * rows,), jnp.float32))
    made = []
    if out:
        made = launch(
            _make,
            backend,
            name="matmul_rows",
            programs=rows,
            args=args,
            out=out,
            warps=min(16, max(4, power_of_two(width) // 1024)),
            form=form,
            norm=norm,
            wide=norm is not None and wide,
        )
    return (args[0], *made) if norm is None and wide else tuple(made)


def _make(program, x_ref, *refs, form, norm, wide):
    width = x_ref.shape[1]
    lane = jnp.arange(power_of_two(width), dtype=jnp.int32)
    real = None if lane.size == width else lane < width

    def load(ref, *at):
        return plgpu.load(ref.at[(*at, lane)], mask=real, other=None if real is None else 0)

    x = load(x_ref, program)
    if norm is not None:
        (weight_ref, *refs), (eps, centre) = refs, norm
        row = x.astype(jnp.float32)
        row = row * lax.rsqrt(jnp.sum(row * row) / width + eps) * (centre + load(weight_ref).astype(jnp.float32))
        x = row.astype(x.dtype)
    if wide:
        wide_ref, *refs = refs
        plgpu.store(wide_ref.at[program, lane], x, mask=real)
    if form == WIDE:
        return
    formed_ref, factor_ref = refs
    largest = jnp.max(jnp.abs(x).astype(jnp.float32))
    parts = zip(*(_float16_row if form == FLOAT16 else _halves_of)(x, largest), strict=True)
    for part, (row, factor) in enumerate(parts):
        plgpu.store(formed_ref.at[PARTS[form] * program + part, lane], row, mask=real)
        factor_ref[PARTS[form] * program + part] = factor


def halves(x: Float[Array, "t i"]) -> tuple[Array, Float32[Array, "_"]]:
    """[t, i] bfloat16 -> [2 t, i] float8_e4m3fn, high and low half of each row side by side, and [2 t] float32, what
    each is to be multiplied by. By XLA.
    """
    rows, factors = _halves_of(x, jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(jnp.float32))
    return jnp.stack(rows, axis=1).reshape(2 * x.shape[0], x.shape[1]), jnp.concatenate(factors, axis=1).reshape(-1)


def _halves_of(x: Array, largest: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """The two halves of rows, and what each is to be multiplied by. `largest`: the largest magnitude of a row."""
    scale = _power_of_two(largest, 7)
    scaled = x.astype(jnp.float32) / scale
    magnitude = jnp.abs(scaled)
    # Rounded by hand: XLA takes a number that was made float8_e4m3fn and float32 again for what it was before, and
    # nothing would be left. The last place is that of 4 significant bits, and 2^-9 below the least normal number.
    exponent = jnp.maximum(lax.bitcast_convert_type(magnitude, jnp.int32) >> 23, 127 - 6)
    place = lax.bitcast_convert_type((exponent - 3) << 23, jnp.float32)
    high = jnp.floor(magnitude / place + 0.5) * place
    high = jnp.where(scaled < 0, -high, high)
    low = (scaled - high) * LOW
    return (high.astype(jnp.float8_e4m3fn), low.astype(jnp.float8_e4m3fn)), (scale, scale / LOW)


def _float16_row(x: Array, largest: Array) -> tuple[tuple[Array], tuple[Array]]:
    scale = _power_of_two(largest, 14)
    return ((x.astype(jnp.float32) / scale).astype(jnp.float16),), (scale,)


def _power_of_two(largest: Array, exponent: int) -> Array:
    """By which to divide rows so that their largest number is from 2^exponent to twice that."""
    stored = lax.bitcast_convert_type(largest, jnp.int32) >> 23
    stored = jnp.minimum(jnp.maximum(stored - exponent, 1), 254)
    return lax.bitcast_convert_type(stored << 23, jnp.float32)


def joined(total: Array, factor: Array, form: str) -> Array:
    """[columns, PARTS * rows] -> [columns, rows], each part times its factor."""
    total, parts = total * factor[None, :], PARTS[form]
    return total if parts == 1 else jnp.sum(total.reshape(total.shape[0], total.shape[1] // parts, parts), axis=-1)


def padded(rows: int, form: str) -> int:
    """Rows of a block that holds so many: as many as a product on matrix units has at least."""
    return power_of_two(PARTS[form] * rows, LEAST) // PARTS[form]
