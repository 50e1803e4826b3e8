"""What an engine has done, as numbers for `LLM.stats()` and for the log."""

import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gdnjax.serving.outputs import acceptance_rate, mean_acceptance_length
from gdnjax.serving.request import Request

WINDOW = 10.0
"""Seconds over which throughput is measured, and between two lines of the log."""

RECENT = 1024
"""Finished requests whose times are kept for percentiles."""

PERCENTILES = (50, 90, 99)


TOKEN_TIMES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5)
TOKEN_TIMES += (10.0, 20.0, 40.0, 80.0)
FIRST_TIMES = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0)
FIRST_TIMES += (80.0, 160.0, 640.0, 2560.0)
REQUEST_TIMES = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0)
REQUEST_TIMES += (120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
LENGTHS = tuple(float(digit * 10**power) for power in range(7) for digit in (1, 2, 5))
TURN_SIZES = tuple(float(1 << power) for power in range(15))
SAMPLES = (1.0, 2.0, 5.0, 10.0, 20.0)
"""Upper bounds of the buckets of histograms: seconds, tokens, samples. Mostly vLLM's, and smaller times beside them."""

HISTOGRAMS: dict[str, tuple[float, ...]] = {
    "time_to_first_token": FIRST_TIMES,
    "inter_token_latency": TOKEN_TIMES,
    "time_per_output_token": TOKEN_TIMES,
    "latency": REQUEST_TIMES,
    "queue_time": REQUEST_TIMES,
    "prefill_time": REQUEST_TIMES,
    "decode_time": REQUEST_TIMES,
    "inference_time": REQUEST_TIMES,
    "num_prompt_tokens": LENGTHS,
    "num_output_tokens": LENGTHS,
    "max_tokens": LENGTHS,
    "num_samples": SAMPLES,
    "turn_tokens": TURN_SIZES,
}
"""What is observed: of requests when they end, each sample for itself (num_samples once a prompt); of streams
inter_token_latency, between two turns that brought them something; of turns turn_tokens, those that they computed.
"""

UNSORTED = 4096
"""Values that a histogram keeps before it puts them into its buckets."""


class Histogram:
    """How many values came to lie in which bucket: above the bound before it, and at most its own."""

    def __init__(self, bounds: Sequence[float]):
        self.bounds: tuple[float, ...] = tuple(bounds)
        self.total: float = 0.0
        self._counts = np.zeros(len(bounds) + 1, np.int64)
        self._unsorted: list[int | float] = []
        self._lock = threading.Lock()

    def observe(self, value: int | float) -> None:
        """Adds a value; it costs next to nothing, now and then sorting the last ones."""
        self._unsorted.append(value)
        if len(self._unsorted) >= UNSORTED:
            self.counts()

    def counts(self) -> list[int]:
        """How many values each bucket has, the last of them those above all bounds. May be asked for by another thread
        than the one that observes.
        """
        with self._lock:
            # What comes meanwhile stays for the next time.
            values = self._unsorted[: len(self._unsorted)]
            del self._unsorted[: len(values)]
            if values:
                places = np.searchsorted(self.bounds, values)
                self._counts += np.bincount(places, minlength=len(self._counts))
                self.total += sum(values)
            return self._counts.tolist()


@dataclasses.dataclass
class Counters:
    """What the engine has done since it was built. Padded tokens are places of steps that held nothing.

    num_ended        requests that have ended, by finish_reason; those that a deadline ended by "timeout".
    num_start_overs  times that everybody who ran was computed anew, since a turn was cut off.

    Counted where the engine speculates, else 0 and empty:
    num_decode_rows            rows of decode steps that emitted something, each a forward pass for one request.
    num_draft_tokens           drafts that these verified.
    num_accepted_draft_tokens  those of them that became output. What stands behind an end is not counted as kept.
    drafted_at, accepted_at    the same two, draft by draft: entry 0 is the first draft of a row.
    """

    num_requests: int = 0
    num_ended: dict[str, int] = dataclasses.field(default_factory=dict)
    num_turns: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_padded_tokens: int = 0
    num_device_reads: int = 0
    num_start_overs: int = 0
    num_decode_rows: int = 0
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    drafted_at: list[int] = dataclasses.field(default_factory=list)
    accepted_at: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Seconds:
    """Time of the host since the engine was built, by what it did.

    plan        the scheduler's decisions.
    move        handing copies between device and host memory to the device, and waiting where too many are under way.
    pack        making numpy batches of them.
    dispatch    handing batches to the device.
    read        waiting for the device and copying what it emitted.
    commit      taking tokens over, without making text of them.
    detokenise  making text.
    """

    plan: float = 0.0
    move: float = 0.0
    pack: float = 0.0
    dispatch: float = 0.0
    read: float = 0.0
    commit: float = 0.0
    detokenise: float = 0.0


class Metrics:
    """Counters, clocks and recent times of one engine."""

    def __init__(self):
        self.counters: Counters = Counters()
        self.seconds: Seconds = Seconds()
        self.started: float = time.monotonic()
        self._last_line = self.started
        self._produced: collections.deque[tuple[float, int]] = collections.deque()
        self._first_token: collections.deque[float] = collections.deque(maxlen=RECENT)
        self._per_token: collections.deque[float] = collections.deque(maxlen=RECENT)
        self.histograms: dict[str, Histogram] = {name: Histogram(bounds) for name, bounds in HISTOGRAMS.items()}

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time within to the clock of that name."""
        began = time.perf_counter()
        try:
            yield
        finally:
            setattr(self.seconds, name, getattr(self.seconds, name) + time.perf_counter() - began)

    def produced(self, tokens: int) -> None:
        """Output tokens that came just now."""
        self.counters.num_output_tokens += tokens
        now = time.monotonic()
        self._produced.append((now, tokens))
        self._forget(now)

    def speculated(self, drafted: Sequence[int], count: Sequence[int]) -> None:
        """A decode step of a speculating engine, row by row: how many drafts were verified, how many tokens came.

        Rows without tokens were done before the step, and count for nothing.
        """
        counters, tokens = self.counters, np.asarray(count, np.int64)
        emitted = tokens > 0
        drafts, accepted = np.where(emitted, np.asarray(drafted, np.int64), 0), np.maximum(tokens - 1, 0)
        counters.num_decode_rows += int(emitted.sum())
        counters.num_draft_tokens += int(drafts.sum())
        counters.num_accepted_draft_tokens += int(accepted.sum())
        _add_by_position(counters.drafted_at, drafts)
        _add_by_position(counters.accepted_at, accepted)

    def speculation(self) -> dict[str, Any]:
        """How speculation has done since the start, for `LLM.stats()`. None where there is nothing to divide by.

        num_draft_tokens, num_accepted_draft_tokens; draft_acceptance_rate, the one over the other;
        acceptance_per_position, the same for each draft of a row, the first one first; mean_acceptance_length, the
        tokens of a decode row on average, with and without drafts.
        """
        counters = self.counters
        accepted_at = counters.accepted_at + [0] * len(counters.drafted_at)
        return {
            "num_draft_tokens": counters.num_draft_tokens,
            "num_accepted_draft_tokens": counters.num_accepted_draft_tokens,
            "draft_acceptance_rate": acceptance_rate(counters.num_accepted_draft_tokens, counters.num_draft_tokens),
            "acceptance_per_position": [
                acceptance_rate(accepted, drafted)
                for accepted, drafted in zip(accepted_at, counters.drafted_at, strict=False)
            ],
            "mean_acceptance_length": mean_acceptance_length(
                counters.num_accepted_draft_tokens, counters.num_decode_rows
            ),
        }

    def speculation_line(self) -> str:
        """What the log says of speculation: "drafts accepted 71%, 2.9 tokens a step". Empty where none was drafted."""
        found = self.speculation()
        if found["draft_acceptance_rate"] is None:
            return ""
        rate, length = 100 * found["draft_acceptance_rate"], found["mean_acceptance_length"]
        return f"drafts accepted {rate:.0f}%, {length:.1f} tokens a step"

    def finished(self, request: Request) -> None:
        """A request has ended. It is counted, and if it has produced anything, its times are among the percentiles."""
        timed_out = request.finish_reason == "abort" and request.stop_reason == "timeout"
        reason, ended = "timeout" if timed_out else str(request.finish_reason), self.counters.num_ended
        ended[reason] = ended.get(reason, 0) + 1
        self._observe(request)
        if request.first_token_time is None or request.finished_time is None:
            return
        self._first_token.append(request.first_token_time - request.arrival_time)
        later = len(request.output_token_ids) - 1
        if later > 0:
            self._per_token.append((request.finished_time - request.first_token_time) / later)

    def _observe(self, request: Request) -> None:
        """Puts a request that has ended into the histograms, as far as it has come."""
        arrival, scheduled = request.arrival_time, request.first_scheduled_time
        first, end = request.first_token_time, request.finished_time
        later = len(request.output_token_ids) - 1
        between = _between(first, end)
        found = {
            "time_to_first_token": _between(arrival, first),
            "time_per_output_token": between / later if between is not None and later > 0 else None,
            "latency": _between(arrival, end),
            "queue_time": _between(arrival, scheduled),
            "prefill_time": _between(scheduled, first),
            "decode_time": between,
            "inference_time": _between(scheduled, end),
            "num_prompt_tokens": request.prompt_length,
            "num_output_tokens": later + 1,
            "max_tokens": request.max_length - request.prompt_length,
            "num_samples": None if request.index else request.params.n,
        }
        for name, value in found.items():
            if value is not None:
                self.histograms[name].observe(value)

    def _forget(self, now: float) -> None:
        while self._produced and self._produced[0][0] < now - WINDOW:
            self._produced.popleft()

    def output_tokens_per_second(self) -> float:
        """Over the last WINDOW seconds, or since the start if that is shorter."""
        now = time.monotonic()
        self._forget(now)
        return sum(tokens for _, tokens in self._produced) / max(min(WINDOW, now - self.started), 1e-9)

    def padding_waste(self) -> float:
        """Share of the places of all steps that held nothing."""
        counters = self.counters
        used = counters.num_prompt_tokens + counters.num_output_tokens
        return counters.num_padded_tokens / max(1, counters.num_padded_tokens + used)

    def latencies(self) -> dict[str, dict[str, float]]:
        """Percentiles in seconds over the last RECENT finished requests; empty before the first."""
        times = {"time_to_first_token": self._first_token, "time_per_output_token": self._per_token}
        return {
            name: {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES} if values else {}
            for name, values in times.items()
        }

    def line_is_due(self) -> bool:
        """Whether the log has had no line for WINDOW seconds. Asking resets the clock."""
        now = time.monotonic()
        if now - self._last_line < WINDOW:
            return False
        self._last_line = now
        return True


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


def _add_by_position(totals: list[int], numbers: np.ndarray) -> None:
    """Adds 1 to the first n totals for each n of `numbers`; the list grows where it is too short."""
    # Of the rows by their number, those with more than 0, more than 1, ...
    rows = np.bincount(numbers)[::-1].cumsum()[::-1][1:].tolist()
    totals.extend([0] * (len(rows) - len(totals)))
    for position, count in enumerate(rows):
        totals[position] += count
