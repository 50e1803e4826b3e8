"""The examples that people copy, on the embedded model: they run, and what they say is right."""

import json
import math

import jsonschema
import pytest

from examples import extract_json, own_loop, reinforce, score
from gdnjax import LLM, AsyncLLM, SamplingParams
from gdnjax.serving.server.app import make_app
from gdnjax.serving.server.settings import ServerConfig
from tests.compiling import IN_ONE_PIECE, WITHOUT_MLIR, compiled_with
from tests.serving.server.sockets import serving

QUESTION = "A box has 3 apples. 4 more are put in. How many apples are in the box?"
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def llm():
    options = {"max_num_seqs": 4, "max_model_len": 1024, "max_num_batched_tokens": 128, "num_kv_blocks": 96}
    options |= {"prefill_buckets": (128,), "decode_buckets": (4,), "max_logprobs": 1}
    with (
        compiled_with(IN_ONE_PIECE, WITHOUT_MLIR),
        LLM("tiny", dtype="float32", warmup=False, use_tqdm=False, **options) as made,
    ):
        yield made


@pytest.mark.thorough
def test_log_likelihoods_are_those_of_the_tokens_as_they_are_drawn(llm):
    params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=0, ignore_eos=True)
    (output,) = llm.generate(["Once upon a time"], params, use_tqdm=False)
    (sample,) = output.outputs
    drawn = sum(entry[token].logprob for token, entry in zip(sample.token_ids, sample.logprobs, strict=True))
    found, other = score.log_likelihoods(llm, "Once upon a time", [sample.text, " seven seven seven"])
    assert math.isclose(found, drawn, abs_tol=1e-3)
    assert other < found


@pytest.mark.thorough
def test_every_object_is_one_of_the_schema(llm):
    found = extract_json.extract(llm, ["Ann has 3 pens.", "Tom sees 4 birds."], extract_json.SCHEMA)
    for instance in found:
        jsonschema.validate(instance, extract_json.SCHEMA)


@pytest.mark.thorough
def test_own_loop_says_what_the_engine_says(llm):
    prompts = [llm.get_tokenizer().encode(text) for text in ("Once upon a time", QUESTION)]
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    expected = [list(each.outputs[0].token_ids) for each in llm.generate(prompts, params, use_tqdm=False)]
    ends = llm.eos_token_ids
    assert own_loop.complete(llm.model, llm.params, prompts, max_tokens=MAX_TOKENS, stop_token_ids=ends) == expected


def test_call_tells_the_model_what_is_wrong():
    # Here, as the clients of the server's tests are: it imports openai.
    from examples import tool_loop

    assert tool_loop.call(tool_loop.FUNCTIONS, "multiply", '{"a": 6, "b": 7}') == "42"
    for name, arguments in (("divide", "{}"), ("add", '{"a": 1}'), ("add", "[")):
        assert tool_loop.call(tool_loop.FUNCTIONS, name, arguments).startswith("error: ")


@pytest.mark.thorough
def test_what_was_rewarded_is_more_probable_to_the_engine_afterwards(llm):
    """Last but one: the engine has other weights afterwards."""
    prompt, continuation = "Once upon a time", " there was a bee"
    (before,) = score.log_likelihoods(llm, prompt, [continuation])
    encode = llm.get_tokenizer().encode
    tokens, first = encode(prompt + continuation), len(encode(prompt))
    learner = reinforce.Learner(llm, width=first + 16, learning_rate=1e-3)
    llm.update_weights(learner.learn(llm.params, tokens[:first], tokens[first:], 1.0))
    (after,) = score.log_likelihoods(llm, prompt, [continuation])
    assert after > before + 0.1
    old = llm.params
    assert len(reinforce.train(llm, prompt, reinforce.reward_of, steps=1, max_tokens=16)) == 1
    assert llm.params is not old


@pytest.mark.thorough
def test_tools_are_called_and_their_results_come_back(llm):
    """The model never learnt to: the first answer is a call because it has to be."""
    with (
        AsyncLLM.from_llm(llm) as async_llm,
        serving(make_app(async_llm, ServerConfig(served_model_names=("tiny",)))) as url,
    ):
        import openai

        from examples import tool_loop

        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        found = tool_loop.converse(client, "tiny", "What is 6 times 7?", most_rounds=2, max_tokens=120, temperature=0.0)
    assert [message["role"] for message in found[:3]] == ["user", "assistant", "tool"]
    results = [message for message in found if message["role"] == "tool"][: len(found[1]["tool_calls"])]
    for made, result in zip(found[1]["tool_calls"], results, strict=True):
        assert result["tool_call_id"] == made["id"]
        assert result["content"] == tool_loop.call(tool_loop.FUNCTIONS, **made["function"])
    json.loads(results[0]["content"])
