"""Word problems in GSM8K's format, and the prompts that they become."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gdnjax.assets import EMBEDDED_MODEL, model_directory

from . import scoring

if TYPE_CHECKING:
    from gdnjax.serving.tokenizer import Tokenizer

FORMS = ("plain", "few-shot", "chat")
END_MARKS = ("</s>", "<|im_end|>")
STOPS = {"plain": END_MARKS, "few-shot": ("Question:", *END_MARKS), "chat": END_MARKS}
"""What ends a completion besides the model's own end of sequence; for few-shot the list of lm-eval's gsm8k task."""

FEW_SHOTS = 5


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question, and an answer that ends with "#### " and the number."""

    question: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What the model is given for a problem: as text, special tokens spelled out, and as tokens."""

    text: str
    token_ids: list[int]


def problem_file(model: str, given: str | None, packaged: str, flag: str) -> pathlib.Path:
    """The file that was given, or the one beside the embedded model. Raises ValueError for other models."""
    if given is not None:
        return pathlib.Path(given)
    if model != EMBEDDED_MODEL:
        raise ValueError(f'no {flag}: pass a file with a {{"question": ..., "answer": ...}} in every line')
    return model_directory(model) / packaged


def read_problems(file: pathlib.Path) -> list[Problem]:
    """The problems of a JSON Lines file; blank lines are skipped.

    Raises OSError where the file cannot be read, and a ValueError that names file and line for what is no problem.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text: {error}") from error
    problems = [_problem(f"{file}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not problems:
        raise ValueError(f"{file}: no problems in it")
    return problems


def _problem(place: str, line: str) -> Problem:
    try:
        raw = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f'{place}: expected {{"question": ..., "answer": ...}}, got {line[:80]}')
    for key in ("question", "answer"):
        if not isinstance(raw.get(key), str) or not raw[key].strip():
            raise ValueError(f'{place}: no "{key}", or one that is not a text')
    if scoring.strict_answer(raw["answer"]) is None:
        raise ValueError(f'{place}: the answer does not end with "#### " and a number: {raw["answer"][-40:]!r}')
    return Problem(raw["question"], raw["answer"])


def make_prompts(
    problems: Sequence[Problem],
    shots: Sequence[Problem],
    form: str,
    tokenizer: "Tokenizer",
    template_options: dict[str, Any] | None = None,
) -> list[Prompt]:
    """The prompts of the problems in one of FORMS. `template_options` go to the chat template."""
    if form == "chat":
        chats = [chat_messages(shots, problem.question) for problem in problems]
        encoded = [tokenizer.apply_chat_template(chat, **(template_options or {})) for chat in chats]
        return [Prompt(tokenizer.decode(ids, skip_special_tokens=False), ids) for ids in encoded]
    if form == "plain" and shots:
        raise ValueError("the plain form has no place for shots; use the form few-shot or chat")
    texts = [few_shot_text(shots, problem.question) if form == "few-shot" else problem.question for problem in problems]
    return [Prompt(text, tokenizer.encode(text)) for text in texts]


def few_shot_text(shots: Sequence[Problem], question: str) -> str:
    """The prompt of lm-eval's gsm8k task."""
    solved = [f"Question: {shot.question}\nAnswer: {shot.answer}" for shot in shots]
    return "\n\n".join([*solved, f"Question: {question}\nAnswer:"])


def chat_messages(shots: Sequence[Problem], question: str) -> list[dict[str, str]]:
    """A conversation in which each shot is a turn that has been answered, and the question is open."""
    turns = [
        {"role": role, "content": content}
        for shot in shots
        for role, content in (("user", shot.question), ("assistant", shot.answer))
    ]
    return [*turns, {"role": "user", "content": question}]
