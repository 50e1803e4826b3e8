"""One PNG of a benchmark: how latencies are distributed and what ran when, setting by setting."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

from gdnjax.cli.bench.serving import figures
from gdnjax.cli.bench.serving.driver import Log

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIZE, DPI = (9.6, 6.4), 100
COLORS = ("#d9731a", "#1f5fa8", "#2a8a4a", "#8a4fb0", "#b03a3a", "#5a5a5a", "#b8a020", "#20a0a8")
BINS = 30
"""Spans into which a run is divided for its throughput over time."""


def draw(runs: Mapping[str, Sequence[Log]], file: pathlib.Path) -> None:
    """Draws the runs of each setting, by name, as many as there are COLORS. Latencies are of all repetitions, times of
    the first.
    """
    figure, ((first, between), (running, rate)) = plt.subplots(2, 2, figsize=SIZE, dpi=DPI, layout="constrained")
    for (name, logs), color in zip(runs.items(), COLORS, strict=False):
        found = [figures.latencies(log.traces) for log in logs]
        for axes, kind, scale in ((first, "ttft", 1.0), (between, "itl", 1e3)):
            _distribution(axes, [scale * value for one in found for value in one[kind]], label=name, color=color)
        times = [sample.time for sample in logs[0].samples]
        running.step(times, [sample.running for sample in logs[0].samples], where="pre", label=name, color=color)
        _throughput(rate, logs[0], label=name, color=color)
    first.set(xlabel="time to first token (s)", ylabel="share of requests", ylim=(0, 1.02))
    between.set(xlabel="inter-token latency (ms)", ylabel="share of tokens", ylim=(0, 1.02), xscale="log")
    running.set(xlabel="seconds", ylabel="requests running", ylim=(0, None))
    rate.set(xlabel="seconds", ylabel="output tokens/s", ylim=(0, None))
    for axes in (first, between, running, rate):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    first.legend(fontsize="small", frameon=False, loc="lower right")
    figure.savefig(file)
    plt.close(figure)


def _distribution(axes: Any, values: Sequence[float], **style: Any) -> None:
    """The share of values up to each value. Draws nothing where there are none."""
    if values:
        axes.step(np.sort(values), np.arange(1, len(values) + 1) / len(values), where="post", **style)


def _throughput(axes: Any, log: Log, **style: Any) -> None:
    times, tokens = [sample.time for sample in log.samples], [sample.tokens for sample in log.samples]
    counts, edges = np.histogram(times, bins=BINS, range=(0, log.seconds), weights=tokens)
    axes.stairs(counts / np.diff(edges), edges, **style)
