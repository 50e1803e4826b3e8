"""Values in a body, wherever they stand in it: each function raises ApiError that names the place."""

import re
from collections.abc import Mapping
from typing import Any

from gdnjax.serving.server.errors import ApiError


def param_of(place: str) -> str:
    """The field of the body that a place is in: `tools` of `tools[1].name`."""
    return re.split(r"[.\[]", place)[0]


def as_object(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ApiError(400, f"{place} must be an object, got {value!r}", param=param_of(place))
    return value


def as_list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise ApiError(400, f"{place} must be a list, got {value!r}", param=param_of(place))
    return value


def string_of(given: Mapping[str, Any], name: str, place: str) -> str:
    """A text that has to be there, of the object at a place."""
    if not isinstance(given.get(name), str):
        raise ApiError(400, f"{place}.{name} must be a string, got {given.get(name)!r}", param=param_of(place))
    return given[name]


def flag_of(given: Mapping[str, Any], name: str, place: str = "") -> bool:
    """A flag of the body, or of the object at a place; False where it is not there."""
    value = given.get(name)
    if not isinstance(value, bool | None):
        whole = f"{place}.{name}" if place else name
        raise ApiError(400, f"{whole} must be true or false, got {value!r}", param=param_of(whole))
    return bool(value)


def check_one_of(value: Any, allowed: tuple[str, ...], place: str) -> None:
    """None is allowed, too."""
    if value is not None and value not in allowed:
        words = ", ".join(map(repr, allowed))
        raise ApiError(400, f"{place} must be one of {words}, got {value!r}", param=param_of(place))
