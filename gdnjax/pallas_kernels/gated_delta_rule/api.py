"""Contract of the op. The functions return the outputs, before the gated norm, in the dtype of `qkv`, and the pool with
the new states. All sums are float32.

    g = -exp(A_log) softplus(a + dt_bias)    beta = sigmoid(b) beta_scale
    q, k: L2-normalised (eps 1e-6), q scaled by K^-1/2
    S_t = exp(g_t) S_(t-1) + k_t beta_t (v_t - (exp(g_t) S_(t-1))^T k_t)^T;  o_t = S_t^T q_t

Gated DeltaNet, arXiv:2412.06464, where g is a number of each head; Kimi Delta Attention, arXiv:2510.26692, where it is
a vector over K and exp(g_t) S scales the rows of S. The shape of `a` decides. `qkv` is the packed output of the
convolution, [q heads | k heads | v heads], and is indexed inside. `ssm [L, s, hv, k * v]` is consumed (donate it); no
row reads a slot that another row writes, and where the order of a mixed pool changes in place, that is in decode,
verify and fold. Each value head reads key head `hv // (HV / HK)`. Rows that write to the null slot are padding: kernels
give zeros for them, and store nothing.

A pool in bfloat16 keeps states rounded to the nearest, or with `rounding` stochastically; see `rounding.py`. Outputs
are those of float32 states.
"""

import dataclasses

from gdnjax.backend import REFERENCE, Backend
from gdnjax.pallas_kernels.gated_delta_rule import chunked, recurrent, reference, triton_decode
from gdnjax.pallas_kernels.gated_delta_rule.rounding import Rounding
from gdnjax.pallas_kernels.pools import dtype_of
from gdnjax.pallas_kernels.rows import Chunks, Rows
from gdnjax.shapes import Array, Bool, Float, Int32, Leaf, Shaped


@dataclasses.dataclass(frozen=True)
class Gates:
    """The inputs of decay and write strength.

    The decay is one of each head, or with `a` and `dt_bias` of K more channels one of each key channel. `beta_scale`,
    static, is 2 where a write may take more away than was there (a state's eigenvalues then reach -1).
    """

    a: Leaf  # [t, hv] or [t, hv, K]; [n, rows, hv] or [n, rows, hv, K] where requests have several rows
    b: Leaf  # [t, hv], or [n, rows, hv]
    A_log: Leaf  # [hv] float32
    dt_bias: Leaf  # [hv] or [hv, K] float32
    beta_scale: float = 1.0

    @property
    def per_channel(self) -> bool:
        return self.dt_bias.ndim == 2

    def check(self, tokens: tuple[int, ...], heads: int, key_head_dim: int) -> None:
        """Raises ValueError where shapes do not fit each other, `tokens` (all axes of qkv but the last) and heads."""
        shapes = {name: tuple(getattr(self, name).shape) for name in ("a", "b", "A_log", "dt_bias")}
        per_head = {"a": (*tokens, heads), "b": (*tokens, heads), "A_log": (heads,), "dt_bias": (heads,)}
        per_channel = per_head | {name: (*per_head[name], key_head_dim) for name in ("a", "dt_bias")}
        if shapes not in (per_head, per_channel):
            raise ValueError(f"gates of shapes {shapes}; allowed: {per_head}, or a decay per channel, {per_channel}")


@dataclasses.dataclass(frozen=True)
class StateOrder:
    """How rows of the pool are stored: False is KV (k outer, v inner), True is VK.

    `read` is one bool for all rows, or a bool array over the rows where a pool is mixed; `write` is always static.
    """

    read: bool | Bool[Array, "rows"]
    write: bool


def prefill(
    qkv: Float[Array, "t x"],
    gates: Gates,
    ssm: Shaped[Array, "L s hv kv"],
    layer: int,
    rows: Rows,
    chunks: Chunks,
    order: StateOrder,
    *,
    key_head_dim: int,
    rounding: Rounding | None = None,
    backend: Backend = REFERENCE,
) -> tuple[Float[Array, "t hv v"], Shaped[Array, "L s hv kv"]]:
    """Packed rows of any length, in the chunked (WY) form. A fresh row starts from a state of zeros.

    Where chunks have checkpoints, the state behind each chunk is stored at its checkpoint's slot, too.
    """
    gates.check(qkv.shape[:-1], ssm.shape[2], key_head_dim)
    _check_rounding(rounding, ssm)
    if backend.is_reference:
        return reference.prefill(qkv, gates, ssm, layer, rows, chunks, order, key_head_dim, rounding)
    return chunked.prefill(qkv, gates, ssm, layer, rows, chunks, order, key_head_dim, rounding, backend)


