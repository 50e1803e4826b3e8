"""How long each head of the recurrent layers remembers: tokens after which half of what it holds is left.

A token multiplies the state by exp(g), g = -exp(A_log) softplus(a + dt_bias), a = in_proj_a(x). What the delta rule
overwrites on top is not counted.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gdnjax import step
from gdnjax.batch import PrefillBatch
from gdnjax.config import LayerKind
from gdnjax.models import HybridModel
from gdnjax.models.context import prefill_context
from gdnjax.models.layers import Stream, rotary_angles
from gdnjax.shapes import Params
from gdnjax.state import ServeState

from .documents import Text
from .forcing import OPTIONS, Feeder, Piece, pack


def half_life(g: Any) -> Any:
    """Tokens until exp(g) per token has halved something; `g` is at most 0."""
    return math.log(2) / -g


def log_decay(a_log: Any, dt_bias: Any, a: Any = 0.0) -> Any:
    """g, the logarithm of what a token leaves."""
    return -jnp.exp(jnp.asarray(a_log, jnp.float32)) * jax.nn.softplus(a + jnp.asarray(dt_bias, jnp.float32))


def at_zero(model: HybridModel, params: Params) -> np.ndarray:
    """[GDN layers, value heads]: half-lives where the input adds nothing."""
    layers = merged(model, params).layers
    return np.array(
        [half_life(log_decay(layer.linear_attn.A_log[...], layer.linear_attn.dt_bias[...])) for layer in _delta(layers)]
    )


def merged(model: HybridModel, params: Params) -> Any:
    """The module, to be looked into."""
    return nnx.merge(model.graphdef, params)


def _delta(layers: Sequence[Any]) -> list[Any]:
    return [layer for layer in layers if layer.kind == LayerKind.DELTA]


def decays(model: HybridModel, params: Params, state: ServeState, batch: PrefillBatch) -> jax.Array:
    """[GDN layers, tokens, value heads]: g of every packed token. Traceable."""
    module = merged(model, params)
    context = prefill_context(step.pools_of(state, OPTIONS), batch)
    angles = rotary_angles(context.position, module.attention)
    stream, cache = Stream(module.embed_tokens(batch.tokens)), state.cache
    found = []
    for layer in module.layers:
        if layer.kind == LayerKind.DELTA:
            mixer = layer.linear_attn
            a = mixer.in_proj_a(layer.input_layernorm(stream.whole)).astype(jnp.float32)
            found.append(log_decay(mixer.A_log[...], mixer.dt_bias[...], a))
        stream, cache = layer(stream, context, angles, cache)
    return jnp.stack(found)


def over_texts(feeder: Feeder, texts: Sequence[Text]) -> np.ndarray:
    """[GDN layers, tokens, value heads]: g over texts, which one call must hold."""
    batch = pack([Piece(1 + i, text.ids) for i, text in enumerate(texts)], feeder.tokens, feeder.rows)
    run = jax.jit(lambda params, state, batch: decays(feeder.model, params, state, batch))
    return np.asarray(run(feeder.params, feeder.pools().state, batch))[:, np.asarray(batch.token_valid)]
