"""Faults that serving a recurrent model can have, done once to a state, and what they do to what comes after.

A fault is a pure function ServeState -> ServeState. It strikes every request at once, between its prompt and the
first step after it; the neighbour of a request is the one in the next slot.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from evaluation import scoring

from gdnjax.config import ATTENTION, DELTA, DeltaConfig, LayerKind, ModelConfig
from gdnjax.state import ServeState

from . import documents
from .documents import Text
from .forcing import Feeder, Piece, Pools, Scores

Fault = Callable[[ServeState], ServeState]

INTACT = "none"
MISSING_RESET = "missing reset"


def table(config: ModelConfig) -> dict[str, Fault]:
    """Every fault by its name, the intact run first. MISSING_RESET strikes before the prompt, so it is `pollute`."""
    assert isinstance(config.delta, DeltaConfig), "the embedded model has layers of Gated DeltaNet"
    attention, last = config.num_attention_layers, config.num_delta_layers - 1
    every = slice(None)
    places = [i for i, kind in enumerate(config.layer_kinds) if kind == LayerKind.DELTA]
    zeroed = {f"state of layer {i} zeroed": _gdn(lambda x: x * 0, ("ssm",), row) for row, i in enumerate(places)}
    return {
        INTACT: lambda state: state,
        "stale layout bit": stale_layout_bit,
        "one layer's state transposed": _gdn(_turned(config.delta.key_head_dim), ("ssm",), last),
        "another request's state": _gdn(_of_neighbour, ("ssm",), every),
        "wrong slot": _gdn(_of_neighbour, ("ssm", "conv"), every),
        MISSING_RESET: pollute,
        "conv windows dropped": _gdn(lambda x: x * 0, ("conv",), every),
        "one conv window dropped": _gdn(lambda x: x * 0, ("conv",), last),
        **zeroed,
        "all states zeroed": _gdn(lambda x: x * 0, ("ssm",), every),
        "all KV zeroed": _kv(lambda x, length: x * 0, ("k", "v"), slice(attention)),
        "keys off by one": _kv(_later, ("k",), slice(attention)),
        "another request's KV": _kv(lambda x, length: jnp.roll(x, -1, axis=1), ("k", "v"), slice(attention)),
        "length off by one": length_off_by_one,
        "one MTP row stale": _kv(_stale_row, ("k", "v"), slice(attention, None)),
        "another request's MTP KV": _kv(lambda x, length: jnp.roll(x, -1, axis=1), ("k", "v"), slice(attention, None)),
    }


def stale_layout_bit(state: ServeState) -> ServeState:
    """Every state is read in the layout in which it is not stored."""
    layout = 1 - state.cache.slots[DELTA]["layout"]
    return dataclasses.replace(state, cache=state.cache.with_slots(DELTA, layout=layout))


def length_off_by_one(state: ServeState) -> ServeState:
    """A place of the cache that nothing was written to counts as a token, and positions shift."""
    slots = dataclasses.replace(state.slots, length=state.slots.length.at[1:].add(1))
    return dataclasses.replace(state, slots=slots)


def pollute(state: ServeState) -> ServeState:
    """What a slot holds when its last owner, the neighbour, has left and nothing is reset."""
    state = _gdn(_of_neighbour, ("ssm", "conv"), slice(None))(state)
    return dataclasses.replace(state, slots=dataclasses.replace(state.slots, length=state.slots.length * 0))


def _gdn(change: Callable[[jax.Array], jax.Array], fields: Sequence[str], layers: Any) -> Fault:
    """A change [..., slots, ...] -> the same of the recurrent state or the convolution windows of some layers."""

    def fault(state: ServeState) -> ServeState:
        changed = {}
        for name in fields:
            pool = state.cache.slots[DELTA][name]
            changed[name] = pool.at[layers].set(change(pool[layers]))
        return dataclasses.replace(state, cache=state.cache.with_slots(DELTA, **changed))

    return fault


def _of_neighbour(pool: jax.Array) -> jax.Array:
    """[L, slots, ...] with every slot holding what the next one held."""
    return pool.at[:, 1:].set(jnp.roll(pool[:, 1:], -1, axis=1))


def _turned(key_dim: int) -> Callable[[jax.Array], jax.Array]:
    """K and V change places; [slots, heads, K * V]."""

    def turned(rows: jax.Array) -> jax.Array:
        square = rows.reshape(*rows.shape[:-1], key_dim, -1)
        return square.swapaxes(-1, -2).reshape(rows.shape)

    return turned


def _kv(change: Callable[[jax.Array, jax.Array], jax.Array], fields: Sequence[str], layers: slice) -> Fault:
    """A change ([L, requests, places, heads, width], [requests] lengths) -> the same of keys or values."""

    def fault(state: ServeState) -> ServeState:
        rows = state.slots.length.shape[0] - 1
        changed = {}
        for name in fields:
            pool = state.cache.pages[ATTENTION][name]
            # Blocks were handed out one run after another.
            part = pool[layers, 1:]
            by_request = part.reshape(part.shape[0], rows, -1, *part.shape[3:])
            changed[name] = pool.at[layers, 1:].set(change(by_request, state.slots.length[1:]).reshape(part.shape))
        return dataclasses.replace(state, cache=state.cache.with_pages(ATTENTION, **changed))

    return fault


def _later(keys: jax.Array, length: jax.Array) -> jax.Array:
    return jnp.roll(keys, 1, axis=2)


def _stale_row(rows: jax.Array, length: jax.Array) -> jax.Array:
    """The newest row holds what the one before it does, as if it had not been written again."""
    request = jnp.arange(length.shape[0])
    return rows.at[:, request, length - 1].set(rows[:, request, length - 2])


@dataclasses.dataclass(frozen=True)
class Sample:
    """Requests with their prompts behind them, and what they are fed after it.

    prompts  the tokens before the fault strikes
    rest     the tokens after it; a score of token i is of token i + 1
    counted  which scores count
    """

    prompts: list[list[int]]
    rest: list[list[int]]
    counted: list[np.ndarray]


def recall_sample(texts: Sequence[Text]) -> Sample:
    """Documents cut before the first value that they recall; the tokens of the values count."""
    prompts, rest, counted = [], [], []
    for text in texts:
        # The first token of the first value is a score of the last token before it, which is fed after the fault.
        cut = text.values[0][0] - 1
        prompts.append(text.ids[:cut])
        rest.append(text.ids[cut:])
        flags = np.zeros(len(text.ids) - cut - 1, bool)
        for start, end in text.values:
            flags[start - cut - 1 : end - cut - 1] = True
        counted.append(flags)
    return Sample(prompts, rest, counted)


def feed_prompts(feeder: Feeder, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> tuple[Pools, list[int]]:
    """Pools with every prompt in them, and the most probable first tokens."""
    pieces = [Piece(1 + i, prompt) for i, prompt in enumerate(prompts)]
    pools, scores = feeder.feed(feeder.pools(limits), pieces)
    return pools, [int(score.best[-1]) for score in scores]


def strike(feeder: Feeder, name: str, fault: Fault, intact: Pools, sample: Sample) -> Pools:
    """The pools after a fault."""
    pools = dataclasses.replace(intact, state=fault(intact.state))
    if name == MISSING_RESET:
        pieces = [Piece(1 + i, prompt) for i, prompt in enumerate(sample.prompts)]
        pools, _ = feeder.feed(pools, pieces, fresh=False)
    return pools


def forced(feeder: Feeder, pools: Pools, sample: Sample) -> list[Scores]:
    """Scores of the rest of every request, fed as it stands."""
    pieces = [Piece(1 + i, ids[:-1], ids[-1]) for i, ids in enumerate(sample.rest)]
    return feeder.feed(pools, pieces)[1]


def shift(scores: Sequence[Scores], intact: Sequence[Scores], counted: Sequence[np.ndarray]) -> dict[str, float]:
    """How far log-probabilities move, and how often a draft is the model's own choice, over what counts."""

    def every(values):
        return np.concatenate([value[flags] for value, flags in zip(values, counted, strict=True)])

    moved = np.abs(every([s.logprob for s in scores]) - every([s.logprob for s in intact]))
    drafted = np.abs(every([s.drafted_logprob for s in scores]) - every([s.drafted_logprob for s in intact]))
    accepted = every([s.best == s.drafted for s in scores])
    return {
        "mean_shift": float(moved.mean()),
        "max_shift": float(moved.max()),
        "drafts_accepted": float(accepted.mean()),
        "mean_draft_shift": float(drafted.mean()),
        "max_draft_shift": float(drafted.max()),
    }


