"""The decoder of all families: the layers in order, one residual stream, and the MTP head where it is wanted."""

import jax.numpy as jnp
from flax import nnx

from gdnjax.backend import REFERENCE, Backend
from gdnjax.cache import Cache
from gdnjax.config import LayerKind, ModelConfig
from gdnjax.models.context import DecodeContext, FoldContext, PrefillContext
from gdnjax.models.decoder import DecoderLayer
from gdnjax.models.layers import Embedding, Linear, Stream, mask_padded_vocab, residual_norm, rotary_angles
from gdnjax.models.moe import MoeMLP
from gdnjax.models.mtp import MultiTokenPredictor
from gdnjax.pallas_kernels import matmul
from gdnjax.pallas_kernels.matmul import product
from gdnjax.pallas_kernels.normed import numbers
from gdnjax.shapes import Array, Float, Float32, Int32


class CausalLM(nnx.Module):
    """The whole model of one rank: tokens in, final hidden states out, pools threaded through."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: str,
        tp: int = 1,
        mtp: bool = False,
        backend: Backend = REFERENCE,
        draft_head: bool = False,
    ):
        local = config.shard(tp)
        self.embed_tokens = Embedding(local.vocab_size, config.hidden_size, dtype, tp)
        self.layers = nnx.List([DecoderLayer.of(local, i, dtype, tp, backend) for i in range(config.num_layers)])
        self.norm = residual_norm(config, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, local.vocab_size, dtype)
        if mtp:
            self.mtp = MultiTokenPredictor(local, dtype, tp, backend)
        if draft_head:
            self.draft_head = Linear(config.hidden_size, local.vocab_size, dtype)
        self.has_draft_head = draft_head
        assert config.attention is not None, "every configuration of these families has one"
        self.config, self.attention = config, config.attention
        self.tp = tp
        self.backend = backend

    def __call__(
        self, tokens: Int32[Array, "t"], context: PrefillContext | DecodeContext, cache: Cache
    ) -> tuple[Float[Array, "t d"], Cache]:
        """Hidden states after the final norm. The pools are consumed."""
        angles = self._angles(context)
        stream = Stream(self.embed_tokens(tokens))
        for layer in self.layers:
            stream, cache = layer(stream, context, angles, cache)
        return self.norm.of_stream(stream, self.backend), cache

    def expert_choices(
        self, tokens: Int32[Array, "t"], context: PrefillContext | DecodeContext, cache: Cache
    ) -> Int32[Array, "layers t top"]:
        """What the router of each layer with experts chooses; of padded tokens the number past the last expert."""
        angles = self._angles(context)
        stream, chosen = Stream(self.embed_tokens(tokens)), []
        for layer in self.layers:
            stream, cache = layer.mix(stream, context, angles, cache)
            if isinstance(layer.mlp, MoeMLP):
                chosen.append(layer.mlp.choices(numbers(layer.mlp_input(stream)[1]), context.valid)[1])
            stream = layer.feed(stream, context)
        return jnp.stack(chosen)

    def fold(self, context: FoldContext, cache: Cache) -> Cache:
        """Pending rows folded into the states of all layers. The pools are consumed."""
        for layer in self.layers:
            if layer.kind is LayerKind.DELTA:
                cache = layer.linear_attn.fold(context, cache, layer.pool_row)
        return cache

    def draft(
        self,
        tokens: Int32[Array, "t"],
        previous: Float[Array, "t d"],
        context: PrefillContext | DecodeContext,
        cache: Cache,
    ) -> tuple[Float[Array, "t d"], Cache]:
        """The MTP head over tokens and the final hidden states of the tokens before them. The pools are consumed."""
        return self.mtp(self.embed_tokens(tokens), previous, context, self._angles(context), cache)

    def logits(self, hidden: Float[Array, "n d"]) -> Float32[Array, "n V"]:
        """This rank's part of the vocabulary; entries that pad it are -inf."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        logits = product(hidden, head.weight[...], jnp.float32)
        return mask_padded_vocab(logits, self.config, self.tp)

    def draft_logits(self, hidden: Float[Array, "n d"]) -> Float32[Array, "n V"]:
        """The same of hidden states of the MTP head, by the head that drafts are drawn by."""
        if not self.has_draft_head:
            return self.logits(hidden)
        # A few rows at a time: of more, XLA would write the copy out as numbers first.
        step = hidden.shape[0] if self.backend.is_reference else matmul.MOST_ROWS
        weight, dtype = self.draft_head.weight[...], jnp.float32
        logits = [
            matmul.project(hidden[first : first + step], weight, out_dtype=dtype, backend=self.backend)[0]
            for first in range(0, hidden.shape[0], step)
        ]
        return mask_padded_vocab(jnp.concatenate(logits), self.config, self.tp)

    def _angles(self, context: PrefillContext | DecodeContext) -> tuple[Array, Array] | None:
        return rotary_angles(context.position, self.attention)
