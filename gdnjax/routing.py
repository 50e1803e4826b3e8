"""Which experts tokens go to, and how evenly: measured by running the routers over given tokens, never in a step."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gdnjax import sharding, step
from gdnjax.config import MlpKind
from gdnjax.generation import pack_prompts, start
from gdnjax.models import HybridModel, partition
from gdnjax.models.context import prefill_context
from gdnjax.shapes import Array, Int32, Params
from gdnjax.step import StepOptions


def expert_choices(model: HybridModel, params: Params, tokens: Any, mesh: Mesh | None = None) -> np.ndarray:
    """The experts that the routers choose for every token of one sequence, [layers with experts, t, top] int32, by one
    prefill of its own; those of the target's layers.

    `tokens` is [t] integers. `params` are of `model`, as its ranks hold them on `mesh`; of an LLM `llm.model`,
    `llm.params` and `llm.mesh`. None: one rank. Compiled for each length. Raises ValueError for a model without
    experts, and for a mesh of another number of ranks than the model's.
    """
    if MlpKind.MOE not in model.config.mlp_kinds:
        raise ValueError(
            f"expert_choices needs a model with a mixture of experts; this {model.config.model_type} has none"
        )
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be one sequence of integers, got {tokens.dtype} {list(tokens.shape)}")
    mesh = sharding.make_mesh(1) if mesh is None else mesh
    if mesh.shape[sharding.AXIS] != model.tp:
        raise ValueError(f"the model was built for {model.tp} ranks, the mesh has {mesh.shape[sharding.AXIS]}")
    specs = partition.specs_of(params, expert_parallel=model.expert_parallel)
    of_rank = sharding.shard_step(functools.partial(_choices, model), mesh, (specs, sharding.P()), sharding.P())
    return np.asarray(jax.jit(of_rank)(params, jnp.asarray(tokens, jnp.int32)))


def _choices(model: HybridModel, params: Params, tokens: Int32[Array, "t"]) -> Int32[Array, "layers t top"]:
    count = tokens.shape[0]
    whole = jnp.full((1,), count, jnp.int32)
    state = start(model, whole + 1, count + 1)
    batch = pack_prompts(tokens[None], whole)
    context = prefill_context(step.pools_of(state, StepOptions()), batch)
    return model.expert_choices(params, batch.tokens, context, state.cache)[:, :count]


@dataclasses.dataclass(frozen=True)
class ExpertBalance:
    """How evenly tokens went to experts, and with expert parallelism to ranks. A token counts once for each choice.

    Imbalance is what the busiest has over the mean of all, layer by layer: 1 where all have the same. That of ranks is
    what the products of a layer with many tokens take longer than they would, since its sum waits for the last; in a
    decode step they read matrices, so experts that were chosen at all count.

    per_expert    [layers, experts] tokens
    ranks         that share out the experts whole, in order
    """

    per_expert: np.ndarray
    ranks: int

    @classmethod
    def of(cls, choices: np.ndarray, num_experts: int, ranks: int) -> "ExpertBalance":
        """Of what `expert_choices` returned. Raises ValueError where the ranks do not divide the experts."""
        if ranks < 1 or num_experts % ranks:
            raise ValueError(f"{ranks} ranks do not divide num_experts={num_experts}")
        counts = [np.bincount(layer.ravel(), minlength=num_experts + 1)[:num_experts] for layer in choices]
        return cls(np.stack(counts), ranks)

    @property
    def per_rank(self) -> np.ndarray:
        """Tokens, [layers, ranks]."""
        return _of_ranks(self.per_expert, self.ranks)

    @property
    def chosen_per_rank(self) -> np.ndarray:
        """Experts that any token went to, [layers, ranks]."""
        return _of_ranks((self.per_expert > 0).astype(np.int64), self.ranks)

    @property
    def figures(self) -> dict[str, Any]:
        """For a JSON file: tokens of each rank in all layers together; imbalances, the mean and the worst of layers."""
        named = {"rank": self.per_rank, "chosen_experts": self.chosen_per_rank, "expert": self.per_expert}
        figures: dict[str, Any] = {"ranks": self.ranks, "tokens_per_rank": self.per_rank.sum(0).tolist()}
        for name, counts in named.items():
            imbalance = _imbalance(counts)
            figures[f"{name}_imbalance"] = {"mean": float(imbalance.mean()), "worst": float(imbalance.max())}
        return figures

    def __str__(self) -> str:
        figures, titles = self.figures, {"expert": "experts"}
        text = "busiest over mean: "
        if self.ranks > 1:
            counts = ", ".join(f"{count:,}" for count in figures["tokens_per_rank"])
            text = f"tokens per rank {counts}; {text}"
            titles = {"rank": "ranks", "chosen_experts": "chosen experts of ranks", **titles}
        imbalances = {title: figures[f"{name}_imbalance"] for name, title in titles.items()}
        return text + ", ".join(
            f"{title} {imbalance['mean']:.2f} (worst layer {imbalance['worst']:.2f})"
            for title, imbalance in imbalances.items()
        )


def _of_ranks(counts: np.ndarray, ranks: int) -> np.ndarray:
    return counts.reshape(len(counts), ranks, -1).sum(-1)


def _imbalance(counts: np.ndarray) -> np.ndarray:
    """The busiest over the mean, of each layer."""
    return counts.max(1) / counts.mean(1)
