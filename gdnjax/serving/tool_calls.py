"""Arguments of tool calls: the types that a tool's JSON schema gives them, texts to JSON, JSON read as it comes.

Everything here is pure; states go in and come out. No jax.
"""

import dataclasses
import functools
import json
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

MAX_KEY = 1024
"""Most characters of a key of an object that is read as it comes: a key is held back until its value begins."""

MAX_ATOM = 1024
"""Most characters of a number that is read as it comes, for the same reason."""

JSON_TYPES = frozenset(("string", "number", "integer", "boolean", "object", "array", "null"))

ANYTHING: frozenset[str] = frozenset()
"""The types of a parameter that its schema says nothing about."""


@dataclasses.dataclass(frozen=True)
class Tool:
    """A function that may be called.

    parameters  its parameters' names -> the JSON types that each may have, ANYTHING where the schema does not say.
    others      the same for parameters that the schema does not name.
    """

    name: str
    parameters: Mapping[str, frozenset[str]]
    others: frozenset[str] = ANYTHING

    def types_of(self, parameter: str) -> frozenset[str]:
        """The JSON types that a parameter may have."""
        return self.parameters.get(parameter, self.others)


def read_tools(tools: Sequence[Any] | None) -> dict[str, Tool]:
    """Tools in OpenAI's form, {"type": "function", "function": {"name", "parameters"}} or the inner dictionary alone,
    by name. Raises ValueError for tools of another form, and for two of one name.
    """
    found: dict[str, Tool] = {}
    for index, tool in enumerate(tools or ()):
        place = f"tools[{index}]"
        if not isinstance(tool, Mapping):
            raise ValueError(f"{place} must be an object, got {tool!r}")
        if tool.get("type", "function") != "function":
            raise ValueError(f"{place} has type {tool['type']!r}; allowed: 'function'")
        function = tool.get("function", tool)
        if not isinstance(function, Mapping):
            raise ValueError(f"{place}['function'] must be an object, got {function!r}")
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{place} has no name: 'name' must be a non-empty string, got {name!r}")
        if name in found:
            raise ValueError(f"{place}: there are two tools of the name {name!r}")
        for key, kind, words in (("description", str, "a string"), ("strict", bool, "true or false")):
            if not isinstance(function.get(key), kind | None):
                raise ValueError(f"{place}[{key!r}] must be {words}, got {function[key]!r}")
        schema = function.get("parameters")
        if schema is not None and not isinstance(schema, Mapping):
            raise ValueError(f"{place}['parameters'] must be a JSON schema, an object, got {schema!r}")
        found[name] = _read_tool(name, schema or {})
    return found


def _read_tool(name: str, schema: Mapping[str, Any]) -> Tool:
    parameters: dict[str, frozenset[str]] = {}
    others = ANYTHING
    for part in _object_schemas(schema, schema, ()):
        properties = part.get("properties")
        for key, value in properties.items() if isinstance(properties, Mapping) else ():
            parameters.setdefault(key, schema_types(value, schema))
        if others == ANYTHING:
            others = schema_types(part.get("additionalProperties"), schema)
    return Tool(name, parameters, others)


def _object_schemas(schema: Any, root: Mapping[str, Any], seen: tuple[str, ...]) -> list[Mapping[str, Any]]:
    """The schema, and those that it is made of: what it refers to, and the members of allOf, anyOf and oneOf."""
    if not isinstance(schema, Mapping):
        return []
    found: list[Mapping[str, Any]] = [schema]
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in seen:
        seen = (*seen, reference)
        found += _object_schemas(_referred(reference, root), root, seen)
    for key in ("allOf", "anyOf", "oneOf"):
        for member in _members(schema, key):
            found += _object_schemas(member, root, seen)
    return found


def schema_types(schema: Any, root: Mapping[str, Any], seen: tuple[str, ...] = ()) -> frozenset[str]:
    """The JSON types that a schema allows; ANYTHING where it does not say, or says what is not known here.

    `root` is the schema that a "$ref" is looked up in, `seen` the references that lead here: a circle allows anything.
    """
    if not isinstance(schema, Mapping):
        return ANYTHING
    found = _plain_types(schema, root, seen)
    return found | {"null"} if found and schema.get("nullable") is True else found


