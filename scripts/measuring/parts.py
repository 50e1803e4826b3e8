"""What a command measures, of the parts that it has. Imports no jax."""

from collections.abc import Sequence


def chosen(given: str, parts: Sequence[str]) -> list[str]:
    """The parts that are named, commas between them, in the order of `parts`. Raises ValueError for another name."""
    names = [part.strip() for part in given.split(",")]
    for name in names:
        if name not in parts:
            raise ValueError(f"--parts: no part {name!r}; allowed: {', '.join(parts)}")
    return [part for part in parts if part in names]
