"""New parameters between turns: what comes after them is theirs alone, and nobody loses a token."""

import asyncio
import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdnjax import LLM, AsyncLLM, SamplingParams, full_logits
from tests.micro import shallow_params
from tests.serving.exactness import CACHED, build_shallow, leave_idle, prompt_of

pytestmark = pytest.mark.usefixtures("quickly_compiled")

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


def old_params() -> dict:
    return shallow_params(mtp=True)


@functools.cache
def new_params() -> dict:
    return jax.tree.map(lambda x: x * np.float32(1.25), old_params())


@pytest.fixture(scope="module")
def engine() -> LLM:
    return build_shallow(**CACHED, num_speculative_tokens=2)


@pytest.fixture
def llm(engine):
    engine.update_weights(old_params())
    yield engine
    leave_idle(engine)


def tokens_of(llm: LLM, prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def test_new_weights_answer_and_old_ones_come_back(llm):
    prompt = prompt_of(0, 70)
    old = tokens_of(llm, prompt)
    compiled = llm.engine.num_compilations
    llm.update_weights(new_params())
    new = tokens_of(llm, prompt)
    assert new != old
    logits = full_logits(llm.model, llm.params, jnp.array([*prompt, *new]))
    assert new == np.argmax(logits[len(prompt) - 1 : -1], axis=-1).tolist()
    llm.update_weights(old_params())
    assert tokens_of(llm, prompt) == old
    assert llm.engine.num_compilations == compiled


def test_nothing_cached_is_used_again(llm):
    prompt = prompt_of(0, 70)
    tokens_of(llm, prompt)
    assert llm.engine.scheduler.cache.num_blocks
    llm.update_weights(new_params())
    (output,) = llm.generate([prompt], GREEDY, use_tqdm=False)
    assert output.num_cached_tokens == 0
    llm.engine.scheduler.check_integrity()


def test_who_has_not_ended_goes_on_from_his_tokens(llm):
    """One decodes, one is in the middle of its prompt, one waits; steps are in flight."""
    first = llm.submit(prompt_of(1, 60), GREEDY)
    for _ in range(6):
        llm.step()
    others = [llm.submit(prompt_of(2, 200), GREEDY), llm.submit(prompt_of(3, 40), GREEDY)]
    llm.step()
    llm.update_weights(new_params())
    (request,) = first.requests
    before = list(request.output_token_ids)
    assert 0 < len(before) < GREEDY.max_tokens
    while llm.step():
        pass
    for group in (first, *others):
        (request,) = group.requests
        kept = before if group is first else []
        rest = dataclasses.replace(GREEDY, max_tokens=GREEDY.max_tokens - len(kept))
        assert request.output_token_ids == [*kept, *tokens_of(llm, [*request.prompt_token_ids, *kept], rest)]
        assert request.finish_reason == "length"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: tree["layers"][0].pop("mlp"), "lacks layers.0.mlp"),
        (lambda tree: tree.update(new_head=np.zeros(3, np.float32)), "unknown new_head"),
        (lambda tree: tree["embed_tokens"].update(weight=np.zeros((101, 31), np.float32)), r"\[101, 31\].*\[101, 32\]"),
        (lambda tree: tree["embed_tokens"].update(weight=np.zeros((101, 32), np.float16)), "float16.*float32"),
    ],
    ids=["a part is missing", "one too many", "shape", "dtype"],
)
def test_what_does_not_fit_is_named_and_changes_nothing(change, words, llm):
    prompt = prompt_of(4, 30)
    old, hits = tokens_of(llm, prompt), llm.engine.scheduler.cache.num_blocks
    wrong = copy.deepcopy(new_params())
    change(wrong)
    with pytest.raises(ValueError, match=words):
        llm.update_weights(wrong)
    assert llm.engine.scheduler.cache.num_blocks == hits
    assert tokens_of(llm, prompt) == old


def test_streams_go_on(engine):
    engine.update_weights(old_params())
    prompt = prompt_of(5, 40)

    async def run(llm: AsyncLLM) -> list[int]:
        tokens, told = [], False
        async for piece in llm.generate(prompt, GREEDY):
            tokens += piece.token_ids
            if not told:
                told = True
                await llm.update_weights(new_params())
        return tokens

    # Closed with its LLM, so this engine is the last one of the module.
    with AsyncLLM.from_llm(engine) as llm:
        tokens = asyncio.run(run(llm))
        assert len(tokens) == GREEDY.max_tokens
    with pytest.raises(RuntimeError, match="closed"):
        engine.update_weights(old_params())
