"""A decoder layer: a token mixer by kind and an MLP by kind."""

from flax import nnx

from gdnjax import sharding
from gdnjax.backend import Backend
from gdnjax.cache import Cache
from gdnjax.config import (
    AttentionConfig,
    DeltaConfig,
    KimiDeltaConfig,
    LatentAttentionConfig,
    LayerKind,
    MlpKind,
    ModelConfig,
)
from gdnjax.models.attention import Attention
from gdnjax.models.context import DecodeContext, PrefillContext
from gdnjax.models.gated_deltanet import GatedDeltaNet
from gdnjax.models.kimi_delta import KimiDeltaAttention
from gdnjax.models.latent_attention import LatentAttention
from gdnjax.models.layers import DenseMLP, residual_norm
from gdnjax.models.moe import MoeMLP
from gdnjax.pallas_kernels.normed import Normed
from gdnjax.shapes import Array, Float


class DecoderLayer(nnx.Module):
    """A token mixer and an MLP, each summed over ranks and added to the residual stream; each behind a norm, or where
    the configuration says so before one.
    """

    def __init__(
        self,
        config: ModelConfig,
        kind: LayerKind,
        mlp_kind: MlpKind,
        pool_row: int,
        dtype: str,
        tp: int,
        backend: Backend,
    ):
        """`config` is that of one rank; `pool_row` is the layer's row in the pools, which count layers of one kind."""
        self.post_norms = kind in config.post_norm_kinds
        # The names of the checkpoints: one stands behind the mixer in either case, there it ends what the mixer gives.
        self.post_attention_layernorm = residual_norm(config, dtype)
        if self.post_norms:
            self.post_feedforward_layernorm = residual_norm(config, dtype)
        else:
            self.input_layernorm = residual_norm(config, dtype)
        match config.mixer(kind):
            case DeltaConfig() as delta:
                self.linear_attn = GatedDeltaNet(config, delta, dtype, tp, backend)
            case KimiDeltaConfig() as delta:
                self.linear_attn = KimiDeltaAttention(config, delta, dtype, tp, backend)
            case AttentionConfig() as attention:
                self.self_attn = Attention(config, attention, dtype, tp, backend)
            case LatentAttentionConfig() as attention:
                self.self_attn = LatentAttention(config, attention, dtype, backend)
        match mlp_kind:
            case MlpKind.DENSE:
                self.mlp = DenseMLP(config.hidden_size, config.intermediate_size, dtype, backend)
            case MlpKind.MOE:
                assert config.moe is not None  # held by ModelConfig
                self.mlp = MoeMLP(config, config.moe, dtype, tp, backend)
        self.kind = kind
        self.pool_row = pool_row
        self.tp = tp

    @classmethod
    def of(cls, config: ModelConfig, layer: int, dtype: str, tp: int, backend: Backend) -> "DecoderLayer":
        """Layer number `layer` of a model."""
        kind = config.layer_kinds[layer]
        pool_row = config.layer_kinds[:layer].count(kind)
        return cls(config, kind, config.mlp_kinds[layer], pool_row, dtype, tp, backend)

    def __call__(
        self,
        x: Float[Array, "t d"],
        context: PrefillContext | DecodeContext,
        angles: tuple[Array, Array] | None,
        cache: Cache,
    ) -> tuple[Float[Array, "t d"], Cache]:
        x, cache = self.mix(x, context, angles, cache)
        return self.feed(x, context), cache

    def mix(
        self,
        x: Float[Array, "t d"],
        context: PrefillContext | DecodeContext,
        angles: tuple[Array, Array] | None,
        cache: Cache,
    ) -> tuple[Float[Array, "t d"], Cache]:
        """The residual stream behind the token mixer."""
        given = x if self.post_norms else self.input_layernorm.of(x)
        match self.kind:
            case LayerKind.DELTA:
                mixed, cache = self.linear_attn(given, context, cache, self.pool_row)
            case LayerKind.ATTENTION:
                mixed, cache = self.self_attn(given, context, angles, cache, self.pool_row)
        mixed = sharding.psum(mixed, self.tp)
        return x + (self.post_attention_layernorm(mixed) if self.post_norms else mixed), cache

    def mlp_input(self, x: Float[Array, "t d"]) -> Float[Array, "t d"] | Normed:
        """What the MLP is given of the residual stream behind the token mixer."""
        return x if self.post_norms else self.post_attention_layernorm.of(x)

    def feed(self, x: Float[Array, "t d"], context: PrefillContext | DecodeContext) -> Float[Array, "t d"]:
        """The residual stream behind the MLP."""
        out = sharding.psum(self.mlp(self.mlp_input(x), context.valid), self.tp)
        return x + (self.post_feedforward_layernorm(out) if self.post_norms else out)
