"""Whether drafting pays, by what the engine measures as it runs. Pure Python, no clock of its own.

Verifying k drafts costs a decode step some time and brings some tokens; which is more depends on the device, on how
many rows share the step, and on how well the drafts fit. So it is measured, for each decode bucket by itself:

    speculate iff  tokens a row and step with drafts / seconds a step with drafts  >  1 / seconds a step without

Averages are exponential, with a weight of WEIGHT. A bucket begins with drafts, since that is what was asked for; once
they are measured the other choice is tried. What is chosen then stays until the other is better by HYSTERESIS. So
that it follows a load that changes, the other choice is made again for the last PROBE turns of every INTERVAL: that
is what measuring costs at most, if the other choice brought nothing at all.
"""

import dataclasses
from collections.abc import Sequence

WEIGHT = 0.25
"""Of the newest step in an average. Three steps of a probe move one by more than half of the way."""

OUTLIER = 1.5
"""A step longer or shorter than the average by more than this counts as if it were by this: a pause of the host makes
one interval long and the next one short, and says nothing of either choice.
"""

MEASURED = 3
"""Steps after which an average is believed: those of a probe, without its first."""

INTERVAL = 64
"""Turns of a bucket in which the other choice is tried once."""

PROBE = 4
"""Turns for which it is tried. The first does not count, see `DraftController.observe`."""

HYSTERESIS = 1.05
"""How many times the tokens a second of the present choice the other must bring to take its place."""


@dataclasses.dataclass
class _Average:
    """Seconds a step, and tokens a row and step, of one choice in one bucket."""

    seconds: float = 0.0
    tokens: float = 0.0
    steps: int = 0

    def add(self, seconds: float, tokens: float) -> None:
        self.steps += 1
        if self.steps <= MEASURED:
            # One of them may have been compiled, so the shortest begins the average.
            self.seconds = seconds if self.steps == 1 else min(seconds, self.seconds)
        else:
            seconds = min(max(seconds, self.seconds / OUTLIER), self.seconds * OUTLIER)
            self.seconds += WEIGHT * (seconds - self.seconds)
        self.tokens += max(WEIGHT, 1 / self.steps) * (tokens - self.tokens)

    @property
    def measured(self) -> bool:
        return self.steps >= MEASURED

    @property
    def tokens_per_second(self) -> float:
        """Of one row."""
        return self.tokens / self.seconds


@dataclasses.dataclass
class _Bucket:
    """What is known of the steps of one padded size. `turn` counts from 0 within an interval."""

    averages: dict[bool, _Average] = dataclasses.field(default_factory=lambda: {True: _Average(), False: _Average()})
    speculates: bool = True
    tried_other: bool = False
    turn: int = -1

    def next_choice(self) -> bool:
        self.turn = (self.turn + 1) % INTERVAL
        return self.speculates != (self.turn >= INTERVAL - PROBE)

    def decide(self) -> None:
        present, other = self.averages[self.speculates], self.averages[not self.speculates]
        if present.measured and other.measured:
            if other.tokens_per_second > HYSTERESIS * present.tokens_per_second:
                self.speculates = not self.speculates
                # A probe that has brought this about is over.
                self.turn = -1
        elif present.measured and not self.tried_other:
            self.tried_other = True
            self.turn = INTERVAL - PROBE - 1


class DraftController:
    """Says before each decode step whether it should verify drafts.

    num_drafts   what a step verifies that does: the engine's num_speculative_tokens.
    buckets      row counts that steps are padded to, ascending; empty: callers give padded counts.
    """

    def __init__(self, num_drafts: int, buckets: Sequence[int] = ()):
        self.num_drafts = num_drafts
        self._sizes = tuple(buckets)
        self._buckets: dict[int, _Bucket] = {}
        self._last: int | None = None

    def choose(self, rows: int) -> int:
        """Drafts for the next decode step, of so many rows: 0 or `num_drafts`. Counts as a turn of their bucket."""
        return self.num_drafts if self._bucket_of(rows).next_choice() else 0

    def observe(self, bucket: int, num_drafts: int, seconds: float, rows: int, tokens: int) -> None:
        """A decode step that has been harvested.

        bucket       rows of the step, padded or not.
        num_drafts   what `choose` had answered for it, 0 or `num_drafts`.
        seconds      from the harvest before to this one. Steps that shared their turn with a prefill are not to be
                     reported, nor those before which the device had nothing to do: they took longer for another reason.
        rows         rows that emitted something.
        tokens       what these emitted.

        The first step after a change of `num_drafts` counts for neither choice: its drafts are still those of the
        choice before, and the time of the step before it stands in its own. Steps may be reported late, as long as
        they are reported in order.
        """
        changed = self._last is not None and num_drafts != self._last
        self._last = num_drafts
        if changed or rows < 1 or seconds <= 0:
            return
        found = self._bucket_of(bucket)
        found.averages[num_drafts > 0].add(seconds, tokens / rows if num_drafts else 1.0)
        found.decide()

    def _bucket_of(self, rows: int) -> _Bucket:
        size = next((size for size in self._sizes if size >= rows), rows)
        return self._buckets.setdefault(size, _Bucket())
