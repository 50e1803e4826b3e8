"""How far back the model finds what a text said, with its full attention and without."""

import itertools
from collections.abc import Callable, Sequence

from .documents import Text
from .forcing import Feeder, Piece

EDGES = (0, 100, 200, 400, 800, 1000, 1200, 1400, 2000)
"""Tokens before a value: the ends of the buckets."""


def values_right(feeder: Feeder, texts: Sequence[Text], *, attends: bool) -> list[tuple[int, bool]]:
    """(tokens before it, whether the argmax at each of its tokens is right) of every value, teacher-forced."""
    found = []
    for start in range(0, len(texts), feeder.rows):
        group = texts[start : start + feeder.rows]
        pieces = [Piece(1 + i, text.ids) for i, text in enumerate(group)]
        _, scores = feeder.feed(feeder.pools(), pieces, attends=attends)
        for text, score in zip(group, scores, strict=True):
            for first, end in text.values:
                right = bool((score.best[first - 1 : end - 1] == text.ids[first:end]).all())
                found.append((first, right))
    return found


def by_context(found: Sequence[tuple[int, bool]]) -> list[dict[str, int]]:
    """Values, and how many were right, by the tokens before them."""
    rows = []
    for least, below in itertools.pairwise(EDGES):
        inside = [right for context, right in found if least <= context < below]
        if inside:
            rows.append({"from": least, "to": below, "values": len(inside), "right": sum(inside)})
    return rows


def measure(
    feeder: Feeder, texts: Sequence[Text], progress: Callable[[str], None] = lambda text: None
) -> dict[str, list[dict[str, int]]]:
    """By context, with full attention and without."""
    result = {}
    for name, attends in (("with_attention", True), ("without_attention", False)):
        progress(f"recall: {name.replace('_', ' ')}")
        result[name] = by_context(values_right(feeder, texts, attends=attends))
    return result
