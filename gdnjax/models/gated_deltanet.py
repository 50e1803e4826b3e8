"""The Gated DeltaNet layer: projections, convolution, delta rule, gated norm."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from gdnjax.backend import Backend
from gdnjax.cache import Cache
from gdnjax.config import DELTA, DeltaConfig, ModelConfig
from gdnjax.models.context import DecodeContext, FoldContext, PrefillContext
from gdnjax.models.layers import GatedRMSNorm, Linear, project
from gdnjax.pallas_kernels import causal_conv1d, gated_delta_rule
from gdnjax.pallas_kernels.gated_delta_rule import Gates
from gdnjax.pallas_kernels.pools import read_rows, write_rows
from gdnjax.shapes import Array, Float


class Conv1d(nnx.Module):
    """The depthwise kernel, [channels, 1, taps] as in the checkpoint."""

    def __init__(self, channels: int, taps: int, dtype: str):
        self.weight = nnx.Param(jnp.zeros((channels, 1, taps), dtype))


class GatedDeltaNet(nnx.Module):
    """One rank's heads of a GDN layer. The result is this rank's term of the sum over ranks."""

    def __init__(self, config: ModelConfig, delta: DeltaConfig, dtype: str, backend: Backend):
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
        self.backend = backend

    def __call__(
        self, x: Float[Array, "t d"], context: PrefillContext | DecodeContext, cache: Cache, layer: int
    ) -> tuple[Float[Array, "t d"], Cache]:
        """`layer` is the row in the pools. Those of `cache` are consumed."""
        inputs = (self.in_proj_qkv, self.in_proj_z, self.in_proj_a, self.in_proj_b)
        qkv, z, a, b = project(x, *inputs, backend=self.backend)
        match context:
            case PrefillContext():
                o, cache = self._prefill(qkv, self._gates(a, b), context, cache, layer)
            case DecodeContext(pending=None):
                o, cache = self._decode(qkv, self._gates(a, b), context, cache, layer)
            case DecodeContext():
                o, cache = self._verify(qkv, a, b, context, cache, layer)
        o = self.norm(o, z.reshape(o.shape))
        (out,) = project(o.reshape(z.shape), self.out_proj, backend=self.backend)
        return out, cache

    def fold(self, context: FoldContext, cache: Cache, layer: int) -> Cache:
        """State and window of `write_slot`: those of `read_slot` with pending rows folded in. Consumes the pools."""
        pools, order = cache.slots[DELTA], context.orders[DELTA]
        read, write, count = context.read_slot, context.write_slot, context.count
        qkv, conv = causal_conv1d.fold(self._taps, pools["conv"], layer, read, write, count, backend=self.backend)
        gates = self._gates(*jnp.split(read_rows(pools["pending_ab"], layer, read), 2, axis=-1))
        ssm = gated_delta_rule.fold(qkv, gates, pools["ssm"], layer, read, write, count, order, **self._static)
        return cache.with_slots(DELTA, ssm=ssm, conv=conv)

    @property
    def _static(self) -> dict[str, Any]:
        return {"key_head_dim": self.key_head_dim, "backend": self.backend}

    @property
    def _taps(self) -> Array:
        return self.conv1d.weight[:, 0]

    def _gates(self, a: Array, b: Array) -> Gates:
        return Gates(a=a, b=b, A_log=self.A_log[...], dt_bias=self.dt_bias[...], beta_scale=self.beta_scale)

    def _prefill(self, qkv, gates: Gates, context: PrefillContext, cache: Cache, layer: int):
        rows, chunks = context.rows, context.chunks
        pools, order = cache.slots[DELTA], context.orders[DELTA]
        qkv, conv = causal_conv1d.prefill(qkv, self._taps, pools["conv"], layer, rows, chunks, backend=self.backend)
        o, ssm = gated_delta_rule.prefill(qkv, gates, pools["ssm"], layer, rows, chunks, order, **self._static)
        return o, cache.with_slots(DELTA, ssm=ssm, conv=conv)

    def _decode(self, qkv, gates: Gates, context: DecodeContext, cache: Cache, layer: int):
        read, write = context.read_slot, context.write_slot
        pools, order = cache.slots[DELTA], context.orders[DELTA]
        qkv, conv = causal_conv1d.decode(qkv, self._taps, pools["conv"], layer, read, write, backend=self.backend)
        o, ssm = gated_delta_rule.decode(qkv, gates, pools["ssm"], layer, read, write, order, **self._static)
        return o, cache.with_slots(DELTA, ssm=ssm, conv=conv)

    def _verify(self, qkv, a, b, context: DecodeContext, cache: Cache, layer: int):
        """Pending rows are folded and stored, then the new ones go on from there and are not.

        The convolution emits the pending rows again from their raw inputs, so that the fold computes the very values
        of the first pass.
        """
        read, write, rows = context.read_slot, context.write_slot, context.rows_per_slot
        pools, order = cache.slots[DELTA], context.orders[DELTA]
        pending_ab = read_rows(pools["pending_ab"], layer, read)
        new = jnp.concatenate([a, b], axis=-1).reshape(-1, rows, 2 * a.shape[-1]).astype(pending_ab.dtype)
        both = jnp.concatenate([pending_ab, new], axis=1)
        qkv, conv = causal_conv1d.verify(
            qkv.reshape(-1, rows, qkv.shape[-1]),
            self._taps,
            pools["conv"],
            layer,
            read,
            write,
            context.pending,
            backend=self.backend,
        )
        o, ssm = gated_delta_rule.verify(
            qkv,
            self._gates(*jnp.split(both, 2, axis=-1)),
            pools["ssm"],
            layer,
            read,
            write,
            context.pending,
            order,
            new=rows,
            **self._static,
        )
        # What is written follows from what was read, so that XLA need not keep the old pool beside the new one.
        kept = jnp.where(context.valid.reshape(-1, rows, 1), new, pending_ab[:, :rows])
        pool = write_rows(pools["pending_ab"], layer, write, slice(rows), rows=kept)
        return o, cache.with_slots(DELTA, ssm=ssm, conv=conv, pending_ab=pool)
