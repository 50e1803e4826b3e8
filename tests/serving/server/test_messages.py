"""Anthropic's Messages API: requests and answers as translations, and the served model by Anthropic's own client."""

import asyncio
import functools
import json
import typing

import pytest
from pydantic import TypeAdapter

from gdnjax.serving.server import messages
from gdnjax.serving.server.errors import ApiError
from tests.serving.server.asking import QUESTION, answer

ASKED = {"model": "tiny", "max_tokens": 40, "messages": [{"role": "user", "content": QUESTION}]}
# Newer clients have no argument for it.
GREEDY = {"extra_body": {"temperature": 0}}
TOOL = {
    "name": "add",
    "description": "Adds.",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
USAGE = {
    "prompt_tokens": 10,
    "completion_tokens": 7,
    "total_tokens": 17,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 3},
}
HEAD = {"id": "chatcmpl-1", "object": "chat.completion", "created": 5, "model": "tiny"}


@functools.cache
def events_adapter() -> TypeAdapter:
    """Made here, as clients are imported where they are used: it takes seconds, in each process that collects tests."""
    from anthropic.types import RawMessageStreamEvent

    return TypeAdapter(list[RawMessageStreamEvent])


def chat_answer(message, finish_reason="stop", stop_reason=None):
    choice = {"index": 0, "message": message, "finish_reason": finish_reason, "stop_reason": stop_reason}
    return {**HEAD, "choices": [choice], "usage": USAGE}


def chunk(delta=None, finish_reason=None, **more):
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish_reason, **more}]
    return {**HEAD, "object": "chat.completion.chunk", "choices": choices, "usage": USAGE}


async def of(chunks):
    for each in chunks:
        if isinstance(each, Exception):
            raise each
        yield each


def events_of(chunks):
    async def collect():
        return [event async for event in messages.stream(of(chunks))]

    return asyncio.run(collect())


def test_request_becomes_a_chat():
    body = {
        "model": "m",
        "max_tokens": 9,
        "system": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief.", "cache_control": {}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "1 + "}, {"type": "text", "text": "2?"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": ""},
                    {"type": "text", "text": "I add."},
                    {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}},
                    {"type": "tool_use", "id": "t2", "name": "add", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "3"}]},
                    {"type": "tool_result", "tool_use_id": "t2", "content": "none", "is_error": True},
                    {"type": "text", "text": "And?"},
                ],
            },
        ],
        "stop_sequences": ["END"],
        "tools": [TOOL],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "temperature": 0.5,
        "stream": True,
        "metadata": {"user_id": "u"},
    }
    calls = [
        {"id": "t1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
        {"id": "t2", "type": "function", "function": {"name": "add", "arguments": "{}"}},
    ]
    function = {"name": "add", "description": "Adds.", "parameters": TOOL["input_schema"]}
    assert messages.to_chat(body, "{{ enable_thinking }}") == {
        "model": "m",
        "max_tokens": 9,
        "messages": [
            {"role": "system", "content": "Be\nbrief."},
            {"role": "user", "content": [{"type": "text", "text": "1 + "}, {"type": "text", "text": "2?"}]},
            {"role": "assistant", "content": "I add.", "reasoning_content": "Hm.", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "t1", "content": "3"},
            {"role": "tool", "tool_call_id": "t2", "content": "Error: none"},
            {"role": "user", "content": [{"type": "text", "text": "And?"}]},
        ],
        "stop": ["END"],
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "enable_thinking": True,
        "thinking_token_budget": 1024,
        "temperature": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }


def test_request_that_begins_the_answer_is_gone_on_with():
    body = {**ASKED, "messages": [*ASKED["messages"], {"role": "assistant", "content": "It is "}]}
    chat = messages.to_chat(body, "")
    assert chat["messages"][-1] == {"role": "assistant", "content": "It is "}
    assert (chat["add_generation_prompt"], chat["continue_final_message"]) == (False, True)


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": None}, "max_tokens: Field required"),
        ({"model": None}, "model: Field required"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, r"messages\[0\].content\[0\].*images are not supported"),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            "'audio'; allowed here: 'text', 'tool_result'",
        ),
        ({"messages": [{"role": "tool", "content": ""}]}, "role must be 'user' or 'assistant', got 'tool'"),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\].content must be a text or a list of blocks"),
        ({"messages": [{"role": "user", "content": [{"type": ["text"]}]}]}, "allowed here"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "the server runs no tools"),
        ({"tool_choice": {"type": "all"}}, "tool_choice.type must be one of"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking: the model's chat template has no"),
        ({"thinking": {"type": "on"}}, "thinking.type must be one of"),
        ({"mcp_servers": [{}]}, "mcp_servers is not served"),
        ({"service_tier": "priority"}, "service_tier is not served.*allowed: 'auto', 'standard_only'"),
        ({"speed": "fast"}, "speed is not served.*allowed: 'standard'"),
        ({"inference_geo": "us"}, "inference_geo is not served"),
        ({"n": 2}, "n is no field of /v1/messages, but of /v1/chat/completions"),
        ({"stop": ["a"]}, "stop is no field of /v1/messages"),
        ({"suffix": "a"}, "suffix is no field of /v1/messages"),
        ({"stream": 1}, "stream must be true or false, got 1"),
        ({"stop_sequences": "a"}, "stop_sequences must be a list"),
        ({"system": 0}, "system must be a text or a list of blocks"),
        ({"metadata": 5}, "metadata must be an object"),
        ({"tools": [{**TOOL, "defer_loading": True}]}, r"tools\[0\].defer_loading is not served"),
        ({"tools": [{**TOOL, "input_examples": [{"a": 1}]}]}, r"tools\[0\].input_examples is not served"),
        ({"tools": [{**TOOL, "allowed_callers": ["code_execution_20250825"]}]}, "allowed_callers is not served"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": "yes"}},
            "tool_choice.disable_parallel_tool_use must be true or false",
        ),
        ({"thinking": {"type": "adaptive", "display": "all"}}, "thinking.display must be one of"),
        ({"output_config": {"effort": "huge"}}, "output_config.effort must be one of"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": 0}]}]},
            r"content\[0\].content must be a text or a list of blocks",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "is_error": 1}]}]},
            "is_error must be true or false",
        ),
        ({"output_config": {"format": {"type": "xml"}}}, "must be 'json_schema'"),
    ],
)
def test_what_is_not_served_is_refused_by_name(change, message):
    with pytest.raises(ApiError, match=message) as refused:
        messages.to_chat({**ASKED, **change}, "")
    assert refused.value.status == 400


