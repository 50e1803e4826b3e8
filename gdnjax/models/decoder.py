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
from gdnjax.models.layers import DenseMLP, RMSNorm, Stream, residual_norm
from gdnjax.models.moe import MoeMLP
from gdnjax.pallas_kernels.normed import Rows, total
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
        self.backend = backend

    @classmethod
    def of(cls, config: ModelConfig, layer: int, dtype: str, tp: int, backend: Backend) -> "DecoderLayer":
        """Layer number `layer` of a model."""
        kind = config.layer_kinds[layer]
        pool_row = config.layer_kinds[:layer].count(kind)
        return cls(config, kind, config.mlp_kinds[layer], pool_row, dtype, tp, backend)

    def __call__(
        self,
        stream: Stream,
        context: PrefillContext | DecodeContext,
        angles: tuple[Array, Array] | None,
        cache: Cache,
    ) -> tuple[Stream, Cache]:
        stream, cache = self.mix(stream, context, angles, cache)
        return self.feed(stream, context), cache

    def mix(
        self,
        stream: Stream,
        context: PrefillContext | DecodeContext,
        angles: tuple[Array, Array] | None,
        cache: Cache,
    ) -> tuple[Stream, Cache]:
        """The residual stream behind the token mixer."""
        mixer = self.linear_attn if self.kind is LayerKind.DELTA else self.self_attn
        if self.post_norms:
            x = given = stream.whole
        else:
            x, given = self.input_layernorm.prepare(stream, mixer.inputs, self.backend)
        match self.kind:
            case LayerKind.DELTA:
                mixed, cache = self.linear_attn(given, context, cache, self.pool_row)
            case LayerKind.ATTENTION:
                mixed, cache = self.self_attn(given, context, angles, cache, self.pool_row)
        return self._behind(x, mixed, self.post_attention_layernorm if self.post_norms else None), cache

    def mlp_input(self, stream: Stream) -> tuple[Float[Array, "t d"], Rows]:
        """The residual stream behind the token mixer, and what the MLP is given of it."""
        if self.post_norms:
            return stream.whole, stream.whole
        norm, wide = self.post_attention_layernorm, self.mlp.takes_numbers
        return norm.prepare(stream, self.mlp.inputs, self.backend, gated=True, wide=wide)

    def feed(self, stream: Stream, context: PrefillContext | DecodeContext) -> Stream:
        """The residual stream behind the MLP."""
        x, given = self.mlp_input(stream)
        norm = self.post_feedforward_layernorm if self.post_norms else None
        return self._behind(x, self.mlp(given, context.valid), norm)

    def _behind(self, x: Float[Array, "t d"], parts: Float[Array, "s t d"], post_norm: RMSNorm | None) -> Stream:
        """The residual stream x with a term, of which this rank has a part, in parts of its own."""
        if self.tp > 1:
            parts = sharding.psum(total(parts, x.dtype), self.tp)[None]
        if not self.post_norms:
            return Stream(x, parts)
        assert post_norm is not None, "made where norms are behind"
        return Stream(x + post_norm(total(parts, x.dtype)))
