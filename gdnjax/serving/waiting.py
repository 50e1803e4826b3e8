"""Who waits, in the order of their places. Plain ints, no jax."""

import heapq
import itertools
from collections.abc import Iterable, Iterator

from gdnjax.serving.request import Request


class WaitingQueue:
    """Requests in the order of their places, in two lanes: those that need a logit row, and those that need none.

    Adding costs the logarithm of how many wait, taking one out and looking at the first nothing that grows with them.
    What is taken out is skipped when it comes to the front of its lane, and dropped when a lane is mostly such.
    """

    def __init__(self, requests: Iterable[Request] = ()):
        self._waiting: set[Request] = set()
        # Entries (order, number, request): without the number equal orders would compare requests.
        self._with_row: list[tuple[tuple[int, int], int, Request]] = []
        self._without_row: list[tuple[tuple[int, int], int, Request]] = []
        self._numbers = itertools.count()
        for request in requests:
            self.add(request)

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request: Request) -> bool:
        return request in self._waiting

    def __iter__(self) -> Iterator[Request]:
        """In order; sorts them all."""
        return iter(sorted(self._waiting, key=lambda request: request.order))

    @property
    def first(self) -> Request | None:
        """The first in order, whatever it needs."""
        firsts = [lane[0] for lane in (self._with_row, self._without_row) if self._skip_absent(lane)]
        return min(firsts)[2] if firsts else None

    @property
    def first_without_row(self) -> Request | None:
        """The first in order of those that need no logit row."""
        return self._without_row[0][2] if self._skip_absent(self._without_row) else None

    def add(self, request: Request) -> None:
        """Puts a request in its place. One that is there already stays once."""
        if request in self._waiting:
            return
        self._waiting.add(request)
        lane = self._with_row if request.params.needs_logit_row else self._without_row
        heapq.heappush(lane, (request.order, next(self._numbers), request))

    def discard(self, request: Request) -> None:
        """Takes a request out; nothing happens to one that is not there."""
        self._waiting.discard(request)
        if len(self._with_row) + len(self._without_row) > 2 * len(self._waiting):
            for lane in (self._with_row, self._without_row):
                lane[:] = [entry for entry in lane if entry[2] in self._waiting]
                heapq.heapify(lane)

    def _skip_absent(self, lane: list[tuple[tuple[int, int], int, Request]]) -> bool:
        """Whether anybody waits in a lane, whose first entry is one that does then."""
        while lane and lane[0][2] not in self._waiting:
            heapq.heappop(lane)
        return bool(lane)

    def check_integrity(self) -> None:
        """Raises AssertionError unless everybody who waits stands in the lane of its kind, at its place."""
        for lane, needs_row in ((self._with_row, True), (self._without_row, False)):
            present = [entry for entry in lane if entry[2] in self._waiting]
            assert {entry[2] for entry in present} == {
                r for r in self._waiting if r.params.needs_logit_row == needs_row
            }
            assert all(entry[0] == entry[2].order for entry in present), "a queue is out of order"
