"""What Prometheus is told: vLLM's names under `vllm:`, so that routers and dashboards work as they are, and what is
this engine's own under `gdnjax:`.

Everything is read when it is asked for, and without waiting for the engine: a scrape is answered while a step compiles.
So numbers of one scrape may be of either side of a turn.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from gdnjax.serving.async_llm import AsyncLLM

HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": ("time_to_first_token", "From arrival to the first output token."),
    "vllm:inter_token_latency_seconds": ("inter_token_latency", "Between two turns that brought a stream tokens."),
    "vllm:request_time_per_output_token_seconds": ("time_per_output_token", "Mean of a request, behind its first."),
    "vllm:e2e_request_latency_seconds": ("latency", "From arrival to the end."),
    "vllm:request_queue_time_seconds": ("queue_time", "From arrival until the prompt's first tokens were dispatched."),
    "vllm:request_prefill_time_seconds": ("prefill_time", "From then to the first output token."),
    "vllm:request_decode_time_seconds": ("decode_time", "From the first output token to the end."),
    "vllm:request_inference_time_seconds": ("inference_time", "From the first dispatch to the end."),
    "vllm:request_prompt_tokens": ("num_prompt_tokens", "Tokens of prompts."),
    "vllm:request_generation_tokens": ("num_output_tokens", "Output tokens of samples."),
    "vllm:request_params_n": ("num_samples", "Samples that were asked for of a prompt."),
    "vllm:request_params_max_tokens": ("max_tokens", "The most output tokens that a sample may have."),
    "vllm:iteration_tokens_total": ("turn_tokens", "Tokens that a turn computed."),
}
"""Metric -> the engine's histogram (gdnjax.serving.metrics.HISTOGRAMS) and what it is of."""

FINISHED = ("stop", "length", "abort", "error")
"""vLLM's reasons for an end. What a deadline ended is an "abort" there."""


def make_registry(llm: AsyncLLM, model_name: str) -> CollectorRegistry:
    """A registry of its own with the metrics of an engine, under the label model_name."""
    registry = CollectorRegistry()
    registry.register(_Engine(llm, model_name))
    return registry