@pytest.mark.parametrize("params", ["MessageCreateParamsNonStreaming", "MessageCreateParamsStreaming"])
def test_every_published_field_is_served_or_refused(params):
    from anthropic.types import message_create_params

    published = set(typing.get_type_hints(getattr(message_create_params, params)))
    assert "model" in published
    assert published <= set(messages.OWN)


def test_fields_that_ask_for_nothing_are_taken():
    asked = {"service_tier": "auto", "speed": "standard", "mcp_servers": [], "cache_control": {"type": "ephemeral"}}
    assert messages.to_chat({**ASKED, **asked, "metadata": {"user_id": "u"}}, "") == messages.to_chat(ASKED, "")


CALLS = [
    {"id": "c0", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
    {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}},
]


def test_answer_becomes_a_message():
    from anthropic.types import Message

    given = {"role": "assistant", "content": "I add.", "reasoning_content": "Hm.", "tool_calls": CALLS}
    found = messages.from_chat(chat_answer(given, "tool_calls"))
    Message.model_validate(found, strict=True)
    assert [block["type"] for block in found["content"]] == ["thinking", "text", "tool_use", "tool_use"]
    assert [block["input"] for block in found["content"][2:]] == [{"a": 1}, {}]
    assert (found["stop_reason"], found["stop_sequence"]) == ("tool_use", None)
    usage = found["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"], usage["output_tokens"]) == (6, 4, 7)


@pytest.mark.parametrize(
    ("finish", "stop", "expected"),
    [
        ("stop", None, ("end_turn", None)),
        ("stop", 7, ("end_turn", None)),
        ("stop", "END", ("stop_sequence", "END")),
        ("length", None, ("max_tokens", None)),
    ],
)
def test_answer_says_why_it_ended(finish, stop, expected):
    found = messages.from_chat(chat_answer({"role": "assistant", "content": ""}, finish, stop))
    assert (found["stop_reason"], found["stop_sequence"]) == expected
    assert found["content"] == [{"type": "text", "text": "", "citations": None}]


def call(index, **function):
    named = {"id": f"c{index}", "type": "function"} if "name" in function else {}
    return {"tool_calls": [{"index": index, **named, "function": function}]}


def test_chunks_become_events():
    found = events_of(
        [
            chunk({"role": "assistant", "content": ""}),
            chunk({"reasoning": "H", "reasoning_content": "H"}),
            chunk({"reasoning": "m.", "reasoning_content": "m."}),
            chunk({"content": "I "}),
            chunk({"content": "add."}),
            chunk(call(0, name="add", arguments="")),
            chunk(call(0, arguments='{"a": ')),
            chunk(call(0, arguments="1}")),
            chunk(call(1, name="add", arguments="{}")),
            chunk({}, "tool_calls", stop_reason=None),
            chunk(),
        ]
    )
    events_adapter().validate_python(found)
    assert [event["type"] for event in found if not event["type"].startswith("content_block_delta")] == [
        "message_start",
        *["content_block_start", "content_block_stop"] * 4,
        "message_delta",
        "message_stop",
    ]
    deltas = [
        (event["index"], *list(event["delta"].values())[1:])
        for event in found
        if event["type"] == "content_block_delta"
    ]
    assert deltas == [(0, "H"), (0, "m."), (1, "I "), (1, "add."), (2, '{"a": '), (2, "1}"), (3, "{}")]
    assert found[-2]["delta"]["stop_reason"] == "tool_use"
    assert found[0]["message"]["usage"]["input_tokens"] == 6
    assert found[-2]["usage"]["output_tokens"] == 7


