"""Structured output: which tokens a grammar allows next, on the host. No jax.

llguidance compiles grammars and says what they allow; it is imported at the first request that asks for any. Where a
grammar forces a text, it allows the tokens alone that the tokenizer makes of that text.
"""

import collections
import dataclasses
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gdnjax.sampling_params import MASK_BITS, SamplingParams, StructuredOutputsParams
from gdnjax.serving.parsing import THINK_CLOSE, THINK_OPEN, begins_thinking
from gdnjax.serving.schemas import check_references
from gdnjax.serving.tokenizer import Tokenizer

PROMPT_END = 8
"""Tokens at the end of a prompt among which a generation prompt has one that is special."""

BLANKS = r"[\x20\x0A\x0D\x09]{1,32}"
"""What may stand between the parts of JSON. Without a bound a model may never come to the next one."""

MAX_GRAMMARS = 256
"""Compiled grammars that are kept for requests to come."""

FULL_WORD = np.uint32(0xFFFFFFFF)


def import_llguidance() -> Any:
    """llguidance. Raises ValueError where it is not installed."""
    try:
        import llguidance
        import llguidance.hf
        import llguidance.numpy
    except ImportError as error:
        raise ValueError(
            "structured_outputs needs llguidance, which is not installed: pip install 'gdnjax[structured]'"
        ) from error
    return llguidance


@dataclasses.dataclass(frozen=True)
class _Library:
    """llguidance over one tokenizer; `executor` is its threads."""

    module: Any
    tokenizer: Any
    executor: Any

    @classmethod
    def over(cls, tokenizer: Tokenizer, vocab_size: int) -> "_Library":
        """Raises ValueError where it is not installed, or cannot read the tokenizer."""
        module = import_llguidance()
        size = max(vocab_size, tokenizer.vocab_size)
        try:
            read = module.hf.from_tokenizer(tokenizer.hf, n_vocab=size)
        except Exception as error:
            kind = type(tokenizer.hf).__name__
            raise ValueError(f"structured_outputs cannot be had with a tokenizer of kind {kind}: {error}") from error
        return cls(module, read, module.LLExecutor())

    @property
    def num_words(self) -> int:
        return -(-self.tokenizer.vocab_size // MASK_BITS)

    def compile(self, structure: StructuredOutputsParams) -> Any:
        """A matcher that has seen no token. Raises ValueError for what is no grammar."""
        return compile_structure(self.module, self.tokenizer, structure)


def compile_structure(module: Any, tokenizer: Any, structure: StructuredOutputsParams) -> Any:
    """llguidance's matcher over its tokenizer, that has seen no token. Raises ValueError for what is no grammar."""
    try:
        found = module.LLMatcher(tokenizer, _grammar_of(module, structure), log_level=0)
    except Exception as error:
        raise ValueError(_no_grammar(structure, str(error))) from error
    if found.is_error():
        raise ValueError(_no_grammar(structure, found.get_error()))
    if structure.json is not None:
        try:
            # Of a depth that llguidance has read.
            check_references(str(structure.json))
        except ValueError as error:
            raise ValueError(f"structured_outputs.json cannot be satisfied: {error}") from error
    return found


def check_grammar(structure: StructuredOutputsParams) -> None:
    """Raises ValueError for what is no grammar over any tokenizer: before one is read, or a model loaded."""
    llguidance = import_llguidance()
    try:
        why = llguidance.LLMatcher.validate_grammar(_grammar_of(llguidance, structure))
    except Exception as error:
        raise ValueError(_no_grammar(structure, str(error))) from error
    if why:
        raise ValueError(_no_grammar(structure, why))


class Grammars:
    """Compiled grammars over one tokenizer. Threads may share it.

    vocab_size  tokens that the model knows; tokens past the tokenizer's are never allowed.
    rehearse    is given each structure before it is compiled here, and raises ValueError for one that must not be.
    """

    rehearse: Callable[[StructuredOutputsParams], None] | None = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        # Matchers that have seen no token, by what they were compiled from, the last used last.
        self._compiled: collections.OrderedDict[StructuredOutputsParams, Any] = collections.OrderedDict()
        self._library: _Library | None = None

    def matcher(
        self, params: SamplingParams, prompt_token_ids: Sequence[int], stop_token_ids: Sequence[int]
    ) -> "Matcher":
        """Where a request begins. Raises ValueError for a grammar that is none, or that nothing can satisfy."""
        structure = params.structured_outputs
        assert structure is not None
        with self._lock:
            library = self._library = self._library or _Library.over(self._tokenizer, self._vocab_size)
            compiled = self._compiled.get(structure)
        if compiled is None:
            # It may take seconds, for which others do not wait.
            if self.rehearse is not None:
                self.rehearse(structure)
            compiled = library.compile(structure)
        with self._lock:
            compiled = self._compiled.setdefault(structure, compiled)
            self._compiled.move_to_end(structure)
            if len(self._compiled) > MAX_GRAMMARS:
                self._compiled.popitem(last=False)
            start = compiled.deep_copy()
        thinking = _thinking_of(self._tokenizer, prompt_token_ids)
        matcher = Matcher(library, start, self._tokenizer, self._vocab_size, tuple(stop_token_ids), thinking)
        if not (matcher.may_end or matcher.mask().any()):
            why = matcher.error or "no token may come first"
            raise ValueError(f"structured_outputs.{structure.kind} cannot be satisfied: {why}")
        return matcher


def _no_grammar(structure: StructuredOutputsParams, why: str) -> str:
    """In one line, whatever the library draws beneath it."""
    return f"structured_outputs.{structure.kind} is no grammar: {' '.join(why.split())}"


def _grammar_of(llguidance: Any, structure: StructuredOutputsParams) -> str:
    """In llguidance's form."""
    match structure.kind:
        case "json" | "json_object":
            schema = structure.json or '{"type": "object"}'
            options: dict[str, Any] = {"whitespace_pattern": BLANKS}
            if structure.disable_any_whitespace:
                options = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
            return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=options)
        case "choice":
            return llguidance.grammar_from("choice", json.dumps(structure.choice))
        case kind:
            return llguidance.grammar_from(kind, getattr(structure, kind))


