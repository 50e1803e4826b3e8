"""What a caller asks for, checked and turned into requests. No jax.

Pure towards the engine, of which it knows a few numbers that do not change, and safe to call from many threads: a
server prepares requests beside the thread that runs the engine.
"""

import dataclasses
import numbers
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gdnjax.config import EngineConfig
from gdnjax.sampling_params import MAX_STOP_TOKENS, SamplingParams, check_unicode
from gdnjax.serving.chat import render_chats
from gdnjax.serving.detokenizer import Detokenizer
from gdnjax.serving.plan import check_fits
from gdnjax.serving.rehearsal import Rehearsals
from gdnjax.serving.request import Request
from gdnjax.serving.structured import Grammars, Matcher
from gdnjax.serving.submission import Submission, Urgency
from gdnjax.serving.tokenizer import GenerationDefaults, Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, or either under the key "prompt" or "prompt_token_ids"."""


LEAST_BIAS = float(np.finfo(np.float32).min)
"""A logit_bias below this is -inf on the device."""

CHARACTERS = 16
"""Of a token, more than there are on average: a text of no more for each token of the context is tokenised at once."""

NO_LISTS = (bytes, bytearray, set, frozenset, Mapping)
"""What holds integers, or may, and is no list of token ids."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Checked:
    """A prompt that can be served as it is asked for. It has no number yet, and so no noise of its own."""

    text: str | None
    token_ids: list[int]
    params: SamplingParams
    max_length: int
    stop_token_ids: tuple[int, ...]
    bad_words: list[list[int]]
    detokenizers: list[Detokenizer]
    matchers: list[Matcher | None]
    urgency: Urgency


