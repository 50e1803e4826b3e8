"""`LLM`: the whole engine behind a few calls, with the names that vLLM's users know."""

import dataclasses
import functools
import logging
import pathlib
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from gdnjax import checkpoint
from gdnjax.config import DEFAULT_MAX_MODEL_LEN, EngineConfig
from gdnjax.memory import MemoryPlan
from gdnjax.models import Model
from gdnjax.models.draft_head import with_draft_head, without_draft_head
from gdnjax.progress import Progress
from gdnjax.sampling_params import SamplingParams
from gdnjax.serving import records, saved_state
from gdnjax.serving.allocator import Allocator
from gdnjax.serving.chat import template_options
from gdnjax.serving.engine import Engine
from gdnjax.serving.frontend import Frontend, Prompt, as_list
from gdnjax.serving.opening import Opened, check_model, open_checkpoint, open_model
from gdnjax.serving.outputs import RequestOutput, StreamOutput
from gdnjax.serving.processes import alone, lead, telling
from gdnjax.serving.request import Request
from gdnjax.serving.submission import Submission, urgencies
from gdnjax.serving.tokenizer import GenerationDefaults, Tokenizer, ends_of_sequence, load_generation_defaults
from gdnjax.shapes import Params
from gdnjax.sharding import placed_like

log = logging.getLogger("gdnjax")