@dataclasses.dataclass(frozen=True)
class _Thinking:
    """Whether a request thinks before its grammar begins.

    begun   its prompt ends within thinking.
    opened_by, closed_by   the tokens that are the tags; None where the tokenizer has none. A model may begin to think
            with the first of them, if `opened_by` is given.
    """

    begun: bool = False
    opened_by: int | None = None
    closed_by: int | None = None


def _thinking_of(tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> _Thinking:
    begun = begins_thinking(tokenizer, prompt_token_ids)
    opening, closing = tokenizer.token_of(THINK_OPEN), tokenizer.token_of(THINK_CLOSE)
    if opening is None or closing is None:
        return _Thinking(begun=begun)
    if begun:
        return _Thinking(begun=True, closed_by=closing)
    end = prompt_token_ids[-PROMPT_END:]
    # A prompt that closes thinking at its end wants none; one that is no chat's is a text to go on with; and a model
    # whose chats know no thinking has no use for the tag, but would draw it now and then, and never close it.
    may_open = closing not in end and not tokenizer.special_token_ids.isdisjoint(end)
    template = tokenizer.hf.chat_template
    may_open = may_open and (not template or THINK_OPEN in str(template))
    return _Thinking(opened_by=opening if may_open else None, closed_by=closing)


class Matcher:
    """Where one request stands in its grammar: a function of its output tokens, which can be made again from them.

    What ends the request (`stop_token_ids`) is allowed where the grammar may end, and where its text may follow.
    """

    def __init__(
        self,
        library: _Library,
        start: Any,
        tokenizer: Tokenizer,
        vocab_size: int,
        stop_token_ids: tuple[int, ...],
        thinking: _Thinking,
    ):
        self._library, self._start, self._tokenizer, self._vocab_size = library, start, tokenizer, vocab_size
        self._stop_token_ids, self._thinking = stop_token_ids, thinking
        self._rewind()

    def fresh(self) -> "Matcher":
        """Another of the same grammar and prompt, that has seen no token."""
        start, rest = self._start.deep_copy(), (self._tokenizer, self._vocab_size, self._stop_token_ids, self._thinking)
        return Matcher(self._library, start, *rest)

    def _rewind(self) -> None:
        self._matcher = self._start.deep_copy()
        self._is_thinking, self._is_first = self._thinking.begun, True
        self._recent: collections.deque[int] = collections.deque(maxlen=len(THINK_CLOSE))
        # Tokens that were followed; None while that is going on, so that nobody goes on where it was cut off.
        self._num_followed: int | None = 0

    def follow(self, output_token_ids: Sequence[int]) -> None:
        """Takes in what the output has come to, which may be less than before. Leave out a token that ends it."""
        if self._num_followed is None or self._num_followed > len(output_token_ids):
            self._rewind()
        start, self._num_followed = self._num_followed or 0, None
        for token in output_token_ids[start:]:
            self._take(token)
        self._num_followed = len(output_token_ids)

    def _take(self, token: int) -> None:
        is_first, self._is_first = self._is_first, False
        if self._is_thinking:
            self._is_thinking = not self._ends_thinking(token)
        elif is_first and token == self._thinking.opened_by:
            self._is_thinking = True
        else:
            self._matcher.consume_token(token)

    def _ends_thinking(self, token: int) -> bool:
        if self._thinking.closed_by is not None:
            return token == self._thinking.closed_by
        # No tag has more tokens than letters.
        self._recent.append(token)
        return THINK_CLOSE in self._tokenizer.decode(list(self._recent), skip_special_tokens=False)

    @property
    def error(self) -> str | None:
        """Why the grammar cannot go on: a limit that it has come to. Nothing is allowed from then on."""
        if not self._matcher.is_error():
            return None
        return f"the grammar cannot go on ({self._matcher.get_error().split(chr(10), 1)[0]})"

    @property
    def may_end(self) -> bool:
        """Whether what there is satisfies the grammar."""
        return not self._is_thinking and not self._matcher.is_error() and self._matcher.is_accepting()

    @property
    def is_complete(self) -> bool:
        """Whether it does, and nothing more can follow."""
        return self.may_end and self._matcher.is_stopped()

    def mask(self) -> np.ndarray:
        """The tokens that may be next: [words] uint32."""
        return masks_of([self])[0]

    def _allow(self, words: np.ndarray) -> None:
        """Makes of what the grammar allows as text what the request may draw."""
        ends = (*self._library.tokenizer.eos_tokens, *self._stop_token_ids)
        if self._is_thinking:
            # An output that ended here would be none that was asked for.
            words[:] = FULL_WORD
            _clear(words, ends)
            return
        if self._matcher.is_error():
            words[:] = 0
            return
        _clear(words, self._library.tokenizer.eos_tokens)
        if self._matcher.is_accepting():
            _set(words, self._stop_token_ids)
        if self._is_first and self._thinking.opened_by is not None:
            _set(words, (self._thinking.opened_by,))


def masks_of(matchers: Sequence[Matcher]) -> np.ndarray:
    """The tokens that each may draw next, of one tokenizer and model: [n, words] uint32, made on the host's cores side
    by side.

    Where a grammar has come to one of its limits nothing is allowed, and `error` says why.
    """
    if not matchers:
        return np.zeros((0, 0), np.uint32)
    library, vocab_size = matchers[0]._library, matchers[0]._vocab_size
    found = np.zeros((len(matchers), library.num_words), np.int32)
    asked = [(each._matcher, row) for row, each in enumerate(matchers) if not each._is_thinking]
    if asked:
        library.module.numpy.fill_next_token_bitmask_par(library.executor, asked, found)
    words = np.ascontiguousarray(found[:, : -(-vocab_size // MASK_BITS)]).view(np.uint32)
    for each, row in zip(matchers, words, strict=True):
        each._allow(row)
    words[:, -1] &= np.uint32((1 << ((vocab_size - 1) % MASK_BITS + 1)) - 1)
    return words


def _set(words: np.ndarray, tokens: Sequence[int]) -> None:
    for token in tokens:
        words[token // MASK_BITS] |= np.uint32(1 << token % MASK_BITS)


def _clear(words: np.ndarray, tokens: Sequence[int]) -> None:
    for token in tokens:
        words[token // MASK_BITS] &= ~np.uint32(1 << token % MASK_BITS)