def test_stream_without_text_has_a_block_all_the_same():
    found = events_of([chunk({"role": "assistant", "content": ""}), chunk({}, "length"), chunk()])
    events_adapter().validate_python(found)
    assert [event["type"] for event in found][1:3] == ["content_block_start", "content_block_stop"]
    assert found[-2]["delta"]["stop_reason"] == "max_tokens"


@pytest.mark.parametrize("error", [ApiError(503, "gone"), RuntimeError("gone")])
def test_error_is_the_last_event_of_a_stream(error):
    found = events_of([chunk({"role": "assistant", "content": "a"}), error])
    assert found[-1]["type"] == "error"
    assert "gone" in found[-1]["error"]["message"]
    assert found[-1]["error"]["type"] == ("overloaded_error" if isinstance(error, ApiError) else "api_error")


@pytest.fixture(scope="module")
def api(url):
    import anthropic

    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def greedy(client):
    body = {"messages": ASKED["messages"], "max_tokens": 40, "temperature": 0}
    return answer(client, "/v1/chat/completions", body)["choices"][0]["message"]["content"]


def test_anthropic_client_gets_what_a_chat_gets(api, greedy, client):
    from anthropic.types import Message

    found = api.messages.create(**ASKED, **GREEDY)
    Message.model_validate(found.model_dump(), strict=True)
    assert [block.text for block in found.content] == [greedy]
    assert found.stop_reason in ("end_turn", "max_tokens")
    with api.messages.stream(**ASKED, **GREEDY) as events:
        final = events.get_final_message()
    assert final.content[0].text == greedy
    assert final.stop_reason == found.stop_reason
    assert final.usage.output_tokens == found.usage.output_tokens
    raw = client.post("/v1/messages", json={**ASKED, "stream": True}).text
    assert raw.replace(": keep-alive\n\n", "").startswith("event: message_start\ndata: {")
    assert "[DONE]" not in raw


def test_anthropic_client_counts_tokens(api):
    found = api.messages.create(**ASKED, **GREEDY)
    count = api.messages.count_tokens(model="tiny", messages=ASKED["messages"]).input_tokens
    assert count == found.usage.input_tokens + found.usage.cache_read_input_tokens


@pytest.mark.thorough
def test_anthropic_client_gets_the_call_that_it_demands(api):
    choice = {"type": "tool", "name": "add"}
    options = {**ASKED, "max_tokens": 100, "tools": [TOOL], "tool_choice": choice, **GREEDY}
    found = api.messages.create(**options)
    assert [(block.type, block.name) for block in found.content] == [("tool_use", "add")]
    with api.messages.stream(**options) as events:
        final = events.get_final_message()
    assert final.content[0].input == found.content[0].input
    turn = [block.model_dump(exclude_none=True) for block in found.content]
    result = {"type": "tool_result", "tool_use_id": found.content[0].id, "content": "7"}
    history = [*ASKED["messages"], {"role": "assistant", "content": turn}, {"role": "user", "content": [result]}]
    assert api.messages.create(**{**ASKED, "messages": history, "tools": [TOOL]}).content


def test_anthropic_client_is_told_what_is_wrong(api, client):
    import anthropic

    with pytest.raises(anthropic.BadRequestError, match="images are not supported"):
        api.messages.create(**{**ASKED, "messages": [{"role": "user", "content": [IMAGE]}]})
    with pytest.raises(anthropic.NotFoundError, match="'gpt' does not exist"):
        api.messages.create(**{**ASKED, "model": "gpt"})
    for fields, name in (
        ({"stop_sequences": 3}, "stop_sequences"),
        ({"stop_sequences": ["a", ""]}, "stop_sequences"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "objekt"}}}},
            r"output_config\.format",
        ),
        ({"tools": [{**TOOL, "description": 5}]}, r"tools\[0\]"),
        ({"tools": [{**TOOL, "strict": "yes"}]}, r"tools\[0\]"),
    ):
        with pytest.raises(anthropic.BadRequestError, match=name):
            api.messages.create(**ASKED, **fields)
    for body in ("{", "3", json.dumps({**ASKED, "max_tokens": "many"})):
        found = client.post("/v1/messages", content=body, headers={"content-type": "application/json"})
        assert found.status_code == 400
        assert found.json()["type"] == "error"
        assert found.json()["error"]["type"] == "invalid_request_error"
