"""The training text of the tiny model: every kind of document, and how often each is drawn.

Standard library only. Everything is a pure function of the random generator that is passed in. The model that gdnjax
ships was trained on exactly this text.
"""

import random
from collections.abc import Callable

import tiny.stories
from tiny.chat import chat_document, json_document, long_chat_document, story_turn, tool_document
from tiny.documents import (
    END_OF_TEXT,
    END_OF_TURN,
    START_OF_TURN,
    Document,
    Span,
    chat,
    estimate_tokens,
    exchange,
    plain,
    system_message,
)
from tiny.problems import Problem, is_held_out, problems, random_problem, shots
from tiny.recall import copy_document, long_copy_document, long_recall_document, lookup_document, recall_document

__all__ = [
    "END_OF_TEXT",
    "END_OF_TURN",
    "KINDS",
    "LONG_LIMIT",
    "LONG_MIXTURE",
    "SHORT_LIMIT",
    "SHORT_MIXTURE",
    "START_OF_TURN",
    "Document",
    "Problem",
    "Span",
    "document",
    "is_held_out",
    "problems",
    "shots",
]

SHORT_LIMIT = 512
LONG_LIMIT = 2048


def document(rng: random.Random, kind: str) -> Document:
    """A random document of one of KINDS."""
    return _KINDS[kind](rng)


def _problem_plain(rng: random.Random) -> Document:
    problem = random_problem(rng)
    return plain("problem_plain", (problem.question, False), (f"\n{problem.answer}", True))


def _few_shots(rng: random.Random, kind: str, count: int, size: int) -> Document:
    """At most `count` problems, no more once there are about `size` tokens."""
    spans: list[tuple[str, bool]] = []
    while len(spans) < 2 * count and size > 0:
        problem = random_problem(rng)
        spans.append(("\n\n" * bool(spans) + f"Question: {problem.question}\nAnswer:", False))
        spans.append((f" {problem.answer}", True))
        size -= estimate_tokens(problem.question) + estimate_tokens(problem.answer)
    return plain(kind, *spans)


def _problem_shots(rng: random.Random) -> Document:
    return _few_shots(rng, "problem_shots", rng.choice((1, 1, 1, 2, 3, 4, 6)), 380)


def _shots_long(rng: random.Random) -> Document:
    return _few_shots(rng, "shots_long", 100, rng.randint(650, 2000))


def _problem_chat(rng: random.Random) -> Document:
    problem = random_problem(rng)
    return chat("problem_chat", system_message(rng, 0.4) + exchange(problem.question, problem.answer))


def _turns(rng: random.Random, kind: str, count: int, size: int) -> Document:
    """At most `count` problems one after another, no more once there are about `size` tokens."""
    messages = system_message(rng, 0.4)
    while count > 0 and size > 0:
        problem = random_problem(rng)
        messages += exchange(problem.question, problem.answer)
        count -= 1
        size -= estimate_tokens(problem.question) + estimate_tokens(problem.answer)
    return chat(kind, messages)


def _problem_turns(rng: random.Random) -> Document:
    return _turns(rng, "problem_turns", rng.randint(2, 5), 370)


def _turns_long(rng: random.Random) -> Document:
    return _turns(rng, "turns_long", 100, rng.randint(600, 1800))


def _story(rng: random.Random) -> Document:
    return plain("story", (tiny.stories.story(rng), True))


def _story_chat(rng: random.Random) -> Document:
    return chat("story_chat", system_message(rng) + story_turn(rng))


def _story_long(rng: random.Random) -> Document:
    return plain("story_long", (tiny.stories.chapters(rng, rng.randint(5, 9)), True))


_KINDS: dict[str, Callable[[random.Random], Document]] = {
    "problem_plain": _problem_plain,
    "problem_shots": _problem_shots,
    "problem_chat": _problem_chat,
    "problem_turns": _problem_turns,
    "story": _story,
    "story_chat": _story_chat,
    "recall": recall_document,
    "copy": copy_document,
    "lookup": lookup_document,
    "chat": chat_document,
    "tool": tool_document,
    "json": json_document,
    "recall_long": long_recall_document,
    "copy_long": long_copy_document,
    "shots_long": _shots_long,
    "turns_long": _turns_long,
    "story_long": _story_long,
    "chat_long": long_chat_document,
}
KINDS: tuple[str, ...] = tuple(_KINDS)

# How often a document of each kind is drawn; the shares of tokens follow from the mean lengths.
SHORT_MIXTURE: dict[str, float] = {
    "problem_plain": 12.0,
    "problem_shots": 9.0,
    "problem_chat": 12.0,
    "problem_turns": 6.0,
    "story": 9.0,
    "story_chat": 5.0,
    "recall": 11.0,
    "copy": 8.0,
    "lookup": 7.0,
    "chat": 8.0,
    "tool": 2.0,
    "json": 2.5,
}
LONG_MIXTURE: dict[str, float] = {
    "recall_long": 4.0,
    "copy_long": 2.0,
    "shots_long": 1.5,
    "turns_long": 1.5,
    "story_long": 1.0,
    "chat_long": 1.5,
}
