"""What a training text of the tiny model is: spans that are learned or only read, and chats made of them.

Standard library only.
"""

import dataclasses
import random
import re
from collections.abc import Sequence

END_OF_TEXT = "<|endoftext|>"
START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"

Message = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Span:
    """A stretch of text that is tokenized on its own; `learn` is False for a prompt, which need not be predicted."""

    text: str
    learn: bool


@dataclasses.dataclass(frozen=True)
class Document:
    """One training text. The last span ends with <|endoftext|>, or in a chat with <|im_end|>."""

    kind: str
    spans: tuple[Span, ...]

    @property
    def text(self) -> str:
        return "".join(span.text for span in self.spans)


def plain(kind: str, *spans: tuple[str, bool]) -> Document:
    """A plain text: (text, learn) spans, closed by <|endoftext|>."""
    text, learn = spans[-1]
    return Document(kind, tuple(Span(*span) for span in (*spans[:-1], (text + END_OF_TEXT, learn))))


def chat(kind: str, messages: Sequence[Message]) -> Document:
    """ChatML: what the assistant says is learned, everything else is prompt."""
    spans: list[Span] = []
    prompt = ""
    for message in messages:
        if message["role"] == "assistant":
            spans.append(Span(f"{prompt}{START_OF_TURN}assistant\n", False))
            spans.append(Span(message["content"] + END_OF_TURN, True))
            prompt = "\n"
        else:
            prompt += f"{START_OF_TURN}{message['role']}\n{message['content']}{END_OF_TURN}\n"
    return Document(kind, tuple(spans))


def exchange(user: str, assistant: str) -> list[Message]:
    """What a user says and what the assistant answers."""
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def system_message(rng: random.Random, chance: float = 0.5) -> list[Message]:
    """A system message, or none."""
    if rng.random() >= chance:
        return []
    text = "You are a helpful assistant."
    if rng.random() < 0.2:
        text = rng.choice(("You are a kind and helpful assistant.", "Answer in short sentences.", "You like to help."))
    return [{"role": "system", "content": text}]


_PIECE = re.compile(r"\d| ?[^\W\d_]+| ?[^\w\s]+|\s")
_TOKENS_PER_PIECE = 1.3


def estimate_tokens(text: str) -> int:
    """About how many tokens a text has, without a tokenizer; seldom less than it really has."""
    return int(_TOKENS_PER_PIECE * len(_PIECE.findall(text)))
