"""The device under an engine: the pools, the jitted steps, and what a plan becomes there.

The only place that reads the device is `Runner.read`.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import Mesh

from gdnjax import backend
from gdnjax.batch import Emitted
from gdnjax.config import EngineConfig
from gdnjax.memory import HostSizes, MemoryPlan
from gdnjax.models import Model, engine_geometry
from gdnjax.progress import Progress
from gdnjax.sampling_params import SamplingParams
from gdnjax.serving import packing, planning
from gdnjax.serving.host_store import HostStore
from gdnjax.serving.metrics import Counters, Metrics
from gdnjax.serving.plan import Admission, Growth, Moves, Piece, Plan, Seal, max_growth
from gdnjax.serving.processes import Call, Followers
from gdnjax.serving.request import Request
from gdnjax.serving.structured import masks_of
from gdnjax.shapes import Params
from gdnjax.state import ServeState, empty_state, shardings_of
from gdnjax.step import StepOptions, Steps, build_word_steps
from gdnjax.transfer import build_transfers
from gdnjax.words import FlatParams

log = logging.getLogger("gdnjax")

MODEL_STEPS = ("prefill", "decode", "seal")
"""Steps that take parameters."""

AHEAD = 8
"""Steps that a follower dispatches before it looks whether the first of them has failed."""


@dataclasses.dataclass(frozen=True)
class InFlight:
    """A dispatched turn whose tokens have not been read."""

    plan: Plan
    prefill: Emitted | None
    decode: Emitted | None


class Runner:
    """One model and its pools. `metrics` counts what is dispatched and read; the engine puts its own there.

    `host_sizes` is the host tier that the scheduler is to plan for; None: there is none. `followers` are other
    processes that have a part of the mesh, and do whatever this one does.
    """

    host_sizes: HostSizes | None = None
    _host: HostStore | None = None

    def __init__(
        self,
        model: Model,
        params: Params,
        mesh: Mesh,
        config: EngineConfig,
        plan: MemoryPlan,
        max_model_len: int,
        followers: Followers | None = None,
    ):
        self.model: Model = model
        self.params = params
        self.mesh: Mesh = mesh
        self.config: EngineConfig = config
        self._followers = followers
        self._followed: collections.deque[Any] = collections.deque()
        self.metrics: Metrics = Metrics()
        # Of requests that had to wait for it: what is compiled before they come is not among it.
        self.compile_seconds: float = 0.0
        self._plain, self._full = planning.plain_options(config), planning.full_options(model, config)
        self._with_prompt = dataclasses.replace(self._full, prompt_logprobs=True)
        geometry = engine_geometry(model, config)

        def empty():
            return empty_state(geometry, plan, config, max_model_len)

        shardings = shardings_of(jax.eval_shape(empty), mesh)
        # Kept, since pools that are made anew must not be compiled anew.
        self._empty = jax.jit(empty, out_shardings=shardings)
        self.state: ServeState = self._empty()
        self.steps: Steps = build_word_steps(model, mesh, self._plain, params, self.state)
        self.host_sizes = plan.host
        if plan.host is not None:
            self._host = HostStore(build_transfers(mesh, self.state, backend.host_memory(mesh.devices.flat[0])))

    @property
    def params(self) -> Params:
        """The parameters. Replaced as a whole, never changed in place."""
        return self._params

    @params.setter
    def params(self, params: Params) -> None:
        self._params, self._flat_params = params, FlatParams.of(params)

    @property
    def needs_state(self) -> bool:
        """Whether a cached prefix can be gone on from only where the state behind it was kept."""
        return self.state.cache.spec.needs_state

    @property
    def _keeps_states(self) -> bool:
        return self.config.keeps_states(self.state.cache.spec)

    @property
    def counters(self) -> Counters:
        return self.metrics.counters

    @property
    def num_compilations(self) -> int:
        """Times a step was traced and compiled. Constant after warm-up."""
        return self.steps.num_traces() + (self._host.num_traces if self._host else 0)

    def dispatch(self, plan: Plan) -> InFlight:
        """Sends a plan to the device without waiting for anything."""
        self.counters.num_turns += 1
        if plan.moves is not None:
            self.move(plan.moves)
        self._seal(plan.seals)
        self._admit(plan.admitted)
        self._fill_masks(plan.masked)
        prefill = self._prefill(plan) if plan.pieces else None
        decode = self._decode(plan) if plan.decoding else None
        turn = InFlight(
            plan, _wanted(prefill, [piece.request for piece in plan.pieces]), _wanted(decode, plan.decoding)
        )
        self._start_copies(turn)
        return turn

    def read(self, turn: InFlight) -> tuple[Emitted | None, Emitted | None]:
        """What a turn emitted. The one place where the host waits for the device."""
        self.counters.num_device_reads += 1
        blaming = contextlib.nullcontext() if self._followers is None else self._followers.blaming()
        with self.metrics.timed("read"), blaming:
            return jax.device_get((turn.prefill, turn.decode))

    def start_over(self, unread: Iterable[InFlight]) -> None:
        """Empty pools in the place of whatever is left of the old ones; `unread` turns are given up."""
        self.give_up(unread)
        if self._followers is None:
            self._empty_state()
        else:
            self._followers.start_over(self._empty_state)

    def _empty_state(self) -> None:
        self._followed.clear()
        self._forget_host()
        self._delete_state()
        self.state = self._empty()

    def replace_state(self, load: Callable[[ServeState], ServeState]) -> None:
        """Other pools in the place of these, and an empty host tier. `load` gets the old ones with their buffers freed,
        for their shapes and places.
        """
        self._forget_host()
        self._delete_state()
        self.state = load(self.state)

    def give_up(self, turns: Iterable[InFlight]) -> None:
        """Waits for turns that nobody will read: what they need must not be taken from under them."""
        for turn in turns:
            try:
                wait_for([turn])
            except Exception:
                log.exception("a turn that is given up has failed on the device")

    def close(self) -> None:
        """Frees the pools and parameters, in all processes."""
        if self._followers is not None:
            self._followers.close()
        self._forget_host()
        self._delete_state()
        self.params = {}

    def _forget_host(self) -> None:
        if self._host is not None:
            self._host.clear()

    def move(self, moves: Moves) -> None:
        """What goes to the host and comes back. Waits for nothing, unless more is on its way than was planned for."""
        assert self._host is not None
        self._host.drop(moves.dropped)
        self._seal(moves.seals)
        with self.metrics.timed("move"):
            self._host.spill(self.state, moves.spills)
            self.state = self._host.restore(self.state, moves.restores)

    def _delete_state(self) -> None:
        for leaf in jax.tree.leaves(self.state):
            if not leaf.is_deleted():
                leaf.delete()

    def _start_copies(self, turn: InFlight) -> None:
        """Has the device send home what `read` will look for, as soon as it is there. Waits for nothing."""
        for leaf in jax.tree.leaves((turn.prefill, turn.decode)):
            leaf.copy_to_host_async()

    def _run(self, call: Call) -> Any:
        traces, began = self.num_compilations, time.monotonic()
        with self.metrics.timed("dispatch"):
            result = self._call(call) if self._followers is None else self._followers.run(call, self._call)
        if self.num_compilations != traces:
            self.compile_seconds += time.monotonic() - began
        return result

    def _call(self, call: Call) -> Any:
        step, arguments = self._step(call)
        return step(*arguments, self.state, call.batch)

    def _step(self, call: Call) -> tuple[Any, tuple[Any, ...]]:
        """The jitted step, and what it takes before the state."""
        step = getattr(self.steps, call.step)
        step = step if call.options is None else step(call.options)
        return step, (self._flat_params,) if call.step in MODEL_STEPS else ()

    def follow(self, call: Call) -> None:
        """Does what process 0 has sent, and reads nothing. Raises what steps before it have raised on the device."""
        result = self._call(call)
        self.state = result if isinstance(result, ServeState) else result[0]
        if not isinstance(result, ServeState):
            self._followed.append(result[1].words)
        if len(self._followed) > AHEAD:
            jax.block_until_ready(self._followed.popleft())

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
            batch = packing.pack_admissions(
                admissions, rows=self.config.prefill_rows, table_width=self._table_width, tails=self._keeps_states
            )
        return Call("admit", batch)

    @property
    def _table_width(self) -> int:
        return self.state.slots.block_table.shape[1]

    def _count_calls(self, requests: list[Request]) -> list[Call]:
        """What fills the count rows of those that have one."""
        with self.metrics.timed("pack"):
            batches = packing.pack_counts(requests, self.model.vocab_size, rows=self.config.prefill_rows)
        return [Call("fill_counts", batch) for batch in batches]

    def _logit_row_call(self, request: Request | None) -> Call:
        width = self.state.logit_rows.bias.shape[1]
        with self.metrics.timed("pack"):
            batch = packing.pack_logit_row(request, self.model.vocab_size, width)
        return Call("fill_logit_row", batch)

    def _fill_masks(self, masked: Sequence[Request]) -> None:
        if masked:
            rows = packing.bucket_for(len(masked), self.config.decode_buckets)
            self.state = self._run(self._mask_call(masked, rows))

    def _mask_call(self, masked: Sequence[Request], rows: int) -> Call:
        with self.metrics.timed("pack"):
            masks = masks_of([request.matcher for request in masked if request.matcher is not None])
            batch = packing.pack_masks(masks, rows=rows, vocab_size=self.model.vocab_size, ranks=self.model.tp)
        return Call("fill_masks", batch)

    def _prefill(self, plan: Plan) -> Emitted:
        pieces = plan.pieces
        # A prefill step draws a few rows only, so it has no variant with the plain sampler.
        wants_prompt = any(piece.request.wants_prompt_logprobs for piece in pieces)
        options = self._with_prompt if wants_prompt else self._full
        length = sum(piece.length for piece in pieces)
        tokens = packing.prefill_bucket(pieces, self._prefill_buckets(options), self.config.prefill_rows_of)
        self.counters.num_prompt_tokens += length
        self.counters.num_padded_tokens += tokens - length
        self.state, emitted = self._run(self._prefill_call(options, pieces, tokens, plan.mask_rows))
        return emitted

    def _prefill_call(
        self, options: StepOptions, pieces: list[Piece], tokens: int, mask_rows: Mapping[Request, int] | None = None
    ) -> Call:
        with self.metrics.timed("pack"):
            batch = packing.pack_prefill(
                pieces,
                tokens=tokens,
                rows=self.config.prefill_rows_of(tokens),
                table_width=self._table_width,
                checkpoints=self._keeps_states,
                mask_rows=mask_rows or {},
            )
        return Call("prefill", batch, options)

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
        call = self._decode_call(options, requests, plan.growth, plan.bounds, rows, plan.mask_rows)
        self.state, emitted = self._run(call)
        return emitted

    def _decode_call(
        self,
        options: StepOptions,
        requests: list[Request],
        growth: dict[int, list[Growth]],
        bounds: list[int],
        rows: int,
        mask_rows: Mapping[Request, int] | None = None,
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
                mask_rows=mask_rows or {} if options.full else None,
            )
        return Call("decode", batch, options)

    def _seal(self, seals: Sequence[Seal]) -> None:
        rows = self.config.prefill_rows
        for start in range(0, len(seals), rows):
            self.state = self._run(self._seal_call(seals[start : start + rows]))

    def _seal_call(self, seals: Sequence[Seal]) -> Call:
        with self.metrics.timed("pack"):
            batch = packing.pack_seals(seals, rows=self.config.prefill_rows)
        return Call("seal", batch)

    def warm_up(self) -> None:
        """Compiles every step, side by side, and runs each on padding, which changes nothing but what is null."""
        calls = {"admit": self._admit_call([]), "logit row": self._logit_row_call(None)}
        calls["counts"] = Call("fill_counts", packing.count_batch([], [], rows=self.config.prefill_rows))
        if self._keeps_states:
            calls["seal"] = self._seal_call([])
        calls |= {f"masks {rows}": self._mask_call([], rows) for rows in self.config.decode_buckets}
        for options in (self._full, self._with_prompt):
            for tokens in self._prefill_buckets(options):
                kind = "prompt log-probabilities" if options.prompt_logprobs else "prefill"
                calls[f"{kind} {tokens}"] = self._prefill_call(options, [], tokens)
        for options in self._decode_options():
            kind = f"decode, {'full' if options.full else 'plain'} sampler, {options.num_drafts} drafts,"
            for rows in self.config.decode_buckets:
                calls[f"{kind} {rows}"] = self._decode_call(options, [], {}, [], rows)
        self._compile(calls)

    def prepare(self, rows: Iterable[int], params: Iterable[SamplingParams] = (SamplingParams(),)) -> None:
        """Compiles what requests of these parameters need, so many of them at once, for engines that do not warm up.

        Every prefill bucket, and the decode buckets of `rows`; each step runs on padding once, as in the warm-up.
        Log-probabilities of prompts are not among it.
        """
        params = list(params)
        calls = {"admit": self._admit_call([])}
        if any(each.needs_logit_row for each in params):
            calls["logit row"] = self._logit_row_call(None)
        if any(each.needs_counts for each in params):
            calls["counts"] = Call("fill_counts", packing.count_batch([], [], rows=self.config.prefill_rows))
        if self._keeps_states:
            calls["seal"] = self._seal_call([])
        sizes = sorted({packing.bucket_for(count, self.config.decode_buckets) for count in rows})
        if any(each.structured_outputs is not None for each in params):
            calls |= {f"masks {size}": self._mask_call([], size) for size in sizes}
        for tokens in self.config.prefill_buckets:
            calls[f"prefill {tokens}"] = self._prefill_call(self._full, [], tokens)
        wanted = {self.config.batch_invariant or each.needs_full_sampler for each in params}
        for options in self._decode_options():
            if options.full in wanted:
                for size in sizes:
                    name = f"decode, {'full' if options.full else 'plain'} sampler, {options.num_drafts} drafts, {size}"
                    calls[name] = self._decode_call(options, [], {}, [], size)
        self._compile(calls)

    def _compile(self, calls: dict[str, Call]) -> None:
        """Compiles steps side by side, and runs each."""
        if self._followers is not None:
            self._followers.compile(list(calls.values()))
        began = time.monotonic()
        progress = Progress("compiling steps", len(calls), "step")
        # Tracing holds Python's lock; the compiler does not, and what it has made is there when the step is called.
        compilers = ThreadPoolExecutor(max_workers=os.cpu_count())
        try:
            compiled = {}
            for name, call in calls.items():
                progress.note(f"tracing {name}")
                compiled[name] = compilers.submit(self._lower(call).compile)
            if self._followers is not None:
                # Whoever runs a step waits for the others, and sums over devices wait for half a minute at most.
                progress.note("all, in all processes")
                concurrent.futures.wait(compiled.values())
                self._followers.ready()
            for name, call in calls.items():
                progress.note(name)
                while not concurrent.futures.wait([compiled[name]], timeout=1.0).done:
                    progress.note(name)
                compiled[name].result()
                result = self._run(call)
                self.state = result if isinstance(result, ServeState) else result[0]
                progress.update()
            if self._host is not None:
                progress.note("copies between device and host")
                self.state = self._host.warm_up(self.state)
        finally:
            # Whoever interrupts does not wait for the compiler.
            compilers.shutdown(wait=False, cancel_futures=True)
            progress.close()
        jax.block_until_ready(self.state)
        log.info("compiled %d steps in %.1f s", len(calls), time.monotonic() - began)

    def _lower(self, call: Call) -> Any:
        step, arguments = self._step(call)
        return step.lower(*arguments, self.state, call.batch)

    def compile(self, calls: Iterable[Call]) -> None:
        """Compiles steps side by side, and runs none of them."""
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as compilers:
            for future in [compilers.submit(self._lower(call).compile) for call in calls]:
                future.result()

    def _decode_options(self) -> list[StepOptions]:
        """What decode steps are compiled with."""
        samplers = (self._full,) if self.config.batch_invariant else (self._plain, self._full)
        drafts = self.config.num_speculative_tokens
        choices = {drafts, 0} if self.config.adaptive_speculation else {drafts}
        return [
            dataclasses.replace(options, num_drafts=drafts)
            for options, drafts in itertools.product(samplers, sorted(choices))
        ]


def _wanted(emitted: Emitted | None, requests: Iterable[Request]) -> Emitted | None:
    """What is to come to the host of what a step emitted: log-probabilities only where one of the requests has them."""
    if emitted is None:
        return None
    params = [request.params for request in requests]
    return dataclasses.replace(
        emitted,
        logprobs=emitted.logprobs if any(each.logprobs is not None for each in params) else None,
        prompt_logprobs=emitted.prompt_logprobs if any(each.prompt_logprobs is not None for each in params) else None,
    )


def wait_for(turns: Iterable[InFlight]) -> None:
    """Returns when the device is through with these turns."""
    for turn in turns:
        jax.block_until_ready((turn.prefill, turn.decode))
