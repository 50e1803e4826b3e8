"""OpenAI's Responses API, as a translation of chat completions: requests, answers and streams.

Everything here is dictionaries in and out. The server keeps no responses: a request has its whole conversation in
`input`, and what refers to a stored one is an error that names it.
"""

import time
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

from gdnjax.serving.server.errors import ApiError, unexpected
from gdnjax.serving.server.fields import as_list, as_object, check_one_of, flag_of, string_of
from gdnjax.serving.server.protocol import refuse, refuse_foreign

KEEPS_NOTHING = "the server keeps no responses; send the whole conversation as input"

UNSERVED_FIELDS: dict[str, tuple[tuple[Any, ...], str]] = {
    "previous_response_id": ((), KEEPS_NOTHING),
    "conversation": ((), KEEPS_NOTHING),
    "store": ((False,), KEEPS_NOTHING),
    "background": ((False,), "the server keeps no responses; wait for this one, or stream it"),
    "prompt": ((), "there are no stored prompts"),
    "truncation": (("disabled",), "cut the input"),
    "top_logprobs": ((0,), "ask /v1/chat/completions for them"),
    "context_management": (([],), "cut the input"),
    "moderation": ((), "nothing is moderated"),
    "background_options": ((), "the server keeps no responses; wait for this one, or stream it"),
    "access_programs": (([],), "the server runs no programs"),
    "image": ((), "this server gives text only"),
}
"""Fields that are not served -> the values that ask for nothing, and why."""

UNSERVED_OF_TOOLS: dict[str, tuple[tuple[Any, ...], str]] = {
    "allowed_callers": ((["direct"],), "the model alone calls tools"),
    "defer_loading": ((False,), "all tools are told to the model"),
    "async": ((False,), "the server runs no tools"),
    "output_schema": ((), "say so in the description"),
}

UNSERVED_OF_REASONING: dict[str, tuple[tuple[Any, ...], str]] = {
    "context": (("auto",), "which thinking of earlier turns the model sees is its template's"),
    "mode": (("standard",), "there is one"),
}

UNSERVED_OF_STREAMS: dict[str, tuple[tuple[Any, ...], str]] = {
    "include_obfuscation": ((False,), "there is no padding of chunks"),
}

SUMMARIES = ("auto", "concise", "detailed")
"""What a client may want of summaries of the thinking. It gets the thinking itself."""

INCLUDED = ("reasoning.encrypted_content",)
"""What `include` may name: reasoning is given as text, so nothing of it is missing."""

UNSERVED_PARTS = {
    "input_image": "images are not supported",
    "input_file": "files are not supported",
    "input_audio": "audio inputs are not supported",
    "input_video": "videos are not supported",
}

SAME = ("model", "temperature", "top_p", "metadata", "user", "safety_identifier", "prompt_cache_key", "service_tier")
SAME += ("parallel_tool_calls", "presence_penalty", "frequency_penalty", "stop", "seed", "top_k", "min_p", "priority")
SAME += ("repetition_penalty", "request_id", "chat_template_kwargs", "enable_thinking", "thinking_token_budget")
SAME += ("ignore_eos", "min_tokens", "stop_token_ids", "logit_bias", "structured_outputs")
"""Fields that are called the same in both: OpenAI's, and the further ones of chat completions."""

# Those that chat completions have an opinion on; and how many calls of tools that a server runs there may be.
REFUSED_THERE = ("prompt_cache_retention", "prompt_cache_options")
OWN = ("input", "instructions", "max_output_tokens", "max_tool_calls", "stream", "stream_options", "reasoning", "text")
OWN += ("include", "tools", "tool_choice", *SAME, *REFUSED_THERE, *UNSERVED_FIELDS)
"""All fields that are served, or refused by their names."""

NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "verbosity": "text.verbosity",
}
"""Fields of chat completions -> what is made to them here."""


