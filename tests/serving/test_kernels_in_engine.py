"""Interpreted kernels in the engine, everything on at once: the tokens of the reference engine, up to rounding."""

import functools
from collections.abc import Callable

import pytest

from gdnjax import LLM
from tests.serving.exactness import (
    CACHED,
    LOGPROB_BOUND,
    Exact,
    Run,
    Tally,
    build,
    build_shallow,
    distance,
    exact_micro,
    exact_shallow,
    gaps,
    interleave,
    micro_arrivals,
    num_same,
)

pytestmark = pytest.mark.usefixtures("quickly_compiled")

NUM_INTERLEAVINGS, FEW = 6, 3
"""Of each layout and number of drafts, 2 to 4 requests each; of the shallow model a few."""

PIECES = {"max_num_batched_tokens": 64, "prefill_buckets": (64,)}
"""Most prompts are prefilled in two or three."""


@functools.cache
def wanted(num_drafts: int, build: Callable[..., LLM], count: int) -> list[dict]:
    """What the reference engine makes of every interleaving. How its states lie in memory does not change it."""
    llm = engine("kv", num_drafts, "reference", build)
    found = [interleave(llm, seed, arrivals_of(num_drafts)) for seed in range(count)]
    llm.close()
    return found


def engine(layout: str, num_drafts: int, kernels: str, build: Callable[..., LLM]) -> LLM:
    return build(state_layout=layout, num_speculative_tokens=num_drafts, kernels=kernels, **PIECES, **CACHED)


def arrivals_of(num_drafts: int):
    return functools.partial(micro_arrivals, speculating=num_drafts > 0)


@pytest.mark.thorough
@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(("layout", "num_drafts"), [("kv", 0), ("vk", 2), ("mixed", 2)])
def test_kernels_give_the_tokens_of_the_reference_engine(layout, num_drafts):
    """The same requests at the same turns, whatever is cached, cut, sent back, drafted and computed beside them.

    Their log-probabilities differ by up to 6.2e-6, as much as those of either engine differ from float64, and are held
    to the same bound. States, keys, values and checkpoints are held to float64.
    """
    check_tokens(layout, num_drafts, build, exact_micro(), NUM_INTERLEAVINGS)


@pytest.mark.usefixtures("without_type_checks")
def test_kernels_give_the_tokens_of_the_reference_engine_of_a_shallow_model():
    """In a mixed pool; without drafts, which kernels' own tests verify."""
    check_tokens("mixed", 0, build_shallow, exact_shallow(), FEW)


def check_tokens(layout: str, num_drafts: int, build: Callable[..., LLM], exact: Exact, count: int) -> None:
    llm, tally = engine(layout, num_drafts, "interpret", build), Tally()
    largest, parted = 0.0, []
    for seed, reference in enumerate(wanted(num_drafts, build, count)):
        found = interleave(llm, seed, arrivals_of(num_drafts))
        tally.add(llm, exact, found)
        for one, other in pairs(reference.values(), found.values()):
            same = num_same(one, other)
            if same < len(one.tokens):
                parted.append(float(gaps(one)[same]))
            # Up to the token at which they part both have seen the same ones.
            largest = max(largest, distance(one.logprobs[: same + 1], other.logprobs[: same + 1]))
    llm.close()
    print(tally, f"largest difference {largest:.1e}, parted at {parted}")
    # Kernels add up in other orders: no difference at all would be that of the reference with itself.
    assert 0 < largest <= LOGPROB_BOUND
    # At most once, where the two best tokens are closer than rounding.
    assert len(parted) <= 1
    assert all(gap <= 2 * LOGPROB_BOUND for gap in parted)
    assert tally.within_bounds(), tally
    assert tally.hits >= count
    assert tally.preempted >= count / 3
    assert tally.checkpoints >= 4 * count
    if num_drafts:
        assert tally.drawn >= 0.8 * count
        assert tally.accepted >= 2 * count * num_drafts
        assert tally.beside >= 0.25 * count


def pairs(ones, others) -> list[tuple[Run, Run]]:
    """Runs of the same request; requests end in an order of their own."""
    by_prompt = {tuple(run.prompt): run for run in others}
    assert len(by_prompt) == len(ones)
    return [(run, by_prompt[tuple(run.prompt)]) for run in ones]
