"""The invariant mode: one prefill bucket, one decode bucket, one sampler, one grid.

Compiled as users do. Without LLVM's optimisations the rows of a product are rounded by their place on some CPUs, and
bits are what is compared here.
"""

import dataclasses

import numpy as np
import pytest

from tests.serving.exactness import CACHED, GREEDY, build_shallow, prompt_of, queue, solo, table

ROUNDS = 5
"""Of all requests among others: each meets a hit in most of them."""


@pytest.mark.short_cases("0")
@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("num_drafts", [0, 2])
def test_invariant_mode_gives_the_same_bits_whatever_the_load(num_drafts):
    """Tokens and log-probabilities, alone with nothing cached, and among others with and without a hit."""
    scarce = CACHED | {"num_kv_blocks": 64, "num_speculative_tokens": num_drafts}
    llm = build_shallow(state_layout="mixed", batch_invariant=True, **scarce)
    shared = prompt_of(0, 130)
    prompts = [[*shared, *prompt_of(1, 20)], [*shared, *prompt_of(2, 70)], shared[:100], prompt_of(3, 64)]
    params = [dataclasses.replace(GREEDY, max_tokens=12), dataclasses.replace(GREEDY, temperature=1.0, seed=5)]
    wanted = [(prompt, params[i % 2]) for i, prompt in enumerate(prompts)]
    alone = []
    for prompt, how in wanted:
        llm.reset_prefix_cache()
        alone.append(solo(llm, prompt, how))
    llm.reset_prefix_cache()
    hits = 0
    for seed in range(ROUNDS):
        rng = np.random.default_rng(seed)
        requests = []
        for i in rng.permutation(len(wanted)):
            requests.append((i, queue(llm, *wanted[i])))
            queue(llm, prompt_of(100 + seed, int(rng.integers(1, 120))), params[seed % 2])
            for _ in range(rng.integers(0, 6)):
                llm.engine.step()
        while llm.engine.has_work:
            llm.engine.step()
        for i, request in requests:
            assert request.output_token_ids == alone[i].tokens
            np.testing.assert_array_equal(table(request.output_logprobs), alone[i].logprobs)
            hits += request.num_cached_tokens > 0
    llm.close()
    assert hits >= ROUNDS
