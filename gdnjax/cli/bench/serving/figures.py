"""Figures of a run, with the names of vLLM's benchmarks, and how those of two settings compare."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gdnjax.cli.bench.serving.driver import Log, Trace
from gdnjax.serving.outputs import acceptance_rate, mean_acceptance_length

PERCENTILES = (50, 90, 99)

Figures = dict[str, float | int | None]
"""By name; None where there is nothing to measure. Names say the unit: `_ms`, and rates are per second."""

HOST_WORK = ("plan", "pack", "commit")
"""What a step costs the host apart from dispatching it and waiting for it."""

HOST_PARTS = (*HOST_WORK, "detokenise", "dispatch", "read")


def time_to_first_token(trace: Trace) -> float:
    return trace.times[0] - trace.arrival


def time_per_output_token(trace: Trace) -> float | None:
    """Mean seconds between output tokens, the first one aside; None for a single token."""
    if trace.output_tokens < 2:
        return None
    return (trace.times[-1] - trace.times[0]) / (trace.output_tokens - 1)


def inter_token_latencies(trace: Trace) -> list[float]:
    """Seconds between tokens; those that one step brought are one."""
    return np.diff(trace.times).tolist()


def latencies(traces: Sequence[Trace]) -> dict[str, list[float]]:
    """Seconds by kind: ttft, tpot and e2el of each request, itl of each token after the first."""
    return {
        "ttft": [time_to_first_token(trace) for trace in traces],
        "tpot": [value for trace in traces if (value := time_per_output_token(trace)) is not None],
        "itl": [value for trace in traces for value in inter_token_latencies(trace)],
        "e2el": [trace.times[-1] - trace.arrival for trace in traces],
    }


@dataclasses.dataclass(frozen=True)
class Goals:
    """What a request must keep to be a good one: milliseconds at most; None: anything."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2el_ms: float | None = None

    def __bool__(self) -> bool:
        return any(value is not None for value in dataclasses.astuple(self))

    def are_met(self, trace: Trace) -> bool:
        """Whether a request keeps them all. One of a single token has no TPOT to keep."""
        found = {
            "ttft_ms": time_to_first_token(trace),
            "tpot_ms": time_per_output_token(trace),
            "e2el_ms": trace.times[-1] - trace.arrival,
        }
        limits = dataclasses.asdict(self)
        return all(
            limits[name] is None or value is None or value * 1e3 <= limits[name] for name, value in found.items()
        )


def of_requests(log: Log, goals: Goals | None = None) -> Figures:
    """The figures of a run that its requests tell alone, whoever served them. `goodput` is the rate of those that keep
    the `goals`.
    """
    inputs = sum(trace.prompt_tokens for trace in log.traces)
    outputs = sum(trace.output_tokens for trace in log.traces)
    found: Figures = {
        "duration": log.seconds,
        "completed": len(log.traces),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(log.traces) / log.seconds,
        "input_throughput": inputs / log.seconds,
        "output_throughput": outputs / log.seconds,
        "total_token_throughput": (inputs + outputs) / log.seconds,
    }
    if goals:
        found["goodput"] = sum(map(goals.are_met, log.traces)) / log.seconds
    for kind, seconds in latencies(log.traces).items():
        found |= {f"{name}_{kind}_ms": value for name, value in spread(seconds).items()}
    running = [sample.running for sample in log.samples]
    # A sample holds from the one before it on.
    spans = np.diff([0.0, *(sample.time for sample in log.samples)])
    cached = sum(trace.cached_tokens for trace in log.traces)
    return found | {
        "mean_running": float(np.average(running, weights=spans)),
        "max_running": max(running),
        "cached_tokens": cached,
        "cached_share": cached / max(1, inputs),
    }


def of_log(log: Log) -> Figures:
    """All figures of a run on an engine."""
    found = of_requests(log)
    del found["cached_share"]
    found["preemptions"] = log.stats["num_preemptions"]
    cache, steps = log.stats["prefix_cache"], log.stats["num_turns"]
    for name in ("hit", "lost"):
        found[f"{name}_rate"] = cache[f"{name}_tokens"] / max(1, cache["queried_tokens"])
    accepted, drafted = log.stats["num_accepted_draft_tokens"], log.stats["num_draft_tokens"]
    found |= {
        "draft_acceptance": acceptance_rate(accepted, drafted),
        "tokens_per_step": mean_acceptance_length(accepted, log.stats["num_decode_rows"]),
    }
    found |= {f"{part}_step_ms": log.stats["seconds"][part] / steps * 1e3 for part in HOST_PARTS}
    found["steps"] = steps
    found["compilations"] = log.stats["num_compilations"]
    return found


def spread(seconds: Sequence[float]) -> Figures:
    """Mean and percentiles in milliseconds."""
    names = ["mean", "median", *(f"p{p}" for p in PERCENTILES[1:])]
    if not len(seconds):
        return dict.fromkeys(names)
    values = [np.mean(seconds), *np.percentile(seconds, PERCENTILES)]
    return {name: float(value) * 1e3 for name, value in zip(names, values, strict=True)}


def of_steps(steps: Sequence[Mapping[str, float]]) -> dict[str, Figures]:
    """The spread of each part of a step on the host, and of plan, pack and commit together."""
    parts = {part: spread([step[part] for step in steps]) for part in HOST_PARTS}
    together = {" + ".join(HOST_WORK): spread([sum(step[part] for part in HOST_WORK) for step in steps])}
    return together | parts


def medians(runs: Sequence[Figures]) -> Figures:
    """The median over repetitions, figure by figure."""
    found: Figures = {}
    for name in runs[0]:
        values = [value for run in runs if (value := run[name]) is not None]
        found[name] = statistics.median(values) if values else None
    return found


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A figure of one setting over that of another: the median over pairs of repetitions, and their range."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        span = "" if self.least == self.most else f" [{self.least:.2f}, {self.most:.2f}]"
        return f"{self.median:.2f}x{span}"

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def ratios(before: Sequence[Figures], after: Sequence[Figures]) -> dict[str, Ratio]:
    """What `after` is of `before`, for every figure that is above 0 in all repetitions of both.

    Repetitions are taken in pairs, since those ran one after the other.
    """
    found = {}
    for name in before[0]:
        pairs = [(old[name], new[name]) for old, new in zip(before, after, strict=True)]
        values = [new / old for old, new in pairs if old and new]
        if len(values) == len(pairs):
            found[name] = Ratio(statistics.median(values), min(values), max(values))
    return found