def _plain_types(schema: Mapping[str, Any], root: Mapping[str, Any], seen: tuple[str, ...]) -> frozenset[str]:
    if "type" in schema:
        types = schema["type"]
        types = [types] if isinstance(types, str) else types
        if isinstance(types, Sequence) and types and all(isinstance(t, str) and t in JSON_TYPES for t in types):
            return frozenset(types)
        return ANYTHING
    if "const" in schema:
        return frozenset((type_of(schema["const"]),))
    if _members(schema, "enum"):
        return frozenset(type_of(value) for value in schema["enum"])
    if isinstance(schema.get("$ref"), str):
        reference = schema["$ref"]
        if reference in seen:
            return ANYTHING
        return schema_types(_referred(reference, root), root, (*seen, reference))
    for key in ("anyOf", "oneOf"):
        if members := _members(schema, key):
            types = [schema_types(member, root, seen) for member in members]
            return ANYTHING if ANYTHING in types else frozenset[str]().union(*types)
    types = [t for member in _members(schema, "allOf") if (t := schema_types(member, root, seen))]
    if types:
        return functools.reduce(frozenset.intersection, types)
    if "properties" in schema:
        return frozenset(("object",))
    if "items" in schema or "prefixItems" in schema:
        return frozenset(("array",))
    return ANYTHING


def _members(schema: Mapping[str, Any], key: str) -> Sequence[Any]:
    found = schema.get(key)
    return found if isinstance(found, Sequence) and not isinstance(found, str) else ()


def _referred(reference: str, root: Mapping[str, Any]) -> Any:
    """What a reference within the schema, "#/$defs/City", points to; None where there is no such place."""
    if not reference.startswith("#"):
        return None
    found: Any = root
    for step in urllib.parse.unquote(reference[1:]).split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping):
            found = found.get(step)
        elif isinstance(found, list) and step.isdecimal() and int(step) < len(found):
            found = found[int(step)]
        else:
            return None
    return found


def type_of(value: Any) -> str:
    """The JSON type of a value that json.loads gives; whole numbers are integers."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case Mapping():
            return "object"
    return "array"


def quoted(text: str) -> str:
    """A text as a JSON string."""
    return json.dumps(text, ensure_ascii=False)


def escaped(text: str) -> str:
    """What stands for a text between the quotes of a JSON string."""
    return quoted(text)[1:-1]


def strict_json(text: str) -> Any:
    """The value of a JSON text, by the standard: no NaN, no Infinity. Raises ValueError for what is not JSON, and for
    JSON that is nested deeper than this interpreter can read.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def value_json(text: str, types: frozenset[str]) -> str:
    """The JSON of a parameter's text, where only the schema says whether 5 is a number or a text.

    For a string it is the text as it is. Else it is the text as JSON where that is what it is, and where its type is
    one of `types` if a string is one of them, too; else the text. Python's True, False and None, which chat templates
    write, are what they mean where the schema allows it.
    """
    if types == {"string"}:
        return quoted(text)
    bare = text.strip()
    word = bare.lower()
    if "null" in types and word in ("null", "none"):
        return "null"
    if "boolean" in types and word in ("true", "false"):
        return word
    try:
        found = type_of(strict_json(bare))
    except ValueError:
        return quoted(text)
    fits = not types or found in types or (found == "integer" and "number" in types)
    return bare if fits or "string" not in types else quoted(text)


def begins_null(text: str) -> bool:
    """Whether a parameter's text may become null, so far."""
    word = text.strip().lower()
    return "null".startswith(word) or "none".startswith(word)


@dataclasses.dataclass(frozen=True, slots=True)
class JsonValue:
    """How far one JSON value has been read.

    stack    containers that are open, innermost first: ("{" or "[", those around it), None at the top.
    expects  what comes next: "value", "item" (or the end of a list), "key" (or the end of an object), "colon",
             "comma" (or the end of either), "done".
    empty    whether the innermost container has no item yet.
    string   whether this is within a string.
    key      the key that is being read, or whose value is awaited, in quotes.
    """

    stack: Any = None
    expects: str = "value"
    empty: bool = True
    string: bool = False
    key: str = ""

    @property
    def done(self) -> bool:
        """Whether the value is complete."""
        return self.expects == "done"

    @property
    def closing(self) -> str:
        """What makes JSON of what has been given for this value so far: null where nothing has."""
        if self.expects == "value" and self.stack is None and not self.string:
            return "null"
        text = '"' if self.string and not self.key else ""
        stack = self.stack
        while stack is not None:
            text += "}" if stack[0] == "{" else "]"
            stack = stack[1]
        return text


_SPACE = re.compile(r"[ \t\r\n]*")
_CHARACTERS = re.compile(r'[^"\\\x00-\x1f]+')
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_BEGUN_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?\Z")
_ATOM = re.compile(r"[-+.\w]+", re.ASCII)
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_WORDS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}


