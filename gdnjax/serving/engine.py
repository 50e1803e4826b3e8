"""The loop: plan, dispatch, and harvest one step late.

A turn is whole or it never was. Whatever cuts one off, an interrupt or an error, at whatever line: what is true of a
request are the tokens that were committed to it, and what is true of the device is nothing. So the next call that comes
starts over: empty pools, an empty cache, and everybody who has not ended waits in the place that he had, to be computed
anew from his tokens, as after a preemption.
"""

import collections
import contextlib
import dataclasses
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from gdnjax.batch import Emitted, Logprobs
from gdnjax.config import EngineConfig
from gdnjax.sampling_params import SamplingParams
from gdnjax.serving.allocator import Allocator
from gdnjax.serving.host_tier import HostTier
from gdnjax.serving.metrics import Counters, Metrics
from gdnjax.serving.outputs import Logprob
from gdnjax.serving.plan import Piece, Plan
from gdnjax.serving.request import Request, Status
from gdnjax.serving.runner import InFlight, Runner, wait_for
from gdnjax.serving.scheduler import Scheduler
from gdnjax.serving.speculation import DraftController
from gdnjax.serving.structured import Matcher
from gdnjax.serving.tokenizer import Tokenizer
from gdnjax.shapes import Params
from gdnjax.state import NO_TOKEN, ServeState

log = logging.getLogger("gdnjax")

T = TypeVar("T")

COURTESY = 1e-4
"""Seconds that a caller who takes turn after turn leaves to others who wait for theirs."""


