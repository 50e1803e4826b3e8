"""OpenAI's Responses API: requests and answers as translations, and the served model by openai's own client."""

import asyncio
import functools
import typing

import pytest
from pydantic import TypeAdapter

from gdnjax.serving.server import responses
from gdnjax.serving.server.errors import ApiError
from tests.serving.server.asking import QUESTION, answer
from tests.serving.server.test_messages import CALLS, call, chat_answer, chunk, of

ASKED = {"model": "tiny", "input": QUESTION}
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {"type": "function", "name": "add", "parameters": PARAMETERS, "strict": False}


@functools.cache
def events_adapter() -> TypeAdapter:
    """See test_messages.py."""
    from openai.types.responses import ResponseStreamEvent

    return TypeAdapter(list[ResponseStreamEvent])


def events_of(chunks, body=ASKED):
    async def collect():
        return [event async for event in responses.stream(of(chunks), body)]

    return asyncio.run(collect())


def test_request_becomes_a_chat():
    body = {
        "model": "m",
        "instructions": "Be brief.",
        "input": [
            {"type": "message", "role": "developer", "content": "Add."},
            {"role": "user", "content": [{"type": "input_text", "text": "1 + "}, {"type": "input_text", "text": "2?"}]},
            {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "I add.", "annotations": []}],
            },
            {"type": "function_call", "call_id": "t1", "name": "add", "arguments": "{}"},
            {"type": "function_call", "call_id": "t2", "name": "add", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "t1", "output": "3"},
            {"type": "function_call_output", "call_id": "t2", "output": [{"type": "input_text", "text": "4"}]},
        ],
        "max_output_tokens": 9,
        "tools": [TOOL, {**TOOL, "name": "other"}],
        "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "add"}]},
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}},
        "reasoning": {"effort": "low"},
        "include": ["reasoning.encrypted_content"],
        "store": False,
        "temperature": 0.5,
        "stream": True,
    }
    calls = [{"id": i, "type": "function", "function": {"name": "add", "arguments": "{}"}} for i in ("t1", "t2")]
    assert responses.to_chat(body) == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": "Add."},
            {"role": "user", "content": "1 + 2?"},
            {"role": "assistant", "content": "I add.", "reasoning_content": "Hm.", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "t1", "content": "3"},
            {"role": "tool", "tool_call_id": "t2", "content": "4"},
        ],
        "max_completion_tokens": 9,
        "tools": [{"type": "function", "function": {"name": "add", "parameters": PARAMETERS, "strict": False}}],
        "tool_choice": "required",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
        },
        "reasoning_effort": "low",
        "temperature": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "model: Field required"),
        ({"input": None}, "input: Field required"),
        ({"input": []}, "not empty"),
        ({"previous_response_id": "resp_1"}, "previous_response_id is not served: the server keeps no responses"),
        ({"store": True}, "store is not served.*allowed: False"),
        ({"background": True}, "background is not served"),
        ({"include": ["message.output_text.logprobs"]}, "include: 'message.output_text.logprobs' is not served"),
        ({"include": 3}, "include must be a list"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\] has type 'web_search': the server runs no tools"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type 'file_search' is not served"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            r"input\[0\].content\[0\].*images are not",
        ),
        ({"input": [{"type": "item_reference", "id": "x"}]}, r"input\[0\] is an item_reference"),
        ({"input": [{"type": "computer_call"}]}, "'computer_call', which is not served"),
        ({"input": [{"role": "critic", "content": ""}]}, "role must be one of"),
        ({"text": 3}, "text must be an object"),
        ({"text": []}, "text must be an object"),
        ({"instructions": 0}, "instructions must be a string"),
        ({"stream": 1}, "stream must be true or false"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation is not served"),
        ({"max_tool_calls": "x"}, "max_tool_calls must be an integer"),
        ({"background_options": {"a": 1}}, "background_options is not served"),
        ({"max_tokens": 5}, "max_tokens is no field of /v1/responses, but of /v1/chat/completions"),
        ({"messages": []}, "messages is no field of /v1/responses"),
        ({"n": 2}, "n is no field of /v1/responses"),
        ({"suffix": "a"}, "suffix is no field of /v1/responses"),
        ({"reasoning": []}, "reasoning must be an object"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode is not served"),
        ({"reasoning": {"context": "all_turns"}}, "reasoning.context is not served"),
        ({"reasoning": {"summary": "long"}}, "reasoning.summary must be one of"),
        ({"tools": [{**TOOL, "defer_loading": True}]}, r"tools\[0\].defer_loading is not served"),
        ({"tools": [{**TOOL, "output_schema": {}}]}, r"tools\[0\].output_schema is not served"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "other"}]}},
            "tool_choice.tools has 'other', which is none of tools",
        ),
    ],
)
def test_what_is_not_served_is_refused_by_name(change, message):
    with pytest.raises(ApiError, match=message) as refused:
        responses.to_chat({**ASKED, **change})
    assert refused.value.status == 400