def to_chat(body: Mapping[str, Any]) -> dict[str, Any]:
    """A request as one for chat completions. Raises ApiError for what is not of the API's form, and for what is not
    served, by its name.
    """
    for name in ("model", "input"):
        if body.get(name) is None:
            raise ApiError(400, f"{name}: Field required", param=name)
    refuse(body, UNSERVED_FIELDS)
    refuse_foreign(body, OWN, "/v1/responses")
    for name in as_list(body.get("include") or [], "include"):
        if name not in INCLUDED:
            raise ApiError(400, f"include: {name!r} is not served; allowed: {', '.join(INCLUDED)}", param="include")
    chat = {name: body[name] for name in (*SAME, *REFUSED_THERE) if body.get(name) is not None}
    chat["messages"] = _messages(body)
    calls = body.get("max_tool_calls")
    if calls is not None and (not isinstance(calls, int) or isinstance(calls, bool) or calls < 0):
        raise ApiError(400, f"max_tool_calls must be an integer from 0 on, got {calls!r}", param="max_tool_calls")
    if body.get("max_output_tokens") is not None:
        chat["max_completion_tokens"] = body["max_output_tokens"]
    streamed = flag_of(body, "stream")
    if body.get("stream_options") is not None:
        refuse(as_object(body["stream_options"], "stream_options"), UNSERVED_OF_STREAMS, "stream_options")
    if streamed:
        chat |= {"stream": True, "stream_options": {"include_usage": True}}
    return chat | _reasoning_of(body) | _tools(body) | _format(body)


