"""Contract of the op. Both functions return the activated channels and the pool with the rows' new windows.

    y_i = silu(sum_j weight[j] x_(i - w + j)),  j = 0..w;  inputs before the row's first stand in its window

`conv [L, s, w, x]` is consumed (donate it); windows hold raw inputs, oldest first.
"""

from gdnjax.pallas_kernels.causal_conv1d import reference
from gdnjax.pallas_kernels.rows import Chunks, Rows
from gdnjax.shapes import Array, Float, Int32, Shaped


def prefill(
    x: Float[Array, "t x"],
    weight: Float[Array, "x taps"],
    conv: Shaped[Array, "L s w x"],
    layer: int,
    rows: Rows,
    chunks: Chunks,
) -> tuple[Float[Array, "t x"], Shaped[Array, "L s w x"]]:
    """Packed rows of any length. A fresh row starts from a window of zeros.

    Where chunks have checkpoints, the window behind each chunk is stored at its checkpoint's slot, too.
    """
    return reference.prefill(x, weight, conv, layer, rows, chunks)


def decode(
    x: Float[Array, "n x"],
    weight: Float[Array, "x taps"],
    conv: Shaped[Array, "L s w x"],
    layer: int,
    read_slot: Int32[Array, "n"],
    write_slot: Int32[Array, "n"],
) -> tuple[Float[Array, "n x"], Shaped[Array, "L s w x"]]:
    """One token a row."""
    return reference.decode(x, weight, conv, layer, read_slot, write_slot)
