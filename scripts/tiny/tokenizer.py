"""The tokenizer of the tiny model: byte-level BPE in Qwen's manner, in which every digit stands alone."""

import json
import pathlib
import random
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import tiny.data
from tiny.data import END_OF_TEXT, END_OF_TURN, START_OF_TURN, Document

SPECIAL_TOKENS = (END_OF_TEXT, START_OF_TURN, END_OF_TURN)
# Tokens of their own, but part of the text: decoding keeps them.
MARKERS = ("<tool_call>", "</tool_call>", "<think>", "</think>")

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

# ChatML; `tools` are listed in the system message as tiny.chat.tools_message does.
CHAT_TEMPLATE = """\
{%- set first = messages[0] if messages and messages[0].role == 'system' else none -%}
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if first and first.content -%}{{- first.content + '\\n\\n' -}}{%- endif -%}
{{- 'Tools:' -}}
{%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if not (loop.first and first and tools) -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content -%}{{- message.content -}}{%- endif -%}
{%- if message.tool_calls -%}
{%- for call in message.tool_calls -%}
{%- set function = call.function if call.function else call -%}
{%- if message.content or not loop.first -%}{{- '\\n' -}}{%- endif -%}
{{- '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' -}}
{{- function.arguments if function.arguments is string else function.arguments | tojson -}}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def train_tokenizer(seed: int, vocab_size: int = 1024, documents: int = 20_000) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` tokens, from that many random documents in the training mixtures."""
    rng = random.Random(seed)
    # Long documents are made of the same words; a few are enough.
    mixture = {**tiny.data.SHORT_MIXTURE, **{kind: weight / 20 for kind, weight in tiny.data.LONG_MIXTURE.items()}}
    kinds = rng.choices(tuple(mixture), tuple(mixture.values()), k=documents)
    return train_on((tiny.data.document(rng, kind) for kind in kinds), vocab_size)


def train_on(documents: Iterable[Document], vocab_size: int) -> Tokenizer:
    """The tokenizer of these documents. Raises ValueError if they are too few for that many tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(MARKERS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_without_markup(span.text) for d in documents for span in d.spans), trainer)
    tokenizer.add_tokens([AddedToken(marker, normalized=False, special=False) for marker in MARKERS])
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the documents give {tokenizer.get_vocab_size()} tokens, not {vocab_size}: train on more")
    return tokenizer


def _without_markup(text: str) -> str:
    """What the model reads between special tokens and markers, so that no merge is spent on these."""
    for token in (*SPECIAL_TOKENS, *MARKERS):
        text = text.replace(token, "\n")
    return text


def write_tokenizer(tokenizer: Tokenizer, directory: pathlib.Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json for transformers' PreTrainedTokenizerFast."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": tiny.data.LONG_LIMIT,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def encode(tokenizer: Tokenizer, document: Document) -> tuple[list[int], list[bool]]:
    """The token ids of a document and, for each, whether it is to be learned."""
    return encode_all(tokenizer, [document])[0]


def encode_all(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[tuple[list[int], list[bool]]]:
    """encode() of many documents, in one batch. Spans are tokenized one by one, as a prompt is at inference."""
    texts = [span.text for document in documents for span in document.spans]
    encodings = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    encoded = []
    for document in documents:
        ids: list[int] = []
        learn: list[bool] = []
        for span, encoding in zip(document.spans, encodings, strict=False):
            piece = encoding.ids
            ids += piece
            learn += [span.learn] * len(piece)
        encoded.append((ids, learn))
    return encoded
