"""Runs a workload on an engine and notes when what came. The clock is the host's; nothing here waits for the device."""

import dataclasses
import heapq
import itertools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gdnjax.cli.bench.serving.workloads import Conversation
from gdnjax.progress import Progress

if TYPE_CHECKING:
    from gdnjax.sampling_params import SamplingParams
    from gdnjax.serving.llm import LLM

Sampling = Callable[[int], "SamplingParams"]
"""The parameters of a request by its number of output tokens."""


COUNTERS = (
    "num_turns",
    "num_preemptions",
    "num_prompt_tokens",
    "num_output_tokens",
    "num_padded_tokens",
    "num_compilations",
    "num_decode_rows",
    "num_draft_tokens",
    "num_accepted_draft_tokens",
    "drafted_at",
    "accepted_at",
    "prefix_cache",
    "seconds",
)
"""What of `LLM.stats()` only grows; the rest describes a moment."""

GAUGES = ("hit_rate", "cached_blocks", "cached_states")
"""What of its prefix cache describes a moment."""


@dataclasses.dataclass
class Trace:
    """One request as it went. Times in seconds after the start of the run.

    arrival  when it was due: the time that it then waited to be submitted counts, too.
    times    when the host had output tokens: one entry whenever there were more of them.
    """

    conversation: int
    turn: int
    arrival: float
    prompt_tokens: int
    output_tokens: int = 0
    cached_tokens: int = 0
    times: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Sample:
    """After a step: when it ended, how many requests then ran and waited, and the output tokens that it brought."""

    time: float
    running: int
    waiting: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Log:
    """A run. `stats` is by how much the COUNTERS of `LLM.stats()` have grown in it."""

    traces: list[Trace]
    samples: list[Sample]
    seconds: float
    stats: dict[str, Any]


@dataclasses.dataclass
class _Active:
    """A request that has been submitted; `history` is its conversation up to the end of its prompt."""

    trace: Trace
    group: Any
    history: list[int]


class Driver:
    """One run of a workload whose prompts are token ids. Times count from the construction."""

    def __init__(self, llm: "LLM", conversations: Sequence[Conversation], sampling: Sampling):
        self.traces: list[Trace] = []
        self.samples: list[Sample] = []
        self._llm, self._conversations, self._sampling = llm, conversations, sampling
        # (when, conversation, turn, its prompt), the next one first.
        self._due = [(item.arrival, index, 0, item.turns[0].token_ids) for index, item in enumerate(conversations)]
        heapq.heapify(self._due)
        self._active: dict[Any, _Active] = {}
        self._began = time.monotonic()

    @property
    def has_work(self) -> bool:
        return bool(self._due or self._active)

    @property
    def now(self) -> float:
        return time.monotonic() - self._began

    def step(self) -> int:
        """Submits what is due, then has the engine take a step, or sleeps where it has nothing to do.

        Returns how many requests ended.
        """
        while self._due and self._due[0][0] <= self.now:
            self._submit(*heapq.heappop(self._due))
        if not self._active:
            time.sleep(max(0.0, self._due[0][0] - self.now))
            return 0
        moved = self._llm.engine.step()
        now = self.now
        tokens, ended = 0, 0
        for request in moved:
            trace = self._active[request].trace
            count = len(request.output_token_ids)
            if count > trace.output_tokens:
                tokens += count - trace.output_tokens
                trace.output_tokens = count
                trace.times.append(now)
            if request.finished:
                self._finish(self._active.pop(request), now)
                ended += 1
        scheduler = self._llm.engine.scheduler
        self.samples.append(Sample(now, len(scheduler.running), len(scheduler.waiting), tokens))
        return ended

    def _submit(self, when: float, index: int, turn: int, history: list[int]) -> None:
        sampling = self._sampling(self._conversations[index].turns[turn].max_tokens)
        group = self._llm.submit({"prompt_token_ids": history}, sampling)
        trace = Trace(index, turn, when, len(history))
        self.traces.append(trace)
        self._active[group.requests[0]] = _Active(trace, group, history)

    def _finish(self, ended: _Active, now: float) -> None:
        """Notes what is known at the end, and has the next turn of the conversation follow at once."""
        trace, output = ended.trace, ended.group.output()
        trace.cached_tokens = output.num_cached_tokens
        turns, turn = self._conversations[trace.conversation].turns, trace.turn + 1
        if turn < len(turns):
            history = [*ended.history, *output.outputs[0].token_ids, *turns[turn].token_ids]
            heapq.heappush(self._due, (now, trace.conversation, turn, history))


def run(
    llm: "LLM",
    conversations: Sequence[Conversation],
    sampling: Sampling,
    *,
    description: str = "",
    progress: bool = False,
) -> Log:
    """Serves all conversations, every turn when it is due."""
    total = sum(len(item.turns) for item in conversations)
    before = llm.stats()
    with Progress(description, total, "request", enabled=progress) as bar:
        driver = Driver(llm, conversations, sampling)
        while driver.has_work:
            bar.update(driver.step())
        seconds = driver.now
    return Log(driver.traces, driver.samples, seconds, growth(before, llm.stats()))


def host_seconds(
    llm: "LLM",
    conversations: Sequence[Conversation],
    sampling: Sampling,
    *,
    description: str = "",
    progress: bool = False,
) -> list[dict[str, float]]:
    """What each part of a step took on the host, for every step in which all requests of the workload decoded.

    Raises ValueError where they never all ran at once.
    """
    total = len(conversations)
    steps: list[dict[str, float]] = []
    with Progress(description, total, "request", enabled=progress) as bar:
        driver = Driver(llm, conversations, sampling)
        before = llm.stats()
        while driver.has_work:
            bar.update(driver.step())
            after = llm.stats()
            # The first tokens of all are there, and none of them has ended: this step and the one in flight decode.
            all_decode = len(driver.traces) == total and all(trace.times for trace in driver.traces)
            if all_decode and before["num_running"] == after["num_running"] == total:
                steps.append(growth(before, after)["seconds"])
            before = after
    if not steps:
        raise ValueError(f"{total} requests never decoded together; raise --max-num-seqs, --pool-gib or --output-len")
    return steps


def growth(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """By how much the counters have grown between two `LLM.stats()`."""
    grown = {}
    for name in COUNTERS:
        if isinstance(after[name], dict):
            parts = [part for part in after[name] if part not in GAUGES]
            grown[name] = {part: after[name][part] - before[name][part] for part in parts}
        elif isinstance(after[name], list):
            # A list of counters grows longer, too.
            pairs = itertools.zip_longest(before[name], after[name], fillvalue=0)
            grown[name] = [now - then for then, now in pairs]
        else:
            grown[name] = after[name] - before[name]
    return grown
