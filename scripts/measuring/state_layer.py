"""One random layer of the delta rule whose state is kept in several forms at once, against float64.

Inputs are random, the same for every form. Pairs of value heads that share a key head are a class: how long they
remember by their decay, how strongly they write, and whether their keys point everywhere. What is not overwritten lasts
as long as the decay lets it: there a form that loses small changes shows.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdnjax.config import CHUNK
from gdnjax.pallas_kernels.gated_delta_rule import reference, rounding
from gdnjax.quantized import quantise

HALF_LIVES = {"1 to 200": (1.0, 200.0), "2,048": (2048.0, 2048.0), "32,768": (32768.0, 32768.0), "for ever": None}
"""Tokens after which half is left, by class: between two numbers, or nothing is ever lost."""

WRITES = {"strong": 0.0, "weak": -4.0}
"""The mean of what beta is the sigmoid of: 0.5, and 0.02."""

KEYS = {"everywhere": 0.0, "few directions": 1.0}
"""Channel i of keys and queries is as large as (1 + i) to the minus this."""

BLOCK = 1024
"""Tokens of a compiled call; of a piece in prefill."""

SEEN = 64
"""Tokens of outputs that a position is judged by."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """Sizes of the layer. Every class has `value_heads / classes` of them."""

    value_heads: int = 32
    key_heads: int = 16
    dim: int = 128

    def __post_init__(self):
        count = len(classes())
        if self.key_heads % count or self.value_heads % self.key_heads:
            raise ValueError(
                f"{self.key_heads} key heads and {self.value_heads} value heads; allowed: key heads in "
                f"multiples of {count} classes, value heads in multiples of those"
            )

    def class_of_heads(self) -> list[str]:
        """The class of each value head."""
        return list(np.repeat(classes(), self.value_heads // len(classes())))


def classes() -> list[str]:
    """Names of all classes: half-life, strength of writes, keys."""
    return [f"{life} / {write} / {keys}" for keys in KEYS for write in WRITES for life in HALF_LIVES]


def log_decays(layer: Layer) -> np.ndarray:
    """[hv]: g of each head where the input adds nothing, at most 0."""
    each = layer.value_heads // len(classes())
    of_class = [
        np.zeros(each) if bounds is None else -np.log(2) / np.geomspace(bounds[0], bounds[1], each)
        for bounds in HALF_LIVES.values()
    ]
    return np.tile(np.concatenate(of_class), len(WRITES) * len(KEYS)).astype(np.float32)


def inputs(layer: Layer, key: jax.Array) -> tuple[jax.Array, ...]:
    """q, k, v, g, beta of a BLOCK of tokens, [t, hv, ...] float32: normalised, q scaled. Traceable."""
    each, lives = layer.value_heads // len(classes()), len(HALF_LIVES)
    normal = [
        jax.random.normal(part, shape, jnp.float32)
        for part, shape in zip(
            jax.random.split(key, 5),
            [(BLOCK, layer.key_heads, layer.dim)] * 2
            + [(BLOCK, layer.value_heads, layer.dim)]
            + [(BLOCK, layer.value_heads)] * 2,
            strict=True,
        )
    ]
    # Classes are in the order of `classes`: half-lives first, then writes, then keys.
    slopes = np.repeat(list(KEYS.values()), layer.key_heads // len(KEYS))
    scale = (1.0 + np.arange(layer.dim)) ** -slopes[:, None]
    q, k = (
        jnp.repeat(reference.l2_normalise(x * scale.astype(np.float32)), layer.value_heads // layer.key_heads, axis=1)
        for x in normal[:2]
    )
    writes = np.tile(np.repeat(list(WRITES.values()), each * lives), len(KEYS)).astype(np.float32)
    # As of a softplus with a noisy argument: every token keeps a little more, or a little less.
    g = jnp.asarray(log_decays(layer)) * jnp.exp(0.3 * normal[3])
    return q * layer.dim**-0.5, k, normal[2], g, jax.nn.sigmoid(writes + normal[4])


@dataclasses.dataclass(frozen=True)
class Form:
    """How a state is kept between two tokens: in `dtype`, after `round` of (float32 states, position)."""

    name: str
    dtype: str
    round: Callable[[jax.Array, jax.Array], jax.Array] | None = None


def stochastic(states: jax.Array, position: jax.Array) -> jax.Array:
    """Rounded as the engine does, seed 0, layer 0."""
    return rounding.rounded_states(states[None], rounding.keys_of(0, position[None]), 0, 0)[0]


FORMS = (
    Form("float32", "float32"),
    Form("bfloat16", "bfloat16"),
    Form("bfloat16 stochastic", "bfloat16", stochastic),
    Form("float16", "float16"),
)


def kept(form: Form, states: jax.Array, position: jax.Array) -> jax.Array:
    """What is left of float32 states where they are stored."""
    if form.round is not None:
        states = form.round(states, position)
    return states.astype(form.dtype)


@functools.partial(jax.jit, static_argnames=("forms",), donate_argnums=0)
def decode_block(states: list, exact: jax.Array, tokens: tuple, first: jax.Array, forms: tuple[Form, ...]):
    """A block of tokens one by one: of each form its states, and the last outputs; the exact ones, too."""

    def one(carry, token):
        states, exact, position = carry
        position = position + 1
        wide = tuple(x.astype(exact.dtype) for x in token)
        o_exact, exact = reference.delta_step(exact, *wide)
        outputs = []
        for i, form in enumerate(forms):
            o, state = reference.delta_step(states[i].astype(jnp.float32), *token)
            outputs.append(o)
            states = [*states[:i], kept(form, state, position), *states[i + 1 :]]
        return (states, exact, position), (o_exact, outputs)

    head = jax.tree.map(lambda x: x[:-SEEN], tokens)
    tail = jax.tree.map(lambda x: x[-SEEN:], tokens)
    carry, _ = lax.scan(lambda carry, token: (one(carry, token)[0], None), (states, exact, first), head)
    (states, exact, _), (o_exact, outputs) = lax.scan(one, carry, tail)
    return states, exact, outputs, o_exact


@functools.partial(jax.jit, static_argnames=("forms",), donate_argnums=0)
def prefill_block(states: list, tokens: tuple, first: jax.Array, forms: tuple[Form, ...]):
    """The block as one piece of a prompt: float32 between its chunks, stored at its end."""
    chunks = [x.reshape(-1, CHUNK, *x.shape[1:]).swapaxes(1, 2) for x in tokens]
    terms = reference.chunk_terms(*chunks)
    found, outputs = [], []

    def one(state, terms):
        o, state = reference.chunk_step(state, terms)
        return state, o

    for form, state in zip(forms, states, strict=True):
        state, o = lax.scan(one, state.astype(jnp.float32), terms)
        found.append(kept(form, state, first + BLOCK))
        outputs.append(o[-1].swapaxes(0, 1)[-SEEN:])
    return found, outputs


def int8_rows(states: jax.Array) -> jax.Array:
    """States [hv, K, V] as int8 with a float32 scale for each row of V, and back."""
    codes, scale = quantise(states, jnp.int8)
    return codes.astype(jnp.float32) * scale


CHECKPOINTS = {
    "bfloat16": lambda states: states.astype(jnp.bfloat16).astype(jnp.float32),
    "int8": int8_rows,
}


@jax.jit
def outputs_behind(states: jax.Array, tokens: tuple) -> jax.Array:
    """[t, hv, V]: what the tokens read, in float32 from there on."""

    def one(states, token):
        o, states = reference.delta_step(states, *token)
        return states, o

    return lax.scan(one, states, tokens)[1]


def error(x: Any, exact: Any, axes: tuple[int, ...]) -> list[float]:
    """By head, the norm of the difference as a part of the exact one's."""
    x, exact = np.asarray(x, np.float64), np.asarray(exact, np.float64)
    return (np.sqrt(((x - exact) ** 2).sum(axes)) / np.sqrt((exact**2).sum(axes))).tolist()


