"""The multi-token-prediction head: from a token and the hidden state before it, the token after it.

    e = norm(embed(token_i)),  h = norm(h_(i-1)),  x = fc([e, h]),  m_i = norm(decoder layer(x))
    logits of token i+1 = shared head(m_i)

h is the target's hidden state after its final norm; further drafts feed m in its place. Source: the published
checkpoints of Qwen3-Next and Qwen3.5 (`mtp.*`), and DeepSeek-V3's (a layer behind the last one, under names that
`gdnjax.checkpoint.names` turns into these) and its report, arXiv:2412.19437, section 2.2.

The layer's keys and values stand at the index of their token. So they depend on the tokens up to it and on nothing
later, and a block of them can be shared by all whose prefix is the same. Index 0 has no hidden state before it: nobody
looks at it.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from gdnjax.backend import Backend
from gdnjax.cache import Cache
from gdnjax.config import LayerKind, ModelConfig
from gdnjax.models.context import DecodeContext, PrefillContext
from gdnjax.models.decoder import DecoderLayer
from gdnjax.models.layers import Linear, Stream, residual_norm
from gdnjax.shapes import Array, Float

FIRST_INDEX = 1
"""The first index at which a token has a hidden state before it."""


class MultiTokenPredictor(nnx.Module):
    """One rank's part. Embedding and head are the target's. Its KV is the row after those of the target's layers."""

    def __init__(self, config: ModelConfig, dtype: str, tp: int, backend: Backend):
        if config.mtp_layers != 1:
            raise ValueError(f"the MTP head needs a configuration with 1 MTP layer, got {config.mtp_layers}")
        width = config.hidden_size
        self.pre_fc_norm_embedding = residual_norm(config, dtype)
        self.pre_fc_norm_hidden = residual_norm(config, dtype)
        self.fc = Linear(2 * width, width, dtype)
        pool_row = config.num_attention_layers
        layer = DecoderLayer(config, LayerKind.ATTENTION, config.mlp_kinds[-1], pool_row, dtype, tp, backend)
        self.layers = nnx.List([layer])
        self.norm = residual_norm(config, dtype)
        self.backend = backend

    def __call__(
        self,
        embedding: Float[Array, "t d"],
        previous: Float[Array, "t d"],
        context: PrefillContext | DecodeContext,
        angles: tuple[Array, Array] | None,
        cache: Cache,
    ) -> tuple[Float[Array, "t d"], Cache]:
        """`previous` holds the hidden state before each token; at index 0 anything. The pools are consumed."""
        context = dataclasses.replace(context, tiles=dataclasses.replace(context.tiles, first=FIRST_INDEX))
        both = [self.pre_fc_norm_embedding(embedding), self.pre_fc_norm_hidden(previous)]
        stream = Stream(self.fc(jnp.concatenate(both, axis=-1)))
        for layer in self.layers:
            stream, cache = layer(stream, context, angles, cache)
        return self.norm.of_stream(stream, self.backend), cache
