"""The small parts: products, norms, rotary embedding, embedding and head, dense MLP.

Weights are stored as in the checkpoint, [out, in]. Modules hold the parameters of one rank and nothing else.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from gdnjax import sharding
from gdnjax.backend import Backend
from gdnjax.config import AttentionConfig, LatentAttentionConfig, ModelConfig, YarnConfig
from gdnjax.pallas_kernels import matmul
from gdnjax.pallas_kernels.normed import Gated, Normed, Prepared, Rows, gated_rms_norm, numbers, rms_norm, summed
from gdnjax.shapes import Array, Bool, Float, Float32, Int32


@dataclasses.dataclass(frozen=True)
class Stream:
    """The residual stream: x, and a term in parts that is still to be added to it; whoever takes a norm of it does."""

    x: Float[Array, "t d"]
    added: Float[Array, "s t d"] | None = None

    @property
    def whole(self) -> Float[Array, "t d"]:
        return summed(self.x, self.added)


class Linear(nnx.Module):
    """A product without bias."""

    def __init__(self, inputs: int, outputs: int, dtype: str):
        self.weight = nnx.Param(jnp.zeros((outputs, inputs), dtype))

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        return matmul.product(x, self.weight[...])


def project(x: Rows, *linears: Linear, backend: Backend) -> tuple[Float[Array, "t _"], ...]:
    """Several products of the same rows, side by side."""
    return matmul.project(x, *(linear.weight[...] for linear in linears), backend=backend)


def project_in_parts(x: Rows, linear: Linear, backend: Backend) -> Float[Array, "s t _"]:
    """A product that is added to the residual stream, as parts whose sum it is."""
    return matmul.project_in_parts(x, linear.weight[...], backend=backend)


class RMSNorm(nnx.Module):
    """Zero-centred, x / rms(x) * (1 + w), or plain, x / rms(x) * w; in float32."""

    def __init__(self, width: int, eps: float, dtype: str, *, zero_centred: bool = True):
        self.weight = nnx.Param(jnp.zeros((width,), dtype))
        self.eps = eps
        self.centre = 1.0 if zero_centred else 0.0

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        return rms_norm(x, self.weight[...], self.eps, self.centre)

    def of(self, x: Float[Array, "t d"], added: Float[Array, "s t d"] | None = None) -> Normed:
        """The same of x + `added`, to be taken by whoever multiplies the rows."""
        return Normed(x, self.weight[...], self.eps, self.centre, added)

    def of_stream(self, stream: Stream, backend: Backend) -> Float[Array, "t d"]:
        """The norm of the whole residual stream."""
        return numbers(self.prepare(stream, (), backend)[1])

    def prepare(
        self, stream: Stream, linears: Sequence[Linear], backend: Backend, *, gated: bool = False, wide: bool = False
    ) -> tuple[Float[Array, "t d"], Prepared]:
        """The whole residual stream, and its norm as the rows of products by just these, of SwiGLU's if `gated`, and as
        numbers, too, if `wide`.
        """
        weights = (linear.weight[...] for linear in linears)
        return matmul.prepare(self.of(stream.x, stream.added), *weights, gated=gated, wide=wide, backend=backend)


class SplitRMSNorm(nnx.Module):
    """An RMSNorm over a width that ranks share out evenly, each part as often as any other."""

    def __init__(self, width: int, eps: float, dtype: str, tp: int, *, zero_centred: bool):
        """`width` is that of one rank."""
        self.weight = nnx.Param(jnp.zeros((width,), dtype))
        self.eps = eps
        self.tp = tp
        self.centre = 1.0 if zero_centred else 0.0

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        wide = x.astype(jnp.float32)
        square = sharding.psum(jnp.mean(wide * wide, axis=-1, keepdims=True), self.tp) / self.tp
        normal = wide * lax.rsqrt(square + self.eps)
        return (normal * (self.centre + self.weight[...].astype(jnp.float32))).astype(x.dtype)


def residual_norm(config: ModelConfig, dtype: str) -> RMSNorm:
    """A norm of the residual stream."""
    return RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, zero_centred=config.zero_centred_norms)


class GatedRMSNorm(nnx.Module):
    """Plain weight, gated: x / rms(x) * w * silu(gate), or sigmoid(gate). The result has the gate's dtype."""

    def __init__(self, width: int, eps: float, dtype: str, *, activation: str = "silu"):
        self.weight = nnx.Param(jnp.zeros((width,), dtype))
        self.eps = eps
        self.activation = activation

    def __call__(self, x: Float[Array, "... v"], gate: Float[Array, "... v"]) -> Float[Array, "... v"]:
        return gated_rms_norm(x, gate, self.weight[...], self.eps, self.activation)

    def of(self, x: Float[Array, "t h v"], gate: Float[Array, "t i"]) -> Gated:
        """The same, to be taken by whoever multiplies the rows [t, h * v]."""
        return Gated(x, gate, self.weight[...], self.eps, self.activation)


