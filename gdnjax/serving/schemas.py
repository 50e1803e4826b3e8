"""JSON schemas as data: what their references lead to. No jax."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords whose values are schemas by names, which may be any."""

VALUES = ("const", "enum", "default", "examples")
"""Keywords whose values are no schemas."""

TOP = "#"


def moved(schema: Any, top: str) -> Any:
    """A schema whose references to places in it are references to places under `top`, where it is to stand.

    References to anchors stay, and so do those within a schema with an `$id`, which is a top of its own.
    """
    if isinstance(schema, list):
        return [moved(each, top) for each in schema]
    if not isinstance(schema, dict) or isinstance(schema.get("$id"), str):
        return schema
    found = {}
    for key, value in schema.items():
        if key in SCHEMAS_BY_NAME and isinstance(value, dict):
            found[key] = {name: moved(each, top) for name, each in value.items()}
        elif key == "$ref" and isinstance(value, str) and (value == TOP or value.startswith("#/")):
            found[key] = top + value[1:]
        else:
            found[key] = value if key in VALUES else moved(value, top)
    return found


def check_references(text: str) -> None:
    """Raises ValueError for a schema with a reference that comes back to itself whatever is chosen, so that no text
    that has begun to follow it can ever end. What llguidance makes of it begins, and has no token to go on with.

    References to anchors, to an `$id`, and to nothing are left to llguidance.
    """
    schema = json.loads(text)
    places = {reference for each in _schemas(schema) if (reference := _reference(each)) is not None}
    targets = {place: found for place in places if (found := _at(schema, place)) is not None}
    users: dict[str, list[str]] = {}
    for place, found in targets.items():
        for used in {_reference(each) for each in _schemas(found)}:
            if used in targets:
                users.setdefault(used, []).append(place)
    ending: set[str] = set()
    left = list(targets)
    while left:
        place = left.pop()
        if place not in ending and _ends(targets[place], ending, targets):
            ending.add(place)
            left += users.get(place, ())
    for place in sorted(targets.keys() - ending):
        raise ValueError(f"the reference {place!r} leads back to itself whatever is chosen: no text of it ever ends")


def _schemas(value: Any) -> Iterator[Mapping[str, Any]]:
    """A schema and all within it; what it holds beside them does no harm."""
    if isinstance(value, list):
        for each in value:
            yield from _schemas(each)
    if not isinstance(value, dict):
        return
    yield value
    for key, each in value.items():
        if key in SCHEMAS_BY_NAME and isinstance(each, dict):
            for one in each.values():
                yield from _schemas(one)
        elif key not in VALUES:
            yield from _schemas(each)


def _reference(schema: Mapping[str, Any]) -> str | None:
    """The place that it refers to; None where it is to none, or to one of another top."""
    found = schema.get("$ref")
    return found if isinstance(found, str) and (found == TOP or found.startswith("#/")) else None


def _at(schema: Any, place: str) -> Any:
    """What stands at a place; None where there is nothing, or an `$id` on the way makes it another's."""
    for part in place.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, dict) and "$id" not in schema:
            schema = schema.get(part)
        elif isinstance(schema, list) and part.isdecimal() and int(part) < len(schema):
            schema = schema[int(part)]
        else:
            return None
    return schema


def _ends(schema: Any, ending: set[str], targets: Mapping[str, Any]) -> bool:
    """Whether there is a text for it that ends, where those for the places of `ending` do. True where it is not known:
    contradictions are llguidance's.
    """

    def ends(value: Any) -> bool:
        return _ends(value, ending, targets)

    if not isinstance(schema, dict):
        return True
    place = _reference(schema)
    if place in targets and place not in ending:
        return False
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list) and schema[key] and not any(map(ends, schema[key])):
            return False
    if isinstance(schema.get("allOf"), list) and not all(map(ends, schema["allOf"])):
        return False
    match schema.get("type"):
        case "object":
            properties, required = schema.get("properties"), schema.get("required")
            if isinstance(properties, dict) and isinstance(required, list):
                return all(ends(properties.get(name)) for name in required if isinstance(name, str))
        case "array":
            least, first = schema.get("minItems"), schema.get("prefixItems")
            first = first if isinstance(first, list) else []
            if isinstance(least, int) and least > 0:
                return all(map(ends, first[:least])) and (least <= len(first) or ends(schema.get("items")))
    return True
