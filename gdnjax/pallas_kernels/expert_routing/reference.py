"""The definitions, by XLA's sorts. Groups of experts, the bias of the choice: DeepSeek-V3 (arXiv 2412.19437, 2.1.2)."""

import jax
import jax.numpy as jnp
from jax import lax

from gdnjax.backend import Backend
from gdnjax.pallas_kernels.expert_routing.rule import Rule
from gdnjax.shapes import Array


def choose_experts(
    logits: Array, bias: Array | None, valid: Array, rule: Rule, backend: Backend
) -> tuple[Array, Array]:
    del backend
    scores = jax.nn.softmax(logits, axis=-1) if rule.scoring == "softmax" else jax.nn.sigmoid(logits)
    choice = scores if bias is None else scores + bias
    if rule.groups > 1:
        choice = _best_groups(choice, rule.groups, rule.top_groups)
    best, expert = lax.top_k(choice, rule.top)
    weight = best if bias is None else jnp.take_along_axis(scores, expert, axis=-1)
    if rule.normalised:
        total = weight.sum(-1, keepdims=True)
        # All of a token's sigmoids may be 0; the best of a softmax are not.
        weight = weight / (total + 1e-20 if rule.scoring == "sigmoid" else total)
    weight = weight * rule.scaling if rule.scaling != 1.0 else weight
    return weight, jnp.where(valid[:, None], expert, logits.shape[1])


def _best_groups(choice: Array, groups: int, top: int) -> Array:
    """-inf outside the `top` groups of neighbours whose two best have the largest sum."""
    by_group = choice.reshape(choice.shape[0], groups, -1)
    _, best = lax.top_k(lax.top_k(by_group, 2)[0].sum(-1), top)
    chosen = (best[:, :, None] == jnp.arange(groups)).any(1)
    return jnp.where(chosen[..., None], by_group, -jnp.inf).reshape(choice.shape)


def sort_by_expert(expert: Array, experts: int, backend: Backend) -> tuple[Array, Array, Array]:
    del backend
    flat = expert.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    # Compared and counted, not scattered: on a GPU adding to one place is one after the other.
    sizes = jnp.sum(flat == jnp.arange(experts)[:, None], axis=1, dtype=jnp.int32)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
    return order // expert.shape[1], place.reshape(expert.shape), sizes
