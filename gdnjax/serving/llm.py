"""`LLM`: the whole engine behind a few calls, with the names that vLLM's users know."""

import dataclasses
import logging
import numbers
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from gdnjax import backend, checkpoint, sharding
from gdnjax.assets import model_directory
from gdnjax.config import DEFAULT_MAX_MODEL_LEN, EngineConfig, ModelConfig
from gdnjax.models import Model, abstract_params, build_model
from gdnjax.sampling_params import MAX_STOP_TOKENS, SamplingParams
from gdnjax.serving.allocator import Allocator
from gdnjax.serving.chat import render_chats, template_options
from gdnjax.serving.detokenizer import Detokenizer
from gdnjax.serving.engine import Engine
from gdnjax.serving.outputs import RequestOutput
from gdnjax.serving.planning import plan_memory
from gdnjax.serving.request import Request
from gdnjax.serving.runner import Runner
from gdnjax.serving.submission import Submission, Urgency, urgencies
from gdnjax.serving.tokenizer import GenerationDefaults, Tokenizer, ends_of_sequence, load_generation_defaults
from gdnjax.shapes import Params

log = logging.getLogger("gdnjax")

JAX_CACHE_THRESHOLD = 1.0
"""JAX's own least compile time, in seconds, of what it caches: it would leave the small steps out."""

LEAST_BIAS = float(np.finfo(np.float32).min)
"""A logit_bias below this is -inf on the device."""

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, or either under the key "prompt" or "prompt_token_ids"."""


@dataclasses.dataclass(frozen=True)
class StreamOutput:
    """What one turn added to a stream. `str()` of it is its text.

    text           newly released text, possibly empty.
    token_ids      the tokens that came with this turn.
    finish_reason  None until the last piece.
    output         on the last piece, the whole RequestOutput.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    output: RequestOutput | None = None

    def __str__(self) -> str:
        return self.text