@pytest.mark.parametrize("params", ["ResponseCreateParamsNonStreaming", "ResponseCreateParamsStreaming"])
def test_every_published_field_is_served_or_refused(params):
    from openai.types.responses import response_create_params

    published = set(typing.get_type_hints(getattr(response_create_params, params)))
    assert "model" in published
    assert published <= set(responses.OWN)


def test_answer_becomes_a_response():
    from openai.types.responses import Response

    given = {"role": "assistant", "content": "I add.", "reasoning_content": "Hm.", "tool_calls": CALLS}
    body = {**ASKED, "tools": [TOOL], "tool_choice": {"type": "function", "name": "add"}}
    found = responses.from_chat(chat_answer(given, "tool_calls"), body)
    made = Response.model_validate(found, strict=True)
    assert [item.type for item in made.output] == ["reasoning", "message", "function_call", "function_call"]
    assert made.output_text == "I add."
    assert (made.status, made.usage.input_tokens, made.usage.input_tokens_details.cached_tokens) == ("completed", 10, 4)
    cut = responses.from_chat(chat_answer({"role": "assistant", "content": "I"}, "length"), ASKED)
    assert (cut["status"], cut["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


def test_chunks_become_events():
    found = events_of(
        [
            chunk({"role": "assistant", "content": ""}),
            chunk({"reasoning": "H", "reasoning_content": "H"}),
            chunk({"reasoning": "m.", "reasoning_content": "m."}),
            chunk({"content": "I add."}),
            chunk(call(0, name="add", arguments="")),
            chunk(call(0, arguments='{"a": 1}')),
            chunk(call(1, name="add", arguments="{}")),
            chunk({}, "tool_calls"),
            chunk(),
        ]
    )
    events_adapter().validate_python(found)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert [event["type"].removeprefix("response.") for event in found] == [
        "created",
        "in_progress",
        *("output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done") * 2,
        "completed",
    ]
    last = found[-1]["response"]
    whole = {"role": "assistant", "content": "I add.", "reasoning_content": "Hm.", "tool_calls": CALLS}
    expected = responses.from_chat(chat_answer(whole, "tool_calls"), ASKED)
    changing = ("id", "completed_at")
    assert [{**item, "id": ""} for item in last["output"]] == [{**item, "id": ""} for item in expected["output"]]
    assert {k: v for k, v in last.items() if k not in (*changing, "output")} == {
        k: v for k, v in expected.items() if k not in (*changing, "output")
    }


@pytest.mark.parametrize("error", [ApiError(503, "gone"), RuntimeError("gone")])
def test_error_is_the_last_event_of_a_stream(error):
    found = events_of([chunk({"role": "assistant", "content": "a"}), error])
    events_adapter().validate_python(found)
    assert found[-1]["type"] == "response.failed"
    assert "gone" in found[-1]["response"]["error"]["message"]
    # The first one, too: a client makes of it what the others add to.
    found = events_of([error])
    assert [event["type"] for event in found] == ["response.created", "response.in_progress", "response.failed"]


@pytest.fixture(scope="module")
def api(url):
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_openai_client_gets_what_a_chat_gets(api, client):
    chat = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 40, "temperature": 0}
    greedy = answer(client, "/v1/chat/completions", chat)["choices"][0]["message"]["content"]
    options = {**ASKED, "max_output_tokens": 40, "temperature": 0}
    found = api.responses.create(**options)
    assert found.output_text == greedy
    with api.responses.stream(**options) as events:
        types = [event.type for event in events]
        final = events.get_final_response()
    assert types[0] == "response.created"
    assert final.output_text == greedy
    assert final.usage == found.usage.model_copy(update={"input_tokens_details": final.usage.input_tokens_details})


@pytest.mark.thorough
def test_openai_client_gets_the_call_that_it_demands(api):
    options = {**ASKED, "tools": [TOOL], "tool_choice": {"type": "function", "name": "add"}, "temperature": 0}
    found = api.responses.create(**options)
    (made,) = found.output
    assert (made.type, made.name) == ("function_call", "add")
    history = [
        {"role": "user", "content": QUESTION},
        made.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": made.call_id, "output": "7"},
    ]
    assert api.responses.create(model="tiny", input=history, tools=[TOOL], max_output_tokens=9).output


def test_openai_client_is_told_what_is_wrong(api):
    import openai

    with pytest.raises(openai.BadRequestError, match="keeps no responses"):
        api.responses.create(**ASKED, previous_response_id="resp_1")
    for fields, name in (
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": "many"}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "objekt"}}}}, "text"),
        ({"text": {"verbosity": "low"}}, "text"),
        ({"reasoning": {"effort": "huge"}}, "reasoning"),
        ({"prompt_cache_retention": "24h"}, "prompt_cache_retention"),
        ({"tools": [{**TOOL, "description": 5}]}, "tools"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            api.responses.create(**ASKED, **fields)
        assert refused.value.param == name
        assert name in refused.value.message
    with pytest.raises(openai.NotFoundError, match="no response runs in the background"):
        api.responses.cancel("resp_1")
    with pytest.raises(openai.NotFoundError, match="keeps no responses"):
        api.responses.retrieve("resp_1")
    with pytest.raises(openai.NotFoundError, match="'gpt' does not exist"):
        api.responses.create(model="gpt", input="a")
