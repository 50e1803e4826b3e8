"""Outputs of models as tokens, for tests of the parser: which tags are tokens, and every way to cut an output."""

import dataclasses
import json
import pathlib
import re

from gdnjax.assets import model_directory
from gdnjax.sampling_params import SamplingParams
from gdnjax.serving.detokenizer import Detokenizer
from gdnjax.serving.parsing import ToolCallArguments, ToolCallStart, joined
from gdnjax.serving.tokenizer import Tokenizer

TAG = re.compile(r"(</?tool_call>|</?think>)")

XML_TEMPLATE = """\
{%- for tool in tools or [] %}{{- '# ' + (tool | tojson) + '\n' }}{%- endfor %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' %}
{{- '<think>\n' + (message.reasoning_content or '') | trim + '\n</think>\n\n' }}
{%- endif %}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
{{- '\n\n' if loop.first and message.content else '\n' if not loop.first else '' }}
{{- '<tool_call>\n<function=' + call.function.name + '>\n' }}
{%- for name, value in call.function.arguments | items %}
{{- '<parameter=' + name + '>\n' }}
{{- value | tojson if value is mapping or (value is sequence and value is not string) else value | string }}
{{- '\n</parameter>\n' }}
{%- endfor %}
{{- '</function>\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' + ('<think>\n' if enable_thinking is not false else '<think>\n\n</think>\n\n') }}
{%- endif %}
"""
"""A template that writes turns and calls as Qwen3.5's does."""


def tagged_tokenizer(directory: pathlib.Path, *, special: bool) -> Tokenizer:
    """The embedded model's tokenizer, whose tags are tokens, with the template above; and with tags that are special
    tokens, which skip_special_tokens leaves out, or are not.
    """
    source = model_directory("tiny")
    content = json.loads((source / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] |= special
    (directory / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((source / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": XML_TEMPLATE}))
    return Tokenizer.from_directory(directory)


@dataclasses.dataclass(frozen=True)
class Tag:
    """A tag that is a token, in an output; in a text it is the same characters that others spell."""

    text: str


def parts_of(text: str) -> list:
    """An output whose tags are all tokens."""
    return [Tag(part) if TAG.fullmatch(part) else part for part in TAG.split(text)]


def encoded(tokenizer: Tokenizer, parts: list) -> list[int]:
    """The ids of an output. A tag within a text is spelled by ordinary tokens."""
    ids = []
    for part in parts:
        if isinstance(part, Tag):
            ids.append(tokenizer.added_token_ids[part.text])
            continue
        for piece in TAG.split(part):
            for half in (piece[:3], piece[3:]) if TAG.fullmatch(piece) else (piece,):
                ids += tokenizer.encode(half, add_special_tokens=False)
    return ids


def text_of(parts: list) -> str:
    """The text of an output."""
    return "".join(part.text if isinstance(part, Tag) else part for part in parts)


def pieces_of(tokenizer: Tokenizer, ids: list[int], params: SamplingParams | None = None):
    """(ids, text) of steps of one token, as the engine streams them."""
    detokenizer = Detokenizer(tokenizer, params or SamplingParams())
    return [*(([token], detokenizer.append([token])) for token in ids), ([], detokenizer.finish())]


def grouped(pieces, length: int):
    """The same in steps of so many pieces."""
    groups = [pieces[start : start + length] for start in range(0, len(pieces), length)]
    return [([i for ids, _ in group for i in ids], "".join(text for _, text in group)) for group in groups]


def read(parser, pieces):
    """The whole that a stream of (ids, text) gives, once every part has been found to be in its place."""
    state, parts = parser.initial, []
    for ids, text in pieces:
        state, more = parser.step(state, ids, text)
        parts += more
    parts += parser.finish(state)
    begun = -1
    for part in parts:
        if isinstance(part, ToolCallStart):
            assert part.index == begun + 1
            begun = part.index
        elif isinstance(part, ToolCallArguments):
            assert part.index == begun
            assert part.text
        else:
            assert part.text
    found = joined(parts, parser.num_reasoning_tokens(state))
    for call in found.tool_calls:
        assert isinstance(json.loads(call.arguments, parse_constant=lambda word: 1 / 0), dict)
    return found


def cut_text(text: str):
    """Every way to cut a text in two, and into pieces of one and of three characters, without ids."""
    for place in range(len(text) + 1):
        yield [([], text[:place]), ([], text[place:])]
    for length in (1, 3):
        yield [([], text[start : start + length]) for start in range(0, len(text), length)]


def cut_tokens(pieces):
    """Every way to cut a stream in two between two of its pieces, and into steps of several; and text that comes after
    all of its ids, character by character.
    """
    for place in range(len(pieces) + 1):
        yield [*grouped(pieces[:place], len(pieces)), *grouped(pieces[place:], len(pieces))]
    for length in (1, 2, 3, 5):
        yield grouped(pieces, length)
    [(ids, text)] = grouped(pieces, len(pieces))
    yield [(ids, ""), *(([], character) for character in text)]
