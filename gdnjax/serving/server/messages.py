"""Anthropic's Messages API, as a translation of chat completions: requests, answers, streams and errors.

Everything here is dictionaries in and out. What a message may hold is what the model reads: text, thinking, tools and
their results. The rest of the API is an error that names it.
"""

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from gdnjax.serving.server.errors import ApiError, unexpected
from gdnjax.serving.server.fields import as_list, as_object, check_one_of, flag_of, param_of, string_of
from gdnjax.serving.server.protocol import refuse, refuse_foreign

UNSERVED_BLOCKS = {
    "image": "images are not supported",
    "document": "documents are not supported",
    "search_result": "search results are not supported",
    "server_tool_use": "the server runs no tools",
    "web_search_tool_result": "the server runs no tools",
    "web_fetch_tool_result": "the server runs no tools",
    "code_execution_tool_result": "the server runs no tools",
    "mcp_tool_use": "the server runs no tools",
    "mcp_tool_result": "the server runs no tools",
    "container_upload": "there are no files",
}
"""Types of content blocks that are not served -> why."""

UNSERVED_FIELDS: dict[str, tuple[tuple[Any, ...], str]] = {
    "mcp_servers": (([],), "the server runs no tools"),
    "container": ((), "the server runs no code"),
    "service_tier": (("auto", "standard_only"), "there is one tier; use priority"),
    "speed": (("standard",), "there is one speed"),
    "inference_geo": ((), "there is one place, where the server runs"),
    "diagnostics": ((), "there are none; see /metrics"),
    "fallbacks": (([],), "there is one model"),
}
"""Fields that are not served -> the values that ask for nothing, and why."""

UNSERVED_OF_TOOLS: dict[str, tuple[tuple[Any, ...], str]] = {
    "allowed_callers": ((["direct"],), "the model alone calls tools"),
    "defer_loading": ((False,), "all tools are told to the model"),
    "input_examples": (([],), "say so in the description"),
}

LABELS = ("metadata", "cache_control", "user_profile_id", "workspace_id")
"""Fields that change nothing: whom a request is for, and what to cache, which is all that there is room for."""

SAME = ("model", "temperature", "top_p", "top_k", "priority", "request_id", "chat_template_kwargs", "seed", "min_p")
"""Fields that are called the same in both."""

OWN = ("messages", "system", "max_tokens", "stop_sequences", "stream", "tools", "tool_choice", "thinking")
OWN += ("output_config", *SAME, *LABELS, *UNSERVED_FIELDS)
"""All fields that are served, or refused by their names."""

NAMES = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "thinking_token_budget": "thinking.budget_tokens",
    "enable_thinking": "thinking",
}
"""Fields of chat completions -> what is made to them here."""

EFFORTS = ("low", "medium", "high", "xhigh", "max")
DISPLAYS = ("summarized", "omitted")

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "abort": "pause_turn"}