def rotary_angles(
    position: Int32[Array, "t"], attention: AttentionConfig | LatentAttentionConfig
) -> tuple[Array, Array] | None:
    """cos and sin [t, rotary_dim], float32; None where nothing is rotated.

    Text has one position for all three sections of the interleaved mrope, so the sections do not show.
    """
    size, theta, yarn = attention.rotary_dim, attention.rope_theta, attention.yarn
    if theta is None or size is None:
        return None
    if yarn is None:
        frequency = theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    else:
        frequency = yarn_frequencies(size, theta, yarn)
    angle = position.astype(jnp.float32)[:, None] * frequency
    angle = jnp.concatenate([angle, angle], axis=-1)
    if yarn is None:
        return jnp.cos(angle), jnp.sin(angle)
    return jnp.cos(angle) * yarn.attention_factor, jnp.sin(angle) * yarn.attention_factor


def yarn_frequencies(rotary_dim: int, theta: float, yarn: YarnConfig) -> np.ndarray:
    """Radians a token, float32 [rotary_dim / 2]. YaRN, arXiv:2309.00071, section 3.2.

    A pair of dimensions that turns beta_fast times or more within the training's context keeps its frequency, one of
    beta_slow turns or fewer has it divided by the factor, and between their dimensions the share rises linearly.
    Computed in float64: near the end of a long context an error of the frequency is multiplied by a million.
    """
    dim = np.arange(0, rotary_dim, 2) / rotary_dim
    frequency = theta**-dim

    def dim_of(turns: float) -> float:
        return rotary_dim * math.log(yarn.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_of(yarn.beta_fast), dim_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    # Bounds that fall together would divide by 0; this is what transformers puts between them.
    high = high + 0.001 if low == high else high
    share = np.clip((np.arange(rotary_dim // 2) - low) / (high - low), 0, 1)
    return (frequency * (1 - share) + frequency / yarn.factor * share).astype(np.float32)


class Embedding(nnx.Module):
    """Token vectors and, where the head is tied, the head. The vocabulary is split over ranks."""

    def __init__(self, vocab: int, width: int, dtype: str, tp: int):
        self.weight = nnx.Param(jnp.zeros((vocab, width), dtype))
        self.tp = tp

    def __call__(self, tokens: Int32[Array, "t"]) -> Float[Array, "t d"]:
        weight = self.weight[...]
        local = tokens - sharding.rank(self.tp) * weight.shape[0]
        mine = (local >= 0) & (local < weight.shape[0])
        vectors = jnp.where(mine[:, None], weight[jnp.clip(local, 0, weight.shape[0] - 1)], 0)
        return sharding.psum(vectors, self.tp)


class DenseMLP(nnx.Module):
    """SwiGLU. Column-parallel in, row-parallel out; the caller sums over ranks."""

    takes_numbers = False

    def __init__(self, width: int, intermediate: int, dtype: str, backend: Backend):
        self.gate_proj = Linear(width, intermediate, dtype)
        self.up_proj = Linear(width, intermediate, dtype)
        self.down_proj = Linear(intermediate, width, dtype)
        self.backend = backend

    @property
    def inputs(self) -> tuple[Linear, ...]:
        """What meets the rows first: side by side, gated."""
        return self.gate_proj, self.up_proj

    def __call__(self, x: Rows, valid: Bool[Array, "t"]) -> Float[Array, "s t d"]:
        del valid  # padded rows are computed like any other and never read
        gate, up = self.gate_proj.weight[...], self.up_proj.weight[...]
        return project_in_parts(matmul.gate_up(x, gate, up, backend=self.backend), self.down_proj, self.backend)


def mask_padded_vocab(logits: Float32[Array, "n V"], config: ModelConfig, tp: int) -> Float32[Array, "n V"]:
    """-inf for the entries that pad the vocabulary to a multiple of the ranks."""
    if config.padded_vocab_size(tp) == config.vocab_size:
        return logits
    token = jnp.arange(logits.shape[1]) + sharding.rank(tp) * logits.shape[1]
    return jnp.where(token < config.vocab_size, logits, -jnp.inf)
