"""Structures that would stop or end the process of the engine end another one."""

import functools
import gc

import pytest

from gdnjax import SamplingParams, StructuredOutputsParams
from gdnjax.assets import model_directory
from gdnjax.serving import rehearsal
from gdnjax.serving.rehearsal import Rehearsals
from gdnjax.serving.structured import Grammars
from gdnjax.serving.tokenizer import Tokenizer

SLOW = {"patternProperties": {f"^{number:05}": {"type": "string"} for number in range(2000)}}
"""Of 70 kB; it takes minutes."""

DEEP = "start: r0\n" + "".join(f'r{i}: "a" r{i + 1} | "x"\n' for i in range(4000)) + 'r4000: "q"'
"""Compiling it takes more stack than a thread has."""


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_directory(model_directory("tiny"))


@pytest.fixture(scope="module")
def rehearse(tokenizer):
    return Rehearsals(tokenizer, tokenizer.vocab_size, seconds=0.5)


def compile_here(tokenizer, structure):
    Grammars(tokenizer, tokenizer.vocab_size).matcher(SamplingParams(structured_outputs=structure), [5], ())


@pytest.mark.parametrize(
    "fields",
    [
        {"regex": "a+"},
        {"json": {"type": "object"}, "disable_any_whitespace": True},
        {"choice": ["yes", "no"]},
        {"json_object": True},
        # Tokens of the model's own, by name and by number.
        {"grammar": 'start: "a" <|im_end|> <tool_call> <[5]>'},
    ],
    ids=str,
)
def test_what_compiles_here_compiles_there(fields, rehearse, tokenizer):
    structure = StructuredOutputsParams(**fields)
    rehearse(structure)
    compile_here(tokenizer, structure)


@pytest.mark.parametrize(
    "fields",
    [
        {"regex": "("},
        {"json": {"type": "objekt"}},
        {"json": {"$ref": "#"}},
        {"grammar": "start: <|nobody_knows|>"},
        {"grammar": "start: start2"},
    ],
    ids=str,
)
def test_what_is_wrong_is_told_as_it_is_here(fields, rehearse, tokenizer):
    structure, found = StructuredOutputsParams(**fields), []
    for attempt in (rehearse, functools.partial(compile_here, tokenizer)):
        with pytest.raises(ValueError, match="structured_outputs") as caught:
            attempt(structure)
        # What tokens there are is told, too.
        found.append(str(caught.value).partition("; following")[0])
    assert found[0] == found[1]


def test_what_takes_too_long_is_refused_and_the_next_served(rehearse):
    with pytest.raises(ValueError, match=r"structured_outputs\.json takes longer than 0\.5 s to compile"):
        rehearse(StructuredOutputsParams(json=SLOW))
    rehearse(StructuredOutputsParams(regex="a"))


def test_what_takes_the_whole_stack_is_refused_and_the_next_served(rehearse):
    with pytest.raises(ValueError, match=r"structured_outputs\.grammar is too large, or nested too deep"):
        rehearse(StructuredOutputsParams(grammar=DEEP))
    rehearse(StructuredOutputsParams(regex="a"))


def test_memory_is_bounded(tokenizer, monkeypatch):
    """So little that not even the library fits."""
    monkeypatch.setattr(rehearsal, "MAX_BYTES", 1 << 20)
    with pytest.raises(RuntimeError, match="a process to compile grammars in ended"):
        Rehearsals(tokenizer, tokenizer.vocab_size, seconds=5.0)(StructuredOutputsParams(regex="a"))


def test_processes_end_with_whoever_asks_them(tokenizer):
    rehearse = Rehearsals(tokenizer, tokenizer.vocab_size, seconds=5.0)
    rehearse(StructuredOutputsParams(regex="a"))
    rehearse(StructuredOutputsParams(regex="b"))
    (child,) = rehearse._idle
    assert child.poll() is None
    del rehearse
    gc.collect()
    assert child.poll() is not None


def test_grammars_that_are_refused_are_not_compiled(tokenizer):
    grammars = Grammars(tokenizer, tokenizer.vocab_size)

    def refuse(structure):
        raise ValueError(f"{structure.kind} is refused")

    grammars.rehearse = refuse
    with pytest.raises(ValueError, match="regex is refused"):
        grammars.matcher(SamplingParams(structured_outputs=StructuredOutputsParams(regex="a")), [5], ())