def to_chat(body: Mapping[str, Any], template: str, *, counts: bool = False) -> dict[str, Any]:
    """A request as one for chat completions.

    `template` is the text of the model's chat template: whether to think is passed on where it knows that. `counts`:
    the tokens are to be counted only, so no max_tokens is needed. Raises ApiError for what is not of the API's form,
    and for what is not served, by its name.
    """
    for name in ("model", "messages", *(() if counts else ("max_tokens",))):
        if body.get(name) is None:
            raise ApiError(400, f"{name}: Field required", param=name)
    if body.get("metadata") is not None:
        as_object(body["metadata"], "metadata")
    refuse(body, UNSERVED_FIELDS)
    refuse_foreign(body, OWN, "/v1/messages")
    chat = {name: body[name] for name in SAME if body.get(name) is not None}
    chat["messages"] = _messages(body)
    if not counts:
        chat["max_tokens"] = body["max_tokens"]
    if body.get("stop_sequences") is not None:
        chat["stop"] = as_list(body["stop_sequences"], "stop_sequences")
    if flag_of(body, "stream"):
        # The first event has the prompt's tokens.
        chat |= {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    if chat["messages"][-1]["role"] == "assistant" and not chat["messages"][-1].get("tool_calls"):
        chat |= {"add_generation_prompt": False, "continue_final_message": True}
    return chat | _tools(body) | _thinking(body, template) | _output(body, template)


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if body.get("system") not in (None, "", []):
        found.append({"role": "system", "content": _text(body["system"], "system")})
    messages = as_list(body["messages"], "messages")
    if not messages:
        raise ApiError(400, "messages must have at least one message", param="messages")
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        message = as_object(message, place)
        content = message.get("content")
        match message.get("role"):
            case "user":
                found += _user(content, f"{place}.content")
            case "assistant":
                found.append(_assistant(content, f"{place}.content"))
            case "system":
                found.append({"role": "system", "content": _text(content, f"{place}.content")})
            case role:
                raise ApiError(400, f"{place}.role must be 'user' or 'assistant', got {role!r}", param="messages")
    return found


def _blocks(content: Any, place: str) -> list[tuple[str, Mapping[str, Any], str]]:
    """(type, block, place) of each block of a content."""
    if isinstance(content, str):
        return [("text", {"text": content}, place)]
    if not isinstance(content, list):
        message = f"{place} must be a text or a list of blocks, got {content!r}"
        raise ApiError(400, message, param=param_of(place))
    found = []
    for index, block in enumerate(content):
        here = f"{place}[{index}]"
        kind = as_object(block, here).get("type")
        if isinstance(kind, str) and kind in UNSERVED_BLOCKS:
            raise ApiError(400, f"{here} has type {kind!r}: {UNSERVED_BLOCKS[kind]}", param=param_of(place))
        found.append((str(kind), block, here))
    return found


def _unknown(kind: Any, place: str, allowed: str) -> ApiError:
    return ApiError(400, f"{place} has type {kind!r}; allowed here: {allowed}", param=param_of(place))


def _text(content: Any, place: str) -> str:
    """A content that is text alone. Blocks are lines of their own."""
    texts = []
    for kind, block, here in _blocks(content, place):
        if kind != "text":
            raise _unknown(kind, here, "'text'")
        texts.append(string_of(block, "text", here))
    return "\n".join(texts)


def _user(content: Any, place: str) -> list[dict[str, Any]]:
    """A turn of the user: the results of tools, and what is said beside them, in order."""
    found: list[dict[str, Any]] = []
    for kind, block, here in _blocks(content, place):
        if kind == "tool_result":
            content = block.get("content")
            result = _text("" if content is None else content, f"{here}.content")
            text = f"Error: {result}" if flag_of(block, "is_error", here) else result
            found.append({"role": "tool", "tool_call_id": string_of(block, "tool_use_id", here), "content": text})
        elif kind == "text":
            part = {"type": "text", "text": string_of(block, "text", here)}
            if not found or found[-1]["role"] != "user":
                found.append({"role": "user", "content": []})
            found[-1]["content"].append(part)
        else:
            raise _unknown(kind, here, "'text', 'tool_result'")
    if not found:
        raise ApiError(400, f"{place} must not be empty", param="messages")
    return found


def _assistant(content: Any, place: str) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for kind, block, here in _blocks(content, place):
        match kind:
            case "text":
                texts.append(string_of(block, "text", here))
            case "thinking":
                thoughts.append(string_of(block, "thinking", here))
            case "redacted_thinking":
                # Of another server, which alone can read it.
                pass
            case "tool_use":
                arguments = json.dumps(as_object(block.get("input"), f"{here}.input"), ensure_ascii=False)
                function = {"name": string_of(block, "name", here), "arguments": arguments}
                calls.append({"id": string_of(block, "id", here), "type": "function", "function": function})
            case _:
                raise _unknown(kind, here, "'text', 'thinking', 'redacted_thinking', 'tool_use'")
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _tools(body: Mapping[str, Any]) -> dict[str, Any]:
    tools = []
    for index, tool in enumerate(as_list(body.get("tools") or [], "tools")):
        place = f"tools[{index}]"
        kind = as_object(tool, place).get("type") or "custom"
        if kind != "custom":
            raise ApiError(
                400, f"{place} has type {kind!r}: the server runs no tools; allowed: 'custom'", param="tools"
            )
        refuse(tool, UNSERVED_OF_TOOLS, place)
        schema = as_object(tool.get("input_schema"), f"{place}.input_schema")
        function = {"name": string_of(tool, "name", place), "parameters": dict(schema)}
        function |= {key: tool[key] for key in ("description", "strict") if tool.get(key) is not None}
        tools.append({"type": "function", "function": function})
    chat: dict[str, Any] = {"tools": tools} if tools else {}
    if body.get("tool_choice") is None:
        return chat
    choice = as_object(body["tool_choice"], "tool_choice")
    match choice.get("type"):
        case "auto" | "none":
            chat["tool_choice"] = choice["type"]
        case "any":
            chat["tool_choice"] = "required"
        case "tool":
            chat["tool_choice"] = {"type": "function", "function": {"name": string_of(choice, "name", "tool_choice")}}
        case kind:
            allowed = "'auto', 'any', 'tool', 'none'"
            raise ApiError(400, f"tool_choice.type must be one of {allowed}, got {kind!r}", param="tool_choice")
    if flag_of(choice, "disable_parallel_tool_use", "tool_choice"):
        chat["parallel_tool_calls"] = False
    return chat


def _thinking(body: Mapping[str, Any], template: str) -> dict[str, Any]:
    if body.get("thinking") is None:
        return {}
    thinking = as_object(body["thinking"], "thinking")
    check_one_of(thinking.get("display"), DISPLAYS, "thinking.display")
    kind, knows = thinking.get("type"), "enable_thinking" in template
    chat: dict[str, Any] = {}
    match kind:
        case "disabled":
            return {"enable_thinking": False} if knows else {}
        case "adaptive":
            # Which is what a model that can think does by itself.
            pass
        case "enabled":
            if not knows:
                raise ApiError(400, "thinking: the model's chat template has no enable_thinking", param="thinking")
            chat["enable_thinking"] = True
            if thinking.get("budget_tokens") is not None:
                chat["thinking_token_budget"] = thinking["budget_tokens"]
        case _:
            allowed = "'enabled', 'disabled', 'adaptive'"
            raise ApiError(400, f"thinking.type must be one of {allowed}, got {kind!r}", param="thinking")
    if thinking.get("display") == "omitted":
        chat["include_reasoning"] = False
    return chat


def _output(body: Mapping[str, Any], template: str) -> dict[str, Any]:
    if body.get("output_config") is None:
        return {}
    config = as_object(body["output_config"], "output_config")
    chat: dict[str, Any] = {}
    effort = config.get("effort")
    check_one_of(effort, EFFORTS, "output_config.effort")
    # How much to think is a hint, which most templates have no word for.
    if effort is not None and "reasoning_effort" in template:
        chat["reasoning_effort"] = "xhigh" if effort == "max" else effort
    if config.get("format") is not None:
        form = as_object(config["format"], "output_config.format")
        if form.get("type") != "json_schema":
            message = f"output_config.format.type must be 'json_schema', got {form.get('type')!r}"
            raise ApiError(400, message, param="output_config")
        schema = {"name": "output", "schema": form.get("schema")}
        chat["response_format"] = {"type": "json_schema", "json_schema": schema}
    return chat


def from_chat(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of chat completions as a message."""
    (choice,) = answer["choices"]
    given = choice["message"]
    content: list[dict[str, Any]] = []
    if given.get("reasoning_content"):
        content.append({"type": "thinking", "thinking": given["reasoning_content"], "signature": ""})
    if given.get("content") or not (content or given.get("tool_calls")):
        content.append({"type": "text", "text": given.get("content") or "", "citations": None})
    for call in given.get("tool_calls") or ():
        content.append(_tool_use(call["id"], call["function"]["name"], json.loads(call["function"]["arguments"])))
    return _message(answer, content, choice, _usage(answer["usage"]))


def _message(
    answer: Mapping[str, Any], content: list[dict[str, Any]], choice: Mapping[str, Any], usage: dict[str, Any]
) -> dict[str, Any]:
    reason, sequence = _stop(choice)
    return {
        "id": "msg_" + answer["id"].removeprefix("chatcmpl-"),
        "type": "message",
        "role": "assistant",
        "model": answer["model"],
        "content": content,
        "stop_reason": reason,
        "stop_sequence": sequence,
        "stop_details": None,
        "container": None,
        "usage": usage,
    }


def _tool_use(name_of_call: str, name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": name_of_call, "name": name, "input": arguments, "caller": {"type": "direct"}}


def _stop(choice: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Why an answer ended, and the stop sequence that ended it, if one did."""
    sequence = choice.get("stop_reason")
    if choice.get("finish_reason") == "stop" and isinstance(sequence, str):
        return "stop_sequence", sequence
    reason = choice.get("finish_reason")
    return (STOP_REASONS[reason] if reason else None), None


def _usage(usage: Mapping[str, Any] | None) -> dict[str, Any]:
    """The usage; what was cached is no part of input_tokens here."""
    usage = usage or {}
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    thinking = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens", 0)
    return {
        "input_tokens": usage.get("prompt_tokens", 0) - cached,
        "output_tokens": usage.get("completion_tokens", 0),
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "cache_creation": None,
        "output_tokens_details": {"thinking_tokens": thinking},
        "server_tool_use": None,
        "service_tier": "standard",
        "inference_geo": None,
    }


class _Blocks:
    """The events of one message's content: one block is open at a time."""

    def __init__(self) -> None:
        self.index = -1
        self._kind: Any = None

    def add(self, kind: Any, start: dict[str, Any], delta: dict[str, Any] | None) -> list[dict[str, Any]]:
        """More of the block of a kind, which begins with `start` if it is not the open one."""
        events = []
        if kind != self._kind:
            events += self.close()
            self.index += 1
            self._kind = kind
            events.append({"type": "content_block_start", "index": self.index, "content_block": start})
        if delta is not None:
            events.append({"type": "content_block_delta", "index": self.index, "delta": delta})
        return events

    def close(self) -> list[dict[str, Any]]:
        """Ends the open block."""
        if self._kind is None:
            return []
        self._kind = None
        return [{"type": "content_block_stop", "index": self.index}]

    def of_delta(self, delta: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The events of what a chunk adds."""
        events = []
        if text := delta.get("reasoning_content"):
            start = {"type": "thinking", "thinking": "", "signature": ""}
            events += self.add("thinking", start, {"type": "thinking_delta", "thinking": text})
        if text := delta.get("content"):
            start = {"type": "text", "text": "", "citations": None}
            events += self.add("text", start, {"type": "text_delta", "text": text})
        for call in delta.get("tool_calls") or ():
            function = call["function"]
            start = _tool_use(call.get("id", ""), function.get("name", ""), {})
            pieces = function.get("arguments")
            more = {"type": "input_json_delta", "partial_json": pieces} if pieces else None
            events += self.add(call["index"], start, more)
        return events


async def stream(chunks: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    """The events of a streamed answer. What goes wrong is the last of them."""
    blocks = _Blocks()
    begun = False
    choice: Mapping[str, Any] = {}
    usage: Mapping[str, Any] | None = None
    try:
        async for chunk in chunks:
            usage = chunk.get("usage") or usage
            if not begun:
                begun = True
                yield {"type": "message_start", "message": _message(chunk, [], {}, _usage(usage))}
            for choice in chunk["choices"]:
                for event in blocks.of_delta(choice["delta"]):
                    yield event
        if blocks.index < 0:
            for event in blocks.add("text", {"type": "text", "text": "", "citations": None}, None):
                yield event
        for event in blocks.close():
            yield event
        reason, sequence = _stop(choice)
        ending = {"stop_reason": reason, "stop_sequence": sequence, "stop_details": None, "container": None}
        yield {"type": "message_delta", "delta": ending, "usage": _usage(usage)}
        yield {"type": "message_stop"}
    except ApiError as error:
        yield error.message_body
    except Exception as error:
        yield unexpected(error).message_body
