"""Qwen3.5 and Qwen3-Next: token mixers by kind, MLPs by kind, one residual stream."""

import jax.numpy as jnp
from flax import nnx

from gdnjax import sharding
from gdnjax.config import LayerKind, MlpKind, ModelConfig
from gdnjax.models.attention import GatedAttention
from gdnjax.models.context import DecodeContext, PrefillContext
from gdnjax.models.gated_deltanet import GatedDeltaNet
from gdnjax.models.layers import DenseMLP, Embedding, Linear, RMSNorm, linear, mask_padded_vocab, rotary_angles
from gdnjax.models.moe import MoeMLP
from gdnjax.shapes import Array, Float, Float32, Int32
from gdnjax.state import GDNState, KVBlocks


class DecoderLayer(nnx.Module):
    """A token mixer and an MLP, each behind a norm and added to the residual stream, each summed over ranks."""

    def __init__(self, config: ModelConfig, layer: int, dtype: str, tp: int):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        match config.layer_kinds[layer]:
            case LayerKind.DELTA:
                self.linear_attn = GatedDeltaNet(config, dtype)
            case LayerKind.ATTENTION:
                self.self_attn = GatedAttention(config, dtype)
        match config.mlp_kinds[layer]:
            case MlpKind.DENSE:
                self.mlp = DenseMLP(config.hidden_size, config.intermediate_size, dtype)
            case MlpKind.MOE:
                assert config.moe is not None  # held by ModelConfig
                self.mlp = MoeMLP(config, config.moe, dtype)
        self.kind = config.layer_kinds[layer]
        # A layer's row in the pools counts the layers of its own kind.
        self.pool_row = config.layer_kinds[:layer].count(self.kind)
        self.tp = tp

    def __call__(
        self,
        x: Float[Array, "t d"],
        context: PrefillContext | DecodeContext,
        angles: tuple[Array, Array],
        gdn: GDNState,
        kv: KVBlocks,
    ) -> tuple[Float[Array, "t d"], GDNState, KVBlocks]:
        normal = self.input_layernorm(x)
        match self.kind:
            case LayerKind.DELTA:
                mixed, gdn = self.linear_attn(normal, context, gdn, self.pool_row)
            case LayerKind.ATTENTION:
                mixed, kv = self.self_attn(normal, context, angles, kv, self.pool_row)
        x = x + sharding.psum(mixed, self.tp)
        out = self.mlp(self.post_attention_layernorm(x), context.valid)
        return x + sharding.psum(out, self.tp), gdn, kv


class Qwen3_5(nnx.Module):
    """The whole model of one rank: tokens in, final hidden states out, pools threaded through."""

    def __init__(self, config: ModelConfig, dtype: str, tp: int = 1):
        local = config.shard(tp)
        self.embed_tokens = Embedding(local.vocab_size, config.hidden_size, dtype, tp)
        self.layers = nnx.List([DecoderLayer(local, i, dtype, tp) for i in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, local.vocab_size, dtype)
        self.config = config
        self.tp = tp

    def __call__(
        self, tokens: Int32[Array, "t"], context: PrefillContext | DecodeContext, gdn: GDNState, kv: KVBlocks
    ) -> tuple[Float[Array, "t d"], GDNState, KVBlocks]:
        """Hidden states after the final norm. The pools are consumed."""
        attention = self.config.attention
        angles = rotary_angles(context.position, attention.rotary_dim, attention.rope_theta)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x, gdn, kv = layer(x, context, angles, gdn, kv)
        return self.norm(x), gdn, kv

    def logits(self, hidden: Float[Array, "n d"]) -> Float32[Array, "n V"]:
        """This rank's part of the vocabulary; entries that pad it are -inf."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        logits = linear(hidden, head.weight[...], out_dtype=jnp.float32)
        return mask_padded_vocab(logits, self.config, self.tp)
