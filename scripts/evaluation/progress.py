"""What a run has come to: said every few seconds, and kept for whoever is interrupted."""

import sys
import time
from collections.abc import Callable, Sequence

from . import scoring
from .cells import Completion
from .problems import Problem
from .report import Score

EVERY_S = 5.0
"""Seconds between two lines on one cell."""


class Progress:
    """The cell that is running, problem by problem. Lines go to stderr; `save` is called behind those on answers."""

    def __init__(self, problems: Sequence[Problem], save: Callable[[], None] = lambda: None):
        self.name = self.dtype = ""
        self.completions: dict[int, Completion] = {}
        self.scores: dict[int, Score] = {}
        self._problems, self._save = problems, save
        self._began = self._said = time.monotonic()

    def begin(self, name: str, dtype: str) -> None:
        """Another cell: nothing of it is done yet."""
        self.name, self.dtype = name, dtype
        self.completions, self.scores = {}, {}
        self._began = time.monotonic()
        self.phase("compiling")

    def phase(self, what: str) -> None:
        """The cell is at something else than its answers."""
        self._say(what)

    def done(self, problem: int, completion: Completion) -> None:
        """An answer has come."""
        self.completions[problem] = completion
        self.scores[problem] = Score.of(completion.text, self._problems[problem].answer)
        if time.monotonic() - self._said >= EVERY_S:
            self._say(self.so_far())
            self._save()

    def end(self) -> None:
        """The cell has all its answers."""
        self._say(self.so_far())
        self.name = ""

    def so_far(self) -> str:
        matches = [score.strict_match for score in self.scores.values()]
        share = f", strict match {scoring.share(matches):.3f}" if matches else ""
        return f"{len(matches)} of {len(self._problems)} answers{share}"

    def _say(self, what: str) -> None:
        self._said = time.monotonic()
        cell = f"{self.name} ({self.dtype})" if self.dtype else self.name
        print(f"{cell}: {what}, {self._said - self._began:.0f} s", file=sys.stderr, flush=True)
