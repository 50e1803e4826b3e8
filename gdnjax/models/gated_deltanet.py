"""The Gated DeltaNet layer: projections, convolution, delta rule, gated norm."""

import jax.numpy as jnp
from flax import nnx

from gdnjax.config import ModelConfig
from gdnjax.models.context import DecodeContext, PrefillContext
from gdnjax.models.layers import GatedRMSNorm, Linear
from gdnjax.pallas_kernels import causal_conv1d, gated_delta_rule
from gdnjax.pallas_kernels.gated_delta_rule import Gates
from gdnjax.shapes import Array, Float
from gdnjax.state import GDNState


class Conv1d(nnx.Module):
    """The depthwise kernel, [channels, 1, taps] as in the checkpoint."""

    def __init__(self, channels: int, taps: int, dtype: str):
        self.weight = nnx.Param(jnp.zeros((channels, 1, taps), dtype))


class GatedDeltaNet(nnx.Module):
    """One rank's heads of a GDN layer. The result is this rank's term of the sum over ranks."""

    def __init__(self, config: ModelConfig, dtype: str):
        delta, width = config.delta, config.hidden_size
        self.in_proj_qkv = Linear(width, delta.conv_dim, dtype)
        self.in_proj_z = Linear(width, delta.value_dim, dtype)
        self.in_proj_b = Linear(width, delta.num_value_heads, dtype)
        self.in_proj_a = Linear(width, delta.num_value_heads, dtype)
        self.conv1d = Conv1d(delta.conv_dim, delta.conv_kernel, dtype)
        self.A_log = nnx.Param(jnp.zeros((delta.num_value_heads,), jnp.float32))
        self.dt_bias = nnx.Param(jnp.zeros((delta.num_value_heads,), jnp.float32))
        self.norm = GatedRMSNorm(delta.value_head_dim, config.rms_norm_eps, dtype)
        self.out_proj = Linear(delta.value_dim, width, dtype)
        self.key_head_dim = delta.key_head_dim

    def __call__(
        self, x: Float[Array, "t d"], context: PrefillContext | DecodeContext, gdn: GDNState, layer: int
    ) -> tuple[Float[Array, "t d"], GDNState]:
        """`layer` counts GDN layers. The pools of `gdn` are consumed."""
        qkv, z = self.in_proj_qkv(x), self.in_proj_z(x)
        gates = Gates(a=self.in_proj_a(x), b=self.in_proj_b(x), A_log=self.A_log[...], dt_bias=self.dt_bias[...])
        weight, width = self.conv1d.weight[:, 0], self.key_head_dim
        match context:
            case PrefillContext(rows=rows, chunks=chunks, order=order):
                qkv, conv = causal_conv1d.prefill(qkv, weight, gdn.conv, layer, rows, chunks)
                o, ssm = gated_delta_rule.prefill(qkv, gates, gdn.ssm, layer, rows, chunks, order, key_head_dim=width)
            case DecodeContext(read_slot=read, write_slot=write, order=order):
                qkv, conv = causal_conv1d.decode(qkv, weight, gdn.conv, layer, read, write)
                o, ssm = gated_delta_rule.decode(qkv, gates, gdn.ssm, layer, read, write, order, key_head_dim=width)
        o = self.norm(o, z.reshape(o.shape))
        return self.out_proj(o.reshape(z.shape)), GDNState(ssm=ssm, conv=conv, layout=gdn.layout)
