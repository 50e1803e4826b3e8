"""Attention over pages of keys and values: `softmax` says how the pages are walked over.

Decode: bytes are the keys and values, read once for all query heads of a group; the ceiling is that of reading memory.
Prefill: 4 hd operations a pair of query and key.
"""

from jax.experimental.pallas import triton as plgpu

from gdnjax.backend import Backend
from gdnjax.pallas_kernels.launch import bounded, dot
from gdnjax.pallas_kernels.paged_attention import softmax
from gdnjax.pallas_kernels.paged_attention import tiles as tables
from gdnjax.shapes import Array


def attend(q, k_blocks, v_blocks, layer: int, tiles, scales, gate, backend: Backend) -> Array:
    return softmax.attend(
        _attend,
        backend,
        name="paged_attention",
        tile=tables.of(backend, q.shape[1]),
        group=q.shape[2] // k_blocks.shape[3],
        width=q.shape[3],
        q=q,
        pools=(k_blocks, v_blocks, *(scales or ())),
        layer=layer,
        tiles=tiles,
        gate=gate,
    )


def _attend(program, layer_ref, position_ref, table_ref, *refs, plan):
    ends_ref, gate_ref, (q_ref, k_ref, v_ref, *scale_refs), outputs = softmax.taken(refs, plan)
    heads, width = q_ref.shape[2:]
    lane, mask = softmax.columns(0, width)
    layer = bounded(layer_ref[0], k_ref.shape[0])

    def run(rows):
        kv_head = rows.part * plan.together // (heads // k_ref.shape[3])
        q = rows.load(q_ref, lane, mask)

        def page_of(block, offset, there):
            at = layer, block, offset, kv_head

            def factor(ref):
                return plgpu.load(ref.at[at], mask=there, other=None if there is None else 0)[None, :]

            k, v = (softmax.load_keys(ref, at, lane, mask, there).astype(q.dtype) for ref in (k_ref, v_ref))
            scores = dot(q, k, contract=(1, 1))
            if not scale_refs:
                return scores, lambda p: dot(p.astype(q.dtype), v)
            return scores * factor(scale_refs[0]), lambda p: dot((p * factor(scale_refs[1])).astype(q.dtype), v)

        softmax.walk(rows, plan, table_ref, k_ref, gate_ref, outputs, page_of, lane=lane, mask=mask, scale=width**-0.5)

    softmax.for_parts(program, position_ref, ends_ref, heads, plan, run)
