"""The loop: plan, dispatch, and harvest one step late. The only place that reads the device is `Engine._read`."""

import collections
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
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
from gdnjax.serving import packing
from gdnjax.serving.allocator import Allocator
from gdnjax.serving.outputs import Logprob
from gdnjax.serving.request import Request
from gdnjax.serving.scheduler import Piece, Plan, Scheduler
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


@dataclasses.dataclass
class Counters:
    """What the engine has done since it was built."""

    num_requests: int = 0
    num_turns: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_padded_tokens: int = 0
    num_device_reads: int = 0


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
        self.scheduler = Scheduler(config, Allocator(plan.num_slots, plan.num_blocks, plan.num_logit_rows))
        self.counters = Counters()
        self.started = time.monotonic()
        self._in_flight: collections.deque[InFlight] = collections.deque()
        self._plain = StepOptions(state_layout=config.state_layout)
        self._full = _full_options(model, config)
        self._with_prompt = dataclasses.replace(self._full, prompt_logprobs=True)
        self.state = self._make_state()
        self.steps: Steps = build_steps(model, mesh, self._plain, params, self.state)
        if config.warmup:
            self._warm_up()

    def _make_state(self) -> ServeState:
        geometry = self.model.geometry(self.config.block_size, self.config.ssm_dtype)

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

    def add(self, request: Request) -> None:
        """Queues a request."""
        self.counters.num_requests += 1
        self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        """Ends a request wherever it is; what it has produced so far stays."""
        self.scheduler.finish(request, "abort")

    def step(self) -> list[Request]:
        """One turn: dispatches the next plan, then reads the turn before it. Returns the requests that moved on."""
        plan = self.scheduler.plan()
        if plan is not None:
            self._in_flight.append(self._dispatch_or_abort(plan))
        if self._in_flight and (plan is None or len(self._in_flight) > 1):
            return self._harvest(self._in_flight.popleft())
        return []

    def _dispatch_or_abort(self, plan: Plan) -> InFlight:
        """Dispatches; if that fails, or is interrupted, nobody waits for tokens that will never come."""
        try:
            return self._dispatch(plan)
        except BaseException:
            for request in list(self.scheduler.running):
                self.abort(request)
            raise

    def _dispatch(self, plan: Plan) -> InFlight:
        """Sends a plan to the device without waiting for anything."""
        self.counters.num_turns += 1
        self._admit(plan.admitted)
        prefill = self._prefill(plan.pieces) if plan.pieces else None
        decode = self._decode(plan.decoding) if plan.decoding else None
        turn = InFlight(plan, prefill, decode)
        self._start_copies(turn)
        return turn

    def _start_copies(self, turn: InFlight) -> None:
        """Has the device send home what _read will look for, as soon as it is there. Waits for nothing."""
        for leaf in jax.tree.leaves((turn.prefill, turn.decode)):
            leaf.copy_to_host_async()

    def _admit(self, requests: list[Request]) -> None:
        if not requests:
            return
        batch = packing.pack_admissions(
            requests, rows=self.config.prefill_rows, table_width=self.state.slots.block_table.shape[1]
        )
        self.state = self.steps.admit(self.state, batch)
        for request in requests:
            if request.logit_row:
                self._fill_logit_row(request)

    def _fill_logit_row(self, request: Request | None) -> None:
        width = self.state.logit_rows.bias.shape[1]
        self.state = self.steps.fill_logit_row(
            self.state, packing.pack_logit_row(request, self.model.vocab_size, width)
        )

    def _prefill(self, pieces: list[Piece]) -> Emitted:
        # A prefill step draws a few rows only, so it has no variant with the plain sampler.
        wants_prompt = any(piece.request.params.prompt_logprobs is not None for piece in pieces)
        options = self._with_prompt if wants_prompt else self._full
        length = sum(piece.length for piece in pieces)
        tokens = packing.bucket_for(length, self._prefill_buckets(options))
        self.counters.num_prompt_tokens += length
        self.counters.num_padded_tokens += tokens - length
        return self._run_prefill(options, pieces, tokens)

    def _run_prefill(self, options: StepOptions, pieces: list[Piece], tokens: int) -> Emitted:
        batch = packing.pack_prefill(pieces, tokens=tokens, rows=self.config.prefill_rows)
        self.state, emitted = self.steps.prefill(options)(self.params, self.state, batch)
        return emitted

    def _prefill_buckets(self, options: StepOptions) -> tuple[int, ...]:
        """Log-probabilities of prompts are rare and slow to compile: they get the largest bucket alone."""
        buckets = self.config.prefill_buckets
        return buckets[-1:] if options.prompt_logprobs else buckets

    def _decode(self, requests: list[Request]) -> Emitted:
        options = self._full if any(r.params.needs_full_sampler for r in requests) else self._plain
        rows = packing.bucket_for(len(requests), self.config.decode_buckets)
        self.counters.num_padded_tokens += rows - len(requests)
        return self._run_decode(options, requests, rows)

    def _run_decode(self, options: StepOptions, requests: list[Request], rows: int) -> Emitted:
        batch = packing.pack_decode(requests, rows=rows)
        self.state, emitted = self.steps.decode(options)(self.params, self.state, batch)
        return emitted

    def _warm_up(self) -> None:
        """Compiles every step by running it on padding, which changes nothing but the null slot, block and row."""
        runs: list[tuple[str, Callable[[], Any]]]
        runs = [("admit", self._admit_nobody), ("logit row", lambda: self._fill_logit_row(None))]
        for options in (self._full, self._with_prompt):
            for tokens in self._prefill_buckets(options):
                runs.append((f"prefill {tokens}", lambda o=options, t=tokens: self._run_prefill(o, [], t)))
        for options in (self._plain, self._full):
            for rows in self.config.decode_buckets:
                runs.append((f"decode {rows}", lambda o=options, r=rows: self._run_decode(o, [], r)))
        began = time.monotonic()
        progress = tqdm(runs, desc="compiling steps", unit="step", disable=None, leave=False)
        for name, run in progress:
            progress.set_postfix_str(name)
            run()
        jax.block_until_ready(self.state)
        log.info("compiled %d steps in %.1f s", len(runs), time.monotonic() - began)

    def _admit_nobody(self) -> None:
        rows, width = self.config.prefill_rows, self.state.slots.block_table.shape[1]
        self.state = self.steps.admit(self.state, packing.pack_admissions([], rows=rows, table_width=width))

    def _read(self, turn: InFlight) -> tuple[Emitted | None, Emitted | None]:
        """The one place where the host waits for the device."""
        self.counters.num_device_reads += 1
        return jax.device_get((turn.prefill, turn.decode))

    def _harvest(self, turn: InFlight) -> list[Request]:
        """Commits what a turn emitted to the requests of its own plan."""
        prefill, decode = self._read(turn)
        moved = []
        if prefill is not None:
            self._collect_prompt_logprobs(turn.plan.pieces, prefill)
            rows = [(row, piece.request) for row, piece in enumerate(turn.plan.pieces) if piece.is_last]
            moved += self._commit(rows, prefill)
        if decode is not None:
            moved += self._commit(enumerate(turn.plan.decoding), decode)
        return moved

    def _commit(self, rows, emitted: Emitted) -> list[Request]:
        moved = []
        for row, request in rows:
            token_ids = emitted.tokens[row, : emitted.count[row]].tolist()
            if request.finished or not token_ids:
                continue
            if request.params.logprobs is not None:
                found = self._logprob_entries(emitted.logprobs, row, token_ids[0], request.params.logprobs)
                request.output_logprobs.append(found)
                request.cumulative_logprob += float(emitted.logprobs.chosen[row])
            self.scheduler.commit(request, token_ids, bool(emitted.done[row]))
            self.counters.num_output_tokens += len(token_ids)
            moved.append(request)
        return moved

    def _collect_prompt_logprobs(self, pieces: list[Piece], emitted: Emitted) -> None:
        place = 0
        for piece in pieces:
            request, most = piece.request, piece.request.params.prompt_logprobs
            if most is not None and not request.finished:
                successors = request.prompt_token_ids[piece.start + 1 : piece.start + piece.length + 1]
                for offset, token in enumerate(successors):
                    entry = self._logprob_entries(emitted.prompt_logprobs, place + offset, token, most)
                    request.prompt_logprobs.append(entry)
            place += piece.length

    def _logprob_entries(self, found: Logprobs, row: int, token: int, most: int) -> dict[int, Logprob]:
        """The token in question and the `most` most probable, by token id."""
        entries = {token: self._logprob(token, found.chosen[row], found.rank[row])}
        for rank in range(min(most, found.top.shape[1])):
            other = int(found.top_tokens[row, rank])
            if other not in entries:
                entries[other] = self._logprob(other, found.top[row, rank], rank + 1)
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

    def close(self) -> None:
        """Drops everything in flight and frees the pools and parameters. The engine is unusable afterwards."""
        self._in_flight.clear()
        for leaf in jax.tree.leaves(self.state):
            leaf.delete()
        self.params = {}


