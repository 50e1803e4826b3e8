"""Texts that training has not seen, as tokens with what is to be predicted in them."""

import dataclasses
import pathlib
import random
from collections.abc import Sequence

import tiny.data
import tokenizers
from evaluation.problems import Problem, read_problems
from tiny.data import Document, Span

from gdnjax.assets import EMBEDDED_MODEL, model_directory

END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|im_end|>"

CUT = 256
"""Tokens after which a document is cut where the work grows with their square."""


@dataclasses.dataclass(frozen=True)
class Text:
    """A document in tokens.

    learn   whether each token is one that the model is to predict
    values  the stretches that repeat something said before, as (first token, one past the last)
    """

    ids: list[int]
    learn: list[bool]
    values: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def cut(self, length: int) -> "Text":
        """The beginning; values that it does not hold whole are left out."""
        return Text(self.ids[:length], self.learn[:length], [value for value in self.values if value[1] <= length])


def held_out_problems(limit: int | None = None) -> list[Problem]:
    """The first held-out problems that ship with the model."""
    return read_problems(model_directory(EMBEDDED_MODEL) / "problems.jsonl")[:limit]


def problem_document(problem: Problem) -> Document:
    """A problem as training writes it."""
    spans = (Span(problem.question, False), Span(f"\n{problem.answer}{END_OF_TEXT}", True))
    return Document("problem_plain", spans)


def fresh_documents(kind: str, count: int) -> list[Document]:
    """Documents of a kind of training text, drawn anew from a seed that training has not used."""
    rng = random.Random(f"measured {kind}")
    return [tiny.data.document(rng, kind) for _ in range(count)]


def documents_of(domain: str, count: int) -> list[Document]:
    """Documents of a domain: held-out problems, or a kind of training text drawn anew."""
    if domain == "problems":
        return [problem_document(problem) for problem in held_out_problems(count)]
    return fresh_documents(domain, count)


def encode(tokenizer: tokenizers.Tokenizer, documents: Sequence[Document]) -> list[Text]:
    """Tokens of documents, spans by themselves as in training."""
    texts = []
    for document in documents:
        ids: list[int] = []
        learn: list[bool] = []
        values = []
        before = ""
        for span in document.spans:
            piece = tokenizer.encode(span.text, add_special_tokens=False).ids
            value = span.text.removesuffix(END_OF_TEXT).removesuffix(END_OF_TURN).strip()
            if span.learn and value in before:
                # What closes the value is not part of it.
                closed = span.text.endswith((END_OF_TEXT, END_OF_TURN))
                values.append((len(ids), len(ids) + len(piece) - closed))
            ids += piece
            learn += [span.learn] * len(piece)
            before += span.text
        texts.append(Text(ids, learn, values))
    return texts


def load_tokenizer(directory: pathlib.Path) -> tokenizers.Tokenizer:
    """The tokenizer of a checkpoint directory."""
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
