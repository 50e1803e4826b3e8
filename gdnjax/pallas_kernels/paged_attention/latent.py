"""Attention over pages of latents (multi-head latent attention, arXiv:2405.04434), in the absorbed form.

A token has one latent for all heads. Its first columns are the token's value, and all of them its key: a page is read
once, and the values are the registers that were loaded as keys.

Decode: bytes are the latents, read once for as many heads as a program holds, and again, out of the cache of the
device, for the others; the ceiling is that of reading memory. Prefill is in the absorbed form, too: 2 (lw + value_dim)
operations a pair of query and key and head, 2,176 at 576 and 512. With keys and values made of the latents first
they would be 2 (192 + 128) = 640 at DeepSeek-V3's sizes, and 2 x 512 x 256 more for each key and head, of the cached
prefix, too, in every piece of a prompt. So the absorbed form does 3.4 times the operations of a long prompt's
attention, and less where a piece has fewer than 171 queries; it needs no memory beside the pages.
"""

from gdnjax.backend import Backend
from gdnjax.pallas_kernels.launch import bounded, dot
from gdnjax.pallas_kernels.paged_attention import softmax
from gdnjax.pallas_kernels.paged_attention import tiles as tables
from gdnjax.shapes import Array


def attend(q, pages, layer: int, tiles, value_dim: int, scale: float, backend: Backend) -> Array:
    return softmax.attend(
        _attend,
        backend,
        name="latent_attention",
        tile=tables.of_latents(backend, q.shape[1], q.shape[2], q.dtype.name),
        group=q.shape[2],
        width=value_dim,
        q=q,
        pools=(pages,),
        layer=layer,
        tiles=tiles,
        value_dim=value_dim,
        scale=scale,
    )


def _attend(program, layer_ref, position_ref, table_ref, *refs, plan, value_dim, scale):
    ends_ref, _, (q_ref, pages_ref), outputs = softmax.taken(refs, plan)
    heads, width = q_ref.shape[2:]
    # Blocks are powers of two: the value is one, and what is the key's alone another, if there is any.
    value = lane, mask = softmax.columns(0, value_dim)
    columns = [value, softmax.columns(value_dim, width - value_dim)] if value_dim < width else [value]
    layer = bounded(layer_ref[0], pages_ref.shape[0])

    def run(rows):
        queries = [rows.load(q_ref, *part) for part in columns]

        def page_of(block, offset, there):
            at = layer, block, offset
            keys = [
                softmax.load_keys(pages_ref, at, *part, there).astype(q.dtype)
                for part, q in zip(columns, queries, strict=True)
            ]
            scores, *more = (dot(q, k, contract=(1, 1)) for q, k in zip(queries, keys, strict=True))
            for part in more:
                scores = scores + part
            return scores, lambda p: dot(p.astype(q_ref.dtype), keys[0])

        softmax.walk(rows, plan, table_ref, pages_ref, None, outputs, page_of, lane=lane, mask=mask, scale=scale)

    softmax.for_parts(program, position_ref, ends_ref, heads, plan, run)
