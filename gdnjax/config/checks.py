"""What is checked of numbers and choices, and said of those that will not do. No jax."""

import dataclasses
import math
from typing import Any


def check_positive(geometry: Any) -> None:
    """Raises ValueError for a field of a geometry that is not above 0."""
    for field in dataclasses.fields(geometry):
        value = getattr(geometry, field.name)
        if isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value < math.inf:
            raise ValueError(f"{type(geometry).__name__}.{field.name} must be above 0, got {value!r}")


def number(name: str, value: Any, least: float) -> float:
    """A finite number of at least `least`, as a float."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of at least {least:g}, got {value!r}")
    return float(value)


def check_int(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
