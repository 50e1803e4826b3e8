"""Contract of the op. Every function returns the activated channels and the pool with the rows' new windows.

    y_i = silu(sum_j weight[j] x_(i - w + j)),  j = 0..w;  inputs before the row's first stand in its window

`conv [L, s, w, x]` is consumed (donate it); windows hold raw inputs, oldest first. With speculation a slot has P rows
more, behind the window: the raw inputs of the tokens that the last step verified, of which the first are pending.
Rows that write to the null slot are padding: kernels give zeros for them, and store nothing.
"""

from gdnjax.backend import REFERENCE, Backend
from gdnjax.pallas_kernels.causal_conv1d import kernels, reference
from gdnjax.pallas_kernels.rows import Chunks, Rows
from gdnjax.shapes import Array, Float, Int32, Shaped


def prefill(
    x: Float[Array, "t x"],
    weight: Float[Array, "x taps"],
    conv: Shaped[Array, "L s w x"],
    layer: int,
    rows: Rows,
    chunks: Chunks,
    *,
    backend: Backend = REFERENCE,
) -> tuple[Float[Array, "t x"], Shaped[Array, "L s w x"]]:
    """Packed rows of any length. A fresh row starts from a window of zeros.

    Where chunks have checkpoints, the window behind each chunk is stored at its checkpoint's slot, too.
    """
    if backend.is_reference:
        return reference.prefill(x, weight, conv, layer, rows, chunks)
    return kernels.prefill(x, weight, conv, layer, rows, chunks, backend)


def decode(
    x: Float[Array, "n x"],
    weight: Float[Array, "x taps"],
    conv: Shaped[Array, "L s w x"],
    layer: int,
    read_slot: Int32[Array, "n"],
    write_slot: Int32[Array, "n"],
    *,
    backend: Backend = REFERENCE,
) -> tuple[Float[Array, "n x"], Shaped[Array, "L s w x"]]:
    """One token a row. The pool has no rows behind the window."""
    if backend.is_reference:
        return reference.decode(x, weight, conv, layer, read_slot, write_slot)
    return kernels.decode(x, weight, conv, layer, read_slot, write_slot, backend)


def verify(
    x: Float[Array, "n T x"],
    weight: Float[Array, "x taps"],
    conv: Shaped[Array, "L s w x"],
    layer: int,
    read_slot: Int32[Array, "n"],
    write_slot: Int32[Array, "n"],
    pending: Int32[Array, "n"],
    *,
    backend: Backend = REFERENCE,
) -> tuple[Float[Array, "n rows x"], Shaped[Array, "L s w x"]]:
    """T tokens a row, at most P, behind the row's `pending` ones.

    Returns P + T rows of channels: those of the pending tokens, as they were computed first (rows past their count mean
    nothing), then those of `x`. The window moves on by the pending tokens, and `x` takes their place behind it.
    """
    if backend.is_reference:
        return reference.verify(x, weight, conv, layer, read_slot, write_slot, pending)
    return kernels.verify(x, weight, conv, layer, read_slot, write_slot, pending, backend)


def fold(
    weight: Float[Array, "x taps"],
    conv: Shaped[Array, "L s w x"],
    layer: int,
    read_slot: Int32[Array, "n"],
    write_slot: Int32[Array, "n"],
    count: Int32[Array, "n"],
    *,
    backend: Backend = REFERENCE,
) -> tuple[Float[Array, "n P x"], Shaped[Array, "L s w x"]]:
    """The channels of P pending rows, of which the first `count` mean something; the window moves on by those."""
    if backend.is_reference:
        return reference.fold(weight, conv, layer, read_slot, write_slot, count)
    return kernels.fold(weight, conv, layer, read_slot, write_slot, count, backend)
