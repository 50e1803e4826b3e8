"""Contract of the op: causal grouped-query attention of query tiles over each tile's own blocks.

    o_i = sum_j softmax_j(q_i . k_j / sqrt(hd)) v_j    over the keys at first <= j <= position_i of its request

and of attention over latents (MLA), where all query heads share a latent, whose first columns are the value:

    o_i = sum_j softmax_j(scale q_i . c_j) c_j[:value_dim]

A tile holds queries of one request: 64 of a chunk in prefill, one token in decode. The keys of the step itself are
written first. What goes to the null block is padding: kernels do not store it.

Keys and values are stored as bfloat16 or float32, or as int8 or float8_e4m3fn with `scales`; latents as bfloat16 or
float32.
"""

import dataclasses
from typing import TypeAlias

from gdnjax.backend import REFERENCE, Backend
from gdnjax.pallas_kernels.paged_attention import kernels, latent, reference, writes
from gdnjax.pallas_kernels.paged_attention.scales import check, check_latent
from gdnjax.shapes import Array, Float, Float32, Int32, Leaf, Shaped

Scales: TypeAlias = tuple[Float32[Array, "L b p kh"], Float32[Array, "L b p kh"]]
"""Of the keys and of the values of 8-bit pools, one for every token and kv head."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Where the queries of each tile stand. `g` counts tiles."""

    position: Leaf  # [g, q] int32: absolute position of each query, -1 for none (its output is 0)
    block_table: Leaf  # [g, m] int32
    longest: Leaf | int  # [] int32: keys that the longest tile attends to; an int makes the op differentiable
    first: int = 0  # keys at positions before it are masked


def attend(
    q: Float[Array, "g q h hd"],
    k_blocks: Shaped[Array, "L b p kh hd"],
    v_blocks: Shaped[Array, "L b p kh hd"],
    layer: int,
    tiles: Tiles,
    *,
    scales: Scales | None = None,
    gate: Float[Array, "g q gates hd"] | None = None,
    backend: Backend = REFERENCE,
) -> Float[Array, "g q h hd"]:
    """Query head i reads kv head `i // (h / kh)`. Null blocks and keys past a query are selected away, and there are no
    keys behind the table: a query at or past its `m * p` tokens sees those alone. Sums are float32; the output is in
    the dtype of `q`.

    `gate` [g, q, 2 h, hd] multiplies the output of head i by the sigmoid of its row 2 i + 1: what projections give that
    make query and gate of each head side by side.

    Pools of int8 or float8_e4m3fn have `scales`: a key's multiplies its scores, a value's its probabilities. Raises
    ValueError for 8-bit pools without scales, scales of other pools, float8_e4m3fn on CUDA devices before sm_89, and,
    but for the reference, 8-bit pools of 2^31 to 2^32 bytes.
    """
    check(k_blocks, v_blocks, scales, backend)
    if backend.is_reference:
        return reference.attend(q, k_blocks, v_blocks, layer, tiles, scales, gate)
    return kernels.attend(q, k_blocks, v_blocks, layer, tiles, scales, gate, backend)


@dataclasses.dataclass(frozen=True)
class Turn:
    """What becomes of queries and keys before they meet: a norm of each head, and a rotation of its first entries.

    q_weight, k_weight  [hd] of the norms, (centre + weight) each; None: they have had one.
    angles              cos and sin [t, rotary_dim] float32, of which both halves are equal; None: nothing is rotated.
    gated               behind each head of the queries stands a gate, which is left where it is.
    """

    q_weight: Leaf
    k_weight: Leaf
    eps: float
    centre: float
    angles: tuple[Array, Array] | None
    gated: bool


def enter(
    k_blocks: Shaped[Array, "L b p kh hd"],
    v_blocks: Shaped[Array, "L b p kh hd"],
    scales: Scales | None,
    layer: int,
    q: Float[Array, "t rows hd"],
    k: Float[Array, "t kh hd"],
    v: Float[Array, "t kh hd"],
    turn: Turn,
    block: Int32[Array, "t"],
    offset: Int32[Array, "t"],
    *,
    backend: Backend = REFERENCE,
) -> tuple[Float[Array, "t h hd"], Shaped[Array, "L b p kh hd"], Shaped[Array, "L b p kh hd"], Scales | None]:
    """Queries and keys as `turn` says, the keys and values stored as by `write`, or with `scales` by `write_quantised`:
    the queries [t, h, hd], and the pools, which are consumed.

    Norms and rotations are computed in float32, each rounded to the dtype of what it is of. Of more tokens than those
    of a decode step all but the writes are XLA's.
    """
    check(k_blocks, v_blocks, scales, backend)
    if not backend.is_reference and q.shape[0] <= writes.most_entering(backend):
        return writes.enter(k_blocks, v_blocks, scales, layer, q, k, v, turn, block, offset, backend)
    q, k = reference.turned(q, k, turn)
    if scales is None:
        return q, *write(k_blocks, v_blocks, layer, k, v, block, offset, backend=backend), None
    return q, *write_quantised(k_blocks, v_blocks, scales, layer, k, v, block, offset, backend=backend)


