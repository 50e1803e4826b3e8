"""The full-attention layer: q, and its gate if it has one, from one projection, q/k norms, rotary, paged KV."""

import jax
from flax import nnx

from gdnjax.backend import Backend
from gdnjax.cache import Cache, Leaves
from gdnjax.config import ATTENTION, AttentionConfig, ModelConfig
from gdnjax.models.context import DecodeContext, Places, PrefillContext
from gdnjax.models.layers import Linear, RMSNorm, SplitRMSNorm, project, rotate
from gdnjax.pallas_kernels import paged_attention
from gdnjax.pallas_kernels.normed import Normed
from gdnjax.shapes import Array, Float


class Attention(nnx.Module):
    """One rank's heads of an attention layer. The result is this rank's term of the sum over ranks."""

    def __init__(self, config: ModelConfig, attention: AttentionConfig, dtype: str, tp: int, backend: Backend):
        width, eps, zero_centred = config.hidden_size, config.rms_norm_eps, config.zero_centred_norms
        self.q_proj = Linear(width, (1 + attention.output_gate) * attention.num_heads * attention.head_dim, dtype)
        self.k_proj = Linear(width, attention.num_kv_heads * attention.head_dim, dtype)
        self.v_proj = Linear(width, attention.num_kv_heads * attention.head_dim, dtype)
        self.o_proj = Linear(attention.num_heads * attention.head_dim, width, dtype)
        # Names of their own, because their weights are split over ranks.
        if attention.whole_norms:
            queries, keys = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
            self.q_heads_norm = SplitRMSNorm(queries, eps, dtype, tp, zero_centred=zero_centred)
            self.k_heads_norm = SplitRMSNorm(keys, eps, dtype, tp, zero_centred=zero_centred)
        else:
            self.q_norm = RMSNorm(attention.head_dim, eps, dtype, zero_centred=zero_centred)
            self.k_norm = RMSNorm(attention.head_dim, eps, dtype, zero_centred=zero_centred)
        self.attention = attention
        self.backend = backend

    def __call__(
        self,
        x: Float[Array, "t d"] | Normed,
        context: PrefillContext | DecodeContext,
        angles: tuple[Array, Array] | None,
        cache: Cache,
        layer: int,
    ) -> tuple[Float[Array, "t d"], Cache]:
        """`layer` is the row in the pools. Those of `cache` are consumed."""
        tokens, width = x.shape[0], self.attention.head_dim
        q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj, backend=self.backend)
        if self.attention.whole_norms:
            q, k = self.q_heads_norm(q), self.k_heads_norm(k)
        q, k, v = (part.reshape(tokens, -1, width) for part in (q, k, v))
        gate = None
        if self.attention.output_gate:
            # q_proj gives [q | gate] for each head.
            q, gate = q[:, ::2], q[:, 1::2]
        if not self.attention.whole_norms:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, angles), rotate(k, angles)
        pools = _written(cache.pages[ATTENTION], layer, k, v, context.places, self.backend)
        match context:
            case PrefillContext(chunks=chunks):
                o = chunks.scatter(self._attend(chunks.gather(q), pools, layer, context))
            case DecodeContext():
                o = self._attend(q.reshape(-1, context.rows_per_slot, *q.shape[1:]), pools, layer, context)
                o = o.reshape(tokens, *o.shape[2:])
        o = o if gate is None else o * jax.nn.sigmoid(gate)
        (out,) = project(o.reshape(tokens, -1), self.o_proj, backend=self.backend)
        return out, cache.with_pages(ATTENTION, **pools)

    def _attend(self, q: Array, pools: Leaves, layer: int, context: PrefillContext | DecodeContext) -> Array:
        return paged_attention.attend(
            q, pools["k"], pools["v"], layer, context.tiles, scales=_scales_of(pools), backend=self.backend
        )


def _scales_of(pools: Leaves) -> paged_attention.Scales | None:
    """Those of 8-bit pools."""
    return (pools["k_scale"], pools["v_scale"]) if "k_scale" in pools else None


def _written(pools: Leaves, layer: int, k: Array, v: Array, places: Places, backend: Backend) -> Leaves:
    """The pools, which are consumed, with each token's keys and values at its place."""
    args = (layer, k, v, places.block, places.offset)
    scales = _scales_of(pools)
    if scales is None:
        k_blocks, v_blocks = paged_attention.write(pools["k"], pools["v"], *args, backend=backend)
        return {"k": k_blocks, "v": v_blocks}
    k_blocks, v_blocks, (k_scale, v_scale) = paged_attention.write_quantised(
        pools["k"], pools["v"], scales, *args, backend=backend
    )
    return {"k": k_blocks, "v": v_blocks, "k_scale": k_scale, "v_scale": v_scale}
