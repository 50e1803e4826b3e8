"""The layer of Kimi Delta Attention (KDA): the delta rule with a decay for each key channel, low-rank gates, and a
sigmoid gate of the output.

    a = Fb Fa x,  g = -exp(A_log) softplus(a + dt_bias)    [heads, K]        y = Wo (norm(o) * sigmoid(Gb Ga x))

Source: Kimi Linear, arXiv:2510.26692; transformers' modeling_kimi_linear.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from gdnjax.backend import Backend
from gdnjax.config import KimiDeltaConfig, ModelConfig
from gdnjax.models.delta_mixer import Conv1d, DeltaMixer
from gdnjax.models.layers import GatedRMSNorm, Linear, project
from gdnjax.pallas_kernels.gated_delta_rule import Gates
from gdnjax.pallas_kernels.normed import Rows
from gdnjax.shapes import Array


class ForgetGate(nnx.Module):
    """The decay's inputs, by way of `head_dim` numbers that all ranks hold; heads are shared out."""

    def __init__(self, width: int, delta: KimiDeltaConfig, dtype: str):
        self.f_a_proj = Linear(width, delta.head_dim, dtype)
        self.f_b_proj = Linear(delta.head_dim, delta.value_dim, dtype)
        self.A_log = nnx.Param(jnp.zeros((1, 1, delta.num_heads, 1), jnp.float32))
        self.dt_bias = nnx.Param(jnp.zeros((delta.value_dim,), jnp.float32))


class KimiDeltaAttention(DeltaMixer):
    """A decay for each key channel. Of a pending token the pools keep the low-rank input of its decay, not the decay:
    `head_dim` numbers in the place of `num_heads * head_dim`.
    """

    def __init__(self, config: ModelConfig, delta: KimiDeltaConfig, dtype: str, tp: int, backend: Backend):
        width = config.hidden_size
        self.in_proj_qkv = Linear(width, delta.conv_dim, dtype)
        self.in_proj_b = Linear(width, delta.num_heads, dtype)
        self.forget_gate = ForgetGate(width, delta, dtype)
        self.conv1d = Conv1d(delta.conv_dim, delta.conv_kernel, dtype)
        self.g_a_proj = Linear(width, delta.head_dim, dtype)
        self.g_b_proj = Linear(delta.head_dim, delta.value_dim, dtype)
        self.norm = GatedRMSNorm(delta.head_dim, config.rms_norm_eps, dtype, activation="sigmoid")
        self.out_proj = Linear(delta.value_dim, width, dtype)
        self.key_head_dim = delta.head_dim
        self.tp = tp
        self.backend = backend

    @property
    def inputs(self) -> tuple[Linear, ...]:
        return self.in_proj_qkv, self.in_proj_b, self.forget_gate.f_a_proj, self.g_a_proj

    def _project(self, x: Rows) -> tuple[Array, Array, tuple[Array, ...]]:
        qkv, b, f, g = project(x, *self.inputs, backend=self.backend)
        (z,) = project(g, self.g_b_proj, backend=self.backend)
        return qkv, z, (f, b)

    def _gates(self, *raw: Array) -> Gates:
        f, b = raw
        gate = self.forget_gate
        (a,) = project(f.reshape(-1, f.shape[-1]), gate.f_b_proj, backend=self.backend)
        heads, width = b.shape[-1], self.key_head_dim
        return Gates(
            a=a.reshape(*b.shape, width),
            b=b,
            A_log=gate.A_log[...].reshape(heads),
            dt_bias=gate.dt_bias[...].reshape(heads, width),
        )

    def _kept(self, *raw: Array) -> dict[str, Array]:
        return dict(zip(("pending_f", "pending_b"), raw, strict=True))

    def _raw(self, kept: dict[str, Array]) -> Sequence[Array]:
        return kept["pending_f"], kept["pending_b"]