def read_json(state: JsonValue, text: str, start: int, more: bool) -> tuple[JsonValue, int, str, bool]:
    """Reads one JSON value on, from text[start:].

    `more` says whether text may follow. Returns the state, where in the text the next character stands that has not
    been read, what is now known of the value, as JSON whose pieces make a whole with one space behind commas and
    colons, and whether the text is good so far. It is not where a character cannot be there; the position is that
    character's. What models get wrong and can mean one thing only is read as that: control characters and unknown
    escapes in strings, a comma before a closing bracket, Python's True, False and None.
    """
    out: list[str] = []
    position = start
    good = True
    while not state.done:
        if state.string:
            state, position, complete = _read_string(state, text, position, more, out)
            if not complete:
                break
            if len(state.key) > MAX_KEY:
                good = False
                break
            continue
        space = _SPACE.match(text, position)
        assert space is not None
        position = space.end()
        if position == len(text):
            break
        read = _read_token(state, text, position, more, out)
        if read is None:
            # A number that may go on.
            break
        state, end = read
        if end == position:
            good = False
            break
        position = end
    return state, position, "".join(out), good


def _read_token(state: JsonValue, text: str, position: int, more: bool, out: list[str]) -> tuple[JsonValue, int] | None:
    """Reads the token at a position: the state and the token's end, the position itself where it cannot be there.
    None where it may go on behind the text.
    """
    character = text[position]
    refused = state, position
    if state.expects == "colon":
        return (dataclasses.replace(state, expects="value"), position + 1) if character == ":" else refused
    if character in "}]":
        innermost = state.stack[0] if state.stack else ""
        if innermost + character not in ("{}", "[]") or state.expects not in ("key", "item", "comma"):
            return refused
        out.append(character)
        return _after_value(dataclasses.replace(state, stack=state.stack[1])), position + 1
    if state.expects == "comma":
        if character != ",":
            return refused
        expects = "key" if state.stack[0] == "{" else "item"
        return dataclasses.replace(state, expects=expects), position + 1
    if state.expects == "key":
        if character != '"':
            return refused
        return dataclasses.replace(state, string=True, key='"'), position + 1
    if character in "{[":
        out.append(_before_value(state) + character)
        expects = "key" if character == "{" else "item"
        stack = (character, state.stack)
        return dataclasses.replace(state, stack=stack, expects=expects, empty=True, key=""), position + 1
    if character == '"':
        out.append(_before_value(state) + '"')
        return dataclasses.replace(state, string=True, key="", empty=False), position + 1
    atom = _ATOM.match(text, position)
    if atom is None:
        return refused
    if atom.end() == len(text) and more and len(atom[0]) <= MAX_ATOM:
        return None
    word = _WORDS.get(atom[0]) or (atom[0] if _NUMBER.fullmatch(atom[0]) else None)
    if word is None:
        return refused
    out.append(_before_value(state) + word)
    return _after_value(state), atom.end()


def _before_value(state: JsonValue) -> str:
    """The comma and the key that go before a value."""
    comma = ", " if state.stack is not None and not state.empty else ""
    return comma + (f"{state.key}: " if state.key else "")


def _after_value(state: JsonValue) -> JsonValue:
    expects = "done" if state.stack is None else "comma"
    return dataclasses.replace(state, expects=expects, empty=False, string=False, key="")


def _read_string(state: JsonValue, text: str, position: int, more: bool, out: list[str]) -> tuple[JsonValue, int, bool]:
    """Reads a string on; True where it has ended. A key goes to `state.key`, a value to `out`."""
    pieces: list[str] = []
    ended = False
    while position < len(text):
        if run := _CHARACTERS.match(text, position):
            pieces.append(run[0])
            position = run.end()
            continue
        character = text[position]
        if character == '"':
            pieces.append('"')
            position += 1
            ended = True
            break
        if character != "\\":
            pieces.append(escaped(character))
            position += 1
        elif escape := _ESCAPE.match(text, position):
            pieces.append(escape[0])
            position = escape.end()
        elif more and _BEGUN_ESCAPE.match(text, position):
            break
        else:
            pieces.append("\\\\")
            position += 1
    read = "".join(pieces)
    if not state.key:
        out.append(read)
        return (_after_value(state) if ended else state), position, ended
    key = state.key + read
    if not ended:
        # One that is too long ends here, for the caller to refuse.
        return dataclasses.replace(state, key=key), position, len(key) > MAX_KEY
    return dataclasses.replace(state, key=key, string=False, expects="colon"), position, True
