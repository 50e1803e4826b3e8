"""The rows of a product in the form in which weights meet them; what is still to be added to them, and a norm or an
activation that they are still to have, come on the way.

  wide      numbers as they are
  float16   of bfloat16: with a power of two taken out of each row
  halves    of bfloat16: two rows of float8_e4m3fn, a power of two taken out. The first is rounded to 4 significant
            bits, and what is left has 4 bits, too. Nothing is lost of a number above 2^-13 of the row's largest, and
            2^-21 of that largest at most of others

What a form is for is said in `gdnjax.pallas_kernels.codes`. A program of the kernel makes one row: of 4096 numbers it
takes as long as a launch does, where XLA needs a kernel each for what is added, the norm's sum, the largest, the
halves, and the factors.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from gdnjax.backend import Backend
from gdnjax.pallas_kernels.launch import LEAST, launch, power_of_two, sigmoid
from gdnjax.pallas_kernels.normed import Gated, GateUp, Normed, Prepared, Rows, numbers
from gdnjax.shapes import Array, Float, Float32

WIDE, FLOAT16, HALVES = "wide", "float16", "halves"

PARTS = {WIDE: 1, FLOAT16: 1, HALVES: 2}
"""Rows that one becomes."""

LOW = 16.0
"""What the low halves are multiplied by."""


def rows_of(x: Rows, form: str, backend: Backend, *, wide: bool) -> tuple[Array, ...]:
    """The operands of a launch that rows [t, i] are: themselves, if `wide` or where that is the form; and but for that
    form [PARTS * t, i] in it, and [PARTS * t] float32, what each of these is to be multiplied by.
    """
    if isinstance(x, Gated | GateUp):
        # A kernel for the gated norm alone is no better than XLA's, nor one for the activation; with the form it is one
        # in place of two.
        if form == WIDE:
            return (numbers(x),)
        made = _gated(x, form, backend, wide=wide) if isinstance(x, Gated) else _activated(x, form, backend, wide=wide)
        return tuple(made)
    if not isinstance(x, Prepared):
        _, x = prepared(x, form, backend, wide=wide)
    assert x.form == form, "rows were prepared for other weights"
    as_they_are = (numbers(x),) if wide or form == WIDE else ()
    return as_they_are if x.formed is None or x.factor is None else (*as_they_are, x.formed, x.factor)


def _gated(x: Gated, form: str, backend: Backend, *, wide: bool) -> list[Array]:
    _, heads, width = x.x.shape
    return launch(
        _make,
        backend,
        name="matmul_rows_gated",
        programs=x.shape[0],
        args=(x.x.reshape(x.shape), x.gate, x.weight),
        out=_out(x, form, wide=wide),
        warps=_warps(heads * width, form),
        form=form,
        norm=(x.eps, 0.0),
        wide=wide,
        added=False,
        gated=(heads, x.activation),
    )


def _activated(x: GateUp, form: str, backend: Backend, *, wide: bool) -> list[Array]:
    return launch(
        _make,
        backend,
        name="matmul_rows_activated",
        programs=x.shape[0],
        args=(x.gate,) if x.up is None else (x.gate, x.up),
        out=_out(x, form, wide=wide),
        warps=_warps(x.shape[1], form),
        form=form,
        norm=None,
        wide=wide,
        added=False,
        activated=jnp.dtype(x.dtype),
        beside=x.up is None,
    )


def _out(x: Array | Normed | Gated | GateUp, form: str, *, wide: bool) -> list[jax.ShapeDtypeStruct]:
    """Rows as they are, if `wide`, in their form, and their factors."""
    (rows, width), parts = x.shape, PARTS[form]
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype)] if wide else []
    if form == WIDE:
        return out
    dtype = jnp.float16 if form == FLOAT16 else jnp.float8_e4m3fn
    out.append(jax.ShapeDtypeStruct((parts * rows, width), dtype))
    return [*out, jax.ShapeDtypeStruct((parts * rows,), jnp.float32)]


def _warps(width: int, form: str) -> int:
    # A row has one program. With four warps, sums of parts come in several waits for memory; in codes, its largest
    # number is another.
    return min(16, max(4, power_of_two(width) // (1024 if form == WIDE else 256)))


def prepared(x: Array | Normed, form: str, backend: Backend, *, wide: bool) -> tuple[Array, Prepared]:
    """Rows [t, i] with all that was added to them, before a norm; and with it, in their form, and as they are, too, if
    `wide`.
    """
    (rows, width), formed = x.shape, form != WIDE
    wide = wide or not formed
    if isinstance(x, Normed):
        whole, norm, added = x.x, (x.eps, x.centre), x.added is not None
        args = [x.x, *([] if x.added is None else [x.added]), x.weight]
    else:
        whole, norm, added, args = x, None, False, [x]
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype)] * added + _out(x, form, wide=norm is not None and wide)
    made = []
    if out:
        made = launch(
            _make,
            backend,
            name="matmul_rows",
            programs=rows,
            args=args,
            out=out,
            warps=_warps(width, form),
            form=form,
            norm=norm,
            wide=norm is not None and wide,
            added=added,
        )
    if added:
        whole, *made = made
    as_they_are = (made.pop(0) if norm is not None else whole) if wide else None
    in_form = made if formed else (None, None)
    return whole, Prepared(form, as_they_are, *in_form, shape=(rows, width), dtype=x.dtype)


def _make(program, x_ref, *refs, form, norm, wide, added, gated=None, activated=None, beside=False):
    width = x_ref.shape[-1] // 2 if beside else x_ref.shape[-1]
    up_ref, refs = (refs[0], refs[1:]) if activated is not None and not beside else (x_ref, refs)
    gate_ref, refs = (refs[0], refs[1:]) if gated else (None, refs)
    heads = gated[0] if gated else 1
    of_head = width // heads
    column = jnp.arange(power_of_two(of_head), dtype=jnp.int32)
    real = None if column.size == of_head else column < of_head
    lane = column
    if gated:
        # Heads are rows of a block, so that each has its own norm.
        head = jnp.arange(power_of_two(heads), dtype=jnp.int32)[:, None]
        lane = head * of_head + column[None, :]
        if (head.size, column.size) != (heads, of_head):
            real = (head < heads) & (column < of_head)[None, :]

    def load(ref, *at, lane=lane):
        return plgpu.load(ref.at[(*at, lane)], mask=real, other=None if real is None else 0)

    def load_total(ref, lane=lane):
        """Of all parts, float32."""
        parts = [load(ref, part, program, lane=lane) for part in range(ref.shape[0])]
        return functools.reduce(jnp.add, (part.astype(jnp.float32) for part in parts))

    if activated is not None:
        gate, up = load_total(x_ref), load_total(up_ref, width + lane if beside else lane)
        x = (gate * sigmoid(gate) * up).astype(activated)
    else:
        x = load(x_ref, program)
    parts_ref, refs = (refs[0], refs[1:]) if added else (None, refs)
    weight_ref, refs = (refs[0], refs[1:]) if norm is not None else (None, refs)
    # Before the row's sum: its threads wait for one another there, and loads do not pass that.
    weight = None if weight_ref is None or gated else load(weight_ref).astype(jnp.float32)
    if parts_ref is not None:
        whole_ref, *refs = refs
        # Rounded as one term, as where it is added by others.
        x = (x.astype(jnp.float32) + load_total(parts_ref).astype(x.dtype).astype(jnp.float32)).astype(x.dtype)
        plgpu.store(whole_ref.at[program, lane], x, mask=real)
    if gated:
        assert weight_ref is not None, "a gated norm has a weight"
        assert norm is not None, "and an epsilon"
        weight = plgpu.load(weight_ref.at[column], mask=column < of_head, other=0).astype(jnp.float32)
        gate, row = load(gate_ref, program), x.astype(jnp.float32)
        row = row * lax.rsqrt(jnp.sum(row * row, axis=1) / of_head + norm[0])[:, None] * weight[None, :]
        open = sigmoid(gate.astype(jnp.float32))
        x = (row * (gate.astype(jnp.float32) * open if gated[1] == "silu" else open)).astype(gate.dtype)
    elif norm is not None:
        eps, centre = norm
        row = x.astype(jnp.float32)
        row = row * lax.rsqrt(jnp.sum(row * row) / width + eps) * (centre + weight)
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
