"""Contract of the op."""

from gdnjax.backend import REFERENCE, Backend
from gdnjax.pallas_kernels import codes
from gdnjax.pallas_kernels.grouped_matmul import kernels, reference
from gdnjax.quantized import Weight
from gdnjax.shapes import Array, Float, Int32


def grouped_matmul(
    x: Float[Array, "n d"],
    weight: Weight,
    group_sizes: Int32[Array, "e"],
    *,
    expected_rows: int | None = None,
    backend: Backend = REFERENCE,
) -> Float[Array, "n f"]:
    """Row i of `x` times the transposed weight [e, f, d] of its group; rows are sorted by group.

    The first `group_sizes[0]` rows are of group 0, and so on. Rows past the sum of the sizes belong to no group; their
    output is unspecified and must be selected away, and kernels do not walk them. About `expected_rows` belong to a
    group (static; None: all): kernels choose their tiles by it, and any number of rows may. Codes that kernels cannot
    take (`codes.can_meet`) are XLA's, group by group.
    """
    if backend.is_reference or not codes.can_meet(backend, x.shape[1], weight):
        return reference.grouped_matmul(x, weight, group_sizes)
    return kernels.grouped_matmul(
        x, weight, group_sizes, x.shape[0] if expected_rows is None else expected_rows, backend
    )
