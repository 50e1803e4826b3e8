"""Thinking: under both names, counted, bounded, left out. The embedded model is made to think by a template."""

import httpx
import pytest

from gdnjax.serving.server.app import make_app
from tests.serving.server.asking import QUESTION, answer, error, stream
from tests.serving.server.conftest import serving
from tests.serving.server.test_errors import config

PATH = "/v1/chat/completions"
TEMPLATE = "{{- '<|im_start|>user\\n' + messages[0].content + '<|im_end|>\\n<|im_start|>assistant\\n<think>\\n' -}}"
EFFORTS = TEMPLATE + "{%- if enable_thinking is false -%}{{- '</think>\\n\\n' -}}{%- endif -%}"
BODY = {
    "messages": [{"role": "user", "content": QUESTION}],
    "chat_template": TEMPLATE,
    "temperature": 0,
    "max_tokens": 24,
    "return_token_ids": True,
    "stream_options": {"include_usage": True},
}


@pytest.fixture(scope="module")
def trusting(async_llm):
    app = make_app(async_llm, config(trust_request_chat_template=True))
    with serving(app) as url, httpx.Client(base_url=url, timeout=300) as client:
        yield client


def told(client, **changes):
    """Thinking, answer, tokens, and how it ended: whole, and the same of the stream."""
    whole = answer(client, PATH, {**BODY, **changes})
    (choice,) = whole["choices"]
    message, usage = choice["message"], whole["usage"]
    assert message.get("reasoning") == message.get("reasoning_content")
    chunks = stream(client, PATH, {**BODY, **changes})
    found = {"reasoning": "", "content": "", "token_ids": []}
    for chunk in chunks[:-1]:
        (piece,) = chunk["choices"]
        assert piece["delta"].get("reasoning") == piece["delta"].get("reasoning_content")
        for name in ("reasoning", "content"):
            found[name] += piece["delta"].get(name, "")
        found["token_ids"] += piece.get("token_ids", [])
    assert found["reasoning"] == (message.get("reasoning") or "")
    assert found["content"] == (message["content"] or "")
    assert found["token_ids"] == choice["token_ids"]
    assert piece["finish_reason"] == choice["finish_reason"]
    assert chunks[-1]["usage"]["completion_tokens"] == usage["completion_tokens"] == len(choice["token_ids"])
    assert chunks[-1]["usage"]["completion_tokens_details"] == usage["completion_tokens_details"]
    return message.get("reasoning"), message["content"], choice, usage["completion_tokens_details"]["reasoning_tokens"]


def test_output_that_begins_in_thinking_is_thinking(trusting):
    reasoning, content, choice, count = told(trusting)
    assert reasoning
    assert content is None
    assert count == len(choice["token_ids"])


@pytest.mark.thorough
def test_thinking_can_be_left_out(trusting):
    reasoning, content, _, count = told(trusting, include_reasoning=False)
    assert (reasoning, content) == (None, None)
    assert count > 0


@pytest.mark.short_cases("1")
@pytest.mark.parametrize("budget", [0, 1, 5])
def test_budget_ends_thinking_and_the_answer_goes_on(budget, trusting, llm):
    free, _, whole, _ = told(trusting)
    reasoning, content, choice, count = told(trusting, thinking_token_budget=budget)
    end = llm.tokenizer.encode("\n</think>\n\n", add_special_tokens=False)
    kept = whole["token_ids"][:budget]
    assert choice["token_ids"][: budget + len(end)] == kept + end
    assert free.startswith(reasoning or "")
    # Up to the tag, whatever the tokens of its newlines are.
    assert count == budget + 1 + end.index(llm.tokenizer.added_token_ids["</think>"])
    # What comes behind is what the model says behind that prompt.
    prompt = answer(trusting, f"{PATH}/render", BODY)["token_ids"]
    rest = {"prompt": prompt + kept + end, "temperature": 0, "max_tokens": 24 - budget - len(end)}
    assert content == answer(trusting, "/v1/completions", rest)["choices"][0]["text"].lstrip("\n")
    assert choice["finish_reason"] in ("stop", "length")


@pytest.mark.thorough
def test_budget_that_is_not_reached_changes_nothing(trusting):
    assert told(trusting, thinking_token_budget=200) == told(trusting)


def test_end_of_thinking_past_the_budget_comes_too_late(trusting, llm):
    """The model ends thinking by its first token, and a budget of none has ended it before."""
    close = llm.tokenizer.added_token_ids["</think>"]
    end = llm.tokenizer.encode("\n</think>\n\n", add_special_tokens=False)
    asked = {**BODY, "logit_bias": {str(close): 100}, "max_tokens": len(end) + 1}
    (free,) = answer(trusting, PATH, asked)["choices"]
    assert free["token_ids"][0] == close
    (choice,) = answer(trusting, PATH, {**asked, "thinking_token_budget": 0})["choices"]
    assert choice["token_ids"][: len(end)] == end


def test_budget_leaves_no_room_for_more_than_there_is(trusting):
    reasoning, content, choice, _ = told(trusting, thinking_token_budget=5, max_tokens=6)
    assert choice["finish_reason"] == "length"
    assert content is None
    assert reasoning


@pytest.mark.parametrize(("name", "value"), [("n", 2), ("logprobs", True), ("presence_penalty", 1)])
def test_budget_and_what_it_cannot_be_had_with(name, value, client):
    body = {"messages": BODY["messages"], "thinking_token_budget": 5, name: value}
    found = error(client.post(PATH, json=body), 400)
    assert found["param"] == "thinking_token_budget"


def test_effort_goes_to_the_template(trusting, client):
    found = error(client.post(PATH, json={"messages": BODY["messages"], "reasoning_effort": "low"}), 400)
    assert found["param"] == "reasoning_effort"
    asked = {**BODY, "chat_template": EFFORTS}
    on, off = (
        answer(trusting, f"{PATH}/render", {**asked, "reasoning_effort": effort})["token_ids"]
        for effort in ("low", "none")
    )
    assert off[: len(on)] == on
    assert len(off) > len(on)
    assert answer(trusting, f"{PATH}/render", {**asked, "enable_thinking": False})["token_ids"] == off
    both = {**asked, "enable_thinking": True, "reasoning_effort": "none"}
    assert error(trusting.post(PATH, json=both), 400)["param"] == "reasoning_effort"


def test_earlier_thinking_may_have_either_name(trusting):
    template = "{%- for message in messages -%}{{- message.reasoning_content or '' -}}{%- endfor -%}x"
    messages = [*BODY["messages"], {"role": "assistant", "content": "Seven."}]
    found = []
    for name in ("reasoning", "reasoning_content"):
        told = [messages[0], {**messages[1], name: "I think."}]
        found.append(answer(trusting, f"{PATH}/render", {"messages": told, "chat_template": template})["token_ids"])
    assert found[0] == found[1]
    assert len(found[0]) > 1
