"""The mixture of experts: router, routed experts, shared expert and its gate."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from gdnjax.backend import Backend
from gdnjax.config import ModelConfig, MoeConfig
from gdnjax.models.layers import DenseMLP, Linear, linear
from gdnjax.pallas_kernels.grouped_matmul import grouped_matmul
from gdnjax.shapes import Array, Bool, Float, Float32, Int32


class Experts(nnx.Module):
    """The routed experts' weights: gate and up side by side, then down."""

    def __init__(self, moe: MoeConfig, width: int, dtype: str, backend: Backend):
        self.backend = backend
        self.gate_up_proj = nnx.Param(jnp.zeros((moe.num_experts, 2 * moe.intermediate_size, width), dtype))
        self.down_proj = nnx.Param(jnp.zeros((moe.num_experts, width, moe.intermediate_size), dtype))

    def __call__(
        self, x: Float[Array, "t d"], expert: Int32[Array, "t top"], weight: Float32[Array, "t top"]
    ) -> Float[Array, "t d"]:
        """Sum over each token's experts, weighted. An expert number past the last means none: it adds nothing."""
        experts = self.gate_up_proj.shape[0]
        tokens, top = expert.shape
        order = jnp.argsort(expert.reshape(-1), stable=True)
        sizes = jnp.zeros((experts,), jnp.int32).at[expert.reshape(-1)].add(1, mode="drop")
        gate, up = jnp.split(self._products(x[order // top], self.gate_up_proj, sizes), 2, axis=-1)
        out = self._products(jax.nn.silu(gate) * up, self.down_proj, sizes)
        # Back to token order; rows of no expert are unspecified and selected away.
        out = jnp.zeros_like(out).at[order].set(out).reshape(tokens, top, -1).astype(jnp.float32)
        out = jnp.where((expert < experts)[..., None], out, 0)
        return jnp.sum(out * weight[..., None], axis=1).astype(x.dtype)

    def _products(self, x: Array, weight: nnx.Param, sizes: Array) -> Array:
        return grouped_matmul(x, weight[...], sizes, backend=self.backend)


class MoeMLP(nnx.Module):
    """One rank's slice of every expert. The result is this rank's term of the sum over ranks."""

    def __init__(self, config: ModelConfig, moe: MoeConfig, dtype: str, backend: Backend):
        width = config.hidden_size
        self.gate = Linear(width, moe.num_experts, dtype)
        self.experts = Experts(moe, width, dtype, backend)
        self.shared_expert = DenseMLP(width, moe.shared_intermediate_size, dtype, backend)
        self.shared_expert_gate = Linear(width, 1, dtype)
        self.experts_per_token = moe.experts_per_token
        self.normalise_top_k = moe.normalise_top_k

    def __call__(self, x: Float[Array, "t d"], valid: Bool[Array, "t"]) -> Float[Array, "t d"]:
        # Router scores decide which experts run, so they are float32 whatever the activations are.
        scores = jax.nn.softmax(linear(x, self.gate.weight[...], out_dtype=jnp.float32), axis=-1)
        weight, expert = lax.top_k(scores, self.experts_per_token)
        if self.normalise_top_k:
            weight = weight / weight.sum(-1, keepdims=True)
        expert = jnp.where(valid[:, None], expert, scores.shape[-1])
        shared = jax.nn.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x, valid)
        return self.experts(x, expert, weight) + shared
