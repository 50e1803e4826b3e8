"""What a user may ask of sampling, checked at construction. Imports no jax."""

import dataclasses
import functools
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

MAX_STOP_TOKENS = 16
"""Token ids that end one request on the device: EOS ids and stop_token_ids together."""

MAX_STOP_STRINGS = 64
"""Texts that end one request: each is looked for at every token, while the device waits."""

MAX_STOP_CHARACTERS = 1 << 14
"""Characters of all of them."""

MAX_STRUCTURE = 1 << 17
"""Characters of a structure: compiling one takes longer than in proportion, seconds for so many."""

MAX_BAD_WORDS = 32
"""Texts that one request may forbid."""

MAX_BAD_WORD_CHARACTERS = 1024
"""In one of them: more than the tokens that it may be have, and few enough to be tokenised at once."""

MAX_BAD_SEQUENCES = 2 * MAX_BAD_WORDS
"""Token sequences that stand for them: each text with and without a leading space."""

MAX_BAD_WORD_TOKENS = 8
"""Tokens in one forbidden sequence."""

MAX_SAMPLES = 1024
"""Samples of one prompt. All of them are queued at once, and each takes some 6 kB of the host."""

NO_TOKEN = -1
"""Where a token id might stand: none."""

MASK_BITS = 32
"""Tokens in a word of a mask; the first is the lowest bit."""

LARGEST = 1e30
"""Magnitude that a number may have, and its inverse for one that is not 0: the device computes in float32, where
products and quotients with a logit must stay finite and a small number must not become 0."""


def _names_its_fields(cls: type[T]) -> type[T]:
    """Has a dataclass say which fields there are where it is given one that it does not know."""
    construct = cls.__init__

    @functools.wraps(construct)
    def checked(self, *args, **kwargs):
        allowed = [field.name for field in dataclasses.fields(self)]
        unknown = [name for name in kwargs if name not in allowed]
        if unknown:
            raise TypeError(f"{cls.__name__} has no {', '.join(unknown)}; allowed: {', '.join(allowed)}")
        construct(self, *args, **kwargs)

    cls.__init__ = checked
    return cls


@_names_its_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What the text of an output has to be: exactly one of these. A bad value raises a ValueError that names it.

    json         a JSON schema, as a dictionary or as its text, which is what is kept.
    regex        a regular expression that the whole text matches.
    choice       texts, of which it is one.
    grammar      a context-free grammar, in Lark's form or in GBNF.
    json_object  True: any JSON object.

    disable_any_whitespace   with json and json_object: only the blanks behind commas and colons.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False

    def __post_init__(self) -> None:
        given = [name for name in STRUCTURES if getattr(self, name) is not None and getattr(self, name) is not False]
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs must have exactly one of {', '.join(STRUCTURES)}, got {', '.join(given) or 'none'}"
            )
        for name in ("json_object", "disable_any_whitespace"):
            if not isinstance(getattr(self, name), bool | None):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.disable_any_whitespace and not (self.json is not None or self.json_object):
            raise ValueError(f"disable_any_whitespace is for json and json_object, got {given[0]}")
        for name in ("regex", "grammar"):
            if getattr(self, name) is not None:
                _strings(name, [getattr(self, name)])
        if self.choice is not None:
            object.__setattr__(self, "choice", _strings("choice", self.choice))
            if not self.choice:
                raise ValueError("choice is empty: no text could be produced")
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        value = getattr(self, self.kind)
        size = sum(map(len, value)) if isinstance(value, tuple) else len(value) if isinstance(value, str) else 0
        if size > MAX_STRUCTURE:
            raise ValueError(f"{self.kind} has {size} characters; allowed: {MAX_STRUCTURE}")

    @property
    def kind(self) -> str:
        """Which of them it is."""
        return next(name for name in STRUCTURES if getattr(self, name))


STRUCTURES = ("json", "regex", "choice", "grammar", "json_object")
"""Fields of StructuredOutputsParams of which one is given."""


