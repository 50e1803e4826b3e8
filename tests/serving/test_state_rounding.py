"""States that an engine rounds stochastically: the noise belongs to a request's tokens, whoever is beside them."""

import dataclasses

import numpy as np
import pytest

from gdnjax import LLM
from tests.serving.exactness import CACHED, GREEDY, Run, build_shallow, finish, leave_idle, prompt_of, queue, solo

pytestmark = [pytest.mark.usefixtures("quickly_compiled"), pytest.mark.thorough]

STOCHASTIC = {
    "ssm_dtype": "bfloat16",
    "ssm_rounding": "stochastic",
    "max_num_batched_tokens": 64,
    "prefill_buckets": (64,),
    "batch_invariant": True,
}
"""Pieces of one chunk each, so that all runs round in the same places; float32 sums are in the same order then, too."""


@pytest.fixture(params=[0, 2], ids=["plain", "drafts"], scope="module")
def engine(request) -> LLM:
    caching = CACHED | {"state_checkpoint_interval": 64}
    return build_shallow(**STOCHASTIC, **caching, num_speculative_tokens=request.param)


@pytest.fixture
def llm(engine):
    """With an empty cache."""
    engine.reset_prefix_cache()
    yield engine
    leave_idle(engine)


def assert_bit_equal(one: Run, other: Run) -> None:
    assert one.tokens == other.tokens
    assert one.position == other.position
    for name in ("logprobs", "states", "windows", "keys", "values"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_request_ignores_its_neighbours(llm):
    """It has other rows, slots and blocks, and its pieces stand in other steps."""
    prompt = prompt_of(0, 100)
    alone = solo(llm, prompt)
    llm.reset_prefix_cache()
    for seed in (1, 2):
        queue(llm, prompt_of(seed, 30 * seed), dataclasses.replace(GREEDY, max_tokens=30))
    for _ in range(4):
        llm.engine.step()
    request = queue(llm, prompt)
    for _ in range(3):
        llm.engine.step()
    queue(llm, prompt_of(3, 50))
    assert_bit_equal(*finish(llm, request), alone)


def test_hit_equals_fresh_where_pieces_end_alike(llm):
    """A state is rounded where it is stored: fresh at 64, 128 and at the end, and so by the request that left it."""
    prompt = prompt_of(0, 150)
    fresh = solo(llm, prompt)
    llm.reset_prefix_cache()
    solo(llm, prompt[:140], dataclasses.replace(GREEDY, max_tokens=1))
    request = queue(llm, prompt)
    (hit,) = finish(llm, request)
    assert request.num_cached_tokens == 128
    assert_bit_equal(hit, fresh)
