"""What is asked of an engine, and when: conversations of one turn or several, drawn from a seed or read from a file."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

KINDS = ("random", "shared-prefix", "multi-turn")


@dataclasses.dataclass(frozen=True)
class Turn:
    """One request of a conversation.

    prompt      what it adds to the conversation so far, as token ids or, in a file, as text.
    max_tokens  output tokens. All of them are produced: EOS is ignored.
    """

    prompt: str | list[int]
    max_tokens: int

    @property
    def token_ids(self) -> list[int]:
        """Its prompt. Raises ValueError where that is a text still: `encode` makes token ids of it."""
        if isinstance(self.prompt, str):
            raise ValueError(f"a text where token ids are expected: {self.prompt!r}")
        return self.prompt


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns one after another: the prompt of each is everything before it, replies included, and its own tokens.

    `arrival` is in seconds after the start; a later turn arrives when the reply before it is complete.
    """

    turns: Sequence[Turn]
    arrival: float = 0.0

    @property
    def length(self) -> int:
        """Tokens at its end."""
        return sum(len(turn.token_ids) + turn.max_tokens for turn in self.turns)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """A workload to be drawn.

    num_requests  requests; of "multi-turn": conversations.
    input_len     prompt tokens of a request; of "shared-prefix": those after the prefix; of "multi-turn": those that a
                  turn adds.
    output_len    output tokens of a request.
    range_ratio   both lengths are uniform from (1 - r) to (1 + r) times that, rounded, and at least 1.
    prefix_len    tokens that requests share at their beginning.
    num_prefixes  different prefixes; every one is used equally often, in random order.
    turns         requests of a conversation.
    turn_growth   each turn of a conversation adds so many times the tokens of the one before it, on average.
    request_rate  arrivals a second, with exponential gaps between them; None: all at once.
    """

    kind: str = "random"
    num_requests: int
    input_len: int
    output_len: int
    range_ratio: float = 0.0
    prefix_len: int = 0
    num_prefixes: int = 1
    turns: int = 1
    turn_growth: float = 1.0
    request_rate: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no workload {self.kind!r}; allowed: {', '.join(KINDS)}")
        if self.kind == "random" and self.prefix_len:
            raise ValueError("random prompts share no prefix; allowed with a prefix: shared-prefix and multi-turn")
        if self.kind != "multi-turn" and self.turns != 1:
            raise ValueError(f"{self.kind} requests have one turn, got {self.turns}; allowed with more: multi-turn")


def draw(spec: Spec, vocab_size: int) -> list[Conversation]:
    """The workload of a spec, of uniform token ids below `vocab_size`. The same spec gives the same workload.

    Lengths, tokens and arrivals are drawn apart: another rate leaves the prompts as they are.
    """
    lengths, tokens, order, gaps = (np.random.default_rng(seed) for seed in np.random.SeedSequence(spec.seed).spawn(4))

    def ids(length: int) -> list[int]:
        return tokens.integers(vocab_size, size=length).tolist()

    prefixes = [ids(spec.prefix_len) for _ in range(spec.num_prefixes)]
    chosen = order.permutation(np.arange(spec.num_requests) % spec.num_prefixes)
    inputs, outputs = (
        _lengths(lengths, mean, spec.range_ratio, (spec.num_requests, spec.turns))
        for mean in (spec.input_len, spec.output_len)
    )
    times = arrivals(gaps, spec.num_requests, spec.request_rate)
    conversations = []
    for i, arrival in enumerate(times):
        turns = []
        for j in range(spec.turns):
            prefix = prefixes[chosen[i]] if j == 0 else []
            length = max(1, round(int(inputs[i, j]) * spec.turn_growth**j))
            turns.append(Turn(prefix + ids(length), int(outputs[i, j])))
        conversations.append(Conversation(turns, float(arrival)))
    return conversations


def _lengths(rng: np.random.Generator, mean: int, ratio: float, shape: tuple[int, ...]) -> np.ndarray:
    low, high = max(1, round(mean * (1 - ratio))), max(1, round(mean * (1 + ratio)))
    return rng.integers(low, high, size=shape, endpoint=True)


def arrivals(rng: np.random.Generator, count: int, rate: float | None) -> np.ndarray:
    """[count] seconds, ascending: a Poisson process of `rate` a second whose first arrival is at 0; None: all are."""
    if rate is None:
        return np.zeros(count)
    times = np.cumsum(rng.exponential(1 / rate, size=count))
    return times - times[0]


def read(file: pathlib.Path, max_tokens: int) -> list[Conversation]:
    """The workload of a JSON Lines file, in the order of the lines; `max_tokens` where a turn does not say.

    A line is a turn, {"prompt": text} or {"prompt_token_ids": [...]} with an optional "max_tokens", or {"turns": [...]}
    of several; "arrival" in seconds is optional. Raises ValueError that names the line.
    """
    conversations = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            conversations.append(_conversation(json.loads(line), max_tokens))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
    if not conversations:
        raise ValueError(f"{file}: no requests in it")
    return conversations


def _conversation(item: Any, max_tokens: int) -> Conversation:
    if not isinstance(item, dict):
        raise ValueError(f"expected a JSON object, got {type(item).__name__}")
    item = dict(item)
    arrival = item.pop("arrival", 0.0)
    if isinstance(arrival, bool) or not isinstance(arrival, int | float) or not 0 <= arrival < float("inf"):
        raise ValueError(f'"arrival" must be seconds of at least 0, got {arrival!r}')
    turns = item.pop("turns") if "turns" in item and len(item) == 1 else [item]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f'"turns" must be a list of at least one turn, got {turns!r}')
    return Conversation([_turn(turn, max_tokens) for turn in turns], float(arrival))


def _turn(item: Any, max_tokens: int) -> Turn:
    allowed = ("prompt", "prompt_token_ids", "max_tokens")
    if not isinstance(item, dict):
        raise ValueError(f"a turn must be a JSON object, got {type(item).__name__}")
    unknown = [key for key in item if key not in allowed]
    if unknown:
        raise ValueError(f"a turn has {unknown[0]!r}; allowed: {', '.join(allowed)}")
    if ("prompt" in item) == ("prompt_token_ids" in item):
        raise ValueError('a turn needs "prompt" or "prompt_token_ids", and not both')
    prompt = item.get("prompt", item.get("prompt_token_ids"))
    is_ids = isinstance(prompt, list) and all(
        isinstance(token, int) and not isinstance(token, bool) for token in prompt
    )
    if not prompt or not (is_ids if "prompt_token_ids" in item else isinstance(prompt, str)):
        raise ValueError(f'"prompt" must be a text, "prompt_token_ids" a list of integers, not empty; got {prompt!r}')
    length = item.get("max_tokens", max_tokens)
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ValueError(f'"max_tokens" must be an integer of at least 1, got {length!r}')
    return Turn(prompt, length)


def encode(conversations: Sequence[Conversation], ids_of: Callable[[str], list[int]]) -> list[Conversation]:
    """The same with token ids in place of texts."""

    def encoded(turn: Turn) -> Turn:
        return dataclasses.replace(turn, prompt=ids_of(turn.prompt)) if isinstance(turn.prompt, str) else turn

    return [dataclasses.replace(item, turns=[encoded(turn) for turn in item.turns]) for item in conversations]
