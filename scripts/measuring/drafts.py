"""The MTP head against the model it drafts for, on text that is given: no engine, no speculation."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdnjax.generation import draft_logits
from gdnjax.models import HybridModel
from gdnjax.shapes import Params

from .documents import CUT, Text

DEPTH = 3
NOISES = 16
"""Draws of Gumbel noise over which an acceptance is averaged."""


def acceptance(target: jax.Array, draft: jax.Array, noise: jax.Array) -> jax.Array:
    """[...]: how often argmax(log p + G) = argmax(log q + G), both with the same G. Logits [..., V], noise [n, ..., V].

    It lies between (1 - TV) / (1 + TV) and 1 - TV, TV the total variation distance of p and q.
    """
    p, q = jax.nn.log_softmax(target), jax.nn.log_softmax(draft)
    return jnp.mean(jnp.argmax(p + noise, axis=-1) == jnp.argmax(q + noise, axis=-1), axis=0)


def overlap(target: jax.Array, draft: jax.Array) -> jax.Array:
    """[...]: 1 - TV, what rejection sampling would accept."""
    return 1 - 0.5 * jnp.sum(jnp.abs(jax.nn.softmax(target) - jax.nn.softmax(draft)), axis=-1)


def of_text(model: HybridModel, params: Params, tokens: jax.Array, length: jax.Array, key: jax.Array) -> Any:
    """[depth, t] of one sequence: whether both argmax agree, the acceptance at temperature 1, and 1 - TV. Traceable."""
    target, draft = draft_logits(model, params, tokens, DEPTH, length)
    noise = jax.random.gumbel(key, (NOISES, *target.shape))
    return {
        "argmax": jnp.argmax(draft, axis=-1) == jnp.argmax(target, axis=-1),
        "acceptance": jnp.stack([acceptance(target, draft[d], noise) for d in range(DEPTH)]),
        "overlap": jnp.stack([overlap(target, draft[d]) for d in range(DEPTH)]),
    }


class Drafter:
    """`of_text`, compiled once for texts of up to CUT tokens."""

    def __init__(self, model: HybridModel, params: Params):
        self._params = params
        self._run = jax.jit(functools.partial(of_text, model))

    def measure(
        self, texts: Sequence[Text], progress: Callable[[str], None] = lambda text: None
    ) -> dict[str, list[float] | int]:
        """Means over the learned tokens of texts, for each depth. What stands past CUT is left out."""
        found: dict[str, list[list[np.ndarray]]] = {}
        learned = 0
        for i, text in enumerate(texts):
            progress(f"drafts: {i + 1} of {len(texts)}")
            text = text.cut(CUT)
            tokens = np.zeros(CUT, np.int32)
            tokens[: len(text.ids)] = text.ids
            one = self._run(self._params, tokens, np.int32(len(text.ids)), jax.random.key(i))
            # The score at a place is of the token that follows it.
            places = np.flatnonzero(text.learn[1:])
            learned += places.size
            for name, values in one.items():
                for d, value in enumerate(np.asarray(values)):
                    # Draft d is made where so many tokens lie before it.
                    found.setdefault(name, [[] for _ in range(DEPTH)])[d].append(value[places[places > d]])
        means = {name: [float(np.concatenate(v).mean()) for v in values] for name, values in found.items()}
        return {"tokens": learned, **means}