def measure(
    layer: Layer, tokens: int, positions: tuple[int, ...], wide: str, seed: int = 0
) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """After each block the position, and, where it is one of `positions`, what was found there: errors of every head.

    `wide` is the dtype of the reference, "float64" or "float32".
    """
    shape = (layer.value_heads, layer.dim, layer.dim)
    states = [jnp.zeros(shape, form.dtype) for form in FORMS]
    pieces = [jnp.zeros(shape, form.dtype) for form in FORMS]
    with jax.enable_x64(wide == "float64"):
        exact = jnp.zeros(shape, wide)
    make = jax.jit(functools.partial(inputs, layer))
    keys = jax.random.split(jax.random.key(seed), tokens // BLOCK + 1)
    for block in range(tokens // BLOCK):
        first = jnp.asarray(block * BLOCK, jnp.int32)
        given = make(keys[block])
        # The package's functions make float32 where 64-bit numbers are not enabled.
        with jax.enable_x64(wide == "float64"):
            states, exact, outputs, o_exact = decode_block(states, exact, given, first, FORMS)
        pieces, piece_outputs = prefill_block(pieces, given, first, FORMS)
        position = (block + 1) * BLOCK
        if position not in positions:
            yield position, None
            continue
        found: dict[str, Any] = {"decode": {}, "prefill": {}, "checkpoint": {}}
        for mode, of_forms, of_outputs in (("decode", states, outputs), ("prefill", pieces, piece_outputs)):
            for form, state, o in zip(FORMS, of_forms, of_outputs, strict=True):
                found[mode][form.name] = {
                    "state": error(state, exact, (1, 2)),
                    "output": error(o, o_exact, (0, 2)),
                    "norm": norm_ratio(state, exact),
                }
        following = jax.tree.map(lambda x: x[:SEEN], make(keys[block + 1]))
        behind = outputs_behind(states[0], following)
        for name, once in CHECKPOINTS.items():
            state = once(states[0])
            found["checkpoint"][name] = {
                "state": error(state, states[0], (1, 2)),
                "output": error(outputs_behind(state, following), behind, (0, 2)),
            }
        yield position, found


def norm_ratio(x: Any, exact: Any) -> list[float]:
    """By head, how much larger the state is than the exact one, as a part of that."""
    x, exact = np.asarray(x, np.float64), np.asarray(exact, np.float64)
    return (np.sqrt((x**2).sum((1, 2))) / np.sqrt((exact**2).sum((1, 2))) - 1).tolist()