class _Engine(Collector):
    """Reads an engine. Numbers that change meanwhile are each right at some moment."""

    def __init__(self, llm: AsyncLLM, model_name: str):
        self._llm, self._model_name = llm, model_name

    def describe(self) -> Iterable[Metric]:
        """Nothing: names need not be looked up before they are asked for."""
        return []

    def collect(self) -> Iterator[Metric]:
        yield from self._load()
        yield from self._tokens()
        yield from self._ended()
        yield from self._speculation()
        yield from self._histograms()
        yield self._cache_config()
        yield from self._own()
        yield from self._host_tier()

    def _gauge(self, name: str, text: str, value: int | float) -> Metric:
        found = GaugeMetricFamily(name, text, labels=["model_name"])
        found.add_metric([self._model_name], value)
        return found

    def _counter(self, name: str, text: str, value: int | float) -> Metric:
        return self._counters(name, text, None, {None: value})

    def _counters(self, name: str, text: str, label: str | None, values: Mapping[Any, int | float]) -> Metric:
        found = CounterMetricFamily(name, text, labels=["model_name", *([label] if label else [])])
        for value, count in values.items():
            found.add_metric([self._model_name, *([str(value)] if label else [])], count)
        return found

    def _load(self) -> Iterator[Metric]:
        engine = self._llm.llm.engine
        scheduler = engine.scheduler
        waiting = len(scheduler.waiting) + len(scheduler.parked)
        yield self._gauge("vllm:num_requests_running", "Requests that have a slot.", len(scheduler.running))
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait for one.", waiting)
        blocks = scheduler.allocator.blocks
        used = blocks.num_used - scheduler.cache.num_evictable_blocks
        yield self._gauge(
            "vllm:kv_cache_usage_perc", "Share of the blocks that requests use; 1: all.", used / blocks.size
        )
        yield self._counter("vllm:num_preemptions", "Requests sent back to the queue.", scheduler.num_preemptions)

    def _tokens(self) -> Iterator[Metric]:
        engine = self._llm.llm.engine
        computed, cache = engine.counters.num_prompt_tokens, engine.scheduler.cache.counters
        yield self._counter("vllm:prompt_tokens", "Prompt tokens, cached ones too.", computed + cache.hit_tokens)
        yield self._counter("vllm:prompt_tokens_cached", "Those that the prefix cache had.", cache.hit_tokens)
        yield self._counter("vllm:prefix_cache_queries", "Tokens that it was asked for.", cache.queried_tokens)
        yield self._counter("vllm:prefix_cache_hits", "Tokens that it had.", cache.hit_tokens)
        yield self._counter("vllm:generation_tokens", "Output tokens.", engine.counters.num_output_tokens)

    def _ended(self) -> Iterator[Metric]:
        ended = dict(self._llm.llm.engine.counters.num_ended)
        yield self._counters("gdnjax:requests_ended", "Samples that have ended.", "reason", ended)
        ended["abort"] = ended.get("abort", 0) + ended.pop("timeout", 0)
        counts = {reason: ended.get(reason, 0) for reason in FINISHED}
        yield self._counters("vllm:request_success", "Samples that have ended.", "finished_reason", counts)

    def _speculation(self) -> Iterator[Metric]:
        engine = self._llm.llm.engine
        if not engine.config.num_speculative_tokens:
            return
        counters = engine.counters
        accepted = dict(enumerate(list(counters.accepted_at)))
        kept = counters.num_accepted_draft_tokens
        yield self._counter("vllm:spec_decode_num_drafts", "Rows of decode steps.", counters.num_decode_rows)
        yield self._counter("vllm:spec_decode_num_draft_tokens", "Verified drafts.", counters.num_draft_tokens)
        yield self._counter("vllm:spec_decode_num_accepted_tokens", "Drafts that were kept.", kept)
        name = "vllm:spec_decode_num_accepted_tokens_per_pos"
        yield self._counters(name, "The same, by their place in a row.", "position", accepted)

    def _histograms(self) -> Iterator[Metric]:
        histograms = self._llm.llm.engine.metrics.histograms
        for name, (source, text) in HISTOGRAMS.items():
            histogram, buckets, below = histograms[source], [], 0
            for bound, count in zip([*map(str, histogram.bounds), "+Inf"], histogram.counts(), strict=True):
                below += count
                buckets.append((bound, below))
            found = HistogramMetricFamily(name, text, labels=["model_name"])
            found.add_metric([self._model_name], buckets, histogram.total)
            yield found

    def _cache_config(self) -> Metric:
        """As vLLM says it: a gauge of value 1 whose labels are the settings."""
        config, allocator = self._llm.llm.config, self._llm.llm.engine.scheduler.allocator
        labels = {
            "model_name": self._model_name,
            "block_size": config.block_size,
            "num_gpu_blocks": allocator.blocks.size,
            "num_slots": allocator.slots.size,
            "cache_dtype": config.kv_cache_dtype,
            "enable_prefix_caching": config.enable_prefix_caching,
        }
        found = GaugeMetricFamily("vllm:cache_config_info", "The caches' settings.", labels=list(labels))
        found.add_metric([str(value) for value in labels.values()], 1)
        return found

    def _own(self) -> Iterator[Metric]:
        llm = self._llm
        engine = llm.llm.engine
        scheduler, metrics, counters = engine.scheduler, engine.metrics, engine.counters
        allocator, cache = scheduler.allocator, scheduler.cache
        running = list(scheduler.running)
        gauges = {
            "slots": ("Slots.", allocator.slots.size),
            "slots_used": ("Slots of running requests.", allocator.slots.num_used - cache.num_states),
            "blocks": ("Blocks.", allocator.blocks.size),
            "blocks_used": ("Blocks of running requests.", allocator.blocks.num_used - cache.num_evictable_blocks),
            "cached_states": ("Checkpoints that the prefix cache holds.", cache.num_states),
            "cached_blocks": ("Blocks that it holds.", cache.num_blocks),
            "tombstones": ("Runs of cached blocks whose state is gone.", cache.num_tombstones),
            "pending_rows": ("Accepted tokens to fold.", sum(max(0, r.num_settled - r.num_folded) for r in running)),
            "parked_requests": ("Requests that wait for the trial of others.", len(scheduler.parked)),
            "streams": ("Streams that have not ended.", llm.num_unfinished),
            "engine_failed": ("1 where the engine's thread has failed.", float(llm.failure is not None)),
        }
        for name, (text, value) in gauges.items():
            yield self._gauge(f"gdnjax:{name}", text, value)
        counts = {
            "requests": ("Samples that were queued.", counters.num_requests),
            "turns": ("Turns that were dispatched.", counters.num_turns),
            "computed_prompt_tokens": ("Prompt tokens without cached ones.", counters.num_prompt_tokens),
            "padded_tokens": ("Places of steps that held nothing.", counters.num_padded_tokens),
            "compilations": ("Times that a step was compiled.", engine.num_compilations),
            "start_overs": ("Turns that were cut off, so that all began anew.", counters.num_start_overs),
        }
        for name, (text, value) in counts.items():
            yield self._counter(f"gdnjax:{name}", text, value)
        cached = dataclasses.asdict(cache.counters)
        yield self._counters(
            "gdnjax:prefix_cache_events", "Tokens, blocks and states, by what befell them.", "event", cached
        )
        seconds = dataclasses.asdict(metrics.seconds)
        yield self._counters("gdnjax:host_seconds", "The host's time, by what it did.", "part", seconds)

    def _host_tier(self) -> Iterator[Metric]:
        host = self._llm.llm.engine.scheduler.cache.host
        if host is None:
            return
        yield self._gauge("gdnjax:host_cache_bytes", "Room of the host tier, of one rank.", host.sizes.capacity_bytes)
        yield self._gauge("gdnjax:host_cache_bytes_used", "Bytes that are there.", host.used_bytes)
        yield self._gauge("gdnjax:host_cache_blocks", "Blocks that are there.", host.num_blocks)
        yield self._gauge("gdnjax:host_cache_states", "States that are there.", host.num_states)
        counters = dataclasses.asdict(host.counters)
        yield self._counters("gdnjax:host_cache_events", "What the host tier has done.", "event", counters)