class LLM:
    """A model ready to generate.

    `model` is a Hugging Face checkpoint directory, one written by `gdnjax convert`, or "tiny", the small trained model
    that is a part of the package. Keyword arguments are EngineConfig's fields; pass them or an EngineConfig.
    `tokenizer` is a Tokenizer, or names another directory to read one from; without tokenizer files prompts are token
    ids and texts are empty. `eos_token_ids` are all that generation_config.json, config.json and the tokenizer name:
    any of them ends an output.

    Of several processes (`gdnjax.distributed`) process 0 makes an LLM, and the others call `gdnjax.follow`.

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
        followers = lead(config)
        with telling(followers), open_checkpoint(model, config, followers) as opened:
            directory = opened.directory
            reader = tokenizer if isinstance(tokenizer, Tokenizer) else _read_tokenizer(tokenizer, directory)
            defaults = load_generation_defaults(directory)
            eos = ends_of_sequence(
                {
                    f"{directory / 'generation_config.json'}: eos_token_id": defaults.eos_token_ids,
                    f"{directory / 'config.json'}: eos_token_id": opened.model_config.eos_token_ids,
                    "the tokenizer's eos_token": reader.eos_token_ids if reader else (),
                },
                opened.model_config.vocab_size,
            )
            params, self.load_report = opened.load(progress=use_tqdm)
            self._start(opened, params, reader, defaults, eos)

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
        check_model(model, config)
        eos = ends_of_sequence({"eos_token_ids": eos_token_ids}, model.vocab_size)
        followers = lead(config, max_model_len)
        with telling(followers):
            opened, placed = open_model(model, params, config, max_model_len, followers)
            llm = cls.__new__(cls)
            llm._start(opened, placed, tokenizer, GenerationDefaults(), eos)
        return llm

    def _start(self, opened: Opened, params, tokenizer, defaults, eos_token_ids) -> None:
        plan = opened.plan
        log.info("memory of one rank:\n%s", plan)
        # A HybridModel, unless from_model was given another one.
        self.model: Any = opened.model
        self.config: EngineConfig = opened.config
        self.mesh: Mesh = opened.mesh
        self.memory_plan: MemoryPlan = plan
        self.max_model_len: int = opened.max_model_len
        self.frontend: Frontend = Frontend(
            opened.config,
            max_model_len=opened.max_model_len,
            vocab_size=opened.model.vocab_size,
            num_blocks=plan.num_blocks,
            tokenizer=tokenizer,
            defaults=defaults,
            eos_token_ids=tuple(eos_token_ids),
        )
        allocator = Allocator(plan.num_slots, plan.num_blocks, plan.num_logit_rows, plan.num_count_rows)
        self.engine: Engine = Engine(opened.runner(params), allocator, tokenizer)
        # What was asked for and is still to be had by somebody: a saved state has their samples that have ended, too.
        self._submissions: weakref.WeakSet[Submission] = weakref.WeakSet()
        self._submissions_lock = threading.Lock()

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.frontend.tokenizer

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a sequence, unless a request ignores them."""
        return self.frontend.eos_token_ids

    @property
    def params(self) -> Params:
        """The parameters: a nested dict of global arrays. A head that drafts have of their own is none of them."""
        return without_draft_head(self.engine.runner.params)

    def get_tokenizer(self) -> Any:
        """The checkpoint's transformers tokenizer. Raises ValueError where there is none."""
        return self.frontend.require_tokenizer("get_tokenizer").hf

    def default_sampling_params(self, **overrides: Any) -> SamplingParams:
        """The sampling parameters of the checkpoint's generation_config.json, with `overrides` in their place."""
        return self.frontend.default_sampling_params(**overrides)

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
        self._check_open()
        prompts = as_list(prompts)
        groups = self.frontend.prepare(prompts, sampling_params, urgencies(len(prompts), priority, timeout))
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
        self._check_open()
        groups = self.frontend.prepare_chat(
            messages,
            sampling_params,
            lambda count: urgencies(count, priority, timeout),
            options=template_options(chat_template_kwargs, template_kwargs),
            add_generation_prompt=add_generation_prompt,
        )
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
        self._check_open()
        (group,) = self.frontend.prepare([prompt], sampling_params, urgencies(1, priority, timeout))
        self.remember([group])
        for request in group.requests:
            self.engine.add(request)
        return group

    def step(self) -> bool:
        """One turn of the engine for everything that is queued. Whether work is left."""
        self.engine.take_turn()
        return self.engine.has_work

    def abort(self, submission: Submission) -> None:
        """Ends what was submitted, wherever it is; what it has produced so far stays."""
        if not isinstance(submission, Submission):
            raise TypeError(f"abort takes what submit has returned, got {submission!r}")
        self.engine.abort(*submission.requests)

    def reset_prefix_cache(self) -> bool:
        """Forgets every cached prefix: what is submitted from now on computes its own. Always True."""
        self._check_open()
        self.engine.reset_prefix_cache()
        return True

    def update_weights(self, params: Params) -> None:
        """Goes on with other parameters: a tree like `llm.params`, of the same names, shapes and dtypes, on devices or
        in numpy.

        Waits for the turn that is under way. What was cached is forgotten. Whoever has not ended keeps his tokens; what
        comes behind them is the new parameters' of all that stands before. Arrays that lie where the old ones do are
        used as they are: do not donate them. The old ones are held until the new ones are placed. Raises ValueError
        that names what does not fit, before anything changes, and RuntimeError in one of several processes.
        """
        self._check_open()
        self._check_alone("update_weights")
        placed = placed_like(params, self.params)
        self.engine.update_params(with_draft_head(placed) if self.config.drafts_apart else placed)

    def save_state(self, path: str | pathlib.Path) -> None:
        """Writes the pools, the prefix cache and every request that has not ended to a directory that it makes, and
        goes on. What is on the host (`host_cache_gib`) is left out.

        Waits for the turn that is under way. Raises FileExistsError where `path` is there already, and RuntimeError in
        one of several processes.
        """
        self._check_open()
        self._check_alone("save_state")

        def write(record, state):
            content = {
                "identity": self._identity(),
                "num_requests": self.frontend.num_requests,
                "scheduler": record,
                "submissions": self._records_of_submissions(),
            }
            saved_state.write(path, content, state)

        self.engine.save(write)

    def _records_of_submissions(self) -> list[dict[str, Any]]:
        """Of those that have requests in the engine. Whom nobody holds any more goes on all the same."""
        unfinished = {request: number for number, request in enumerate(self.engine.scheduler.unfinished)}
        members: dict[str, list[Request]] = {}
        for request in unfinished:
            members.setdefault(request.request_id, []).append(request)
        with self._submissions_lock:
            # Of another process's prompts some may have the numbers of prompts that have ended here.
            held = {g.request_id: g for g in self._submissions if not unfinished.keys().isdisjoint(g.requests)}
        found = []
        for name, requests in members.items():
            group = held.get(name) or Submission(name, None, requests[0].prompt_token_ids, requests)
            # One that another thread is about to queue is not here yet.
            requests = [request for request in group.requests if request.finished or request in unfinished]
            group = dataclasses.replace(group, requests=requests)
            found.append(records.of_submission(group, unfinished, time.monotonic()))
        return found

    def remember(self, groups: Iterable[Submission]) -> None:
        """Notes what was asked for and is about to be queued: a saved state has it as long as somebody holds it."""
        with self._submissions_lock:
            self._submissions.update(groups)

    def restore(self, path: str | pathlib.Path) -> list[Submission]:
        """Goes on from what `save_state` has written, with its prefix cache and with its requests, to the token.

        The requests are returned in the order in which they came, those of `generate` and of streams among them.
        `step()` moves them on, and so does every other call. This LLM must have no requests (RuntimeError), and be of
        the same model, settings and sizes of pools: what differs is named in a ValueError, before anything changes.
        What it had cached itself is forgotten. Raises FileNotFoundError where nothing was saved, and RuntimeError in
        one of several processes.
        """
        self._check_open()
        self._check_alone("restore")
        content = saved_state.read(path, self._identity())
        matchers = records.matchers_of(content["scheduler"]["requests"], self.frontend.matcher_for)
        requests = self.engine.restore(content["scheduler"], saved_state.loader(path), matchers)
        self.frontend.go_on_from(content["num_requests"])
        now = time.monotonic()
        groups = [records.submission_of(record, requests, self.tokenizer, now) for record in content["submissions"]]
        self.remember(groups)
        return sorted(groups, key=lambda group: int(group.request_id))

    def _check_alone(self, what: str) -> None:
        if not alone():
            raise RuntimeError(f"{what} is for engines of one process; the devices of this one are of several")

    def _identity(self) -> dict[str, dict[str, Any]]:
        return saved_state.identity(
            self.model, self.params, self.config, self.memory_plan, self.max_model_len, self.tokenizer is not None
        )

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[StreamOutput]:
        """Yields a completion as its tokens come. Leaving the loop early aborts the request.

        Errors are raised by the call, not by the first turn of the loop.
        """
        self._check_open()
        (params,) = self.frontend.params_for(1, sampling_params)
        if params.n != 1:
            raise ValueError(f"stream yields one sample, got n={params.n}; use generate for several")
        (group,) = self.frontend.prepare([prompt], params)
        return self._stream(group)

    def _stream(self, group: Submission) -> Iterator[StreamOutput]:
        (request,) = group.requests
        self.remember([group])
        shown_text, shown_tokens, finished = 0, 0, False
        self.engine.add(request)
        try:
            while not finished:
                self._check_open()
                output = self.engine.between_turns(functools.partial(self._next_piece, group, shown_text, shown_tokens))
                finished = output.output is not None
                if not output.token_ids and not finished:
                    continue
                shown_text, shown_tokens = shown_text + len(output.text), shown_tokens + len(output.token_ids)
                yield output
        finally:
            self.engine.abort(request)

    def _next_piece(self, group: Submission, shown_text: int, shown_tokens: int) -> StreamOutput:
        """What the next turn brings beside the characters and tokens that were shown, which may be nothing."""
        (request,) = group.requests
        # Since the last one the turn of another call may have moved the request on, or ended it.
        if not request.finished:
            self.engine.step()
        return StreamOutput(
            text=request.detokenizer.text_since(shown_text),
            token_ids=tuple(request.output_token_ids[shown_tokens:]),
            finish_reason=request.finish_reason if request.finished else None,
            output=group.output() if request.finished else None,
            logprobs=request.logprobs_since(shown_tokens),
            stop_reason=request.stop_reason if request.finished else None,
        )

    def stats(self) -> dict[str, Any]:
        """What the engine holds now and has done since the start.

        num_running, num_waiting, num_preemptions, num_requests, num_ended (by finish_reason, or "timeout"), num_turns,
        num_prompt_tokens (computed, so without cached ones), num_output_tokens, num_compilations, num_device_reads,
        num_start_overs (of everybody who ran, since a turn was cut off), uptime in seconds;
        slots_used and blocks_used (by running requests) of slots_total and blocks_total;
        output_tokens_per_second over the last ten seconds; padding_waste, the share of all steps' places that held
        nothing; prefix_cache, a dictionary of its counters (gdnjax.serving.prefix_cache.CacheCounters), hit_rate,
        cached_blocks, evictable_blocks (those of them that no running request shares) and cached_states; host_cache,
        None without one, else a dictionary of its counters (gdnjax.serving.host_tier.HostCounters), num_blocks,
        num_states, bytes_used and bytes_total, bytes being those of one rank; speculation, a dictionary of
        num_speculative_tokens, num_draft_tokens, num_accepted_draft_tokens,
        draft_acceptance_rate, acceptance_per_position, mean_acceptance_length (tokens a request and decode step,
        drafting or not) and forced_acceptance; seconds, the host's time by what it did
        (gdnjax.serving.metrics.Seconds);
        time_to_first_token and time_per_output_token, percentiles p50, p90 and p99 in seconds over the last 1024
        requests, empty before the first has ended.
        """
        return self.engine.stats()

    def close(self) -> None:
        """Frees pools and parameters. Whatever generates raises RuntimeError from then on, streams in progress too."""
        self.engine.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raises TypeError: neither a device's memory nor what runs in it can be copied or pickled."""
        raise TypeError(
            "an LLM cannot be copied or pickled; make another from the same directory, or LLM.from_model(llm.model, "
            "llm.params, ...), which shares the parameters"
        )

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self.engine.closed:
            raise RuntimeError("this LLM is closed")

    def _run(self, requests: list[Request], groups: list[Submission], use_tqdm: bool) -> list[RequestOutput]:
        self.remember(groups)
        for request in requests:
            request.detokenizer.defer()
        progress = Progress("generating", len(requests), "sequence", enabled=use_tqdm)
        try:
            mine, told = set(requests), 0
            for moved in self.engine.run(requests):
                ended = sum(request.finished and request in mine for request in moved)
                progress.update(ended)
                told += ended
            # The turns of other calls have told those of the others.
            progress.update(len(requests) - told)
        except BaseException:
            # An interrupted call must not leave its requests behind for the next one.
            self.engine.abort(*requests)
            raise
        finally:
            progress.close()
        return self.engine.between_turns(lambda: [group.output() for group in groups])


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
        return Tokenizer.named(named)
    try:
        return Tokenizer.from_directory(directory)
    except FileNotFoundError:
        log.warning("%s has no tokenizer: prompts must be token ids, and texts stay empty", directory)
        return None


__all__ = ["LLM", "Prompt"]