class LLM:
    """A model ready to generate.

    `model` is a Hugging Face checkpoint directory, one written by scripts/convert.py, or "tiny", the small trained
    model that is a part of the package. Keyword arguments are
    EngineConfig's fields; pass them or an EngineConfig. `tokenizer` is a Tokenizer, or names another directory to read
    one from; without tokenizer files prompts are token ids and texts are empty. `eos_token_ids` are all that
    generation_config.json, config.json and the tokenizer name: any of them ends an output.

    Raises FileNotFoundError, ValueError or MemoryError, before any weight is read, for what cannot work.
    `load_report` says what became of the checkpoint's tensors, and how fast; None where nothing was read.
    """

    load_report: checkpoint.LoadReport | None = None

    def __init__(
        self,
        model: str | pathlib.Path,
        config: EngineConfig | None = None,
        *,
        tokenizer: str | pathlib.Path | Tokenizer | None = None,
        use_tqdm: bool = True,
        **kwargs: Any,
    ):
        config = _engine_config(config, kwargs)
        directory = model_directory(model)
        _configure_compilation_cache(config)
        model_config = ModelConfig.from_hf(directory)
        mesh = sharding.make_mesh(config.tensor_parallel_size)
        implementation = backend.of_device(config.kernels, mesh.devices.flat[0])
        dtype = model_config.dtype if config.dtype == "auto" else config.dtype
        mtp = config.num_speculative_tokens > 0
        if mtp:
            model_config.require_mtp()
        hybrid = build_model(model_config, dtype, config.tensor_parallel_size, mtp=mtp, backend=implementation)
        abstract = abstract_params(model_config, config.tensor_parallel_size, dtype, mtp=mtp)
        max_model_len = config.length_within(model_config.max_position_embeddings)
        plan = plan_memory(hybrid, config, mesh, max_model_len, abstract)
        reader = tokenizer if isinstance(tokenizer, Tokenizer) else _read_tokenizer(tokenizer, directory)
        defaults = load_generation_defaults(directory)
        eos = ends_of_sequence(
            {
                f"{directory / 'generation_config.json'}: eos_token_id": defaults.eos_token_ids,
                f"{directory / 'config.json'}: eos_token_id": model_config.eos_token_ids,
                "the tokenizer's eos_token": reader.eos_token_ids if reader else (),
            },
            model_config.vocab_size,
        )
        params, self.load_report = checkpoint.load_params(directory, model_config, abstract, mesh, progress=use_tqdm)
        self._start(hybrid, params, mesh, config, plan, max_model_len, reader, defaults, eos)

    @classmethod
    def from_model(
        cls,
        model: Model,
        params: Params,
        config: EngineConfig | None = None,
        *,
        max_model_len: int = DEFAULT_MAX_MODEL_LEN,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: tuple[int, ...] = (),
        **kwargs: Any,
    ) -> "LLM":
        """An LLM of a model and parameters (global arrays) that are already in memory."""
        config = _engine_config(config, kwargs)
        if model.tp != config.tensor_parallel_size:
            raise ValueError(
                f"the model was built for {model.tp} ranks, tensor_parallel_size is {config.tensor_parallel_size}"
            )
        if config.num_speculative_tokens and not model.mtp:
            raise ValueError(
                f"num_speculative_tokens={config.num_speculative_tokens} needs a model with its MTP head: "
                "build_model(..., mtp=True)"
            )
        eos = ends_of_sequence({"eos_token_ids": eos_token_ids}, model.vocab_size)
        _configure_compilation_cache(config)
        mesh = sharding.make_mesh(config.tensor_parallel_size)
        model = model.on(backend.of_device(config.kernels, mesh.devices.flat[0]))
        length = config.length_within(max_model_len)
        plan = plan_memory(model, config, mesh, length, params)
        llm = cls.__new__(cls)
        placed = jax.device_put(params, sharding.shardings_of(params, mesh))
        llm._start(model, placed, mesh, config, plan, length, tokenizer, GenerationDefaults(), eos)
        return llm

    def _start(self, model, params, mesh, config, plan, max_model_len, tokenizer, defaults, eos_token_ids) -> None:
        log.info("memory of one rank:\n%s", plan)
        self.model, self.config, self.mesh = model, config, mesh
        self.memory_plan, self.max_model_len = plan, max_model_len
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self._defaults = defaults
        self._num_requests = 0
        runner = Runner(model, params, mesh, config, plan, max_model_len)
        allocator = Allocator(plan.num_slots, plan.num_blocks, plan.num_logit_rows, plan.num_count_rows)
        self.engine = Engine(runner, allocator, tokenizer)

    @property
    def params(self) -> Params:
        """The parameters: a nested dict of global arrays."""
        return self.engine.runner.params

    def get_tokenizer(self) -> Any:
        """The checkpoint's transformers tokenizer. Raises ValueError where there is none."""
        return self._require_tokenizer("get_tokenizer").hf

    def default_sampling_params(self, **overrides: Any) -> SamplingParams:
        """The sampling parameters of the checkpoint's generation_config.json, with `overrides` in their place."""
        return SamplingParams(**(self._defaults.sampling | overrides))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int | Sequence[int] = 0,
        timeout: float | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts (texts, or lists of token ids) and returns their outputs in order.

        One SamplingParams for all prompts or one each; None takes the checkpoint's defaults. `priority`, one for all
        or one each: lower comes first, by 64 places in the queue for each step, so that nobody waits for ever.
        `timeout`: seconds from now after which what has not ended is aborted, with stop_reason "timeout". Raises
        ValueError that names the prompt by its index, before any of them is queued.
        """
        prompts = _as_list(prompts)
        params = self._params_for(prompts, sampling_params)
        urgent = urgencies(len(prompts), priority, timeout)
        groups = self._make_groups(prompts, params, urgent)
        return self._run([request for group in groups for request in group.requests], groups, use_tqdm)

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int | Sequence[int] = 0,
        timeout: float | None = None,
        **template_kwargs: Any,
    ) -> list[RequestOutput]:
        """Answers a conversation, or each of several, through the tokenizer's chat template. Text only.

        Messages are dictionaries as OpenAI's clients send them. `priority` and `timeout` are as in `generate`; other
        keywords go to the template, and so does what is in `chat_template_kwargs`. An output's `prompt` is the text
        that the template gave. Raises ValueError as `generate` does, for a keyword that the template does not know,
        and for messages that are malformed or that the template fails at, by the index of the message, and of the
        conversation where there are several.
        """
        several = isinstance(messages, Sequence) and messages and isinstance(messages[0], list | tuple)
        tokenizer = self._require_tokenizer("chat")
        chats = messages if several else [messages]
        options = template_options(chat_template_kwargs, template_kwargs)
        texts = render_chats(tokenizer, chats, options, add_generation_prompt, several=bool(several))
        prompts: list[Prompt] = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        params = self._params_for(prompts, sampling_params)
        groups = self._make_groups(prompts, params, urgencies(len(prompts), priority, timeout))
        groups = [dataclasses.replace(group, prompt=text) for group, text in zip(groups, texts, strict=True)]
        if self.config.enable_prefix_caching:
            # The next turn renders the answer anew, so it parts from this one at the generation prompt.
            turns = render_chats(tokenizer, chats, options, False, several=bool(several))
            for chat, turn, group in zip(chats, turns, groups, strict=True):
                # Other chats part from this one at their first question.
                system_end = _common_length(tokenizer.with_another_question(chat, **options), group.token_ids)
                turn_start = 0
                if add_generation_prompt:
                    turn_start = _common_length(tokenizer.encode(turn, add_special_tokens=False), group.token_ids)
                for request in group.requests:
                    request.system_end, request.turn_start = system_end, turn_start
        return self._run([request for group in groups for request in group.requests], groups, use_tqdm)

    def submit(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> Submission:
        """Queues one prompt and returns at once; `step()` moves it on. For drivers with a loop of their own.

        Arguments and errors as in `generate`.
        """
        params = self._params_for([prompt], sampling_params)
        (group,) = self._make_groups([prompt], params, urgencies(1, priority, timeout))
        for request in group.requests:
            self.engine.add(request)
        return group

    def step(self) -> bool:
        """One turn of the engine for everything that is queued. Whether work is left."""
        self.engine.take_turn()
        return self.engine.has_work

    def abort(self, submission: Submission) -> None:
        """Ends what was submitted, wherever it is; what it has produced so far stays."""
        self.engine.abort(*submission.requests)

    def reset_prefix_cache(self) -> bool:
        """Forgets every cached prefix: what is submitted from now on computes its own. Always True."""
        self._check_open()
        self.engine.reset_prefix_cache()
        return True

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[StreamOutput]:
        """Yields a completion as its tokens come. Leaving the loop early aborts the request.

        Errors are raised by the call, not by the first turn of the loop.
        """
        params = self._params_for([prompt], sampling_params)[0]
        if params.n != 1:
            raise ValueError(f"stream yields one sample, got n={params.n}; use generate for several")
        return self._stream(self._make_requests(prompt, params, 0))

    def _stream(self, group: Submission) -> Iterator[StreamOutput]:
        (request,) = group.requests
        shown_text, shown_tokens, finished = 0, 0, False
        self.engine.add(request)
        try:
            while not finished:
                self._check_open()
                # Between two turns of this loop another call may have moved the request on, or ended it.
                if not request.finished:
                    self.engine.take_turn()
                text, tokens = request.detokenizer.text, tuple(request.output_token_ids[shown_tokens:])
                finished = request.finished
                if not tokens and not finished:
                    continue
                output = StreamOutput(
                    text=text[shown_text:],
                    token_ids=tokens,
                    finish_reason=request.finish_reason,
                    output=group.output() if finished else None,
                )
                shown_text, shown_tokens = len(text), shown_tokens + len(tokens)
                yield output
        finally:
            self.engine.abort(request)

    def stats(self) -> dict[str, Any]:
        """What the engine holds now and has done since the start.

        num_running, num_waiting, num_preemptions, num_requests, num_turns, num_prompt_tokens (computed, so without
        cached ones), num_output_tokens, num_compilations, num_device_reads, uptime in seconds; slots_used and
        blocks_used (by running requests) of slots_total and blocks_total; output_tokens_per_second over the last ten
        seconds; padding_waste, the share of all steps' places that held nothing; prefix_cache, a dictionary of its
        counters (gdnjax.serving.prefix_cache.CacheCounters), hit_rate, cached_blocks and cached_states; speculation, a
        dictionary of num_speculative_tokens, num_draft_tokens, num_accepted_draft_tokens, draft_acceptance_rate,
        acceptance_per_position, mean_acceptance_length (tokens a request and decode step, drafting or not) and
        forced_acceptance; seconds, the host's time by what it did (gdnjax.serving.metrics.Seconds);
        time_to_first_token and time_per_output_token, percentiles p50, p90 and p99 in seconds over the last 1024
        requests, empty before the first has ended.
        """
        return self.engine.stats()

    def close(self) -> None:
        """Frees pools and parameters. Whatever generates raises RuntimeError from then on, streams in progress too."""
        self.engine.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(f"{what} needs a tokenizer, and this checkpoint has none; pass tokenizer=DIRECTORY")
        return self.tokenizer

    def _check_open(self) -> None:
        if self.engine.closed:
            raise RuntimeError("this LLM is closed")

    def _params_for(self, prompts: list, params: Any) -> list[SamplingParams]:
        self._check_open()
        if params is None:
            params = self.default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * len(prompts)
        if not isinstance(params, Sequence) or not all(isinstance(item, SamplingParams) for item in params):
            raise ValueError(f"sampling_params must be a SamplingParams or a list of them, got {params!r}")
        params = list(params)
        if len(params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(params)} sampling params; give one for all or one each")
        return params

    def _make_groups(
        self, prompts: list[Prompt], params: list[SamplingParams], urgent: list[Urgency]
    ) -> list[Submission]:
        """All prompts checked, none queued. A call that fails takes no numbers, so it changes no later seed."""
        first = self._num_requests
        try:
            given = enumerate(zip(prompts, params, urgent, strict=True))
            return [self._make_requests(prompt, each, index, urgency) for index, (prompt, each, urgency) in given]
        except BaseException:
            self._num_requests = first
            raise

    def _make_requests(
        self, prompt: Prompt, params: SamplingParams, index: int, urgency: Urgency | None = None
    ) -> Submission:
        """The samples of one prompt, checked, not queued."""
        where, urgency = f"prompt {index}", urgency or Urgency()
        if isinstance(prompt, Mapping):
            prompt = _prompt_of_mapping(prompt, where)
        text = prompt if isinstance(prompt, str) else None
        token_ids = self._token_ids(prompt, where)
        max_length = min(len(token_ids) + params.max_tokens, self.max_model_len)
        if len(token_ids) >= self.max_model_len:
            raise ValueError(
                f"{where} has {len(token_ids)} tokens, and max_model_len={self.max_model_len} leaves no room for "
                f"an output token; allowed: at most {self.max_model_len - 1}"
            )
        try:
            self.engine.scheduler.check_fits(max_length, len(token_ids))
            stop_token_ids = self._check_params(params)
            bad_words = (
                self._require_tokenizer("bad_words").bad_word_sequences(params.bad_words) if params.bad_words else []
            )
            _check_something_is_allowed(params, stop_token_ids, bad_words, self.model.vocab_size)
            detokenizers = [Detokenizer(self.tokenizer, params) for _ in range(params.n)]
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        request_id = str(self._num_requests)
        self._num_requests += 1
        seed = params.seed if params.seed is not None else self._next_seed()
        requests = [
            Request(
                request_id=request_id,
                prompt_token_ids=token_ids,
                params=params,
                max_length=max_length,
                stop_token_ids=stop_token_ids,
                # Sample 0 draws what n=1 draws; the others change the upper word.
                seed=seed ^ (sample << 32),
                detokenizer=detokenizer,
                bad_words=bad_words,
                index=sample,
                arrival_time=time.monotonic(),
                priority=urgency.priority,
                deadline=urgency.deadline,
            )
            for sample, detokenizer in enumerate(detokenizers)
        ]
        forced = self.config.spec_acceptance_length is not None
        return Submission(request_id, text, token_ids, requests, forced_acceptance=forced)

    def _next_seed(self) -> int:
        """A seed of its own for each request that brings none, the same in every run of the same program."""
        words = np.random.SeedSequence([self.config.seed, self._num_requests]).generate_state(2, np.uint32)
        return int(words[0]) | int(words[1]) << 32

    def _token_ids(self, prompt: Prompt, where: str) -> list[int]:
        if isinstance(prompt, str):
            token_ids = self._require_tokenizer(f"{where}, a text,").encode(prompt)
        else:
            if not isinstance(prompt, Iterable):
                raise ValueError(f"{where} must be a text or a list of token ids, got {prompt!r}")
            token_ids = list(prompt)
            for token in token_ids:
                if not isinstance(token, numbers.Integral) or isinstance(token, bool):
                    raise ValueError(f"{where} must be a text or a list of token ids, got {token!r} in it")
            token_ids = [int(token) for token in token_ids]
        if not token_ids:
            raise ValueError(f"{where} is empty; a prompt needs at least one token")
        self._check_token_ids(where, token_ids)
        return token_ids

    def _check_token_ids(self, name: str, token_ids: Sequence[int]) -> None:
        for token in token_ids:
            if not 0 <= token < self.model.vocab_size:
                raise ValueError(
                    f"{name} has token id {token}, outside the vocabulary; allowed: 0 to {self.model.vocab_size - 1}"
                )

    def _check_params(self, params: SamplingParams) -> tuple[int, ...]:
        """Checks what depends on the model and the engine. Returns the ids that end the request."""
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, name)
            if asked is not None and asked > self.config.max_logprobs:
                raise ValueError(f"{name}={asked} exceeds max_logprobs={self.config.max_logprobs}")
        self._check_token_ids("stop_token_ids", params.stop_token_ids or ())
        self._check_token_ids("logit_bias", tuple(params.logit_bias or ()))
        self._check_token_ids("allowed_token_ids", params.allowed_token_ids or ())
        eos = () if params.ignore_eos else self.eos_token_ids
        stop_token_ids = tuple(dict.fromkeys((*eos, *(params.stop_token_ids or ()))))
        if len(stop_token_ids) > MAX_STOP_TOKENS:
            raise ValueError(
                f"EOS and stop_token_ids together are {len(stop_token_ids)} ids; allowed: {MAX_STOP_TOKENS}"
            )
        return stop_token_ids

    def _run(self, requests: list[Request], groups: list[Submission], use_tqdm: bool) -> list[RequestOutput]:
        progress = tqdm(total=len(requests), desc="generating", unit="seq", disable=not use_tqdm)
        try:
            mine = set(requests)
            for moved in self.engine.run(requests):
                progress.update(sum(request.finished and request in mine for request in moved))
        except BaseException:
            # An interrupted call must not leave its requests behind for the next one.
            self.engine.abort(*requests)
            raise
        finally:
            progress.close()
        return [group.output() for group in groups]


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


def _common_length(tokens: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two sequences have in common before they part."""
    most = min(len(tokens), len(others))
    return next((i for i in range(most) if tokens[i] != others[i]), most)


