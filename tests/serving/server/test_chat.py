"""/v1/chat/completions: what comes is what LLM.chat gives, streamed or not, in OpenAI's form."""

import pytest

from gdnjax import SamplingParams
from tests.serving.server.asking import CHAT, QUESTION, answer, error, joined, stream

PATH = "/v1/chat/completions"


@pytest.mark.short_cases("greedy")
@pytest.mark.parametrize(
    ("asked", "params"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 1, "seed": 11, "n": 3}, {"temperature": 1.0, "seed": 11, "n": 3}),
        ({"temperature": 0, "max_completion_tokens": 5}, {"temperature": 0.0, "max_tokens": 5}),
        ({"temperature": 0, "stop": ["####"]}, {"temperature": 0.0, "stop": ["####"]}),
    ],
    ids=["greedy", "seeded", "limit", "stop"],
)
def test_streaming_equals_not_streaming_equals_chat(asked, params, client, llm):
    body = {**CHAT, "logprobs": True, "top_logprobs": 2, "return_token_ids": True, **asked}
    (output,) = llm.chat(
        CHAT["messages"], SamplingParams(**{"max_tokens": None, "logprobs": 2, **params}), use_tqdm=False
    )
    whole = answer(client, PATH, body)
    chunks = stream(client, PATH, body)
    pieces = joined(chunks)
    assert len(whole["choices"]) == len(pieces) == asked.get("n", 1)
    for sample, choice, piece in zip(output.outputs, whole["choices"], pieces, strict=True):
        expected = (list(sample.token_ids), sample.finish_reason, sample.stop_reason)
        assert choice["message"] == {"role": "assistant", "content": sample.text, "refusal": None}
        assert (choice["token_ids"], choice["finish_reason"], choice["stop_reason"]) == expected
        assert piece["text"] == sample.text
        assert (piece["token_ids"], piece["finish_reason"], piece["stop_reason"]) == expected
        content = choice["logprobs"]["content"]
        assert content == [entry for table in piece["logprobs"] for entry in table["content"]]
        for entry, token, found in zip(content, sample.token_ids, sample.logprobs, strict=True):
            assert (entry["token"], entry["logprob"]) == (found[token].decoded_token, found[token].logprob)
            assert [top["logprob"] for top in entry["top_logprobs"]] == sorted(
                (each.logprob for each in found.values() if each.rank <= 2), reverse=True
            )
    assert whole["prompt_token_ids"] == chunks[0]["prompt_token_ids"] == list(output.prompt_token_ids)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_bytes_of_tokens_make_the_text(client):
    """Also of a character that several tokens make."""
    body = {**CHAT, "logprobs": True, "max_tokens": 4, "allowed_token_ids": [164, 225], "temperature": 0}
    entries = answer(client, PATH, body)["choices"][0]["logprobs"]["content"]
    assert len(entries) == 4
    assert all(len(entry["bytes"]) == 1 for entry in entries)
    assert {entry["token"] for entry in entries} == {"\ufffd"}
    assert all(entry["top_logprobs"] == [] for entry in entries)


def test_prompt_is_that_of_the_template(client, llm):
    rendered = answer(client, f"{PATH}/render", CHAT)["token_ids"]
    assert rendered == llm.tokenizer.apply_chat_template(CHAT["messages"])
    assert answer(client, "/tokenize", CHAT)["tokens"] == rendered
    with_tools = {**CHAT, "tools": [{"type": "function", "function": {"name": "add"}}]}
    rendered_with_tools = answer(client, f"{PATH}/render", with_tools)["token_ids"]
    assert len(rendered_with_tools) > len(rendered)
    assert answer(client, "/tokenize", with_tools)["tokens"] == rendered_with_tools
    assert answer(client, PATH, {**CHAT, "max_tokens": 1, "return_token_ids": True})["prompt_token_ids"] == rendered


def test_last_message_can_be_gone_on_with(client, llm):
    messages = [*CHAT["messages"], {"role": "assistant", "content": "The box has"}]
    body = {"messages": messages, "add_generation_prompt": False, "continue_final_message": True, "temperature": 0}
    body["max_tokens"] = 4
    prompt = answer(client, PATH, {**body, "return_token_ids": True})["prompt_token_ids"]
    assert llm.tokenizer.decode(prompt).endswith("The box has")
    plain = answer(client, PATH, body)["choices"][0]["message"]["content"]
    echoed = answer(client, PATH, {**body, "echo": True})["choices"][0]["message"]["content"]
    assert echoed == "The box has" + plain
    assert joined(stream(client, PATH, {**body, "echo": True}))[0]["text"] == echoed


def test_developer_is_a_system_to_a_template_without_one(client):
    system, developer = (
        {"messages": [{"role": role, "content": "Be brief."}, *CHAT["messages"]]} for role in ("system", "developer")
    )
    assert (
        answer(client, f"{PATH}/render", developer)["token_ids"]
        == answer(client, f"{PATH}/render", system)["token_ids"]
    )


def test_parts_of_text_are_a_text(client):
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]}
    assert answer(client, f"{PATH}/render", parts)["token_ids"] == answer(client, f"{PATH}/render", CHAT)["token_ids"]


def test_usage_chunk_is_the_usage(client):
    body = {**CHAT, "temperature": 0, "n": 2, "max_tokens": 5}
    chunks = stream(client, PATH, {**body, "stream_options": {"include_usage": True}})
    assert chunks[-1]["choices"] == []
    usage, whole = chunks[-1]["usage"], answer(client, PATH, body)["usage"]
    assert {**usage, "prompt_tokens_details": None} == {**whole, "prompt_tokens_details": None}
    assert chunks[-1]["metrics"]["time_to_first_token_ms"] > 0
    every = stream(client, PATH, {**body, "stream_options": {"continuous_usage_stats": True}})
    assert [chunk["usage"]["completion_tokens"] for chunk in every][-1] == 10


def test_templates_of_requests_want_trust(client):
    found = error(client.post(PATH, json={**CHAT, "chat_template": "{{ messages }}"}), 400)
    assert found["param"] == "chat_template"
    assert "--trust-request-chat-template" in found["message"]


def test_keywords_go_to_the_template(client):
    for body in ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}):
        # The embedded model's template knows no such thing, and an answer without it would not be what was asked for.
        assert "enable_thinking" in error(client.post(PATH, json={**CHAT, **body}), 400)["message"]
    twice = {"chat_template_kwargs": {"enable_thinking": False}, "enable_thinking": True}
    assert error(client.post(PATH, json={**CHAT, **twice}), 400)["param"] == "enable_thinking"
