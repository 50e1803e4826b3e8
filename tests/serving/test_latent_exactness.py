"""A model of latents alone, without a state, in random interleavings: within the float64 bound, and no fault unseen."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from gdnjax import LLM, EngineConfig, build_model
from gdnjax.config import ATTENTION
from tests import faults
from tests.float64 import reference
from tests.micro import LATENTS, made
from tests.serving.exactness import (
    ALL,
    GREEDY,
    LOGPROB_BOUND,
    MAX_MODEL_LEN,
    STATE_BOUND,
    distance,
    micro_arrivals,
    prompt_of,
    queue,
    relative,
    reported,
    values_of,
)

pytestmark = pytest.mark.usefixtures("quickly_compiled")

NUM_INTERLEAVINGS = 8
"""Of 2 to 4 requests each."""


@functools.cache
def params() -> dict:
    """With the head; without it the model is the same one."""
    return made(LATENTS, 3, mtp=True)


@functools.cache
def engine(num_drafts: int) -> LLM:
    """Scarce: blocks for two or three requests, so that some are preempted; and pieces of 64 tokens."""
    config = EngineConfig(
        max_num_seqs=4,
        max_num_batched_tokens=64,
        prefill_buckets=(64,),
        decode_buckets=(4,),
        block_size=16,
        num_kv_blocks=28,
        num_speculative_tokens=num_drafts,
        max_logprobs=ALL,
        warmup=False,
    )
    model = build_model(LATENTS, "float32", mtp=num_drafts > 0)
    held = {name: leaf for name, leaf in params().items() if num_drafts or name != "mtp"}
    return LLM.from_model(model, held, config, max_model_len=MAX_MODEL_LEN)


@functools.lru_cache(maxsize=32)
def exact(tokens: tuple[int, ...]):
    return reference(LATENTS, params(), tokens)


def logprob_error(request) -> float:
    """Of every log-probability that a request reported, teacher-forced on what it emitted."""
    sequence = (*request.prompt_token_ids, *request.output_token_ids)
    found = values_of(request.output_logprobs, reported(request.output_logprobs))
    forced = exact(sequence).logprobs
    return distance(found, forced[request.prompt_length - 1 : -1])


def latent_error(llm: LLM, request, blocks: list[int]) -> float:
    """Of the latents in a request's blocks, those of the head among them, by layer."""
    mtp = llm.model.mtp
    sequence = (*request.prompt_token_ids, *request.output_token_ids)
    pages = jax.device_get(llm.engine.runner.state.cache.pages[ATTENTION]["latent"][:, np.array(blocks)])
    found = pages.reshape(len(pages), -1, pages.shape[-1])
    fed = request.num_tokens - 1
    wanted = exact(sequence).keys[: 3 + mtp]
    assert len(found) == len(wanted)
    # The head has nothing at index 0.
    return max(relative(a[first:fed], b[first:fed]) for a, b, first in zip(found, wanted, (0, 0, 0, 1), strict=False))


def interleave(llm: LLM, seed: int, speculating: bool) -> dict:
    """Requests at their times, some of them sent back once: each with the error of its latents as it ended."""
    rng = np.random.default_rng([99, seed])
    arrivals = micro_arrivals(rng, speculating)
    requests, held, found = [], {}, {}
    for turn in range(600):
        requests += [queue(llm, *what) for when, *what in arrivals if when == turn]
        if rng.random() < 0.03 and llm.engine.scheduler.running:
            llm.engine.preempt(llm.engine.scheduler.running[-1])
        llm.engine.step()
        llm.engine.scheduler.check_integrity()
        for request in requests:
            if request.finished and request not in found:
                found[request] = latent_error(llm, request, held[request])
            elif request.slot:
                held[request] = list(request.blocks)
        if turn > 12 and not llm.engine.has_work:
            assert len(found) == len(arrivals)
            return found
    raise AssertionError("work is left after 600 turns")


@pytest.mark.thorough
@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("num_drafts", [0, 2])
def test_random_interleavings_of_latents_are_within_the_float64_bound(num_drafts):
    """Hits at any block, pieces, preemption and drafts: log-probabilities of the whole vocabulary, and the pages."""
    llm = engine(num_drafts)
    logprob = latent = hits = preempted = drafted = accepted = 0
    for seed in range(NUM_INTERLEAVINGS):
        for request, error in interleave(llm, seed, num_drafts > 0).items():
            logprob, latent = max(logprob, logprob_error(request)), max(latent, error)
            hits += request.num_cached_tokens > 0
            preempted += request.num_preemptions
            drafted += request.num_draft_tokens
            accepted += request.num_accepted_tokens
    print(f"{logprob:.1e} {latent:.1e}, {hits} hits, {preempted} preempted, {accepted} of {drafted} drafts")
    assert logprob <= LOGPROB_BOUND
    assert latent <= STATE_BOUND
    assert hits >= 12
    assert preempted >= 2
    assert (drafted >= 50) == (num_drafts > 0)
    assert (accepted >= 20) == (num_drafts > 0)


def _page_off_by_one(llm, victim, neighbour):
    """The entries of the block that is being filled stand one place further on, in one layer. (In a full block they
    might stand in any order: they bring their rotation along.)"""
    latent = llm.engine.runner.state.cache.pages[ATTENTION]["latent"]
    block = victim.blocks[2]
    faults.replace_pools(llm.engine, latent=latent.at[1, block].set(np.roll(latent[1, block], 1, axis=0)))


def _page_of_neighbour(llm, victim, neighbour):
    table = llm.engine.runner.state.slots.block_table
    swapped = table.at[victim.slot, 0].set(table[neighbour.slot, 0])
    faults.replace_table(llm.engine, block_table=swapped)


def _shared_part_lost(llm, victim, neighbour):
    """The rotated part of the keys alone, of a block of one layer."""
    latent = llm.engine.runner.state.cache.pages[ATTENTION]["latent"]
    faults.replace_pools(llm.engine, latent=latent.at[1, victim.blocks[0], :, 20:].set(0))


@pytest.mark.parametrize("fault", [None, _page_off_by_one, _page_of_neighbour, _shared_part_lost])
def test_float64_sees_a_fault_in_the_latents(fault):
    llm = engine(0)
    llm.reset_prefix_cache()
    params = dataclasses.replace(GREEDY, max_tokens=12)
    victim, neighbour = (queue(llm, prompt_of(seed, 40), params) for seed in (71, 72))
    for _ in range(4):
        llm.engine.step()
    if fault is not None:
        fault(llm, victim, neighbour)
    for _ in range(30):
        llm.engine.step()
    assert victim.finished
    assert neighbour.finished
    errors = logprob_error(victim), logprob_error(neighbour)
    llm.reset_prefix_cache()
    assert errors[1] <= LOGPROB_BOUND
    if fault is None:
        assert errors[0] <= LOGPROB_BOUND
    else:
        assert errors[0] > 100 * LOGPROB_BOUND
