"""Contract of the op: causal grouped-query attention of query tiles over each tile's own blocks.

    o_i = sum_j softmax_j(q_i . k_j / sqrt(hd)) v_j    over the keys at first <= j <= position_i of its request

A tile holds queries of one request: 64 of a chunk in prefill, one token in decode. The keys of the step itself are
written first.
"""

import dataclasses

from gdnjax.backend import REFERENCE, Backend
from gdnjax.pallas_kernels.paged_attention import kernels, reference
from gdnjax.shapes import Array, Float, Int32, Leaf, Shaped


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
    backend: Backend = REFERENCE,
) -> Float[Array, "g q h hd"]:
    """Query head i reads kv head `i // (h / kh)`. Null blocks and keys past a query are selected away. Sums are
    float32; the output is in the dtype of `q`.
    """
    if backend.is_reference:
        return reference.attend(q, k_blocks, v_blocks, layer, tiles)
    return kernels.attend(q, k_blocks, v_blocks, layer, tiles, backend)


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
    block.
    """
    if backend.is_reference:
        return reference.write(k_blocks, v_blocks, layer, k, v, block, offset)
    return kernels.write(k_blocks, v_blocks, layer, k, v, block, offset, backend)
