"""The engines of one process, one at a time: built, prepared, given another scheduler, closed before the next."""

import contextlib
import dataclasses
import gc
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from gdnjax.cli.bench.offline.record import Record
from gdnjax.cli.bench.serving.engines import Arm, Loaded
from gdnjax.config import EngineConfig
from gdnjax.sampling_params import SamplingParams
from gdnjax.serving.allocator import Allocator
from gdnjax.serving.llm import LLM
from gdnjax.serving.scheduler import Scheduler

if TYPE_CHECKING:
    from gdnjax.serving.outputs import RequestMetrics
    from gdnjax.serving.submission import Submission


class DoesNotFit(MemoryError):
    """The device's memory does not hold weights or engine: no section will get any further."""


class Bench:
    """An engine that is open, and what all sections do with it. `configs` has the engines by their drafts, `lower` says
    what a user can lower where the memory is too small.
    """

    def __init__(self, loaded: Loaded, configs: dict[int, EngineConfig], record: Record, lower: str):
        self.loaded, self.configs, self.record, self._lower = loaded, configs, record, lower
        self._rng = np.random.default_rng(0)
        self._drafts: int | None = None
        self._llm: LLM | None = None
        self._prepared: set[int] = set()

    @property
    def llm(self) -> LLM:
        """The engine that is open."""
        if self._llm is None:
            raise RuntimeError("no engine is open")
        return self._llm

    def open(self, drafts: int, batches: Iterable[int]) -> LLM:
        """The engine of so many drafts, with an empty cache and ready for plain requests, so many at once.

        Raises DoesNotFit.
        """
        if self._drafts != drafts:
            self.close()
            self._build(drafts)
        buckets = self.llm.config.decode_buckets
        rows = {min(batch, buckets[-1]) for batch in batches}
        new = {min(size for size in buckets if size >= count) for count in rows} - self._prepared
        if new:
            begin = time.perf_counter()
            with saying_what_does_not_fit(self._lower):
                self.llm.engine.prepare(sorted(new))
                jax.block_until_ready(self.llm.engine.runner.state)
            self._prepared |= new
            seconds = time.perf_counter() - begin
            name = f"rows {', '.join(map(str, sorted(new)))}"
            print(f"k = {drafts}: steps for {name} compiled and run once in {seconds:.1f} s", flush=True)
            earlier = self.record.content["engines"][f"k = {drafts}"]["prepare_seconds"]
            self.record.engine(f"k = {drafts}", prepare_seconds={**earlier, name: seconds}, device=device_memory())
        self.llm.reset_prefix_cache()
        return self.llm

    def _build(self, drafts: int) -> None:
        config = self.configs[drafts]
        loaded = self.loaded.for_arm(Arm(f"k = {drafts}", speculation={"num_speculative_tokens": drafts}))
        begin = time.perf_counter()
        with saying_what_does_not_fit(self._lower):
            self._llm = LLM.from_model(loaded.model, loaded.params, config, max_model_len=config.max_model_len or 0)
            jax.block_until_ready(self._llm.engine.runner.state)
        seconds = time.perf_counter() - begin
        self._drafts, self._prepared = drafts, set()
        plan = self._llm.memory_plan
        print(f"k = {drafts}: engine built in {seconds:.1f} s; a rank's memory:\n{plan}", flush=True)
        self.record.engine(
            f"k = {drafts}",
            build_seconds=seconds,
            prepare_seconds={},
            config=dataclasses.asdict(config),
            memory_plan={**dataclasses.asdict(plan), "total_bytes": plan.total_bytes},
            device=device_memory(),
        )

    def close(self) -> None:
        """Frees the pools of the engine, and what was compiled for it. The parameters stay."""
        if self._llm is not None:
            self._llm.close()
        self._llm, self._drafts, self._prepared = None, None, set()
        gc.collect()
        jax.clear_caches()

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Random tokens that nobody has had before."""
        return self._rng.integers(0, self.loaded.model.vocab_size, (count, length)).tolist()

    @staticmethod
    def greedy(max_tokens: int) -> SamplingParams:
        """All output tokens are produced, whatever the model says."""
        return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)

    def generate(self, prompts: list[list[int]], output_len: int) -> dict[str, Any]:
        """Serves all at once, from submission to the last token. Returns seconds and tokens, and what happened."""
        before = self.happened()
        begin = time.perf_counter()
        outputs = self.llm.generate(prompts, self.greedy(output_len), use_tqdm=False)
        seconds = time.perf_counter() - begin
        prompt_tokens = sum(map(len, prompts))
        output_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        return {
            "requests": len(prompts),
            "seconds": seconds,
            "prompt_tokens": prompt_tokens,
            "cached_tokens": sum(output.num_cached_tokens for output in outputs),
            "output_tokens": output_tokens,
            "output_tokens_per_second": output_tokens / seconds,
            "total_tokens_per_second": (prompt_tokens + output_tokens) / seconds,
            **latencies([output.metrics for output in outputs]),
            **{name: now - before[name] for name, now in self.happened().items()},
        }

    def happened(self) -> dict[str, int]:
        """Counts of what a figure should not have in it, or not unawares."""
        engine = self.llm.engine
        return {"preemptions": engine.scheduler.num_preemptions, "compilations": engine.num_compilations}

    def abort(self, submissions: "list[Submission]") -> None:
        """Ends requests, and waits for what is in flight."""
        for submission in submissions:
            self.llm.abort(submission)
        while self.llm.engine.has_work:
            self.llm.step()

    @contextlib.contextmanager
    def scheduled(self, *, num_blocks: int | None = None, prefix_caching: bool = True) -> Iterator[None]:
        """Another scheduler for the same compiled steps: of fewer blocks, or without a prefix cache.

        Nothing may run, before or after.
        """
        llm = self.llm
        llm.reset_prefix_cache()
        own, plan = llm.engine.scheduler, llm.memory_plan
        config = llm.config
        if not prefix_caching:
            config = dataclasses.replace(config, enable_prefix_caching=False, num_checkpoint_slots=None)
        blocks = min(plan.num_blocks, num_blocks or plan.num_blocks)
        llm.engine.scheduler = Scheduler(
            config, Allocator(plan.num_slots, blocks, plan.num_logit_rows, plan.num_count_rows)
        )
        try:
            yield
        finally:
            llm.engine.scheduler = own


def latencies(metrics: "Sequence[RequestMetrics | None]") -> dict[str, float]:
    """Median milliseconds to the first token, from submission on, and of those behind it; the latter only where there
    are some.
    """
    firsts, others = [], []
    for request in metrics:
        assert request is not None
        assert request.first_token_time is not None
        assert request.finished_time is not None
        firsts.append(request.first_token_time - request.arrival_time)
        if request.num_output_tokens > 1:
            seconds = request.finished_time - request.first_token_time
            others.append(seconds / (request.num_output_tokens - 1))
    found = {"ttft_ms": 1e3 * statistics.median(firsts)}
    return found | ({"tpot_ms": 1e3 * statistics.median(others)} if others else {})


def device_memory() -> dict[str, int]:
    """The allocator's own figures, in bytes; empty where it keeps none."""
    stats = jax.devices()[0].memory_stats() or {}
    return {name: stats[name] for name in ("bytes_in_use", "peak_bytes_in_use", "bytes_limit") if name in stats}


@contextlib.contextmanager
def saying_what_does_not_fit(lower: str) -> Iterator[None]:
    """Raises DoesNotFit, with the flags that are to be lowered, where the device has no memory left."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(
            f"it does not fit into the device's memory: {error}; lower {lower}, or raise --memory-fraction"
        ) from error