@_names_its_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are drawn, and when it ends. A bad value raises a ValueError that names it.

    Drawing, applied in this order
      logit_bias           {token id: added to its logit}.
      allowed_token_ids    only these may be drawn.
      structured_outputs   a StructuredOutputsParams: only tokens that its grammar allows next may be drawn; from behind
                           "</think>" on, where prompt or model begin with thinking. The output ends where nothing can
                           follow, whatever min_tokens says, and before that only where the grammar may end.
      bad_words            texts that may not be produced.
      repetition_penalty   > 0; logits of tokens in prompt or output are divided (positive) or multiplied by it.
      frequency_penalty    subtracted from a token's logit once per occurrence in the output; in [-2, 2].
      presence_penalty     subtracted once from the logit of every token in the output; in [-2, 2].
      temperature          0 is greedy; otherwise logits are divided by it.
      min_p                tokens less probable than min_p times the most probable are dropped; in [0, 1].
      top_k                the k most probable are kept (all that tie with the k-th); 0 or -1 keeps all.
      top_p                the smallest set of the most probable whose mass reaches top_p is kept; in (0, 1].
      seed                 the same seed, prompt and parameters give the same noise; None: the engine picks one.
      n                    independent samples of the prompt, 1024 at most; sample 0 is the one that n=1 gives.
    Ending
      max_tokens           most tokens to produce; None: to the end of the context.
      min_tokens           EOS and stop token ids are not drawn, and stop strings not looked for, before this many.
      stop                 strings that end the output, and are cut off.
      include_stop_str_in_output  the stop string that ends the output stays in its text.
      stop_token_ids       token ids that end the output.
      ignore_eos           go on after the model's end-of-sequence token.
    Speed
      speculate            draft tokens ahead and verify them, where the engine does so at all; False: a token a step.
    Reporting
      logprobs             None: none; k: the drawn token's log-probability under the model (before any of the above)
                           and those of the k most probable.
      prompt_logprobs      the same for every prompt token after the first.
      skip_special_tokens  leave special tokens out of the text.
    """

    n: int = 1
    temperature: int | float = 1.0
    top_p: int | float = 1.0
    top_k: int = 0
    min_p: int | float = 0.0
    presence_penalty: int | float = 0.0
    frequency_penalty: int | float = 0.0
    repetition_penalty: int | float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str] | None = None
    allowed_token_ids: Sequence[int] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    speculate: bool = True

    def __post_init__(self) -> None:
        _integer("n", self.n, 1)
        if self.n > MAX_SAMPLES:
            raise ValueError(
                f"n must be at most {MAX_SAMPLES}, got {self.n}: all samples are queued at once; for more, give the "
                "prompt several times"
            )
        _real("temperature", self.temperature, 0.0, math.inf)
        _real("top_p", self.top_p, 0.0, 1.0, above=True)
        _integer("top_k", self.top_k, -1)
        if self.top_k >= 1 << 31:
            raise ValueError(f"top_k must be below 2**31, got {self.top_k}")
        _real("min_p", self.min_p, 0.0, 1.0)
        _real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _real("repetition_penalty", self.repetition_penalty, 0.0, math.inf, above=True)
        if self.seed is not None:
            _integer("seed", self.seed, 0)
            if self.seed >= 1 << 64:
                raise ValueError(f"seed must be below 2**64, got {self.seed}")
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1)
        _integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "speculate"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        structured = self.structured_outputs
        if structured is not None and not isinstance(structured, StructuredOutputsParams):
            raise ValueError(f"structured_outputs must be a StructuredOutputsParams, got {structured!r}")
        self._freeze_sequences()

    def __hash__(self) -> int:
        # logit_bias is a dict; without it a SamplingParams could be no static argument of a user's jit.
        bias = tuple(sorted(self.logit_bias.items())) if self.logit_bias else ()
        others = (getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "logit_bias")
        return hash((bias, *others))

    def _freeze_sequences(self) -> None:
        """Turns sequences into tuples and checks their members."""
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", _strings("stop", stop))
        assert self.stop is not None
        if len(self.stop) > MAX_STOP_STRINGS:
            raise ValueError(f"stop must be at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}")
        size = sum(map(len, self.stop))
        if size > MAX_STOP_CHARACTERS:
            raise ValueError(f"stop must have at most {MAX_STOP_CHARACTERS} characters, got {size}")
        bad_words = _strings("bad_words", self.bad_words)
        object.__setattr__(self, "bad_words", bad_words)
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        if len(bad_words) > MAX_BAD_WORDS:
            raise ValueError(f"at most {MAX_BAD_WORDS} bad_words are allowed, got {len(bad_words)}")
        size = max(map(len, bad_words), default=0)
        if size > MAX_BAD_WORD_CHARACTERS:
            raise ValueError(
                f"bad_words must have at most {MAX_BAD_WORD_CHARACTERS} characters each, got one of {size}"
            )
        if self.allowed_token_ids is not None:
            allowed = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise ValueError("allowed_token_ids is empty: no token could ever be drawn; use None to allow all")
            object.__setattr__(self, "allowed_token_ids", allowed)
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise ValueError(f"logit_bias must map token ids to numbers, got {self.logit_bias!r}")
            _token_ids("logit_bias", tuple(self.logit_bias))
            for token, bias in self.logit_bias.items():
                if not _is_number(bias) or math.isnan(bias) or bias > LARGEST:
                    raise ValueError(f"logit_bias[{token}] must be a number of at most {LARGEST:g}, got {bias!r}")
            object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    @property
    def needs_logit_row(self) -> bool:
        """Whether this request needs a row of bias and bans on the device, of which there are few."""
        return bool(self.logit_bias or self.bad_words or self.allowed_token_ids is not None)

    @property
    def needs_counts(self) -> bool:
        """Whether this request has penalties, for which its tokens are counted on the device."""
        return bool(self.repetition_penalty != 1.0 or self.frequency_penalty or self.presence_penalty)

    @property
    def needs_full_sampler(self) -> bool:
        """Whether the plain sampler (greedy, temperature, min_p) is not enough."""
        return bool(
            self.needs_logit_row
            or self.needs_counts
            or self.min_tokens
            or (self.temperature > 0 and (self.top_k > 0 or self.top_p < 1.0))
            or self.logprobs is not None
            or self.structured_outputs is not None
        )


def _integer(name: str, value: Any, least: int) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _real(name: str, value: Any, least: float, most: float, *, above: bool = False) -> None:
    """Raises ValueError for what is no finite number from `least`, or with `above` from beyond it, to `most`."""
    if not _is_number(value) or not least <= value <= most or value == math.inf or (above and value == least):
        bound = f"in {'(' if above else '['}{least:g}, {most:g}]"
        if most == math.inf:
            bound = f"{'above' if above else 'of at least'} {least:g}"
        raise ValueError(f"{name} must be a finite number {bound}, got {value!r}")
    if value and not 1 / LARGEST <= abs(value) <= LARGEST:
        raise ValueError(f"{name} must be 0 or of a magnitude in [{1 / LARGEST:g}, {LARGEST:g}], got {value!r}")


def check_unicode(name: str, text: str) -> None:
    """Raises ValueError for a text with a lone surrogate, half of a character, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"{text[error.start]!r} at character {error.start}"
        raise ValueError(f"{name} is no valid text: {half} is a lone surrogate") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _strings(name: str, values: Any) -> tuple[str, ...]:
    if values is None:
        return ()
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise ValueError(f"{name} must be a list of strings, got {values!r}")
    for value in values:
        if not isinstance(value, str) or not value:
            raise ValueError(f"{name} must hold non-empty strings, got {value!r}")
        check_unicode(f"{value!r} in {name}", value)
    return tuple(values)


def _schema_text(schema: Any) -> str:
    """A JSON schema as text, its properties in their order."""
    if isinstance(schema, Mapping):
        try:
            schema = json.dumps(dict(schema))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"json must be a schema that JSON holds: {error}") from error
    if not isinstance(schema, str):
        raise ValueError(f"json must be a JSON schema, a dictionary or its text, got {schema!r}")
    try:
        content = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"json is no JSON text: {error}, got {schema[:80]!r}") from error
    if not isinstance(content, dict | bool):
        raise ValueError(f"json must be a JSON schema, an object, got {schema[:80]!r}")
    check_unicode("json", schema)
    return schema


def _token_ids(name: str, values: Any) -> tuple[int, ...]:
    if values is None:
        return ()
    if isinstance(values, str | bytes | bytearray) or not isinstance(values, Sequence):
        raise ValueError(f"{name} must be a list of token ids, got {values!r}")
    for value in values:
        _integer(f"every id in {name}", value, 0)
    return tuple(int(value) for value in values)
