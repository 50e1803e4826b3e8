"""The Gated DeltaNet layer: projections, convolution, delta rule, gated norm."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from gdnjax.backend import Backend
from gdnjax.config import DeltaConfig, ModelConfig
from gdnjax.models.delta_mixer import Conv1d, DeltaMixer
from gdnjax.models.layers import GatedRMSNorm, Linear, project
from gdnjax.pallas_kernels.gated_delta_rule import Gates
from gdnjax.pallas_kernels.normed import Rows
from gdnjax.shapes import Array


class GatedDeltaNet(DeltaMixer):
    """A decay for each head and token, and an output gate of its own projection."""

    def __init__(self, config: ModelConfig, delta: DeltaConfig, dtype: str, tp: int, backend: Backend):
        width = config.hidden_size
        self.in_proj_qkv = Linear(width, delta.conv_dim, dtype)
        self.in_proj_z = Linear(width, delta.value_dim, dtype)
        self.in_proj_b = Linear(width, delta.num_value_heads, dtype)
        self.in_proj_a = Linear(width, delta.num_value_heads, dtype)
        self.conv1d = Conv1d(delta.conv_dim, delta.conv_kernel, dtype)
        self.A_log = nnx.Param(jnp.zeros((delta.num_value_heads,), jnp.float32))
        self.dt_bias = nnx.Param(jnp.zeros((delta.num_value_heads,), jnp.float32))
        eps = config.rms_norm_eps if delta.norm_eps is None else delta.norm_eps
        self.norm = GatedRMSNorm(delta.value_head_dim, eps, dtype)
        self.out_proj = Linear(delta.value_dim, width, dtype)
        self.key_head_dim = delta.key_head_dim
        self.beta_scale = delta.beta_scale
        self.tp = tp
        self.backend = backend

    @property
    def inputs(self) -> tuple[Linear, ...]:
        return self.in_proj_qkv, self.in_proj_z, self.in_proj_a, self.in_proj_b

    def _project(self, x: Rows) -> tuple[Array, Array, tuple[Array, ...]]:
        qkv, z, a, b = project(x, *self.inputs, backend=self.backend)
        return qkv, z, (a, b)

    def _gates(self, *raw: Array) -> Gates:
        a, b = raw
        return Gates(a=a, b=b, A_log=self.A_log[...], dt_bias=self.dt_bias[...], beta_scale=self.beta_scale)

    def _kept(self, *raw: Array) -> dict[str, Array]:
        return {"pending_ab": jnp.concatenate(raw, axis=-1)}

    def _raw(self, kept: dict[str, Array]) -> Sequence[Array]:
        return jnp.split(kept["pending_ab"], 2, axis=-1)
