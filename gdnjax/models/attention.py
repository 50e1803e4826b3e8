"""The full-attention layer: q, and its gate if it has one, from one projection, q/k norms, rotary, paged KV."""

import jax
from flax import nnx

from gdnjax.backend import Backend
from gdnjax.cache import Cache, Leaves
from gdnjax.config import ATTENTION, AttentionConfig, ModelConfig
from gdnjax.models.context import DecodeContext, PrefillContext
from gdnjax.models.layers import Linear, RMSNorm, SplitRMSNorm, project, project_in_parts
from gdnjax.pallas_kernels import paged_attention
from gdnjax.pallas_kernels.normed import Rows
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

    @property
    def inputs(self) -> tuple[Linear, ...]:
        """What meets the rows first, side by side."""
        return self.q_proj, self.k_proj, self.v_proj

    def __call__(
        self,
        x: Rows,
        context: PrefillContext | DecodeContext,
        angles: tuple[Array, Array] | None,
        cache: Cache,
        layer: int,
    ) -> tuple[Float[Array, "s t d"], Cache]:
        """`layer` is the row in the pools. Those of `cache` are consumed."""
        tokens, width = x.shape[0], self.attention.head_dim
        q, k, v = project(x, *self.inputs, backend=self.backend)
        if self.attention.whole_norms:
            q, k = self.q_heads_norm(q), self.k_heads_norm(k)
        q, k, v = (part.reshape(tokens, -1, width) for part in (q, k, v))
        # q_proj gives [q | gate] for each head.
        both, gated = q, self.attention.output_gate
        turn = self._turn(angles)
        pools, places = cache.pages[ATTENTION], context.places
        q, k_blocks, v_blocks, scales = paged_attention.enter(
            pools["k"], pools["v"], _scales_of(pools), layer, q, k, v, turn, places.block, places.offset,
            backend=self.backend,
        )  # fmt: skip
        pools = {"k": k_blocks, "v": v_blocks}
        if scales is not None:
            pools |= dict(zip(("k_scale", "v_scale"), scales, strict=True))
        match context:
            case PrefillContext(chunks=chunks):
                o = chunks.scatter(self._attend(chunks.gather(q), pools, layer, context))
                o = o * jax.nn.sigmoid(both[:, 1::2]) if gated else o
            case DecodeContext():
                q, both = (x.reshape(-1, context.rows_per_slot, *x.shape[1:]) for x in (q, both))
                o = self._attend(q, pools, layer, context, both if gated else None)
        return project_in_parts(o.reshape(tokens, -1), self.o_proj, self.backend), cache.with_pages(ATTENTION, **pools)

    def _turn(self, angles: tuple[Array, Array] | None) -> paged_attention.Turn:
        """Norm and rotation of a head's queries and keys."""
        weights, norm = (None, None), None
        if not self.attention.whole_norms:
            weights, norm = (self.q_norm.weight[...], self.k_norm.weight[...]), self.q_norm
        return paged_attention.Turn(
            *weights,
            eps=norm.eps if norm else 0.0,
            centre=norm.centre if norm else 0.0,
            angles=angles,
            gated=self.attention.output_gate,
        )

    def _attend(
        self, q: Array, pools: Leaves, layer: int, context: PrefillContext | DecodeContext, gate: Array | None = None
    ) -> Array:
        return paged_attention.attend(
            q, pools["k"], pools["v"], layer, context.tiles, scales=_scales_of(pools), gate=gate, backend=self.backend
        )


def _scales_of(pools: Leaves) -> paged_attention.Scales | None:
    """Those of 8-bit pools."""
    return (pools["k_scale"], pools["v_scale"]) if "k_scale" in pools else None
