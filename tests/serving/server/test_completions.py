"""/v1/completions: what comes is what LLM.generate gives, streamed or not, in OpenAI's form."""

import pytest

from gdnjax import SamplingParams
from tests.serving.server.asking import QUESTION, answer, joined, merged, stream

PATH = "/v1/completions"

CASES = {
    "greedy": ({"temperature": 0}, {"temperature": 0.0}),
    "seeded": ({"temperature": 1, "seed": 7, "n": 2}, {"temperature": 1.0, "seed": 7, "n": 2}),
    "stop": ({"temperature": 0, "stop": ["apples"]}, {"temperature": 0.0, "stop": ["apples"]}),
    "stop shown": (
        {"temperature": 0, "stop": "apples", "include_stop_str_in_output": True},
        {"temperature": 0.0, "stop": "apples", "include_stop_str_in_output": True},
    ),
    "stop token": ({"temperature": 0, "stop_token_ids": [710]}, {"temperature": 0.0, "stop_token_ids": [710]}),
    "penalties": (
        {"temperature": 0, "presence_penalty": 2, "frequency_penalty": 1.5, "repetition_penalty": 1.2},
        {"temperature": 0.0, "presence_penalty": 2, "frequency_penalty": 1.5, "repetition_penalty": 1.2},
    ),
    "filters": (
        {"temperature": 1, "seed": 3, "top_k": 5, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 1.0, "seed": 3, "top_k": 5, "top_p": 0.9, "min_p": 0.01},
    ),
    "bias": ({"temperature": 0, "logit_bias": {"300": -100}}, {"temperature": 0.0, "logit_bias": {300: -100}}),
    "allowed": ({"temperature": 0, "allowed_token_ids": [22, 24]}, {"temperature": 0.0, "allowed_token_ids": [22, 24]}),
    "bad words": ({"temperature": 0, "bad_words": ["box"]}, {"temperature": 0.0, "bad_words": ["box"]}),
    "past the end": (
        {"temperature": 0, "ignore_eos": True, "min_tokens": 9, "skip_special_tokens": False},
        {"temperature": 0.0, "ignore_eos": True, "min_tokens": 9, "skip_special_tokens": False},
    ),
}


@pytest.mark.short_cases("greedy")
@pytest.mark.parametrize("case", CASES)
def test_streaming_equals_not_streaming_equals_generate(case, client, llm):
    asked, params = CASES[case]
    body = {"prompt": QUESTION, "max_tokens": 24, "logprobs": 2, "return_token_ids": True, **asked}
    (output,) = llm.generate([QUESTION], SamplingParams(max_tokens=24, logprobs=2, **params), use_tqdm=False)
    whole = answer(client, PATH, body)
    pieces = joined(stream(client, PATH, body))
    assert len(whole["choices"]) == len(pieces) == len(output.outputs) == asked.get("n", 1)
    for sample, choice, piece in zip(output.outputs, whole["choices"], pieces, strict=True):
        expected = (sample.text, list(sample.token_ids), sample.finish_reason, sample.stop_reason)
        assert (choice["text"], choice["token_ids"], choice["finish_reason"], choice["stop_reason"]) == expected
        assert (piece["text"], piece["token_ids"], piece["finish_reason"], piece["stop_reason"]) == expected
        assert choice["prompt_token_ids"] == list(output.prompt_token_ids)
        table = choice["logprobs"]
        assert table == merged(piece["logprobs"])
        drawn = [entries[token] for token, entries in zip(sample.token_ids, sample.logprobs, strict=True)]
        assert table["token_logprobs"] == [each.logprob for each in drawn]
        assert table["tokens"] == [each.decoded_token for each in drawn]
        for top, entries in zip(table["top_logprobs"], sample.logprobs, strict=True):
            assert top == {each.decoded_token: each.logprob for each in entries.values()}
    num = sum(len(sample.token_ids) for sample in output.outputs)
    usage = whole["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(output.prompt_token_ids), num)
    assert usage["total_tokens"] == usage["prompt_tokens"] + num


@pytest.mark.thorough
def test_text_offsets_find_the_tokens(client):
    whole = answer(client, PATH, {"prompt": QUESTION, "max_tokens": 12, "logprobs": 0, "echo": True, "temperature": 0})
    (choice,) = whole["choices"]
    table = choice["logprobs"]
    assert choice["text"].startswith(QUESTION)
    for offset, token in zip(table["text_offset"], table["tokens"], strict=True):
        assert choice["text"][offset : offset + len(token)] == token
    assert table["top_logprobs"][-1] == {}


def test_batch_of_texts_and_token_ids_is_answered_in_order(client, llm):
    prompts = [QUESTION, [42, 75], "Once upon a time"]
    body = {"prompt": prompts, "max_tokens": 6, "temperature": 1, "seed": 5, "n": 2, "return_token_ids": True}
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=5, n=2)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    expected = [(sample.text, list(sample.token_ids)) for output in outputs for sample in output.outputs]
    whole = answer(client, PATH, body)
    assert [choice["index"] for choice in whole["choices"]] == list(range(6))
    assert [(choice["text"], choice["token_ids"]) for choice in whole["choices"]] == expected
    assert [(piece["text"], piece["token_ids"]) for piece in joined(stream(client, PATH, body))] == expected
    assert whole["usage"]["prompt_tokens"] == sum(len(output.prompt_token_ids) for output in outputs)