def write(
    k_blocks: Shaped[Array, "L b p kh hd"],
    v_blocks: Shaped[Array, "L b p kh hd"],
    layer: int,
    k: Float[Array, "t kh hd"],
    v: Float[Array, "t kh hd"],
    block: Int32[Array, "t"],
    offset: Int32[Array, "t"],
    *,
    backend: Backend = REFERENCE,
) -> tuple[Shaped[Array, "L b p kh hd"], Shaped[Array, "L b p kh hd"]]:
    """Stores each token's keys and values at its (block, offset). Both pools are consumed; padded tokens go to the null
    block. Raises ValueError for 8-bit pools: `write_quantised` is theirs.
    """
    check(k_blocks, v_blocks, None, backend)
    if backend.is_reference:
        return reference.write(k_blocks, v_blocks, layer, k, v, block, offset)
    return writes.write(k_blocks, v_blocks, layer, k, v, block, offset, backend)


def write_quantised(
    k_blocks: Shaped[Array, "L b p kh hd"],
    v_blocks: Shaped[Array, "L b p kh hd"],
    scales: Scales,
    layer: int,
    k: Float[Array, "t kh hd"],
    v: Float[Array, "t kh hd"],
    block: Int32[Array, "t"],
    offset: Int32[Array, "t"],
    *,
    backend: Backend = REFERENCE,
) -> tuple[Shaped[Array, "L b p kh hd"], Shaped[Array, "L b p kh hd"], Scales]:
    """`write` into pools of int8 or float8_e4m3fn: each head of a token is divided by its scale, its largest magnitude
    over the dtype's, and rounded to the nearest. Pools and scales are consumed. Raises ValueError as `attend` does.
    """
    check(k_blocks, v_blocks, scales, backend)
    if backend.is_reference:
        return reference.write_quantised(k_blocks, v_blocks, scales, layer, k, v, block, offset)
    return writes.write_quantised(k_blocks, v_blocks, scales, layer, k, v, block, offset, backend)


def attend_latent(
    q: Float[Array, "g q h lw"],
    pages: Shaped[Array, "L b p lw"],
    layer: int,
    tiles: Tiles,
    *,
    value_dim: int,
    scale: float,
    backend: Backend = REFERENCE,
) -> Float[Array, "g q h {value_dim}"]:
    """Multi-head latent attention in the absorbed form: all query heads read the one latent of a token, and the first
    `value_dim` columns of what is read as keys are the values.

    Positions, null blocks and what is behind the table are as in `attend`; the output is in the dtype of `q`. `scale`
    is of the scores; what the up-projections made of keys and values is already in `q`, and is still to be made of the
    output. Raises ValueError for 8-bit pages, and for a `value_dim` that is not of 1 to lw.
    """
    check_latent(pages)
    if not 0 < value_dim <= pages.shape[-1]:
        raise ValueError(f"value_dim={value_dim} of latents of {pages.shape[-1]}; allowed: 1 to {pages.shape[-1]}")
    if backend.is_reference:
        return reference.attend_latent(q, pages, layer, tiles, value_dim, scale)
    return latent.attend(q, pages, layer, tiles, value_dim, scale, backend)


def write_latent(
    pages: Shaped[Array, "L b p lw"],
    layer: int,
    entries: Float[Array, "t lw"],
    block: Int32[Array, "t"],
    offset: Int32[Array, "t"],
    *,
    backend: Backend = REFERENCE,
) -> Shaped[Array, "L b p lw"]:
    """Stores each token's latent at its (block, offset). The pages are consumed; padded tokens go to the null block.
    Raises ValueError for 8-bit pages.
    """
    check_latent(pages)
    if backend.is_reference:
        return reference.write_latent(pages, layer, entries, block, offset)
    return writes.write_latent(pages, layer, entries, block, offset, backend)
