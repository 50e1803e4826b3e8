"""The loop: plan, dispatch, and harvest one step late. The only place that reads the device is `Engine._read`."""

import collections
import dataclasses
import itertools
import logging
import os
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from gdnjax import sharding
from gdnjax.batch import Emitted, Logprobs
from gdnjax.config import EngineConfig
from gdnjax.memory import MemoryPlan
from gdnjax.models import Model
from gdnjax.serving import packing, planning
from gdnjax.serving.allocator import Allocator
from gdnjax.serving.metrics import Counters, Metrics
from gdnjax.serving.outputs import Logprob
from gdnjax.serving.plan import Admission, Growth, Piece, Plan, Seal, max_chunks, max_growth
from gdnjax.serving.request import Request, Status
from gdnjax.serving.scheduler import Scheduler
from gdnjax.serving.speculation import DraftController
from gdnjax.serving.tokenizer import Tokenizer
from gdnjax.shapes import Params
from gdnjax.state import ServeState, empty_state
from gdnjax.step import StepOptions, Steps, build_steps

log = logging.getLogger("gdnjax")


@dataclasses.dataclass(frozen=True)
class InFlight:
    """A dispatched turn whose tokens have not been read."""

    plan: Plan
    prefill: Emitted | None
    decode: Emitted | None


@dataclasses.dataclass(frozen=True)
class Call:
    """A jitted step, and what it is called with beside the state."""

    step: Any
    batch: Any
    arguments: tuple[Any, ...] = ()


