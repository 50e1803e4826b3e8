"""A model fed with given tokens, its recurrent state kept in several forms: what that does to log-probabilities, and to
answers.
"""

import dataclasses
import functools
import pathlib
import random
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny.data
from jax import lax

from gdnjax import generation, step
from gdnjax.config import DELTA
from gdnjax.models import HybridModel
from gdnjax.models.context import decode_context, prefill_context
from gdnjax.shapes import Params
from gdnjax.state import ServeState
from gdnjax.step import StepOptions

from . import documents
from .state_layer import int8_rows

BLOCK = 1024
"""Tokens of each text in a compiled call; of a piece in prefill."""

SEED = 0
"""Of the noise."""


@dataclasses.dataclass(frozen=True)
class Form:
    """How states are kept: `dtype` and rounding of the pool; `checkpoint`: passed through int8 after each BLOCK."""

    name: str
    dtype: str
    stochastic: bool = False
    checkpoint: bool = False

    @property
    def options(self) -> StepOptions:
        return StepOptions(rounding_seed=SEED if self.stochastic else None)


FORMS = (
    Form("float32", "float32"),
    Form("bfloat16", "bfloat16"),
    Form("bfloat16 stochastic", "bfloat16", stochastic=True),
    Form(f"int8 once in {BLOCK}", "float32", checkpoint=True),
)


def texts(directory: pathlib.Path, count: int, length: int) -> np.ndarray:
    """[count, length] tokens: documents that training has not seen, of its mixture, one behind another."""
    tokenizer = documents.load_tokenizer(directory)
    rng = random.Random("states")
    kinds, weights = zip(*tiny.data.SHORT_MIXTURE.items(), strict=True)
    ids: list[int] = []
    while len(ids) < count * length:
        document = tiny.data.document(rng, rng.choices(kinds, weights)[0])
        ids += documents.encode(tokenizer, [document])[0].ids
    return np.asarray(ids[: count * length], np.int32).reshape(count, length)


