"""Clients that nobody here wrote: openai's, sync and async, litellm's, langchain's; answers by openai's own types."""

import asyncio
import json
import warnings

import pydantic
import pytest

from tests.serving.server.asking import CHAT, QUESTION, answer, stream

MESSAGES = CHAT["messages"]


@pytest.fixture(scope="module")
def api(url):
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def greedy(client):
    """The answer to compare with."""
    return answer(client, "/v1/chat/completions", {**CHAT, "temperature": 0})["choices"][0]["message"]["content"]


def test_answers_are_of_openai_s_types(client):
    """Validated, which the client itself leaves out."""
    from openai.types import Completion
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    extras = {"logprobs": True, "top_logprobs": 2, "n": 2, "max_tokens": 8, "seed": 1}
    ChatCompletion.model_validate(answer(client, "/v1/chat/completions", {**CHAT, **extras}), strict=True)
    usage = {"stream_options": {"include_usage": True}}
    for chunk in stream(client, "/v1/chat/completions", {**CHAT, **extras, **usage}):
        ChatCompletionChunk.model_validate(chunk, strict=True)
    body = {"prompt": QUESTION, "logprobs": 2, "n": 2, "max_tokens": 8, "seed": 1}
    Completion.model_validate(answer(client, "/v1/completions", body), strict=True)
    chunks = stream(client, "/v1/completions", {**body, **usage})
    # openai has no type for a chunk whose choices go on: its finish_reason is never null.
    Completion.model_validate(chunks[-1], strict=True)
    for chunk in chunks[:-1]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for choice in chunk["choices"]:
                pydantic.TypeAdapter(Completion.model_fields["choices"].annotation).validate_python(
                    [{**choice, "finish_reason": choice["finish_reason"] or "stop"}], strict=True
                )


def test_openai_client_chats(api, greedy):
    found = api.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0)
    assert found.choices[0].message.content == greedy
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_openai_client_streams(api, greedy):
    options = {"include_usage": True}
    chunks = list(
        api.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, stream=True, stream_options=options)
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == greedy
    assert chunks[-1].usage.completion_tokens > 0
    with api.chat.completions.stream(model="tiny", messages=MESSAGES, temperature=0) as events:
        for _ in events:
            pass
        assert events.get_final_completion().choices[0].message.content == greedy


def test_openai_client_completes(api):
    found = api.completions.create(model="tiny", prompt=[QUESTION, QUESTION], max_tokens=5, temperature=0, logprobs=1)
    assert len({choice.text for choice in found.choices}) == 1
    assert len(found.choices[0].logprobs.token_logprobs) == 5
    pieces = api.completions.create(model="tiny", prompt=QUESTION, max_tokens=5, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == found.choices[0].text


def test_openai_client_lists_models(api):
    assert [model.id for model in api.models.list()] == ["tiny", "embedded"]
    assert api.models.retrieve("tiny").max_model_len == 256


def test_openai_client_is_told_what_is_wrong(api):
    import openai

    with pytest.raises(openai.BadRequestError) as bad:
        api.chat.completions.create(model="tiny", messages=MESSAGES, temperature=-1)
    assert (bad.value.param, "temperature must be" in bad.value.message) == ("temperature", True)
    with pytest.raises(openai.NotFoundError, match="'gpt' does not exist"):
        api.chat.completions.create(model="gpt", messages=MESSAGES)
    with pytest.raises(openai.NotFoundError, match="embeddings are not served"):
        api.embeddings.create(model="tiny", input="x")


def test_async_openai_client(url, greedy):
    import openai

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as api:
            create = api.chat.completions.create
            whole, chunks = await asyncio.gather(
                create(model="tiny", messages=MESSAGES, temperature=0),
                create(model="tiny", messages=MESSAGES, temperature=0, stream=True),
            )
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])
            with pytest.raises(openai.NotFoundError, match="embeddings"):
                await api.embeddings.create(model="tiny", input="x")
            return whole.choices[0].message.content, text

    assert asyncio.run(ask()) == (greedy, greedy)


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 3}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


def fits(arguments):
    found = json.loads(arguments)
    assert set(found) == {"city", "days"}
    assert found["city"] in ("Oslo", "Rome")
    assert 1 <= found["days"] <= 3


@pytest.mark.short_cases("named")
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_openai_client_gets_the_call_that_it_demands(choice, api):
    asked = {"model": "tiny", "messages": MESSAGES, "tools": [WEATHER], "tool_choice": choice, "temperature": 0}
    whole = api.chat.completions.create(**asked, max_tokens=120, parallel_tool_calls=False).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None
    (call,) = whole.message.tool_calls
    assert call.function.name == "get_weather"
    fits(call.function.arguments)
    chunks = api.chat.completions.create(**asked, max_tokens=120, parallel_tool_calls=False, stream=True)
    name, arguments, reasons = "", "", []
    for chunk in chunks:
        reasons.append(chunk.choices[0].finish_reason)
        for piece in chunk.choices[0].delta.tool_calls or ():
            assert piece.index == 0
            name += piece.function.name or ""
            arguments += piece.function.arguments or ""
    assert (name, arguments, reasons[-1]) == ("get_weather", call.function.arguments, "tool_calls")


def test_openai_client_parses_structured_output(api):
    class Sum(pydantic.BaseModel):
        left: int
        right: int
        word: str = pydantic.Field(max_length=8)

    found = api.chat.completions.parse(
        model="tiny", messages=MESSAGES, response_format=Sum, temperature=0, max_tokens=120
    )
    assert isinstance(found.choices[0].message.parsed, Sum)


@pytest.mark.thorough
def test_litellm(url, greedy):
    import litellm

    asked = {"model": "openai/tiny", "api_base": f"{url}/v1", "api_key": "none", "messages": MESSAGES, "temperature": 0}
    assert litellm.completion(**asked).choices[0].message.content == greedy
    pieces = litellm.completion(**asked, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == greedy


@pytest.mark.thorough
def test_langchain(url, greedy):
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model="tiny", base_url=f"{url}/v1", api_key="none", temperature=0, max_retries=0)
    assert model.invoke(QUESTION).content == greedy
    assert "".join(piece.content for piece in model.stream(QUESTION)) == greedy
    called = model.bind_tools([WEATHER], tool_choice="get_weather").invoke(QUESTION)
    assert [call["name"] for call in called.tool_calls] == ["get_weather"]