def finished(
    feeder: Feeder,
    pools: Pools,
    first: Sequence[int],
    most: int,
    completions: Sequence[list[int]],
    scores: Sequence[Scores],
    reference: Sequence[Scores],
) -> list[list[int]]:
    """Greedy completions after a fault.

    Where the best token is that of the intact run at every token of its completion, greedy decoding repeats it, and is
    spared.
    """
    parts = np.array([bool((a.best != b.best).any()) for a, b in zip(scores, reference, strict=True)])
    produced = feeder.finish(feeder.begin(pools, first, parts), first, most)
    return [new if other else old for new, old, other in zip(produced, completions, parts, strict=True)]


def on_problems(
    feeder: Feeder,
    tokenizer: tokenizers.Tokenizer,
    count: int,
    most: int,
    names: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, float]]:
    """Every fault on held-out problems: exact match, completions that change, shifts on the intact run's tokens."""
    problems = documents.held_out_problems(count)
    prompts = [tokenizer.encode(problem.question).ids for problem in problems]
    limits = [len(prompt) + most for prompt in prompts]
    intact, first = feed_prompts(feeder, prompts, limits)
    completions = feeder.finish(feeder.begin(intact, first), first, most)
    sample = Sample(prompts, completions, [np.ones(len(ids) - 1, bool) for ids in completions])
    reference = forced(feeder, intact, sample)
    result = {}
    for name, fault in table(feeder.model.config).items():
        if names is not None and name not in names:
            continue
        progress(f"faults, problems: {name}")
        pools = strike(feeder, name, fault, intact, sample)
        scores = forced(feeder, pools, sample)
        produced = finished(feeder, pools, first, most, completions, scores, reference)
        texts = [tokenizer.decode(ids) for ids in produced]
        right = [
            scoring.is_match(scoring.strict_answer(text), problem.answer)
            for text, problem in zip(texts, problems, strict=True)
        ]
        result[name] = {
            "exact": int(sum(right)),
            "changed": sum(a != b for a, b in zip(produced, completions, strict=True)),
            **shift(scores, reference, sample.counted),
        }
    return result


def on_recall(
    feeder: Feeder,
    texts: Sequence[Text],
    names: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, float]]:
    """Every fault on documents that recall: values right, values that change, shifts on the values' tokens."""
    sample = recall_sample(texts)
    intact, _ = feed_prompts(feeder, sample.prompts, [feeder.longest] * len(texts))
    reference = forced(feeder, intact, sample)
    result = {}
    for name, fault in table(feeder.model.config).items():
        if names is not None and name not in names:
            continue
        progress(f"faults, recall: {name}")
        scores = forced(feeder, strike(feeder, name, fault, intact, sample), sample)
        exact = changed = 0
        for text, prompt, score, before in zip(texts, sample.prompts, scores, reference, strict=True):
            for start, end in text.values:
                here = slice(start - len(prompt) - 1, end - len(prompt) - 1)
                exact += bool((score.best[here] == text.ids[start:end]).all())
                changed += bool((score.best[here] != before.best[here]).any())
        result[name] = {"exact": exact, "changed": changed, **shift(scores, reference, sample.counted)}
    return result