class Frontend:
    """Prepares the requests of one engine. Nothing is queued here.

    max_model_len  tokens that a prompt and its output have room for.
    vocab_size     token ids that the model knows.
    num_blocks     blocks of the engine's KV pool.
    eos_token_ids  end a sequence, unless its request ignores them.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        max_model_len: int,
        vocab_size: int,
        num_blocks: int,
        tokenizer: Tokenizer | None = None,
        defaults: GenerationDefaults | None = None,
        eos_token_ids: tuple[int, ...] = (),
    ):
        self.config: EngineConfig = config
        self.max_model_len: int = max_model_len
        self.vocab_size: int = vocab_size
        self.num_blocks: int = num_blocks
        self.tokenizer: Tokenizer | None = tokenizer
        self.eos_token_ids: tuple[int, ...] = eos_token_ids
        self._defaults = defaults or GenerationDefaults()
        self._grammars = Grammars(tokenizer, vocab_size) if tokenizer is not None else None
        self._lock = threading.Lock()
        self._num_requests = 0

    @property
    def num_requests(self) -> int:
        """Prompts that were prepared so far: the number of the next one, which its seed is made of."""
        return self._num_requests

    def go_on_from(self, num_requests: int) -> None:
        """The next prompt has at least this number: those before it were prepared by another process."""
        with self._lock:
            self._num_requests = max(self._num_requests, num_requests)

    def rehearse_grammars(self, seconds: float) -> None:
        """From now on structures are compiled in another process first, which may take `seconds` of the processor for
        one: whoever asks for them is not trusted to be modest.
        """
        if self._grammars is not None:
            assert self.tokenizer is not None
            self._grammars.rehearse = Rehearsals(self.tokenizer, self.vocab_size, seconds)

    def require_tokenizer(self, what: str) -> Tokenizer:
        """The tokenizer. Raises ValueError where there is none, for `what` needs one."""
        if self.tokenizer is None:
            raise ValueError(f"{what} needs a tokenizer, and this checkpoint has none; pass tokenizer=DIRECTORY")
        return self.tokenizer

    def default_sampling_params(self, **overrides: Any) -> SamplingParams:
        """The sampling parameters of the checkpoint's generation_config.json, with `overrides` in their place."""
        given: dict[str, Any] = self._defaults.sampling | overrides
        return SamplingParams(**given)

    @property
    def default_max_tokens(self) -> int | None:
        """The checkpoint's own limit of an output (max_new_tokens); None where it names none."""
        found = self._defaults.sampling.get("max_tokens")
        return None if found is None else int(found)

    def params_for(
        self, count: int, params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[SamplingParams]:
        """One for each of `count` prompts: given ones, one for all, or for None the checkpoint's defaults."""
        if params is None:
            params = self.default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * count
        if not isinstance(params, Sequence) or not all(isinstance(item, SamplingParams) for item in params):
            raise ValueError(f"sampling_params must be a SamplingParams or a list of them, got {params!r}")
        params = list(params)
        if len(params) != count:
            raise ValueError(f"{count} prompts but {len(params)} sampling params; give one for all or one each")
        return params

    def prepare(
        self,
        prompts: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        urgencies: Sequence[Urgency] | None = None,
    ) -> list[Submission]:
        """The requests of each prompt. Raises ValueError that names a prompt, or what should be one, by its index.

        All are checked before any of them gets a number: a call that fails changes no later seed.
        """
        params = self.params_for(len(prompts), sampling_params)
        urgencies = [Urgency()] * len(prompts) if urgencies is None else urgencies
        given = enumerate(zip(prompts, params, urgencies, strict=True))
        checked = [self._check(prompt, each, f"prompt {index}", urgency) for index, (prompt, each, urgency) in given]
        with self._lock:
            first = self._num_requests
            self._num_requests += len(checked)
        return [self._make_requests(each, first + index) for index, each in enumerate(checked)]

    def prepare_chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        urgencies: Callable[[int], Sequence[Urgency]] | None = None,
        *,
        options: dict[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[Submission]:
        """The requests of a conversation, or of each of several, through the chat template, to which `options` go.

        `urgencies` is told how many conversations there are. The states that other chats and the next turn of this one
        go on from are asked for. Raises ValueError as `prepare` does, and for what `Tokenizer.render_chat` refuses,
        with the index of the conversation where there are several.
        """
        several = isinstance(messages, Sequence) and bool(messages) and isinstance(messages[0], list | tuple)
        tokenizer, options = self.require_tokenizer("chat"), options or {}
        if options.get("continue_final_message") and add_generation_prompt:
            raise ValueError(
                "continue_final_message goes on with the last message, and add_generation_prompt begins another; give "
                "add_generation_prompt=False, too"
            )
        chats = messages if several else [messages]
        texts = render_chats(tokenizer, chats, options, add_generation_prompt, several=several)
        prompts = [self.encode(text, f"prompt {index}", add_special_tokens=False) for index, text in enumerate(texts)]
        groups = self.prepare(prompts, sampling_params, None if urgencies is None else urgencies(len(prompts)))
        groups = [dataclasses.replace(group, prompt=text) for group, text in zip(groups, texts, strict=True)]
        if self.config.enable_prefix_caching:
            starts = [0] * len(groups)
            if add_generation_prompt:
                # The next turn renders the answer anew, so it parts from this one at the generation prompt.
                turns = render_chats(tokenizer, chats, options, False, several=several)
                encoded = [tokenizer.encode(turn, add_special_tokens=False) for turn in turns]
                starts = [_common_length(turn, group.token_ids) for turn, group in zip(encoded, groups, strict=True)]
            for chat, turn_start, group in zip(chats, starts, groups, strict=True):
                # Other chats part from this one at their first question.
                system_end = _common_length(tokenizer.with_another_question(chat, **options), group.token_ids)
                for request in group.requests:
                    request.system_end, request.turn_start = system_end, turn_start
        return groups

    def encode(self, text: str, where: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text. Raises ValueError that begins with `where` for a text that is none, and for one that is
        too long by far, of which only the beginning is looked at: there may be megabytes of it.
        """
        check_unicode(where, text)
        tokenizer = self.require_tokenizer(f"{where}, a text,")
        length = CHARACTERS * self.max_model_len
        while length < len(text):
            count = len(tokenizer.encode(text[:length], add_special_tokens=False))
            # Where it is cut it may be other tokens than in one piece, but not twice as many.
            if count > 2 * self.max_model_len:
                raise ValueError(
                    f"{where} has {len(text)} characters, of which the first {length} are {count} tokens, and "
                    f"max_model_len={self.max_model_len}; allowed: at most {self.max_model_len - 1} tokens"
                )
            length *= 2
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def token_ids(self, prompt: Any, where: str) -> list[int]:
        """The tokens of a text or of token ids, at least one. Raises ValueError that begins with `where`."""
        if isinstance(prompt, str):
            token_ids = self.encode(prompt, where)
        else:
            token_ids = _integers(prompt, where)
        if not token_ids:
            raise ValueError(f"{where} is empty; a prompt needs at least one token")
        self.check_token_ids(where, token_ids)
        return token_ids

    def _check(self, prompt: Any, params: SamplingParams, where: str, urgency: Urgency) -> _Checked:
        if isinstance(prompt, Mapping):
            prompt = _prompt_of_mapping(prompt, where)
        token_ids = self.token_ids(prompt, where)
        max_length = self.max_model_len
        if params.max_tokens is not None:
            max_length = min(len(token_ids) + params.max_tokens, max_length)
        if len(token_ids) >= self.max_model_len:
            raise ValueError(
                f"{where} has {len(token_ids)} tokens, and max_model_len={self.max_model_len} leaves no room for "
                f"an output token; allowed: at most {self.max_model_len - 1}"
            )
        try:
            check_fits(max_length, len(token_ids), num_blocks=self.num_blocks, block_size=self.config.block_size)
            stop_token_ids = self._check_params(params)
            bad_words: list[list[int]] = []
            if params.bad_words:
                bad_words = self.require_tokenizer("bad_words").bad_word_sequences(params.bad_words)
            _check_something_is_allowed(params, stop_token_ids, bad_words, self.vocab_size)
            return _Checked(
                text=prompt if isinstance(prompt, str) else None,
                token_ids=token_ids,
                params=params,
                max_length=max_length,
                stop_token_ids=stop_token_ids,
                bad_words=bad_words,
                detokenizers=[Detokenizer(self.tokenizer, params) for _ in range(params.n)],
                matchers=self._matchers(params, token_ids, stop_token_ids),
                urgency=urgency,
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def _matchers(
        self, params: SamplingParams, token_ids: list[int], stop_token_ids: tuple[int, ...]
    ) -> list[Matcher | None]:
        """Of each sample. Raises ValueError for a structure that is none, and where there can be none."""
        matcher = self.matcher_for(params, token_ids, stop_token_ids)
        return [None if matcher is None else matcher.fresh() for _ in range(params.n)]

    def matcher_for(
        self, params: SamplingParams, token_ids: Sequence[int], stop_token_ids: Sequence[int]
    ) -> Matcher | None:
        """Where a request with a structure begins; None for one without. Raises ValueError where it cannot be had."""
        if params.structured_outputs is None:
            return None
        self.require_tokenizer("structured_outputs")
        assert self._grammars is not None
        return self._grammars.matcher(params, token_ids, stop_token_ids)

    def _make_requests(self, checked: _Checked, number: int) -> Submission:
        params, urgency = checked.params, checked.urgency
        seed = params.seed if params.seed is not None else self._seed_of(number)
        requests = [
            Request(
                request_id=str(number),
                prompt_token_ids=checked.token_ids,
                params=params,
                max_length=checked.max_length,
                stop_token_ids=checked.stop_token_ids,
                # Sample 0 draws what n=1 draws; the others change the upper word.
                seed=seed ^ (sample << 32),
                detokenizer=detokenizer,
                bad_words=checked.bad_words,
                index=sample,
                matcher=matcher,
                arrival_time=time.monotonic(),
                priority=urgency.priority,
                deadline=urgency.deadline,
            )
            for sample, (detokenizer, matcher) in enumerate(zip(checked.detokenizers, checked.matchers, strict=True))
        ]
        forced = self.config.spec_acceptance_length is not None
        return Submission(str(number), checked.text, checked.token_ids, requests, forced_acceptance=forced)

    def _seed_of(self, number: int) -> int:
        """A seed of its own for each request that brings none, the same in every run of the same program."""
        words = np.random.SeedSequence([self.config.seed, number + 1]).generate_state(2, np.uint32)
        return int(words[0]) | int(words[1]) << 32

    def check_token_ids(self, name: str, token_ids: Sequence[int]) -> None:
        """Raises ValueError that begins with `name` for an id outside the vocabulary."""
        if not token_ids or (min(token_ids) >= 0 and max(token_ids) < self.vocab_size):
            return
        token = next(token for token in token_ids if not 0 <= token < self.vocab_size)
        raise ValueError(f"{name} has token id {token}, outside the vocabulary; allowed: 0 to {self.vocab_size - 1}")

    def _check_params(self, params: SamplingParams) -> tuple[int, ...]:
        """Checks what depends on the model and the engine. Returns the ids that end the request."""
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, name)
            if asked is not None and asked > self.config.max_logprobs:
                raise ValueError(f"{name}={asked} exceeds max_logprobs={self.config.max_logprobs}")
        self.check_token_ids("stop_token_ids", params.stop_token_ids or ())
        self.check_token_ids("logit_bias", tuple(params.logit_bias or ()))
        self.check_token_ids("allowed_token_ids", params.allowed_token_ids or ())
        eos = () if params.ignore_eos else self.eos_token_ids
        stop_token_ids = tuple(dict.fromkeys((*eos, *(params.stop_token_ids or ()))))
        if len(stop_token_ids) > MAX_STOP_TOKENS:
            raise ValueError(
                f"EOS and stop_token_ids together are {len(stop_token_ids)} ids; allowed: {MAX_STOP_TOKENS}"
            )
        return stop_token_ids


def _common_length(tokens: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two sequences have in common before they part."""
    most = min(len(tokens), len(others))
    return next((i for i in range(most) if tokens[i] != others[i]), most)


def _check_something_is_allowed(
    params: SamplingParams, stop_token_ids: tuple[int, ...], bad_words: list[list[int]], vocab_size: int
) -> None:
    """Raises ValueError where masks leave no token to draw from the start. Bad words of several tokens may leave none
    later: such a request ends with finish_reason "error".
    """
    banned = {token for token, bias in (params.logit_bias or {}).items() if bias < LEAST_BIAS}
    banned.update(sequence[0] for sequence in bad_words if len(sequence) == 1)
    if params.min_tokens:
        banned.update(stop_token_ids)
    if params.allowed_token_ids is not None and banned.issuperset(params.allowed_token_ids):
        raise ValueError(
            f"allowed_token_ids={list(params.allowed_token_ids)} leaves no token to draw: all of them are forbidden by "
            "logit_bias or bad_words, or end the output before min_tokens"
        )
    if len(banned) >= vocab_size:
        raise ValueError(f"logit_bias and bad_words forbid all {vocab_size} tokens of the vocabulary")


def _integers(prompt: Any, where: str) -> list[int]:
    """Token ids as ints. Raises ValueError for what is no list of integers."""
    if isinstance(prompt, np.ndarray) and prompt.ndim == 1 and np.issubdtype(prompt.dtype, np.integer):
        return prompt.tolist()
    if not isinstance(prompt, Iterable) or isinstance(prompt, NO_LISTS):
        raise ValueError(f"{where} must be a text or a list of token ids, got {prompt!r}")
    token_ids = list(prompt)
    # One look at each item, in C: a prompt may have 100,000 of them.
    if {int}.issuperset(map(type, token_ids)):
        return token_ids
    for token in token_ids:
        if not isinstance(token, numbers.Integral) or isinstance(token, bool):
            raise ValueError(f"{where} must be a text or a list of token ids, got {token!r} in it")
    return [int(token) for token in token_ids]


def _prompt_of_mapping(prompt: Mapping[str, Any], where: str) -> Prompt:
    """The prompt of {"prompt": text} or {"prompt_token_ids": ids}, as vLLM's users write them."""
    allowed = ("prompt", "prompt_token_ids")
    unknown = [key for key in prompt if key not in allowed]
    if unknown:
        raise ValueError(
            f"{where} has {', '.join(map(repr, unknown))}; text only: allowed is 'prompt' or 'prompt_token_ids'"
        )
    if len(prompt) != 1:
        raise ValueError(f"{where} must have exactly one of 'prompt' and 'prompt_token_ids', got {len(prompt)}")
    return next(iter(prompt.values()))


def as_list(prompts: Any) -> list[Prompt]:
    """One prompt or several, as a list. A list of ints is one prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, NO_LISTS):
        raise ValueError(f"prompts must be texts or lists of token ids, got {prompts!r}")
    prompts = list(prompts)
    if prompts and isinstance(prompts[0], numbers.Integral):
        return [prompts]
    return prompts
