"""Contract of the op."""

from gdnjax.backend import REFERENCE, Backend
from gdnjax.pallas_kernels import codes
from gdnjax.pallas_kernels.grouped_matmul import kernels, reference
from gdnjax.pallas_kernels.normed import GateUp, Prepared, numbers
from gdnjax.quantized import Weight
from gdnjax.shapes import Array, Float, Int32


def grouped_matmul(
    x: Float[Array, "t d"] | GateUp | Prepared,
    weight: Weight,
    group_sizes: Int32[Array, "e"],
    *,
    rows: Int32[Array, "n"] | None = None,
    expected_rows: int | None = None,
    backend: Backend = REFERENCE,
) -> Float[Array, "n f"]:
    """Row i of the result is row `rows[i]` of `x` times the transposed weight [e, f, d] of its group; `rows` are sorted
    by group. None: they are x's own, as they stand. Kernels take the rows from where they are, and in the form in which
    they were prepared, for whatever weights, where that is the one they need; else x must have them as they are. Rows
    that are still to be activated (`GateUp`) are, on the way.

    The first `group_sizes[0]` rows are of group 0, and so on. Rows past the sum of the sizes belong to no group; their
    output is unspecified and must be selected away, and kernels do not walk them. About `expected_rows` belong to a
    group (static; None: all): kernels choose their tiles by it, and any number of rows may. Codes that kernels cannot
    take (`codes.can_meet`) are XLA's, group by group.
    """
    if backend.is_reference or not codes.can_meet(backend, x.shape[1], weight):
        whole = numbers(x)
        return reference.grouped_matmul(whole if rows is None else whole[rows], weight, group_sizes)
    if expected_rows is None:
        expected_rows = (x if rows is None else rows).shape[0]
    return kernels.grouped_matmul(x, weight, group_sizes, rows, expected_rows, backend)