@pytest.mark.thorough
@pytest.mark.parametrize("prompt", [QUESTION, [42, 75, 300]])
def test_echo_shows_the_prompt_and_its_logprobs(prompt, client, llm):
    body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 1, "return_token_ids": True}
    params = SamplingParams(max_tokens=4, temperature=0.0, logprobs=1, prompt_logprobs=1)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    text = prompt if isinstance(prompt, str) else llm.tokenizer.decode(prompt)
    whole = answer(client, PATH, body)
    (choice,), (piece,) = whole["choices"], joined(stream(client, PATH, body))
    assert choice["text"] == piece["text"] == text + output.outputs[0].text
    table = choice["logprobs"]
    assert table == merged(piece["logprobs"])
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    entries = [*output.prompt_logprobs, *output.outputs[0].logprobs]
    assert table["token_logprobs"][0] is None
    assert table["token_logprobs"][1:] == [
        found[token].logprob for token, found in zip(ids[1:], entries[1:], strict=True)
    ]
    # What is generated is told apart from what was given.
    assert choice["token_ids"] == piece["token_ids"] == list(output.outputs[0].token_ids)


@pytest.mark.thorough
def test_echo_alone_scores_a_prompt(client):
    body = {"prompt": [QUESTION, [42, 75]], "max_tokens": 0, "echo": True, "logprobs": 0, "n": 2}
    whole = answer(client, PATH, body)
    texts = [choice["text"] for choice in whole["choices"]]
    assert texts[:2] == [QUESTION, QUESTION]
    assert [len(choice["logprobs"]["tokens"]) for choice in whole["choices"][2:]] == [2, 2]
    assert [choice["finish_reason"] for choice in whole["choices"]] == ["length"] * 4
    assert whole["usage"]["completion_tokens"] == 0
    assert [piece["text"] for piece in joined(stream(client, PATH, body))] == texts


@pytest.mark.thorough
def test_prompt_logprobs_are_those_of_generate(client, llm):
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=2)
    (output,) = llm.generate([QUESTION], params, use_tqdm=False)
    whole = answer(client, PATH, {"prompt": QUESTION, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 2})
    found = whole["choices"][0]["prompt_logprobs"]
    assert found[0] is None
    for entries, expected in zip(found[1:], output.prompt_logprobs[1:], strict=True):
        assert {int(token): each["logprob"] for token, each in entries.items()} == {
            token: each.logprob for token, each in expected.items()
        }


def test_tokens_may_be_called_by_their_ids(client):
    body = {"prompt": QUESTION, "max_tokens": 3, "temperature": 0, "logprobs": 1, "return_token_ids": True}
    whole = answer(client, PATH, {**body, "return_tokens_as_token_ids": True})
    (choice,) = whole["choices"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]


def test_usage_is_the_last_chunk_or_in_every_chunk(client):
    body = {"prompt": QUESTION, "max_tokens": 5, "temperature": 0, "ignore_eos": True, "n": 2}
    assert not any("usage" in chunk for chunk in stream(client, PATH, body))
    chunks = stream(client, PATH, {**body, "stream_options": {"include_usage": True}})
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 10
    assert chunks[-1]["usage"] == answer(client, PATH, body)["usage"]
    every = stream(client, PATH, {**body, "stream_options": {"continuous_usage_stats": True}})
    counts = [chunk["usage"]["completion_tokens"] for chunk in every]
    assert counts == sorted(counts)
    assert counts[-1] == 10
    assert counts[0] < 10


def test_second_time_the_prompt_is_cached(client):
    # No other test asks this, so it is new.
    body = {"prompt": "Sam counts birds. " * 12, "max_tokens": 2, "temperature": 0}
    first, second = (answer(client, PATH, body)["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in range(2))
    assert first == 0
    assert second > 32


def test_text_can_be_taken_without_special_tokens(client):
    body = {"prompt": "Hello", "max_tokens": 1, "return_token_ids": True}
    found = [answer(client, PATH, {**body, "add_special_tokens": flag}) for flag in (True, False)]
    # This tokenizer puts none around a text.
    assert found[0]["choices"][0]["prompt_token_ids"] == found[1]["choices"][0]["prompt_token_ids"]


def test_answers_have_the_name_that_the_client_gave(client):
    body = {"prompt": "Hello", "max_tokens": 1}
    response = client.post(PATH, json=body, headers={"x-request-id": "mine"})
    assert response.json()["id"] == response.headers["x-request-id"] == "cmpl-mine"
    assert answer(client, PATH, {**body, "request_id": "own"}, headers={"x-request-id": "mine"})["id"] == "cmpl-own"
    streamed = client.post(PATH, json={**body, "stream": True}, headers={"x-request-id": "mine"})
    assert streamed.headers["x-request-id"] == "cmpl-mine"
    assert len({answer(client, PATH, body)["id"] for _ in range(2)}) == 2


def test_model_may_have_several_names(client):
    assert answer(client, PATH, {"prompt": "Hello", "max_tokens": 1, "model": "embedded"})["model"] == "embedded"
    assert answer(client, PATH, {"prompt": "Hello", "max_tokens": 1})["model"] == "tiny"


def test_priority_reaches_the_engine(client, llm):
    seen = []
    original = type(llm.frontend).prepare

    def prepare(self, prompts, params=None, urgencies=None):
        seen.extend(each.priority for each in urgencies or ())
        return original(self, prompts, params, urgencies)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(llm.frontend), "prepare", prepare)
        answer(client, PATH, {"prompt": "Hello", "max_tokens": 1, "priority": -3})
    assert seen == [-3]