def decode(
    qkv: Float[Array, "n x"],
    gates: Gates,
    ssm: Shaped[Array, "L s hv kv"],
    layer: int,
    read_slot: Int32[Array, "n"],
    write_slot: Int32[Array, "n"],
    order: StateOrder,
    *,
    key_head_dim: int,
    rounding: Rounding | None = None,
    backend: Backend = REFERENCE,
) -> tuple[Float[Array, "n hv v"], Shaped[Array, "L s hv kv"]]:
    """One token a row, in the recurrent form.

    `Backend("triton")` runs it as a kernel in Triton, by jax_triton: of states in one order, rounded to the nearest,
    with a decay of each head. Raises ValueError for others, ImportError where jax_triton is missing.
    """
    gates.check(qkv.shape[:-1], ssm.shape[2], key_head_dim)
    _check_rounding(rounding, ssm)
    if backend.is_triton:
        return triton_decode.decode(
            qkv, gates, ssm, layer, read_slot, write_slot, order, key_head_dim, rounding, backend
        )
    if backend.is_reference:
        return reference.decode(qkv, gates, ssm, layer, read_slot, write_slot, order, key_head_dim, rounding)
    return recurrent.decode(qkv, gates, ssm, layer, read_slot, write_slot, order, key_head_dim, rounding, backend)


def verify(
    qkv: Float[Array, "n rows x"],
    gates: Gates,
    ssm: Shaped[Array, "L s hv kv"],
    layer: int,
    read_slot: Int32[Array, "n"],
    write_slot: Int32[Array, "n"],
    pending: Int32[Array, "n"],
    order: StateOrder,
    *,
    key_head_dim: int,
    new: int,
    rounding: Rounding | None = None,
    backend: Backend = REFERENCE,
) -> tuple[Float[Array, "n T hv v"], Shaped[Array, "L s hv kv"]]:
    """Pending rows, then T = `new` rows (static), which are the last ones of `rows`.

    The state with the first `pending` rows folded in is stored; the outputs are those of the new rows, which go on from
    there and change nothing that is stored. One read and one write of the state, however many rows.
    """
    gates.check(qkv.shape[:-1], ssm.shape[2], key_head_dim)
    _check_rounding(rounding, ssm)
    if backend.is_reference:
        return reference.verify(
            qkv, gates, ssm, layer, read_slot, write_slot, pending, order, key_head_dim, new, rounding
        )
    return recurrent.verify(
        qkv, gates, ssm, layer, read_slot, write_slot, pending, order, key_head_dim, new, rounding, backend
    )


def fold(
    qkv: Float[Array, "n rows x"],
    gates: Gates,
    ssm: Shaped[Array, "L s hv kv"],
    layer: int,
    read_slot: Int32[Array, "n"],
    write_slot: Int32[Array, "n"],
    count: Int32[Array, "n"],
    order: StateOrder,
    *,
    key_head_dim: int,
    rounding: Rounding | None = None,
    backend: Backend = REFERENCE,
) -> Shaped[Array, "L s hv kv"]:
    """The state with the first `count` rows folded in is stored."""
    gates.check(qkv.shape[:-1], ssm.shape[2], key_head_dim)
    _check_rounding(rounding, ssm)
    if backend.is_reference:
        return reference.fold(qkv, gates, ssm, layer, read_slot, write_slot, count, order, key_head_dim, rounding)
    return recurrent.fold(qkv, gates, ssm, layer, read_slot, write_slot, count, order, key_head_dim, rounding, backend)


def _check_rounding(rounding: Rounding | None, ssm: Array) -> None:
    if rounding is not None and dtype_of(ssm) != "bfloat16":
        raise ValueError(f"states are rounded stochastically to bfloat16 alone, got a pool of {dtype_of(ssm)}")
