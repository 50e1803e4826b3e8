"""Structured output and demanded tool calls, as fields of a request: what they make of SamplingParams."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gdnjax.sampling_params import StructuredOutputsParams
from gdnjax.serving.schemas import moved
from gdnjax.serving.server.errors import ApiError, bad_request
from gdnjax.serving.server.protocol import GenerationBody

STRUCTURES = ("json", "regex", "choice", "grammar", "json_object")
OPTIONS = ("disable_any_whitespace",)

PLACE = "tool"
"""With its index, where a tool's schema stands among the definitions of a demanded call's."""


def structured_outputs(body: GenerationBody) -> StructuredOutputsParams | None:
    """What response_format or structured_outputs ask for; None where neither does. Raises ApiError that names it."""
    formatted = _of_response_format(body.response_format)
    if body.structured_outputs is None:
        return formatted
    if formatted is not None:
        raise ApiError(
            400, "response_format and structured_outputs are two ways to say it; give one", param="structured_outputs"
        )
    given = {name: value for name, value in body.structured_outputs.items() if value is not None}
    unknown = [name for name in given if name not in (*STRUCTURES, *OPTIONS)]
    if unknown:
        raise ApiError(
            400,
            f"structured_outputs.{unknown[0]} is not served; allowed: {', '.join((*STRUCTURES, *OPTIONS))}",
            param="structured_outputs",
        )
    return _made("structured_outputs", given)


def _of_response_format(given: Mapping[str, Any] | None) -> StructuredOutputsParams | None:
    name = "response_format"
    match (given or {"type": "text"}).get("type"):
        case "text":
            return None
        case "json_object":
            return _made(name, {"json_object": True})
        case "json_schema":
            schema = (given or {}).get("json_schema")
            if not isinstance(schema, Mapping) or "schema" not in schema:
                raise ApiError(400, f"{name}.json_schema must be an object with a schema, got {schema!r}", param=name)
            return _made(name, {"json": schema["schema"]})
        case other:
            allowed = "'text', 'json_object', 'json_schema'"
            raise ApiError(400, f"{name}.type {other!r} is not served; allowed: {allowed}", param=name)


def _made(name: str, given: Mapping[str, Any]) -> StructuredOutputsParams:
    try:
        return StructuredOutputsParams(**given)
    except ValueError as error:
        raise ApiError(400, f"{name}: {error}", param=name) from error


def demanded_call(
    tools: Sequence[Mapping[str, Any]], tool_choice: str | Mapping[str, Any], parallel: bool
) -> StructuredOutputsParams | None:
    """The form of an output that has to be a call: `{"name", "arguments"}`, or where several may be made a list of
    such. None where none is demanded. The tools and the choice have been checked.
    """
    functions = list(enumerate(tool.get("function", tool) for tool in tools))
    if isinstance(tool_choice, Mapping):
        functions = [each for each in functions if each[1]["name"] == tool_choice["function"]["name"]]
        parallel = False
    elif tool_choice != "required":
        return None
    places = {f"{PLACE}{index}": function for index, function in functions}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": function["name"]}, "arguments": {"$ref": f"#/$defs/{place}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for place, function in places.items()
    ]
    call: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    schema = {"type": "array", "items": call, "minItems": 1} if parallel else call
    definitions = {
        # A schema's references are to its own top, which is here.
        place: moved(function.get("parameters") or {"type": "object"}, f"#/$defs/{place}")
        for place, function in places.items()
    }
    try:
        return StructuredOutputsParams(json={**schema, "$defs": definitions})
    except ValueError as error:
        raise bad_request(error) from error


def in_fields_of(body: GenerationBody, error: ApiError) -> ApiError:
    """An error about a structure, in the words of the field that asked for it."""
    name = "structured_outputs"
    if error.param != name or body.structured_outputs is not None:
        return error
    if _of_response_format(body.response_format) is not None:
        found, words = "response_format", "response_format"
    else:
        found, words = "tools", "a schema of tools, which tool_choice demands a call of,"
    message = re.sub(rf"{name}\.\w+", words, error.message)
    message = re.sub(rf"(?:json-schema:///)?#/\$defs/{PLACE}(\d+)", r"tools[\1]: #", message)
    return ApiError(error.status, message, param=found)