class Engine:
    """A runner and its scheduler. Drive it with `step()` until `has_work` is False.

    Threads may share it: each call waits until it is alone, and a turn serves the requests of all of them. A signal
    handler or a finaliser, which may call in the middle of a turn, is allowed nothing there but `abort` and `stats`: a
    RuntimeError says so.
    """

    def __init__(self, runner: Runner, allocator: Allocator, tokenizer: Tokenizer | None = None):
        config = runner.config
        self.runner: Runner = runner
        self.config: EngineConfig = config
        self.tokenizer: Tokenizer | None = tokenizer
        host = HostTier(runner.host_sizes) if runner.host_sizes is not None else None
        self.scheduler: Scheduler = Scheduler(config, allocator, runner.needs_state, host)
        drafts = config.num_speculative_tokens
        self._controller = DraftController(drafts, config.decode_buckets) if config.adaptive_speculation else None
        # When a turn was harvested behind which the device had another to do; None where it had none.
        self._last_harvest: float | None = None
        self._in_flight: collections.deque[InFlight] = collections.deque()
        # A program that ends with a step in flight would tear the device down under it.
        weakref.finalize(self, wait_for, self._in_flight)
        # Who moved on and has not been told of, and who is to be aborted.
        self._moved: list[Request] = []
        self._aborted: collections.deque[Request] = collections.deque()
        self._half_done = self._closed = False
        # Told of everybody who moved on or ended, whoever took the turn, within it: see `listen`.
        self._listener: Callable[[list[Request]], None] | None = None
        # Of single tokens, for log-probabilities: decoding twenty a row anew would take longer than the step.
        self._texts: dict[int, str] = {}
        # Of a thread, so that one that is interrupted on its way out does not lock itself out.
        self._lock = threading.RLock()
        self._callers: dict[int, None] = {}
        if config.warmup:
            runner.warm_up()
        # Padding and compiling are not what users ask the statistics about.
        self.metrics: Metrics = Metrics()
        runner.metrics = self.metrics

    @property
    def num_compilations(self) -> int:
        """Times a step was traced and compiled. Constant after warm-up."""
        return self.runner.num_compilations

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight)

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def counters(self) -> Counters:
        return self.metrics.counters

    def add(self, request: Request) -> None:
        """Queues a request. Its deadline becomes one of the engine's own clock, which stands while steps compile.

        Raises RuntimeError once the engine is closed.
        """
        with self._alone(), self._whole():
            self.counters.num_requests += 1
            if request.deadline is not None:
                request.deadline -= self.runner.compile_seconds
            self.scheduler.add(request)

    def abort(self, *requests: Request) -> None:
        """Ends requests wherever they are; what they have produced so far stays."""
        # Should this be cut off, the next call goes on with it.
        self._aborted.extend(requests)
        if self._is_within_a_turn:
            # A stream that nobody holds any more ends wherever Python collects it. The turn does it when it is over.
            return
        with self._lock:
            if not self._closed:
                self._catch_up()

    def _abort_all(self) -> None:
        while self._aborted:
            self.scheduler.finish(self._aborted[0], "abort")
            self._aborted.popleft()

    def preempt(self, request: Request) -> None:
        """Harvests what is in flight, then sends a running request back to the queue, as want of blocks would."""
        with self._alone():
            self._settle()
            with self._whole():
                if request.status is Status.RUNNING:
                    self.scheduler.preempt(request)

    def park(self, *requests: Request) -> None:
        """Takes requests that have not ended, running ones too, out of the queue until `unpark`. What they have
        produced, their places and their deadlines stay.
        """
        for request in requests:
            self.preempt(request)
        with self._alone(), self._whole():
            for request in requests:
                if not request.finished:
                    self.scheduler.park(request)

    def unpark(self, *requests: Request) -> None:
        """Lets parked requests go on. Nothing happens to others."""
        with self._alone(), self._whole():
            for request in requests:
                self.scheduler.unpark(request)

    def fail(self, request: Request, error: Exception) -> None:
        """Ends a request that cannot go on with finish_reason "error"."""
        with self._alone(), self._whole():
            self.scheduler.fail(request, error)

    def step(self) -> list[Request]:
        """One turn: dispatches the next plan, then reads the turn before it.

        Returns the requests that moved on or ended, by whatever, since the last call returned. Where the plan has to
        know what is in flight, nothing is dispatched, and what is in flight is read. Raises RuntimeError once the
        engine is closed, and what the device raises; whatever is raised, no request is lost, and the next call goes on.
        """
        with self._alone():
            with self._whole():
                self._abort_all()
                with self.metrics.timed("plan"):
                    drafts = self._choose_drafts()
                    plan = self.scheduler.plan(in_flight=bool(self._in_flight), now=self._now(), num_drafts=drafts)
                if plan is not None:
                    self._in_flight.append(self.runner.dispatch(plan))
            if self.metrics.line_is_due():
                self._log_line()
            if self._in_flight and (plan is None or len(self._in_flight) > 1):
                self._harvest(self._in_flight[0])
            return self._told()

    @property
    def _is_within_a_turn(self) -> bool:
        """Whether this thread is in the middle of `_whole`, from where a signal handler or a finaliser has called."""
        return self._half_done and self._lock._is_owned()  # pyright: ignore[reportAttributeAccessIssue]

    def _alone(self) -> Any:
        """The lock, to be taken. Raises RuntimeError within a turn: what it has begun must not change under it."""
        if self._is_within_a_turn:
            raise RuntimeError(
                "the engine is in the middle of a turn of this very thread: a signal handler or a finaliser may abort "
                "requests, and has to leave everything else until the turn is over"
            )
        return self._lock

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """Around whatever changes the scheduler or the pools: if what was done before was cut off, starts over first.
        Whoever is to be aborted ends with it.

        No `finally`: what leaves this by an exception has not been done.
        """
        if self._closed:
            raise RuntimeError("this LLM is closed")
        if self._half_done:
            self._start_over()
        self._half_done = True
        yield
        self._abort_all()
        self._half_done = False

    def _catch_up(self) -> None:
        """Does what the last call left: starts over if it was cut off, and ends whoever is to be aborted."""
        with self._whole():
            pass

    def _settle(self) -> None:
        """The same, and reads what is in flight: nothing is then."""
        self._catch_up()
        while self._in_flight:
            self._harvest(self._in_flight[0])

    def _start_over(self) -> None:
        log.log(
            # Where nobody waits, whoever ended the turn has ended all of it.
            logging.WARNING if self.scheduler.unfinished else logging.INFO,
            "a turn was cut off: the prefix cache is forgotten, and %d requests are computed anew from their tokens",
            len(self.scheduler.running),
        )
        self._last_harvest = None
        self.counters.num_start_overs += 1
        self.runner.start_over(self._in_flight)
        self._in_flight.clear()
        self.scheduler.start_over()

    def _told(self) -> list[Request]:
        """Who has moved on or ended since this was last asked."""
        ended = self.scheduler.ended
        for request in ended:
            self.metrics.finished(request)
        told = list(dict.fromkeys([*self._moved, *ended]))
        self._moved.clear()
        ended.clear()
        if self._listener is not None and told:
            self._listener(told)
        return told

    def listen(self, listener: Callable[[list[Request]], None] | None) -> None:
        """From now on `listener` is given what `step` returns, whoever calls it, while nobody else takes a turn. It may
        not raise. None: nobody listens any more. Raises RuntimeError where somebody else does.
        """
        with self._lock:
            if listener is not None and self._listener is not None:
                raise RuntimeError("somebody listens to this engine already: an LLM has one AsyncLLM")
            self._listener = listener

    def _choose_drafts(self) -> int:
        """Drafts of the next decode step."""
        rows = sum(request.may_decode for request in self.scheduler.running) if self._controller else 0
        return self._controller.choose(rows) if self._controller and rows else self.config.num_speculative_tokens

    def _observe(self, turn: InFlight, decode: Emitted | None) -> None:
        """Tells the controller what a turn has cost, if the device did nothing else in that time."""
        began, now = self._last_harvest, time.perf_counter()
        self._last_harvest = now if self._in_flight else None
        if self._controller and began is not None and decode is not None and turn.prefill is None:
            counts = decode.count[: len(turn.plan.decoding)]
            rows, tokens = int(np.count_nonzero(counts)), int(counts.sum())
            self._controller.observe(len(decode.count), turn.plan.num_drafts, now - began, rows, tokens)

    def _harvest(self, turn: InFlight) -> None:
        """Commits what a turn emitted to the requests of its own plan."""
        try:
            prefill, decode = self.runner.read(turn)
        except Exception:
            # It failed on the device, and left nothing there. An interrupt of the wait is none of these: what the
            # turn emitted is still to be had.
            self._half_done = True
            raise
        with self._whole():
            self._in_flight.popleft()
            self._observe(turn, decode)
            spent, produced = self.scheduler.detokenise_seconds, self.counters.num_output_tokens
            with self.metrics.timed("commit"):
                if prefill is not None:
                    self._collect_prompt_logprobs(turn.plan.pieces, prefill)
                    rows = [(row, piece.request, 0) for row, piece in enumerate(turn.plan.pieces) if piece.is_last]
                    self._commit(rows, prefill)
                for mark in turn.plan.marks:
                    self.scheduler.confirm(mark)
                if decode is not None:
                    rows = zip(itertools.count(), turn.plan.decoding, turn.plan.bounds, strict=False)
                    self._commit(rows, decode)
                    self._account(turn.plan, decode)
            prefilled = sum(piece.length for piece in turn.plan.pieces)
            produced = self.counters.num_output_tokens - produced
            self.metrics.histograms["turn_tokens"].observe(prefilled + produced)
            spent = self.scheduler.detokenise_seconds - spent
            self.metrics.seconds.commit -= spent
            self.metrics.seconds.detokenise += spent

    def _commit(self, rows: Iterable[tuple[int, Request, int]], emitted: Emitted) -> None:
        """Takes over what each (row, request, bound) emitted."""
        produced = 0
        tokens, counts, dones = emitted.tokens.tolist(), emitted.count.tolist(), emitted.done.tolist()
        for row, request, bound in rows:
            token_ids = tokens[row][: counts[row]]
            if request.status is Status.FINISHED or not token_ids:
                continue
            if request.params.logprobs is not None:
                where = [((row, at), token) for at, token in enumerate(token_ids) if token != NO_TOKEN]
                found = self._entries_of(request, emitted.logprobs, where, request.params.logprobs)
                request.output_logprobs.extend(found)
            self.scheduler.commit(request, token_ids, dones[row], bound)
            self._moved.append(request)
            produced += len(token_ids) - (token_ids[-1] == NO_TOKEN)
        self.metrics.produced(produced)

    def _account(self, plan: Plan, emitted: Emitted) -> None:
        """Counts drafts and what came of them, for each request and in all."""
        if not self.config.num_speculative_tokens:
            return
        drafted, counts = emitted.drafted.tolist(), emitted.count.tolist()
        for request, drafts, count in zip(plan.decoding, drafted, counts, strict=False):
            if count:
                request.num_decode_steps += 1
                request.num_draft_tokens += drafts
                request.num_accepted_tokens += count - 1
        rows = len(plan.decoding)
        self.metrics.speculated(drafted[:rows], counts[:rows])

    def _collect_prompt_logprobs(self, pieces: list[Piece], emitted: Emitted) -> None:
        place = 0
        for piece in pieces:
            request = piece.request
            # A request that was preempted prefills its prompt again, but knows these already.
            most = request.params.prompt_logprobs
            if most is not None and not request.finished and len(request.prompt_logprobs) == piece.start:
                successors = request.prompt_token_ids[piece.start + 1 : piece.end + 1]
                where = [((at,), token) for at, token in enumerate(successors, start=place)]
                # A prompt of one token has none, and asks no step for them.
                if where:
                    request.prompt_logprobs.extend(self._entries_of(request, emitted.prompt_logprobs, where, most))
            place += piece.length

    def _entries_of(
        self, request: Request, found: Logprobs, where: list[tuple[tuple[int, ...], int]], most: int
    ) -> list[dict[int, Logprob]]:
        """For each (place, token) the token and the `most` most probable ones there, by token id.

        Their texts are the tokenizer's work, and what fails there ends this request alone: then the list is empty.
        """
        try:
            return [self._logprob_entries(found, place, token, most) for place, token in where]
        except Exception as error:
            self.scheduler.fail(request, error)
            return []

    def _logprob_entries(self, found: Logprobs, place: tuple[int, ...], token: int, most: int) -> dict[int, Logprob]:
        """The token in question and the `most` most probable, by token id."""
        entries = {token: self._logprob(token, found.chosen[place], found.rank[place])}
        tokens, values = found.top_tokens[place], found.top[place]
        for rank in range(min(most, len(tokens))):
            other = int(tokens[rank])
            if other not in entries:
                entries[other] = self._logprob(other, values[rank], rank + 1)
        return entries

    def _logprob(self, token: int, value: np.floating, rank: int | np.integer) -> Logprob:
        return Logprob(logprob=float(value), rank=int(rank), decoded_token=self._text_of(token))

    def _text_of(self, token: int) -> str | None:
        if self.tokenizer is None:
            return None
        if token not in self._texts:
            self._texts[token] = self.tokenizer.decode([token], skip_special_tokens=False)
        return self._texts[token]

    def run(self, requests: list[Request]) -> Iterator[list[Request]]:
        """Queues requests and yields those that moved on, turn by turn, until all of these have finished."""
        for request in requests:
            self.add(request)
        unfinished = requests[::-1]
        while True:
            while unfinished and unfinished[-1].finished:
                unfinished.pop()
            if not unfinished:
                return
            yield self.take_turn()

    def take_turn(self) -> list[Request]:
        """`step()` for callers who take turn after turn beside others; see `between_turns`."""
        return self.between_turns(self.step)

    def between_turns(self, call: Callable[[], T]) -> T:
        """`call()` while no other thread takes a turn: it may take one, and what it sees of requests is whole. Of those
        who call this again and again whoever has waited longer comes first.
        """
        lock, me = self._alone(), threading.get_ident()
        self._callers[me] = None
        try:
            with lock:
                if self._half_done and not self._closed:
                    self._catch_up()
                return call()
        finally:
            self._callers.pop(me, None)
            if self._callers:
                # A lock that is let go and taken again at once would stay with whoever has it.
                time.sleep(COURTESY)

    @property
    def compile_seconds(self) -> float:
        """Seconds for which requests had to wait while a step was compiled."""
        return self.runner.compile_seconds

    def prepare(self, rows: Iterable[int], params: Iterable[SamplingParams] = (SamplingParams(),)) -> None:
        """See Runner.prepare."""
        with self._alone(), self._whole():
            self.runner.prepare(rows, params)

    def reset_prefix_cache(self) -> None:
        """Forgets every cached block and state. Requests that run keep what they have."""
        with self._alone(), self._whole():
            self.scheduler.cache.reset()

    def update_params(self, params: Params) -> None:
        """Goes on with other parameters, which lie as the present ones do. What was computed with the present ones is
        forgotten, and whoever has not ended is computed anew from his tokens.
        """
        with self._alone():
            self._settle()
            with self._whole():
                self._last_harvest = None
                self.runner.params = params
                self.runner.start_over([])
                self.scheduler.start_over()

    def save(self, write: Callable[[dict[str, Any], ServeState], None]) -> None:
        """Calls `write` with the scheduler's record and the pools when nothing is in flight, and goes on as before,
        whether it raises or not.
        """
        with self._alone():
            self._settle()
            with self._whole():
                moves = self.scheduler.take_moves()
                if moves is not None:
                    self.runner.move(moves)
                record = self.scheduler.record(self._now())
            write(record, self.runner.state)

    def restore(
        self,
        record: dict[str, Any],
        load: Callable[[ServeState], ServeState],
        matchers: Sequence[Matcher | None] | None = None,
    ) -> list[Request]:
        """The opposite of `save`, in an engine without requests: RuntimeError where there are any. Returns those that
        go on. Should `load` raise, the engine has forgotten what it had cached, and nothing else.
        """
        with self._alone():
            self._catch_up()
            if self.has_work:
                raise RuntimeError(
                    f"restore needs an engine without requests; this one has {len(self.scheduler.unfinished)}: let "
                    "them end, or abort them"
                )
            with self._whole():
                self._last_harvest = None
                self.runner.replace_state(load)
                return self.scheduler.restore(record, self.tokenizer, self._now(), matchers)

    def _now(self) -> float:
        """The clock of deadlines, which stands while steps compile."""
        return time.monotonic() - self.runner.compile_seconds

    def stats(self) -> dict[str, Any]:
        """See LLM.stats."""
        with self._lock:
            return self._stats()

    def _stats(self) -> dict[str, Any]:
        scheduler, metrics = self.scheduler, self.metrics
        allocator, cache = scheduler.allocator, scheduler.cache
        counters = cache.counters
        return {
            "num_running": len(scheduler.running),
            "num_waiting": len(scheduler.waiting) + len(scheduler.parked),
            "num_preemptions": scheduler.num_preemptions,
            "num_compilations": self.num_compilations,
            "slots_used": allocator.slots.num_used - cache.num_states,
            "slots_total": allocator.slots.size,
            "blocks_used": allocator.blocks.num_used - cache.num_evictable_blocks,
            "blocks_total": allocator.blocks.size,
            "uptime": time.monotonic() - metrics.started,
            "output_tokens_per_second": metrics.output_tokens_per_second(),
            "padding_waste": metrics.padding_waste(),
            **dataclasses.asdict(metrics.counters),
            "prefix_cache": {
                **dataclasses.asdict(counters),
                "hit_rate": counters.hit_tokens / max(1, counters.queried_tokens),
                "cached_blocks": cache.num_blocks,
                "evictable_blocks": cache.num_evictable_blocks,
                "cached_states": cache.num_states,
            },
            "host_cache": self._host_stats(),
            "speculation": {
                "num_speculative_tokens": self.config.num_speculative_tokens,
                "forced_acceptance": self.config.spec_acceptance_length is not None,
                **metrics.speculation(),
            },
            "seconds": dataclasses.asdict(metrics.seconds),
            **metrics.latencies(),
        }

    def _host_stats(self) -> dict[str, int] | None:
        host = self.scheduler.cache.host
        if host is None:
            return None
        return {
            **dataclasses.asdict(host.counters),
            "num_blocks": host.num_blocks,
            "num_states": host.num_states,
            "bytes_used": host.used_bytes,
            "bytes_total": host.sizes.capacity_bytes,
        }

    def _log_line(self) -> None:
        stats = self.stats()
        first, per_token = stats["time_to_first_token"], stats["time_per_output_token"]
        drafts = self.metrics.speculation_line()
        log.info(
            "running %d, waiting %d | slots %d/%d, blocks %d/%d | cache hits %.0f%%, preemptions %d, padding %.0f%%, "
            "compilations %d%s | %.1f output tok/s, first token p50/p99 %.0f/%.0f ms, per token %.1f/%.1f ms",
            stats["num_running"],
            stats["num_waiting"],
            stats["slots_used"],
            stats["slots_total"],
            stats["blocks_used"],
            stats["blocks_total"],
            100 * stats["prefix_cache"]["hit_rate"],
            stats["num_preemptions"],
            100 * stats["padding_waste"],
            stats["num_compilations"],
            f" | {drafts}" if drafts else "",
            stats["output_tokens_per_second"],
            *(1e3 * first.get(name, float("nan")) for name in ("p50", "p99")),
            *(1e3 * per_token.get(name, float("nan")) for name in ("p50", "p99")),
        )

    def close(self) -> None:
        """Aborts every request, drops everything in flight and frees the pools and parameters. Nothing runs afterwards.

        Waits for the turn of another thread to end.
        """
        with self._alone():
            if self._closed:
                return
            with self._whole():
                self.runner.give_up(self._in_flight)
                self._in_flight.clear()
                for request in list(self.scheduler.unfinished):
                    self.scheduler.finish(request, "abort")
                self.runner.close()
                self._closed = True