def step_workspace(model: Model, config: EngineConfig, mesh: Mesh, max_model_len: int, params: Any) -> int:
    """Bytes of temporaries of the largest prefill step on one rank, from an abstract compile.

    Pools are not among them: steps update those in place, so the smallest pools give the same answer, and the compile
    comes from the persistent cache whatever memory is free.
    """
    geometry = model.geometry(config.block_size, config.ssm_dtype)
    blocks = -(-max_model_len // config.block_size)
    plan = MemoryPlan.of_counts(
        geometry, num_slots=config.max_num_seqs, num_blocks=blocks, num_logit_rows=config.num_logit_rows
    )
    # The variant with prompt_logprobs holds logits of the prompt beside everything else.
    options = dataclasses.replace(_full_options(model, config), prompt_logprobs=True)
    state = jax.eval_shape(lambda: empty_state(geometry, plan, config, max_model_len))
    params, state = (_with_shardings(tree, mesh) for tree in (params, state))
    batch = packing.pack_prefill([], tokens=config.max_num_batched_tokens, rows=config.prefill_rows)
    prefill = build_steps(model, mesh, options, params, state).prefill(options)
    return prefill.lower(params, state, batch).compile().memory_analysis().temp_size_in_bytes


def _full_options(model: Model, config: EngineConfig) -> StepOptions:
    most = min(config.max_logprobs, model.vocab_size)
    return StepOptions(full=True, max_logprobs=most, state_layout=config.state_layout)


def _with_shardings(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        sharding.shardings_of(tree, mesh),
    )