def _as_list(prompts: Any) -> list[Prompt]:
    """One prompt or several, as a list. A list of ints is one prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise ValueError(f"prompts must be texts or lists of token ids, got {prompts!r}")
    prompts = list(prompts)
    if prompts and all(isinstance(item, numbers.Integral) for item in prompts):
        return [prompts]
    return prompts


def _engine_config(config: EngineConfig | None, kwargs: dict[str, Any]) -> EngineConfig:
    if config is not None and kwargs:
        raise ValueError(f"give an EngineConfig or its fields, not both: got {', '.join(kwargs)} beside it")
    if config is not None:
        return config
    allowed = [field.name for field in dataclasses.fields(EngineConfig)]
    unknown = [name for name in kwargs if name not in allowed]
    if unknown:
        raise ValueError(f"unknown engine options: {', '.join(unknown)}; allowed: {', '.join(allowed)}")
    return EngineConfig(**kwargs)


def _read_tokenizer(named: str | pathlib.Path | None, directory: pathlib.Path) -> Tokenizer | None:
    """The tokenizer of the directory that the user named, or the checkpoint's own if it has one."""
    if named is not None:
        return Tokenizer.from_directory(named)
    try:
        return Tokenizer.from_directory(directory)
    except FileNotFoundError:
        log.warning("%s has no tokenizer: prompts must be token ids, and texts stay empty", directory)
        return None


def _configure_compilation_cache(config: EngineConfig) -> None:
    """Switches JAX's persistent cache on, in the place that the config or JAX's own settings name; "" switches it off.

    These are settings of the process, as the cache is.
    """
    # Any: jax makes the attributes of its configuration at run time, and a type checker knows none of them.
    settings: Any = jax.config
    if config.compilation_cache_dir == "":
        jax.config.update("jax_compilation_cache_dir", None)
        return
    default = settings.jax_compilation_cache_dir or pathlib.Path.home() / ".cache" / "gdnjax"
    jax.config.update("jax_compilation_cache_dir", str(config.compilation_cache_dir or default))
    if settings.jax_persistent_cache_min_compile_time_secs == JAX_CACHE_THRESHOLD:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


__all__ = ["LLM", "Prompt", "StreamOutput"]