def _scores(model: HybridModel, params: Params, hidden: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each token the log-probability of the one that follows, and the most probable one."""
    logits = model.logits(params, hidden)
    chosen = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1)


def decode_block(
    model: HybridModel, form: Form, params: Params, state: ServeState, tokens: jax.Array, targets: jax.Array
) -> tuple[ServeState, tuple[jax.Array, jax.Array]]:
    """Tokens [t, n] one at a time, n texts side by side. Traceable."""
    slot = jnp.arange(1, tokens.shape[1] + 1, dtype=jnp.int32)

    def one(state, given):
        token, target = given
        pools = step.pools_of(state, form.options)
        context = decode_context(pools, slot, state.slots.length[slot], jnp.ones((slot.shape[0], 1), bool))
        hidden, cache = model.forward(params, token, context, state.cache)
        return _fed(dataclasses.replace(state, cache=cache), slot, 1), _scores(model, params, hidden, target)

    state, found = lax.scan(one, state, (tokens, targets))
    return _passed(state, form), found


def prefill_block(
    model: HybridModel, form: Form, params: Params, state: ServeState, tokens: jax.Array, targets: jax.Array
) -> tuple[ServeState, tuple[jax.Array, jax.Array]]:
    """The same tokens as one piece of a prompt of each text. Traceable."""
    length, count = tokens.shape
    batch = generation.pack_prompts(tokens.T, jnp.full((count,), length, jnp.int32))
    context = prefill_context(step.pools_of(state, form.options), batch)
    hidden, cache = model.forward(params, batch.tokens, context, state.cache)
    found = _scores(model, params, hidden, targets.T.reshape(-1))
    state = _fed(dataclasses.replace(state, cache=cache), batch.slot, length)
    return _passed(state, form), jax.tree.map(lambda x: x.reshape(count, length).T, found)


def _fed(state: ServeState, slot: Any, tokens: int) -> ServeState:
    slots = dataclasses.replace(state.slots, length=state.slots.length.at[slot].add(tokens))
    return dataclasses.replace(state, slots=slots)


def _passed(state: ServeState, form: Form) -> ServeState:
    """The state as an int8 checkpoint would give it back, where the form says so."""
    if not form.checkpoint:
        return state
    pool = state.cache.slots[DELTA]["ssm"]
    kind = next(kind for kind in state.cache.spec.slots if kind.name == DELTA)
    assert kind.ordered  # and the pool's order is "vk"
    dim = round(pool.shape[-1] ** 0.5)
    states = pool.reshape(*pool.shape[:-1], dim, dim).swapaxes(-1, -2)
    found = int8_rows(states).swapaxes(-1, -2).reshape(pool.shape)
    return dataclasses.replace(state, cache=state.cache.with_slots(DELTA, ssm=found))


MODES = {"decode": decode_block, "prefill": prefill_block}


def feed(
    model: HybridModel, params: Params, form: Form, mode: str, given: np.ndarray, told: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """[count, length - 1] log-probabilities of each next token, and the most probable ones."""
    count, length = given.shape
    state = generation.start(model, jnp.full((count,), length + 1, jnp.int32), length + 1, ssm_dtype=form.dtype)
    run = jax.jit(functools.partial(MODES[mode], model, form), donate_argnums=1)
    targets = np.roll(given, -1, axis=1)
    found = []
    for first in range(0, length, BLOCK):
        here = slice(first, first + BLOCK)
        state, scores = run(params, state, jnp.asarray(given[:, here].T), jnp.asarray(targets[:, here].T))
        found.append(jax.device_get(scores))
        told(count * BLOCK)
    logprobs, best = (np.concatenate(parts).T[:, :-1] for parts in zip(*found, strict=True))
    return logprobs, best


def compare(found: tuple[np.ndarray, np.ndarray], plain: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """Log-probabilities and argmax of one form against those of float32."""
    shift = found[0].astype(np.float64) - plain[0]
    size = np.abs(shift)
    blocks = range(0, size.shape[1], BLOCK)
    return {
        "mean_logprob": float(found[0].mean()),
        "mean_shift": float(shift.mean()),
        "mean_size": float(size.mean()),
        "p99_size": float(np.quantile(size, 0.99)),
        "max_size": float(size.max()),
        "same_argmax": float((found[1] == plain[1]).mean()),
        "mean_size_by_block": [float(size[:, first : first + BLOCK].mean()) for first in blocks],
    }


def solve(directory: pathlib.Path, limit: int) -> dict[str, dict[str, Any]]:
    """Exact match of held-out problems by an engine with each form that it has, and tokens beside those of float32."""
    from evaluation import cells, problems, report
    from evaluation.progress import Progress

    from gdnjax.serving.tokenizer import Tokenizer

    given: Sequence[problems.Problem] = documents.held_out_problems(limit)
    prompts = problems.make_prompts(given, [], "plain", Tokenizer.from_directory(directory), {})
    work = cells.Workload(
        prompts=[prompt.token_ids for prompt in prompts], max_tokens=256, stop=problems.STOPS["plain"], progress=True
    )
    settings = {
        "float32": {},
        "bfloat16": {"ssm_dtype": "bfloat16"},
        "bfloat16 stochastic": {"ssm_dtype": "bfloat16", "ssm_rounding": "stochastic"},
    }
    progress = Progress(given, lambda: None)
    found, reference = {}, None
    with cells.load(directory, "float32", True, mtp=False) as loaded:
        for name, options in settings.items():
            progress.begin(name, "float32")
            made = cells.run_cell(
                cells.Cell(name=name, dtype="float32", options=options), "float32", loaded, work, progress
            )
            scored = report.report_cell(made, given, reference, None)
            progress.end()
            reference = reference or scored
            tokens = [completion.token_ids for completion in scored.run.completions]
            plain = [completion.token_ids for completion in reference.run.completions]
            found[name] = {
                "problems": len(given),
                "strict_match": scored.strict,
                "same_tokens": sum(a == b for a, b in zip(tokens, plain, strict=True)),
            }
    return found
