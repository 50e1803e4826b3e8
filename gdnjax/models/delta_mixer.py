"""What layers of the delta rule share: the convolution, the rule itself, and the pools of their states."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from gdnjax import sharding
from gdnjax.backend import Backend
from gdnjax.cache import Cache, Leaves
from gdnjax.config import DELTA
from gdnjax.models.context import DecodeContext, FoldContext, PrefillContext
from gdnjax.models.layers import GatedRMSNorm, Linear, project_in_parts
from gdnjax.pallas_kernels import causal_conv1d, gated_delta_rule
from gdnjax.pallas_kernels.gated_delta_rule import Gates
from gdnjax.pallas_kernels.normed import Rows
from gdnjax.pallas_kernels.pools import read_rows, write_rows
from gdnjax.shapes import Array, Float


class Conv1d(nnx.Module):
    """The depthwise kernel, [channels, 1, taps] as in the checkpoint."""

    def __init__(self, channels: int, taps: int, dtype: str):
        self.weight = nnx.Param(jnp.zeros((channels, 1, taps), dtype))


class DeltaMixer(nnx.Module):
    """One rank's heads of a layer of the delta rule. The result is this rank's term of the sum over ranks.

    A subclass says how tokens become the rule's inputs: `_project`, `_gates`, and which pools keep what pending tokens
    need for their gates, `_kept` and its inverse `_raw`.
    """

    conv1d: Conv1d
    norm: GatedRMSNorm
    out_proj: Linear
    key_head_dim: int
    tp: int
    backend: Backend

    @property
    @abc.abstractmethod
    def inputs(self) -> tuple[Linear, ...]:
        """What meets the rows first, side by side."""

    @abc.abstractmethod
    def _project(self, x: Rows) -> tuple[Array, Array, tuple[Array, ...]]:
        """The convolution's input [t, x], the output's gate [t, hv * v], and what the rule's gates are made of."""

    @abc.abstractmethod
    def _gates(self, *raw: Array) -> Gates:
        """The rule's gates, of rows of any axes before the last."""

    @abc.abstractmethod
    def _kept(self, *raw: Array) -> dict[str, Array]:
        """By pool, the numbers of pending tokens from which their gates are made again."""

    @abc.abstractmethod
    def _raw(self, kept: dict[str, Array]) -> Sequence[Array]:
        """What `_gates` takes, of what pools keep."""

    def __call__(
        self, x: Rows, context: PrefillContext | DecodeContext, cache: Cache, layer: int
    ) -> tuple[Float[Array, "s t d"], Cache]:
        """`layer` is the row in the pools. Those of `cache` are consumed."""
        qkv, z, raw = self._project(x)
        match context:
            case PrefillContext():
                o, cache = self._prefill(qkv, self._gates(*raw), context, cache, layer)
            case DecodeContext(pending=None):
                o, cache = self._decode(qkv, self._gates(*raw), context, cache, layer)
            case DecodeContext():
                o, cache = self._verify(qkv, self._kept(*raw), context, cache, layer)
        o = self.norm.of(o.reshape(z.shape[0], -1, o.shape[-1]), z)
        return project_in_parts(o, self.out_proj, self.backend), cache

    def fold(self, context: FoldContext, cache: Cache, layer: int) -> Cache:
        """State and window of `write_slot`: those of `read_slot` with pending rows folded in. Consumes the pools."""
        pools, order = cache.slots[DELTA], context.orders[DELTA]
        read, write, count = context.read_slot, context.write_slot, context.count
        qkv, conv = causal_conv1d.fold(self._taps, pools["conv"], layer, read, write, count, backend=self.backend)
        gates = self._gates(*self._raw(self._pending(pools, layer, read)))
        ssm = gated_delta_rule.fold(
            qkv, gates, pools["ssm"], layer, read, write, count, order, **self._static(context, pools)
        )
        return cache.with_slots(DELTA, ssm=ssm, conv=conv)

    def _static(self, context: PrefillContext | DecodeContext | FoldContext, pools: Leaves) -> dict[str, Any]:
        """What the rule is told beside its inputs."""
        rounding = context.rounding
        if rounding is not None:
            rounding = dataclasses.replace(rounding, first_head=sharding.rank(self.tp) * pools["ssm"].shape[2])
        return {"key_head_dim": self.key_head_dim, "rounding": rounding, "backend": self.backend}

    @property
    def _taps(self) -> Array:
        return self.conv1d.weight[:, 0]

    def _pending(self, pools: Leaves, layer: int, slot: Array) -> dict[str, Array]:
        """What the slots keep of their pending tokens, [n, P, _] each."""
        return {name: read_rows(pools[name], layer, slot) for name in pools if name.startswith("pending_")}

    def _prefill(self, qkv, gates: Gates, context: PrefillContext, cache: Cache, layer: int):
        rows, chunks = context.rows, context.chunks
        pools, order = cache.slots[DELTA], context.orders[DELTA]
        qkv, conv = causal_conv1d.prefill(qkv, self._taps, pools["conv"], layer, rows, chunks, backend=self.backend)
        o, ssm = gated_delta_rule.prefill(
            qkv, gates, pools["ssm"], layer, rows, chunks, order, **self._static(context, pools)
        )
        return o, cache.with_slots(DELTA, ssm=ssm, conv=conv)

    def _decode(self, qkv, gates: Gates, context: DecodeContext, cache: Cache, layer: int):
        read, write = context.read_slot, context.write_slot
        pools, order = cache.slots[DELTA], context.orders[DELTA]
        qkv, conv = causal_conv1d.decode(qkv, self._taps, pools["conv"], layer, read, write, backend=self.backend)
        o, ssm = gated_delta_rule.decode(
            qkv, gates, pools["ssm"], layer, read, write, order, **self._static(context, pools)
        )
        return o, cache.with_slots(DELTA, ssm=ssm, conv=conv)

    def _verify(self, qkv, kept: dict[str, Array], context: DecodeContext, cache: Cache, layer: int):
        """Pending rows are folded and stored, then the new ones go on from there and are not.

        The convolution emits the pending rows again from their raw inputs, so that the fold computes the very values
        of the first pass.
        """
        read, write, rows = context.read_slot, context.write_slot, context.rows_per_slot
        pools, order = cache.slots[DELTA], context.orders[DELTA]
        old = self._pending(pools, layer, read)
        new = {name: x.reshape(-1, rows, x.shape[-1]).astype(old[name].dtype) for name, x in kept.items()}
        both = {name: jnp.concatenate([old[name], new[name]], axis=1) for name in new}
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
            self._gates(*self._raw(both)),
            pools["ssm"],
            layer,
            read,
            write,
            context.pending,
            order,
            new=rows,
            **self._static(context, pools),
        )
        # What is written follows from what was read, so that XLA need not keep the old pool beside the new one.
        valid = context.valid.reshape(-1, rows, 1)
        pending = {
            name: write_rows(
                pools[name], layer, write, slice(rows), rows=jnp.where(valid, new[name], old[name][:, :rows])
            )
            for name in new
        }
        return o, cache.with_slots(DELTA, ssm=ssm, conv=conv, **pending)