def _reasoning_of(body: Mapping[str, Any]) -> dict[str, Any]:
    given = {} if body.get("reasoning") is None else as_object(body["reasoning"], "reasoning")
    refuse(given, UNSERVED_OF_REASONING, "reasoning")
    for name in ("summary", "generate_summary"):
        check_one_of(given.get(name), SUMMARIES, f"reasoning.{name}")
    effort = given.get("effort")
    return {} if effort is None else {"reasoning_effort": "xhigh" if effort == "max" else effort}


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if body.get("instructions") not in (None, ""):
        if not isinstance(body["instructions"], str):
            message = f"instructions must be a string, got {body['instructions']!r}"
            raise ApiError(400, message, param="instructions")
        found.append({"role": "system", "content": body["instructions"]})
    given = body["input"]
    if isinstance(given, str):
        return [*found, {"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise ApiError(400, f"input must be a text, or a list of items that is not empty, got {given!r}", param="input")
    for index, item in enumerate(given):
        _add_item(found, as_object(item, f"input[{index}]"), f"input[{index}]")
    return found


def _add_item(messages: list[dict[str, Any]], item: Mapping[str, Any], place: str) -> None:
    """Adds an item to the conversation. Thinking, text and calls that stand together are one turn of the model."""
    match item.get("type") or ("message" if "role" in item else None):
        case "message":
            role = item.get("role")
            if role not in ("user", "assistant", "system", "developer"):
                allowed = "'user', 'assistant', 'system', 'developer'"
                raise ApiError(400, f"{place}.role must be one of {allowed}, got {role!r}", param="input")
            text = _text(item.get("content"), f"{place}.content")
            if role == "assistant" and _open_for_text(messages):
                messages[-1]["content"] = text
            else:
                messages.append({"role": role, "content": text})
        case "reasoning":
            parts = item.get("content") or item.get("summary") or []
            messages.append({"role": "assistant", "content": "", "reasoning_content": _text(parts, place)})
        case "function_call":
            function = {"name": string_of(item, "name", place), "arguments": string_of(item, "arguments", place)}
            call = {"id": string_of(item, "call_id", place), "type": "function", "function": function}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).append(call)
        case "function_call_output":
            result = _text(item.get("output"), f"{place}.output")
            name = string_of(item, "call_id", place)
            messages.append({"role": "tool", "tool_call_id": name, "content": result})
        case "item_reference":
            raise ApiError(400, f"{place} is an item_reference: {KEEPS_NOTHING}", param="input")
        case kind:
            allowed = "'message', 'reasoning', 'function_call', 'function_call_output'"
            raise ApiError(400, f"{place} has type {kind!r}, which is not served; allowed: {allowed}", param="input")


def _open_for_text(messages: list[dict[str, Any]]) -> bool:
    """Whether the conversation ends with thinking, which has no answer yet."""
    last = messages[-1] if messages else {}
    return last.get("role") == "assistant" and not last.get("content") and not last.get("tool_calls")


def _text(content: Any, place: str) -> str:
    """The text of a content: a text, or parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{place} must be a text or a list of parts, got {content!r}", param="input")
    texts = []
    for index, part in enumerate(content):
        here = f"{place}[{index}]"
        kind = as_object(part, here).get("type")
        if isinstance(kind, str) and kind in UNSERVED_PARTS:
            raise ApiError(400, f"text only: {here} has type {kind!r}, but {UNSERVED_PARTS[kind]}", param="input")
        if kind == "refusal":
            texts.append(string_of(part, "refusal", here))
        elif kind in ("input_text", "output_text", "text", "summary_text", "reasoning_text"):
            texts.append(string_of(part, "text", here))
        else:
            allowed = "'input_text', 'output_text'"
            raise ApiError(400, f"{here} has the unknown type {kind!r}; allowed: {allowed}", param="input")
    return "".join(texts)


def _tools(body: Mapping[str, Any]) -> dict[str, Any]:
    tools = []
    for index, tool in enumerate(as_list(body.get("tools") or [], "tools")):
        place = f"tools[{index}]"
        if as_object(tool, place).get("type") != "function":
            message = f"{place} has type {tool.get('type')!r}: the server runs no tools; allowed: 'function'"
            raise ApiError(400, message, param="tools")
        refuse(tool, UNSERVED_OF_TOOLS, place)
        names = ("name", "description", "parameters", "strict")
        tools.append({"type": "function", "function": {n: tool[n] for n in names if tool.get(n) is not None}})
    choice = body.get("tool_choice")
    chat: dict[str, Any] = {}
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        allowed = as_list(choice.get("tools") or [], "tool_choice.tools")
        names = [as_object(each, "tool_choice.tools").get("name") for each in allowed]
        missing = [name for name in names if name not in [tool["function"].get("name") for tool in tools]]
        if missing:
            raise ApiError(400, f"tool_choice.tools has {missing[0]!r}, which is none of tools", param="tool_choice")
        tools = [tool for tool in tools if tool["function"].get("name") in names]
        choice = choice.get("mode", "auto")
    if isinstance(choice, Mapping):
        if choice.get("type") != "function":
            message = f"tool_choice.type {choice.get('type')!r} is not served; allowed: 'function', 'allowed_tools'"
            raise ApiError(400, message, param="tool_choice")
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    if choice is not None:
        chat["tool_choice"] = choice
    return chat | ({"tools": tools} if tools else {})


def _format(body: Mapping[str, Any]) -> dict[str, Any]:
    text = {} if body.get("text") is None else as_object(body["text"], "text")
    chat: dict[str, Any] = {}
    if text.get("verbosity") is not None:
        # Which chat completions have an opinion on.
        chat["verbosity"] = text["verbosity"]
    form = {"type": "text"} if text.get("format") is None else as_object(text["format"], "text.format")
    if form.get("type") == "json_schema":
        schema = {
            name: form[name] for name in ("name", "schema", "strict", "description") if form.get(name) is not None
        }
        chat["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif form.get("type") != "text":
        chat["response_format"] = dict(form)
    return chat


def resource(body: Mapping[str, Any], head: Mapping[str, Any], status: str, output: list[Any]) -> dict[str, Any]:
    """A response: what was asked for in `body`, and `output`. `head` has the id, the model and the time."""
    reasoning = body.get("reasoning") or {}
    text = body.get("text") or {}
    return {
        "id": "resp_" + head["id"].removeprefix("chatcmpl-"),
        "object": "response",
        "created_at": head["created"],
        "completed_at": int(time.time()) if status == "completed" else None,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "max_tool_calls": body.get("max_tool_calls"),
        "model": head["model"],
        "output": output,
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "previous_response_id": None,
        "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
        "store": False,
        "temperature": 1.0 if body.get("temperature") is None else body["temperature"],
        "top_p": 1.0 if body.get("top_p") is None else body["top_p"],
        "presence_penalty": body.get("presence_penalty") or 0.0,
        "frequency_penalty": body.get("frequency_penalty") or 0.0,
        "top_logprobs": 0,
        "text": {**text, "format": text.get("format") or {"type": "text"}},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": [
            {"type": "function", **{n: tool.get(n) for n in ("name", "description", "parameters", "strict")}}
            for tool in body.get("tools") or ()
        ],
        "truncation": "disabled",
        "usage": None,
        "user": body.get("user"),
        "metadata": body.get("metadata") or {},
        "service_tier": "default",
        "safety_identifier": body.get("safety_identifier"),
        "prompt_cache_key": body.get("prompt_cache_key"),
    }


def from_chat(answer: Mapping[str, Any], body: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of chat completions as the response to `body`."""
    (choice,) = answer["choices"]
    status, details = _ending(choice)
    message = choice["message"]
    output = []
    if message.get("reasoning_content"):
        output.append(_reasoning(_new_id("rs"), status, message["reasoning_content"]))
    if message.get("content") or not (output or message.get("tool_calls")):
        output.append(_message(_new_id("msg"), status, [_output_text(message.get("content") or "")]))
    for call in message.get("tool_calls") or ():
        output.append(_call(_new_id("fc"), status, call["id"], call["function"]["name"], call["function"]["arguments"]))
    found = resource(body, answer, status, output)
    return found | {"incomplete_details": details, "usage": _usage(answer["usage"])}


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


def _ending(choice: Mapping[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """The status of what has ended, and why it is incomplete if it is."""
    match choice.get("finish_reason"):
        case "length":
            return "incomplete", {"reason": "max_output_tokens"}
        case "abort":
            return "incomplete", {"reason": "abort"}
    return "completed", None


def _reasoning(name: str, status: str, text: str | None) -> dict[str, Any]:
    content = [] if text is None else [{"type": "reasoning_text", "text": text}]
    return {"type": "reasoning", "id": name, "status": status, "summary": [], "content": content}


def _message(name: str, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "message", "id": name, "status": status, "role": "assistant", "content": content}


def _output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call(item: str, status: str, call_id: str, name: str, arguments: str) -> dict[str, Any]:
    kind = "function_call"
    return {"type": kind, "id": item, "status": status, "call_id": call_id, "name": name, "arguments": arguments}


def _usage(usage: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if usage is None:
        return None
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
            "cache_write_tokens": 0,
        },
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {
            "reasoning_tokens": (usage.get("completion_tokens_details") or {}).get("reasoning_tokens", 0)
        },
        "total_tokens": usage["total_tokens"],
    }


class _Items:
    """The items of a stream: one is open at a time."""

    def __init__(self) -> None:
        self.output: list[dict[str, Any]] = []
        self._key: Any = None
        self._pieces: list[str] = []

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}

    def of_delta(self, delta: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The events of what a chunk adds."""
        events: list[dict[str, Any]] = []
        if text := delta.get("reasoning_content"):
            if self._key != "reasoning":
                events += self._open("reasoning", _reasoning(_new_id("rs"), "in_progress", None))
                events.append(self._part("added", {"type": "reasoning_text", "text": ""}))
            events.append(self._more("response.reasoning_text.delta", text) | {"content_index": 0})
        if text := delta.get("content"):
            events += self.open_text()
            events.append(self._more("response.output_text.delta", text) | {"content_index": 0, "logprobs": []})
        for call in delta.get("tool_calls") or ():
            function = call["function"]
            if self._key != call["index"]:
                item = _call(_new_id("fc"), "in_progress", call["id"], function["name"], "")
                events += self._open(call["index"], item)
            if function.get("arguments"):
                events.append(self._more("response.function_call_arguments.delta", function["arguments"]))
        return events

    def open_text(self) -> list[dict[str, Any]]:
        """Begins the answer's text, unless it is open."""
        if self._key == "text":
            return []
        events = self._open("text", _message(_new_id("msg"), "in_progress", []))
        return [*events, self._part("added", _output_text(""))]

    def close(self, status: str) -> list[dict[str, Any]]:
        """Ends the open item."""
        if self._key is None:
            return []
        item, text = self.output[-1], "".join(self._pieces)
        events: list[dict[str, Any]] = []
        if item["type"] == "function_call":
            done = {"type": "response.function_call_arguments.done", "name": item["name"], "arguments": text}
            events.append(done | self._place)
            ended = {**item, "status": status, "arguments": text}
        elif item["type"] == "reasoning":
            events.append({"type": "response.reasoning_text.done", "text": text, "content_index": 0} | self._place)
            ended = _reasoning(item["id"], status, text)
            events.append(self._part("done", ended["content"][0]))
        else:
            done = {"type": "response.output_text.done", "text": text, "content_index": 0, "logprobs": []}
            events.append(done | self._place)
            ended = _message(item["id"], status, [_output_text(text)])
            events.append(self._part("done", ended["content"][0]))
        self.output[-1] = ended
        place = {"output_index": len(self.output) - 1}
        events.append({"type": "response.output_item.done", "item": ended} | place)
        self._key, self._pieces = None, []
        return events

    def _open(self, key: Any, item: dict[str, Any]) -> list[dict[str, Any]]:
        events = self.close("completed")
        self.output.append(item)
        self._key = key
        added = {"type": "response.output_item.added", "output_index": len(self.output) - 1, "item": item}
        return [*events, added]

    def _part(self, what: str, part: dict[str, Any]) -> dict[str, Any]:
        return {"type": f"response.content_part.{what}", "content_index": 0, "part": part} | self._place

    def _more(self, kind: str, text: str) -> dict[str, Any]:
        self._pieces.append(text)
        return {"type": kind, "delta": text} | self._place


async def stream(chunks: AsyncIterator[Mapping[str, Any]], body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The events of a streamed response to `body`. What goes wrong is the last of them."""
    number = 0
    async for event in _events(chunks, body):
        yield event | {"sequence_number": number}
        number += 1


async def _events(chunks: AsyncIterator[Mapping[str, Any]], body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
    items = _Items()
    head: Mapping[str, Any] = {"id": uuid.uuid4().hex, "created": int(time.time()), "model": body.get("model")}
    begun = False
    choice: Mapping[str, Any] = {}
    usage = None
    try:
        async for chunk in chunks:
            usage = chunk.get("usage") or usage
            if not begun:
                begun, head = True, chunk
                for event in _beginning(body, head):
                    yield event
            for choice in chunk["choices"]:
                for event in items.of_delta(choice["delta"]):
                    yield event
        status, details = _ending(choice)
        if not items.output:
            for event in items.open_text():
                yield event
        for event in items.close(status):
            yield event
        found = resource(body, head, status, items.output)
        found |= {"incomplete_details": details, "usage": _usage(usage)}
        yield {"type": f"response.{status}", "response": found}
    except Exception as error:
        if not begun:
            for event in _beginning(body, head):
                yield event
        yield _failed(error if isinstance(error, ApiError) else unexpected(error), body, head, items)


def _beginning(body: Mapping[str, Any], head: Mapping[str, Any]) -> list[dict[str, Any]]:
    kinds = ("response.created", "response.in_progress")
    return [{"type": kind, "response": resource(body, head, "in_progress", [])} for kind in kinds]


def _failed(error: ApiError, body: Mapping[str, Any], head: Mapping[str, Any], items: _Items) -> dict[str, Any]:
    code = "rate_limit_exceeded" if error.status == 429 else "server_error"
    found = resource(body, head, "failed", items.output) | {"error": {"code": code, "message": error.message}}
    return {"type": "response.failed", "response": found}
