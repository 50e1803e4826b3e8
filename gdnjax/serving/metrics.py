"""What an engine has done, as numbers for `LLM.stats()` and for the log."""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Iterator

import numpy as np

from gdnjax.serving.request import Request

WINDOW = 10.0
"""Seconds over which throughput is measured, and between two lines of the log."""

RECENT = 1024
"""Finished requests whose times are kept for percentiles."""

PERCENTILES = (50, 90, 99)


@dataclasses.dataclass
class Counters:
    """What the engine has done since it was built. Padded tokens are places of steps that held nothing."""

    num_requests: int = 0
    num_turns: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_padded_tokens: int = 0
    num_device_reads: int = 0


@dataclasses.dataclass
class Seconds:
    """Time of the host since the engine was built, by what it did.

    plan        the scheduler's decisions.
    pack        making numpy batches of them.
    dispatch    handing batches to the device.
    read        waiting for the device and copying what it emitted.
    commit      taking tokens over, without making text of them.
    detokenise  making text.
    """

    plan: float = 0.0
    pack: float = 0.0
    dispatch: float = 0.0
    read: float = 0.0
    commit: float = 0.0
    detokenise: float = 0.0


class Metrics:
    """Counters, clocks and recent times of one engine."""

    def __init__(self):
        self.counters = Counters()
        self.seconds = Seconds()
        self.started = time.monotonic()
        self._last_line = self.started
        self._produced: collections.deque[tuple[float, int]] = collections.deque()
        self._first_token: collections.deque[float] = collections.deque(maxlen=RECENT)
        self._per_token: collections.deque[float] = collections.deque(maxlen=RECENT)

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

    def finished(self, request: Request) -> None:
        """A request has ended; its times count towards the percentiles."""
        if request.first_token_time is None or request.finished_time is None:
            return
        self._first_token.append(request.first_token_time - request.arrival_time)
        later = len(request.output_token_ids) - 1
        if later > 0:
            self._per_token.append((request.finished_time - request.first_token_time) / later)

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
