"""Multi-head latent attention (MLA): one latent a token in the pages, from which all heads' keys and values come.

    c = norm(x Wa),  r = rotated part of x Wa, shared by all heads        the entry of a token: [c | r]
    k_h = [c Wk_h | r],  v_h = c Wv_h,  q_h = [n_h | rotated part],  o_h = sum_j softmax_j(scale q_h . k_h,j) v_h,j

The latents are never expanded: Wk is absorbed into the queries, q_h . k_h = (n_h Wk_h^T) . c + r's part, and Wv is
applied to the sum of latents. Source: DeepSeek-V2, arXiv:2405.04434, section 2.1; transformers' modeling_deepseek_v3.
"""

import jax.numpy as jnp
from flax import nnx

from gdnjax.backend import Backend, dot_precision
from gdnjax.cache import Cache
from gdnjax.config import ATTENTION, LatentAttentionConfig, ModelConfig
from gdnjax.models.context import DecodeContext, PrefillContext
from gdnjax.models.layers import Linear, RMSNorm, project, project_in_parts
from gdnjax.pallas_kernels import paged_attention
from gdnjax.pallas_kernels.normed import Rows
from gdnjax.pallas_kernels.rotary import rotate
from gdnjax.shapes import Array, Float


class LatentAttention(nnx.Module):
    """One rank's heads of an MLA layer. The result is this rank's term of the sum over ranks; latents are whole on
    every rank. `k_b_proj` and `v_b_proj` are the rows of the checkpoint's `kv_b_proj` that make keys, and values.
    """

    def __init__(self, config: ModelConfig, attention: LatentAttentionConfig, dtype: str, backend: Backend):
        width, heads, rank = config.hidden_size, attention.num_heads, attention.kv_lora_rank
        queries = heads * attention.qk_head_dim
        if attention.q_lora_rank is None:
            self.q_proj = Linear(width, queries, dtype)
        else:
            self.q_a_proj = Linear(width, attention.q_lora_rank, dtype)
            self.q_a_layernorm = RMSNorm(attention.q_lora_rank, attention.norm_eps, dtype, zero_centred=False)
            self.q_b_proj = Linear(attention.q_lora_rank, queries, dtype)
        self.kv_a_proj_with_mqa = Linear(width, attention.latent_dim, dtype)
        self.kv_a_layernorm = RMSNorm(rank, attention.norm_eps, dtype, zero_centred=False)
        self.k_b_proj = Linear(rank, heads * attention.qk_nope_head_dim, dtype)
        self.v_b_proj = Linear(rank, heads * attention.v_head_dim, dtype)
        self.o_proj = Linear(heads * attention.v_head_dim, width, dtype)
        self.attention = attention
        self.backend = backend

    @property
    def inputs(self) -> tuple[Linear, ...]:
        """What meets the rows first, side by side."""
        queries = self.q_proj if self.attention.q_lora_rank is None else self.q_a_proj
        return queries, self.kv_a_proj_with_mqa

    def __call__(
        self,
        x: Rows,
        context: PrefillContext | DecodeContext,
        angles: tuple[Array, Array] | None,
        cache: Cache,
        layer: int,
    ) -> tuple[Float[Array, "s t d"], Cache]:
        """`layer` is the row in the pools. Those of `cache` are consumed."""
        tokens, geometry = x.shape[0], self.attention
        q, latent, shared = self._project(x)
        q, turned = jnp.split(q.reshape(tokens, geometry.num_heads, -1), [geometry.qk_nope_head_dim], axis=-1)
        q = jnp.concatenate([_by_head("thn,hnl->thl", q, self.k_b_proj), rotate(turned, angles)], axis=-1)
        entries = jnp.concatenate([self.kv_a_layernorm(latent), rotate(shared[:, None], angles)[:, 0]], axis=-1)
        places = context.places
        pages = paged_attention.write_latent(
            cache.pages[ATTENTION]["latent"], layer, entries, places.block, places.offset, backend=self.backend
        )
        match context:
            case PrefillContext(chunks=chunks):
                o = chunks.scatter(self._attend(chunks.gather(q), pages, layer, context))
            case DecodeContext():
                o = self._attend(q.reshape(-1, context.rows_per_slot, *q.shape[1:]), pages, layer, context)
                o = o.reshape(tokens, *o.shape[2:])
        o = _by_head("thl,hvl->thv", o, self.v_b_proj)
        return project_in_parts(o.reshape(tokens, -1), self.o_proj, self.backend), cache.with_pages(
            ATTENTION, latent=pages
        )

    def _project(self, x: Rows) -> tuple[Array, Array, Array]:
        """Queries [t, h * hd], latents [t, kv_lora_rank] before their norm, and the shared part of the keys."""
        q, kv = project(x, *self.inputs, backend=self.backend)
        if self.attention.q_lora_rank is not None:
            (q,) = project(self.q_a_layernorm.of(q), self.q_b_proj, backend=self.backend)
        latent, shared = jnp.split(kv, [self.attention.kv_lora_rank], axis=-1)
        return q, latent, shared

    def _attend(self, q: Array, pages: Array, layer: int, context: PrefillContext | DecodeContext) -> Array:
        return paged_attention.attend_latent(
            q,
            pages,
            layer,
            context.tiles,
            value_dim=self.attention.kv_lora_rank,
            scale=self.attention.scale,
            backend=self.backend,
        )


def _by_head(equation: str, x: Float[Array, "t h _"], linear: Linear) -> Float[Array, "t h _"]:
    """A product for each head: `linear` has their matrices one after another."""
    weight = linear.weight[...].reshape(x.shape[1], -1, linear.weight.shape[1])
    return jnp.einsum(equation, x, weight, precision=dot_precision(x.dtype), preferred_element_type=x.dtype)
