"""The mixture of experts: router, routed experts, shared expert, and its gate where it has one."""

import jax
import jax.numpy as jnp
from flax import nnx

from gdnjax import sharding
from gdnjax.backend import Backend
from gdnjax.config import ModelConfig, MoeConfig
from gdnjax.models.layers import DenseMLP, Linear
from gdnjax.pallas_kernels.expert_routing import Rule, choose_experts, sort_by_expert
from gdnjax.pallas_kernels.grouped_matmul import grouped_matmul
from gdnjax.pallas_kernels.matmul import product
from gdnjax.pallas_kernels.normed import GateUp, Prepared, Rows, numbers, total
from gdnjax.shapes import Array, Bool, Float, Float32, Int32


class Experts(nnx.Module):
    """The routed experts' weights of one rank, a slice of each or some of them whole: gate and up side by side, then
    down.
    """

    def __init__(self, moe: MoeConfig, width: int, dtype: str, tp: int, backend: Backend):
        self.moe, self.tp, self.backend = moe, tp, backend
        self.gate_up_proj = nnx.Param(jnp.zeros((moe.held_experts, 2 * moe.intermediate_size, width), dtype))
        self.down_proj = nnx.Param(jnp.zeros((moe.held_experts, width, moe.intermediate_size), dtype))

    def __call__(
        self, x: Float[Array, "t d"] | Prepared, expert: Int32[Array, "t top"], weight: Float32[Array, "t top"]
    ) -> Float[Array, "t d"]:
        """Sum over each token's experts, weighted, as far as this rank has them. An expert number past the last means
        none: it adds nothing.

        Every rank has the rows of all pairs of token and choice, since all of them may be its own; those of other
        ranks' experts stand last. No group has those, so no tile of a product is theirs: kernels walk a rank's own
        rows, and take them from where their tokens stand. The activation between the products is made for all
        rows.
        """
        self._check_split()
        expert, experts = self._own(expert), self.moe.held_experts
        token, place, sizes = sort_by_expert(expert, experts, backend=self.backend)
        out = self._products(GateUp.of(self._products(x, self.gate_up_proj, sizes, token)), self.down_proj, sizes)
        # Back to token order: each pair's row is taken, for rows that are scattered go one number at a time on a GPU.
        # Rows of pairs of no expert are unspecified: the first is read in their place, which stays in the cache, and
        # selected away.
        own = expert < experts
        out = out[jnp.where(own, place, 0)].astype(jnp.float32)
        return jnp.sum(jnp.where(own[..., None], out, 0) * weight[..., None], axis=1).astype(x.dtype)

    def _own(self, expert: Int32[Array, "t top"]) -> Int32[Array, "t top"]:
        """Numbers of experts as this rank counts those that it holds; what others hold is none."""
        if not self.moe.expert_parallel:
            return expert
        held = self.moe.held_experts
        own = expert - sharding.rank(self.tp) * held
        return jnp.where((own >= 0) & (own < held), own, held)

    def _products(
        self, x: Array | GateUp | Prepared, weight: nnx.Param, sizes: Array, rows: Array | None = None
    ) -> Array:
        expected = -(-(x if rows is None else rows).shape[0] * self.moe.held_experts // self.moe.num_experts)
        return grouped_matmul(x, weight[...], sizes, rows=rows, expected_rows=expected, backend=self.backend)

    def _check_split(self) -> None:
        """Raises ValueError for weights that ranks have shared out otherwise: numbers of experts would be others'."""
        moe, found = self.moe, tuple(self.gate_up_proj.shape[:2])
        if found != (moe.held_experts, 2 * moe.intermediate_size):
            raise ValueError(
                f"one of {self.tp} ranks got {found[0]} experts of gate and up {found[1]} wide, and the model has "
                f"{moe.held_experts} of {2 * moe.intermediate_size}: its parameters have to be split with "
                f"expert_parallel={moe.expert_parallel} (gdnjax/models/partition.py)"
            )


class Router(nnx.Module):
    """Which experts a token goes to, and with what weights. Scores decide that, so they are float32 whatever the
    activations are, and so are the biases of the choice.
    """

    def __init__(self, moe: MoeConfig, width: int, dtype: str, backend: Backend):
        self.weight = nnx.Param(jnp.zeros((moe.num_experts, width), dtype))
        if moe.correction_bias:
            self.e_score_correction_bias = nnx.Param(jnp.zeros((moe.num_experts,), jnp.float32))
        self.rule = Rule(
            top=moe.experts_per_token,
            scoring=moe.scoring,
            normalised=moe.normalise_top_k,
            scaling=moe.routed_scaling,
            groups=moe.num_groups,
            top_groups=moe.top_k_groups,
        )
        self.biased, self.backend = moe.correction_bias, backend

    def __call__(
        self, x: Float[Array, "t d"], valid: Bool[Array, "t"]
    ) -> tuple[Float32[Array, "t top"], Int32[Array, "t top"]]:
        """Weights and experts; a padded token's are the number past the last."""
        logits = product(x, self.weight[...], jnp.float32)
        bias = self.e_score_correction_bias[...] if self.biased else None
        return choose_experts(logits, bias, valid, self.rule, backend=self.backend)


class MoeMLP(nnx.Module):
    """One rank's experts, and its slice of the shared one. The result is this rank's term of the sum over ranks."""

    takes_numbers = True
    """Rows as they are, for the router, beside those that its `inputs` meet."""

    def __init__(self, config: ModelConfig, moe: MoeConfig, dtype: str, tp: int, backend: Backend):
        width = config.hidden_size
        self.gate = Router(moe, width, dtype, backend)
        self.experts = Experts(moe, width, dtype, tp, backend)
        shared = DenseMLP(width, moe.shared_intermediate_size, dtype, backend)
        # The names of the checkpoints: the two forms of a shared expert are spelled differently there.
        if moe.shared_gate:
            self.shared_expert = shared
            self.shared_expert_gate = Linear(width, 1, dtype)
        else:
            self.shared_experts = shared
        self.shared_gate = moe.shared_gate

    @property
    def inputs(self) -> tuple[Linear, ...]:
        """The shared expert's. Routed experts take the same rows where they are in the form that they need."""
        return self._shared.inputs

    @property
    def _shared(self) -> DenseMLP:
        return self.shared_expert if self.shared_gate else self.shared_experts

    def __call__(self, x: Rows, valid: Bool[Array, "t"]) -> Float[Array, "s t d"]:
        whole = numbers(x)
        x = x if isinstance(x, Prepared) else whole
        weight, expert = self.choices(whole, valid)
        shared = total(self._shared(x, valid), x.dtype)
        if self.shared_gate:
            shared = jax.nn.sigmoid(self.shared_expert_gate(whole)) * shared
        return (self.experts(x, expert, weight) + shared)[None]

    def choices(
        self, x: Float[Array, "t d"], valid: Bool[Array, "t"]
    ) -> tuple[Float32[Array, "t top"], Int32[Array, "t top"]]:
        """Weights and experts of each token, the same on all ranks."""
        return self.gate(x, valid)
