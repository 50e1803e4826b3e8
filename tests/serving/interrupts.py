"""An interrupt at each line of plan and harvest: `python -m tests.serving.interrupts [--all]`.

The engine's own loop runs over the device of plain Python, whose reads check that what they find is right. In a process
of its own, since under pytest every function of the package is checked for types, which takes ten times as long.
"""

import argparse
import collections
import itertools
import logging
import pathlib
import sys

import numpy as np

from gdnjax import serving
from gdnjax.batch import Emitted
from gdnjax.memory import HostSizes
from gdnjax.serving.engine import Engine
from gdnjax.serving.metrics import Metrics
from gdnjax.serving.runner import InFlight, Runner
from tests.serving.paper import EOS, Paper, check_nothing_is_held, check_output, make_request, make_scheduler

PARTS = ("engine", "scheduler", "prefix_cache", "host_tier", "radix_tree", "allocator", "request", "detokenizer")
LINES_OF = {str(pathlib.Path(serving.__file__).parent / f"{part}.py") for part in PARTS}


class PaperRunner(Runner):
    """The paper device in the runner's place, with states that a hit needs, and a host tier for a few blocks."""

    needs_state = True
    num_compilations = 0
    host_sizes = HostSizes(capacity_bytes=20, block_bytes=1, state_bytes=3, staging_bytes=0)

    def __init__(self, config):
        self.config, self.metrics, self.compile_seconds = config, Metrics(), 0.0
        self.device = Paper(config)

    def dispatch(self, plan) -> InFlight:
        self.counters.num_turns += 1
        self.counters.num_prompt_tokens += sum(piece.length for piece in plan.pieces)
        prefill, decode = self.device.execute(plan)
        return InFlight(plan, *(_emitted(rows, self.config) if rows else None for rows in (prefill, decode)))

    def read(self, turn):
        return turn.prefill, turn.decode

    def start_over(self, unread) -> None:
        self.device = Paper(self.config)

    def give_up(self, turns) -> None:
        """Nothing runs that could be waited for."""

    def close(self) -> None:
        """It has no device to free."""


def _emitted(rows, config) -> Emitted:
    tokens = np.full((len(rows), 1 + config.num_speculative_tokens), -1, np.int32)
    for row, (produced, _) in enumerate(rows):
        tokens[row, : len(produced)] = produced
    count = np.array([len(produced) for produced, _ in rows], np.int32)
    drafted = np.maximum(count - 1, 0)
    done = np.array([ended for _, ended in rows])
    return Emitted.of(tokens=tokens, count=count, done=done, drafted=drafted, logprobs=None, prompt_logprobs=None)


Moment = tuple[int, int]
"""A line that runs, by the number of its function's call and its own number in that."""


class Cut:
    """Notes every line that runs within it, and its moment; or raises KeyboardInterrupt at one moment, and notes the
    lines of that call alone, since to trace the others would take most of the time.
    """

    def __init__(self, at: Moment | None = None):
        self.at, self.calls = at, 0
        self.places: list[tuple[tuple[str, int], Moment]] = []

    def __enter__(self) -> "Cut":
        sys.settrace(self._call)
        return self

    def __exit__(self, *_) -> None:
        sys.settrace(None)

    def _call(self, frame, event, arg):
        if frame.f_code.co_filename not in LINES_OF:
            return None
        self.calls += 1
        if self.at is not None and self.calls != self.at[0]:
            return None
        return self._lines_of(self.calls)

    def _lines_of(self, call: int):
        numbers = itertools.count()

        def line(frame, event, arg):
            if event == "line":
                moment = call, next(numbers)
                self.places.append(((frame.f_code.co_filename, frame.f_lineno), moment))
                if moment == self.at:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return line

        return line


def _scene(drafts: int):
    """An engine, the requests of others, some in the queue, and those of the call that is to be interrupted.

    Blocks are scarce, prompts are cut and share their beginnings, checkpoints are due while requests decode, and
    requests end by a stop string, a stop token and their length.
    """
    scheduler = make_scheduler(
        seqs=3, tokens=64, blocks=16, block_size=4, checkpoints=3, rows=1,
        state_checkpoint_interval=8, num_speculative_tokens=drafts, warmup=False,
    )  # fmt: skip
    engine = Engine(PaperRunner(scheduler.config), scheduler.allocator)
    shared = [5, 2, 7, 1, 8, 2, 8, 1]
    others = [
        make_request([*shared, 3], max_tokens=14, ignore_eos=True),
        make_request([*shared, 4, 4], max_tokens=12, stop=["c"], priority=1),
        make_request([6] * 20, max_tokens=9, ignore_eos=True),
        make_request([*shared, 3, 9, 9], max_tokens=6, logit_bias={0: 1.0}),
    ]
    own = [make_request([*shared, 5], max_tokens=5, stop_token_ids=[EOS - 1]), make_request([7] * 6, max_tokens=4)]
    return engine, others, own


def play(drafts: int, at: Moment | None) -> Cut:
    """Runs the scene, interrupted at that line, and checks what must hold after it."""
    engine, others, own = _scene(drafts)
    for request in others[:2]:
        engine.add(request)
    told: list = []
    for _ in range(3):
        told += engine.step()
    for request in [*others[2:], *own]:
        engine.add(request)
    cut = Cut(at)
    try:
        with cut:
            while not all(request.finished for request in own):
                told += engine.step()
    except KeyboardInterrupt:
        engine.abort(*own)
    for _ in range(400):
        if not engine.has_work:
            break
        told += engine.step()
        engine.scheduler.check_integrity()
        engine.runner.device.check_cache(engine.scheduler.cache.root, engine.scheduler._seals)
    told += engine.step()
    for request in [*others, *own]:
        check_output(request)
    assert all(request.finish_reason != "abort" for request in others)
    # What an interrupt takes away on its last line is the answer of that very call.
    assert at is not None or {*told} == {*others, *own}
    check_nothing_is_held(engine.scheduler)
    return cut


def main() -> int:
    """Prints a line for each line of code after whose interrupt something was wrong; the last one says how many ran."""
    parser = argparse.ArgumentParser(description=__doc__)
    chosen = "a middle one, and with drafts the first and the last"
    parser.add_argument("--all", action="store_true", help=f"every time that a line runs, not {chosen}")
    every = parser.parse_args().all
    logging.disable()
    wrong, played = collections.Counter(), 0
    lines: set[tuple[str, int]] = set()
    for drafts in (0, 3):
        runs = collections.defaultdict(list)
        for place, moment in play(drafts, None).places:
            runs[place].append(moment)
        lines |= runs.keys()
        for (file, line), found in runs.items():
            middle = found[len(found) // 2]
            for at in found if every else {found[0], middle, found[-1]} if drafts else {middle}:
                played += 1
                try:
                    cut = play(drafts, at)
                    assert cut.places[-1] == ((file, line), at), "another line was cut"
                except BaseException as error:
                    wrong[f"{pathlib.Path(file).name}:{line}, {drafts} drafts: {type(error).__name__}: {error}"] += 1
    for what, times in wrong.items():
        print(f"{what}, {times} times")
    print(f"{len(lines)} lines, {played} interrupts, {wrong.total()} wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
