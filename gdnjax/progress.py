"""How far something is that takes its time: a bar on a terminal, elsewhere a line in the log now and then."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

log = logging.getLogger("gdnjax.progress")

EVERY_S = 10.0
"""Seconds between two lines."""

T = TypeVar("T")


class Progress:
    """`total` units of something, named by `description`. On a terminal and in a notebook it is tqdm's bar.

    Elsewhere (a file, a pipe, a service) it is a line of the logger "gdnjax.progress" at level INFO, the first after
    EVERY_S seconds, so that what is quick says nothing. `enabled=False` says nothing anywhere.
    """

    def __init__(self, description: str, total: int, unit: str, *, enabled: bool = True):
        # A notebook's stderr is no terminal, and shows bars all the same.
        self._on_terminal = sys.stderr.isatty() or "ipykernel" in sys.modules
        self._description, self._total, self._unit = description, total, unit
        self._count, self._note = 0, ""
        self._began = self._said = time.monotonic()
        self._enabled = enabled
        self._bar = tqdm(
            total=total,
            desc=description,
            unit=unit,
            leave=False,
            disable=not (enabled and self._on_terminal),
        )

    def update(self, count: int = 1) -> None:
        """So many more units are done."""
        self._count += count
        self._bar.update(count)
        self._say()

    def note(self, text: str) -> None:
        """What is being done now."""
        self._note = text
        self._bar.set_postfix_str(text)
        self._say()

    def _say(self) -> None:
        now = time.monotonic()
        if self._on_terminal or not self._enabled or now - self._said < EVERY_S:
            return
        self._said = now
        note = f", {self._note}" if self._note else ""
        seconds = now - self._began
        log.info("%s: %d of %d %ss%s, %.0f s", self._description, self._count, self._total, self._unit, note, seconds)

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The items, each counted as one unit once the next is asked for."""
        with self:
            for item in items:
                yield item
                self.update()

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