class Engine:
    """One model, its pools and its scheduler. Drive it with `step()` until `has_work` is False."""

    def __init__(
        self,
        model: Model,
        params: Params,
        mesh: Mesh,
        config: EngineConfig,
        plan: MemoryPlan,
        max_model_len: int,
        tokenizer: Tokenizer | None = None,
    ):
        self.model, self.params, self.mesh, self.config = model, params, mesh, config
        self.memory_plan, self.max_model_len, self.tokenizer = plan, max_model_len, tokenizer
        self.scheduler = Scheduler(
            config, Allocator(plan.num_slots, plan.num_blocks, plan.num_logit_rows, plan.num_count_rows)
        )
        self.metrics = Metrics()
        drafts = config.num_speculative_tokens
        self._controller = DraftController(drafts, config.decode_buckets) if config.adaptive_speculation else None
        # When a turn was harvested behind which the device had another to do; None where it had none.
        self._last_harvest: float | None = None
        self._in_flight: collections.deque[InFlight] = collections.deque()
        # A program that ends with a step in flight would tear the device down under it.
        weakref.finalize(self, _wait_for, self._in_flight)
        self._plain, self._full = planning.plain_options(config), planning.full_options(model, config)
        self._with_prompt = dataclasses.replace(self._full, prompt_logprobs=True)
        self.state = self._make_state()
        self.steps: Steps = build_steps(model, mesh, self._plain, params, self.state)
        if config.warmup:
            self._warm_up()
            # Padding and compiling are not what users ask the statistics about.
            self.metrics = Metrics()

    def _make_state(self) -> ServeState:
        geometry = self.model.geometry(self.config.block_size, self.config.ssm_dtype).speculating(self.config)

        def empty():
            return empty_state(geometry, self.memory_plan, self.config, self.max_model_len)

        shardings = sharding.shardings_of(jax.eval_shape(empty), self.mesh)
        return jax.jit(empty, out_shardings=shardings)()

    @property
    def num_compilations(self) -> int:
        """Times a step was traced and compiled. Constant after warm-up."""
        return self.steps.num_traces()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight)

    @property
    def counters(self) -> Counters:
        return self.metrics.counters

    def add(self, request: Request) -> None:
        """Queues a request."""
        self.counters.num_requests += 1
        self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        """Ends a request wherever it is; what it has produced so far stays."""
        self.scheduler.finish(request, "abort")

    def preempt(self, request: Request) -> None:
        """Harvests what is in flight, then sends a running request back to the queue, as want of blocks would."""
        while self._in_flight:
            self._harvest(self._in_flight[0])
        if request.status is Status.RUNNING:
            self.scheduler.preempt(request)

    def step(self) -> list[Request]:
        """One turn: dispatches the next plan, then reads the turn before it. Returns the requests that moved on.

        Where the plan has to know what is in flight, nothing is dispatched, and what is in flight is read.
        """
        with self.metrics.timed("plan"):
            plan = self.scheduler.plan(in_flight=bool(self._in_flight), num_drafts=self._choose_drafts())
        if plan is not None:
            self._in_flight.append(self._dispatch_or_reset(plan))
        if self.metrics.line_is_due():
            self._log_line()
        if self._in_flight and (plan is None or len(self._in_flight) > 1):
            return self._harvest(self._in_flight[0])
        return []

    def _dispatch_or_reset(self, plan: Plan) -> InFlight:
        """Dispatches; if that fails, or is interrupted, nobody waits for tokens that will never come, and nothing that
        was promised to be computed is taken for computed.
        """
        try:
            return self._dispatch(plan)
        except BaseException:
            self._in_flight.clear()
            self.scheduler.reset()
            raise

    def _dispatch(self, plan: Plan) -> InFlight:
        """Sends a plan to the device without waiting for anything."""
        self.counters.num_turns += 1
        self._seal(plan.seals)
        self._admit(plan.admitted)
        prefill = self._prefill(plan.pieces) if plan.pieces else None
        decode = self._decode(plan) if plan.decoding else None
        turn = InFlight(plan, prefill, decode)
        self._start_copies(turn)
        return turn

    def _start_copies(self, turn: InFlight) -> None:
        """Has the device send home what _read will look for, as soon as it is there. Waits for nothing."""
        for leaf in jax.tree.leaves((turn.prefill, turn.decode)):
            leaf.copy_to_host_async()

    def _run(self, call: Call) -> Any:
        with self.metrics.timed("dispatch"):
            return call.step(*call.arguments, self.state, call.batch)

    def _admit(self, admissions: list[Admission]) -> None:
        if not admissions:
            return
        self.state = self._run(self._admit_call(admissions))
        for call in self._count_calls([admission.request for admission in admissions]):
            self.state = self._run(call)
        for admission in admissions:
            if admission.request.logit_row:
                self.state = self._run(self._logit_row_call(admission.request))

    def _admit_call(self, admissions: list[Admission]) -> Call:
        with self.metrics.timed("pack"):
            batch = packing.pack_admissions(admissions, rows=self.config.prefill_rows, table_width=self._table_width)
        return Call(self.steps.admit, batch)

    @property
    def _table_width(self) -> int:
        return self.state.slots.block_table.shape[1]

    def _count_calls(self, requests: list[Request]) -> list[Call]:
        """What fills the count rows of those that have one."""
        with self.metrics.timed("pack"):
            batches = packing.pack_counts(requests, self.model.vocab_size, rows=self.config.prefill_rows)
        return [Call(self.steps.fill_counts, batch) for batch in batches]

    def _logit_row_call(self, request: Request | None) -> Call:
        width = self.state.logit_rows.bias.shape[1]
        with self.metrics.timed("pack"):
            batch = packing.pack_logit_row(request, self.model.vocab_size, width)
        return Call(self.steps.fill_logit_row, batch)

    def _prefill(self, pieces: list[Piece]) -> Emitted:
        # A prefill step draws a few rows only, so it has no variant with the plain sampler.
        wants_prompt = any(piece.request.wants_prompt_logprobs for piece in pieces)
        options = self._with_prompt if wants_prompt else self._full
        length = sum(piece.length for piece in pieces)
        chunks = sum(len(piece.chunks()) for piece in pieces)
        rows = self.config.prefill_rows
        # A bucket has to hold the chunk table, too.
        fits = [size for size in self._prefill_buckets(options) if chunks <= max_chunks(size, rows)]
        tokens = packing.bucket_for(length, fits)
        self.counters.num_prompt_tokens += length
        self.counters.num_padded_tokens += tokens - length
        self.state, emitted = self._run(self._prefill_call(options, pieces, tokens))
        return emitted

    def _prefill_call(self, options: StepOptions, pieces: list[Piece], tokens: int) -> Call:
        with self.metrics.timed("pack"):
            batch = packing.pack_prefill(
                pieces,
                tokens=tokens,
                rows=self.config.prefill_rows,
                table_width=self._table_width,
                checkpoints=self.config.enable_prefix_caching,
            )
        return Call(self.steps.prefill(options), batch, (self.params,))

    def _prefill_buckets(self, options: StepOptions) -> tuple[int, ...]:
        """Log-probabilities of prompts are rare and slow to compile: they get the largest bucket alone."""
        buckets = self.config.prefill_buckets
        return buckets[-1:] if options.prompt_logprobs else buckets

    def _decode(self, plan: Plan) -> Emitted:
        requests = plan.decoding
        full = self.config.batch_invariant or any(r.params.needs_full_sampler for r in requests)
        options = dataclasses.replace(self._full if full else self._plain, num_drafts=plan.num_drafts)
        rows = packing.bucket_for(len(requests), self.config.decode_buckets)
        self.counters.num_padded_tokens += rows - len(requests)
        self.state, emitted = self._run(self._decode_call(options, requests, plan.growth, plan.bounds, rows))
        return emitted

    def _decode_call(
        self,
        options: StepOptions,
        requests: list[Request],
        growth: dict[int, list[Growth]],
        bounds: list[int],
        rows: int,
    ) -> Call:
        drafts = self.config.num_speculative_tokens
        with self.metrics.timed("pack"):
            batch = packing.pack_decode(
                requests,
                growth,
                bounds,
                rows=rows,
                table_width=self._table_width,
                grown_width=max_growth(drafts, self.config.block_size),
                drafts=drafts > 0,
            )
        return Call(self.steps.decode(options), batch, (self.params,))

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

    def _seal(self, seals: Sequence[Seal]) -> None:
        rows = self.config.prefill_rows
        for start in range(0, len(seals), rows):
            self.state = self._run(self._seal_call(seals[start : start + rows]))

    def _seal_call(self, seals: Sequence[Seal]) -> Call:
        with self.metrics.timed("pack"):
            batch = packing.pack_seals(seals, rows=self.config.prefill_rows)
        return Call(self.steps.seal, batch, (self.params,))

    def _warm_up(self) -> None:
        """Compiles every step, side by side, and runs each on padding, which changes nothing but what is null."""
        calls = {"admit": self._admit_call([]), "logit row": self._logit_row_call(None)}
        calls["counts"] = Call(self.steps.fill_counts, packing.count_batch([], [], rows=self.config.prefill_rows))
        if self.config.enable_prefix_caching:
            calls["seal"] = self._seal_call([])
        for options in (self._full, self._with_prompt):
            for tokens in self._prefill_buckets(options):
                kind = "prompt log-probabilities" if options.prompt_logprobs else "prefill"
                calls[f"{kind} {tokens}"] = self._prefill_call(options, [], tokens)
        for options in self._decode_options():
            kind = f"decode, {'full' if options.full else 'plain'} sampler, {options.num_drafts} drafts,"
            for rows in self.config.decode_buckets:
                calls[f"{kind} {rows}"] = self._decode_call(options, [], {}, [], rows)
        self._compile(calls)

    def prepare(self, rows: Iterable[int]) -> None:
        """Compiles what plain requests need, so many of them at once, for engines that do not warm up.

        Every prefill bucket, and the decode buckets of `rows`; each step runs on padding once, as in the warm-up.
        """
        calls = {"admit": self._admit_call([])}
        if self.config.enable_prefix_caching:
            calls["seal"] = self._seal_call([])
        for tokens in self.config.prefill_buckets:
            calls[f"prefill {tokens}"] = self._prefill_call(self._full, [], tokens)
        options = self._full if self.config.batch_invariant else self._plain
        for size in sorted({packing.bucket_for(count, self.config.decode_buckets) for count in rows}):
            calls[f"decode {size}"] = self._decode_call(options, [], {}, [], size)
        self._compile(calls)

    def _compile(self, calls: dict[str, Call]) -> None:
        """Compiles steps side by side, and runs each."""
        began = time.monotonic()
        progress = tqdm(calls.items(), desc="compiling steps", unit="step", disable=None, leave=False)
        # Tracing holds Python's lock; the compiler does not, and what it has made is there when the step is called.
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as compilers:
            compiled = {
                name: compilers.submit(call.step.lower(*call.arguments, self.state, call.batch).compile)
                for name, call in calls.items()
            }
            for name, call in progress:
                progress.set_postfix_str(name)
                compiled[name].result()
                result = self._run(call)
                self.state = result if isinstance(result, ServeState) else result[0]
        jax.block_until_ready(self.state)
        log.info("compiled %d steps in %.1f s", len(calls), time.monotonic() - began)

    def _decode_options(self) -> list[StepOptions]:
        """What decode steps are compiled with."""
        samplers = (self._full,) if self.config.batch_invariant else (self._plain, self._full)
        drafts = self.config.num_speculative_tokens
        choices = {drafts, 0} if self._controller else {drafts}
        return [
            dataclasses.replace(options, num_drafts=drafts)
            for options, drafts in itertools.product(samplers, sorted(choices))
        ]

    def _read(self, turn: InFlight) -> tuple[Emitted | None, Emitted | None]:
        """The one place where the host waits for the device."""
        self.counters.num_device_reads += 1
        with self.metrics.timed("read"):
            return jax.device_get((turn.prefill, turn.decode))

    def _harvest(self, turn: InFlight) -> list[Request]:
        """Commits what a turn emitted to the requests of its own plan."""
        prefill, decode = self._read(turn)
        # Not before it is read: a call that is interrupted while it waits loses nobody's tokens.
        if self._in_flight and self._in_flight[0] is turn:
            self._in_flight.popleft()
        self._observe(turn, decode)
        spent = self.scheduler.detokenise_seconds
        moved = []
        with self.metrics.timed("commit"):
            if prefill is not None:
                self._collect_prompt_logprobs(turn.plan.pieces, prefill)
                rows = [(row, piece.request, 0) for row, piece in enumerate(turn.plan.pieces) if piece.is_last]
                moved += self._commit(rows, prefill)
            for mark in turn.plan.marks:
                self.scheduler.confirm(mark)
            if decode is not None:
                rows = zip(itertools.count(), turn.plan.decoding, turn.plan.bounds, strict=False)
                moved += self._commit(rows, decode)
                self._account(turn.plan, decode)
        spent = self.scheduler.detokenise_seconds - spent
        self.metrics.seconds.commit -= spent
        self.metrics.seconds.detokenise += spent
        return moved

    def _commit(self, rows: Iterable[tuple[int, Request, int]], emitted: Emitted) -> list[Request]:
        """Takes over what each (row, request, bound) emitted. Returns the requests that moved on."""
        moved, produced = [], 0
        tokens, counts, dones = emitted.tokens.tolist(), emitted.count.tolist(), emitted.done.tolist()
        for row, request, bound in rows:
            token_ids = tokens[row][: counts[row]]
            if request.status is Status.FINISHED or not token_ids:
                continue
            if request.params.logprobs is not None:
                for place, token in enumerate(token_ids):
                    found = self._logprob_entries(emitted.logprobs, (row, place), token, request.params.logprobs)
                    request.output_logprobs.append(found)
            self.scheduler.commit(request, token_ids, dones[row], bound)
            moved.append(request)
            produced += len(token_ids)
            if request.status is Status.FINISHED:
                self.metrics.finished(request)
        self.metrics.produced(produced)
        return moved

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
            request, most = piece.request, piece.request.params.prompt_logprobs
            # A request that was preempted prefills its prompt again, but knows these already.
            if most is not None and not request.finished and len(request.prompt_logprobs) == piece.start:
                successors = request.prompt_token_ids[piece.start + 1 : piece.end + 1]
                for offset, token in enumerate(successors):
                    entry = self._logprob_entries(emitted.prompt_logprobs, (place + offset,), token, most)
                    request.prompt_logprobs.append(entry)
            place += piece.length

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
        text = None if self.tokenizer is None else self.tokenizer.decode([token], skip_special_tokens=False)
        return Logprob(logprob=float(value), rank=int(rank), decoded_token=text)

    def run(self, requests: list[Request]) -> Iterator[list[Request]]:
        """Queues requests and yields those that moved on, turn by turn, until all of these have finished."""
        for request in requests:
            self.add(request)
        while not all(request.finished for request in requests):
            yield self.step()

    def reset_prefix_cache(self) -> None:
        """Forgets every cached block and state. Requests that run keep what they have."""
        self.scheduler.cache.reset()

    def stats(self) -> dict[str, Any]:
        """See LLM.stats."""
        scheduler, metrics = self.scheduler, self.metrics
        allocator, cache = scheduler.allocator, scheduler.cache
        counters = cache.counters
        return {
            "num_running": len(scheduler.running),
            "num_waiting": len(scheduler.waiting),
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
                "cached_states": cache.num_states,
            },
            "speculation": {
                "num_speculative_tokens": self.config.num_speculative_tokens,
                "forced_acceptance": self.config.spec_acceptance_length is not None,
                **metrics.speculation(),
            },
            "seconds": dataclasses.asdict(metrics.seconds),
            **metrics.latencies(),
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
        """Drops everything in flight and frees the pools and parameters. The engine is unusable afterwards."""
        self._in_flight.clear()
        for leaf in jax.tree.leaves(self.state):
            leaf.delete()
        self.params = {}


def _wait_for(turns: Iterable[InFlight]) -> None:
    """Returns when the device is through with these turns."""
    for turn in turns:
        jax.block_until_ready((turn.prefill, turn.decode))
