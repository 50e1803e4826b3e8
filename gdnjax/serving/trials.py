"""Who it is that turns fail for. An engine recovers from a turn that fails, but not from a request that every turn
with it fails for: it would take all others along for ever.

Turns that fail are tried again. Requests that have gained nothing over several of them are tried apart from all others,
which are parked meanwhile, then half by half, until each has gained a token or is the only one that its turns fail for.
That one ends with finish_reason "error".
"""

import logging

from gdnjax.serving.engine import Engine
from gdnjax.serving.request import Request

log = logging.getLogger("gdnjax")

STRIKES = 3
"""Failed turns that a request has a part in, and gains no token between, before it is tried."""

TRIAL_STRIKES = 2
"""Failed turns of a trial of several before it is taken apart."""

LAST_STRIKES = 5
"""Failed turns of a trial of one request before it ends."""


class Trials:
    """Looks for culprits in an engine whose turns it is told of. Called by one thread.

    A trial ends when each of its requests has gained `tokens`: one, but twice as many after each hunt that blamed
    nobody, where it is the company that turns fail for, as where it takes more memory than there is. So even then
    everybody gets on.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        # Of requests that had a part in failed turns: how often, and the output tokens that they had then.
        self._strikes: dict[Request, tuple[int, int]] = {}
        self._suspects: list[Request] = []
        self._groups: list[list[Request]] = []
        # Of the trial that is under way: output tokens at its beginning, and its failed turns.
        self._began: dict[Request, int] = {}
        self._failures = 0
        # On the way to the next trial; somebody was found in this hunt; those that wait are suspects, too.
        self._moving = self._blamed = self._wide = False
        self._tokens = 1

    @property
    def under_way(self) -> bool:
        """Whether requests are parked for the sake of a trial. New ones are to be, too: see `hold`."""
        return bool(self._began) or self._moving

    def hold(self, *requests: Request) -> None:
        """Parks new requests until the trials are over."""
        self._engine.park(*requests)

    def suspect(self) -> None:
        """A turn has just been cut off: notes who had a part in it, before the engine starts over."""
        scheduler = self._engine.scheduler
        going = [request for request in scheduler.unfinished if request not in scheduler.parked]
        # Where nobody runs yet, it is for those that wait that the turn could not be planned.
        self._suspects = (not self._wide and [request for request in going if request.slot]) or going

    @property
    def has_suspects(self) -> bool:
        """Whether anybody had a part in the turn that was cut off last."""
        return bool(self._suspects)

    def failed(self, error: Exception) -> None:
        """The engine has started over behind a turn that was cut off by `error`."""
        if self._moving:
            self._next_trial()
        elif self._began:
            self._fail_trial(error)
        else:
            self._strike()

    def passed(self) -> None:
        """A turn was taken. Ends the trial if everybody has gained what it takes."""
        if self._moving or (self._began and all(self._has_gained(*entry) for entry in self._began.items())):
            self._next_trial()

    def _has_gained(self, request: Request, had: int) -> bool:
        return request.finished or request.num_committed >= had + self._tokens

    def _strike(self) -> None:
        for request in self._suspects:
            count, had = self._strikes.get(request, (0, 0))
            now = request.num_committed
            self._strikes[request] = (count + 1 if now == had else 1, now)
        self._strikes = {request: entry for request, entry in self._strikes.items() if not request.finished}
        group = [request for request, (count, _) in self._strikes.items() if count >= STRIKES]
        if group:
            log.warning("turns fail again and again: %d requests that gained nothing are tried apart", len(group))
            self._groups, self._blamed = [group], False
            self._next_trial()

    def _fail_trial(self, error: Exception) -> None:
        self._failures += 1
        left = [request for request, had in self._began.items() if not self._has_gained(request, had)]
        if self._failures < (TRIAL_STRIKES if len(self._began) > 1 else LAST_STRIKES):
            return
        if len(self._began) == 1:
            self._blamed = True
            self._engine.fail(left[0], error)
        else:
            self._groups += [left[len(left) // 2 :], left[: len(left) // 2]]
        self._next_trial()

    def _next_trial(self) -> None:
        """Parks everybody but the next group; behind the last one everybody goes on. Should this be cut off, it is
        called again.
        """
        self._moving, scheduler = True, self._engine.scheduler
        groups = [[request for request in group if not request.finished] for group in self._groups]
        self._groups = [group for group in groups if group]
        if self._groups:
            group = dict.fromkeys(self._groups[-1])
            self._engine.park(*(r for r in scheduler.unfinished if r not in scheduler.parked and r not in group))
            self._engine.unpark(*group)
            self._began, self._failures = {request: request.num_committed for request in group}, 0
            self._groups.pop()
        else:
            self._engine.unpark(*scheduler.parked)
            self._began, self._strikes = {}, {}
            self._tokens = 1 if self._blamed else 2 * self._tokens
            # If it was none of those that ran, it may be one of those that waited.
            self._wide = not self._blamed
            log.warning("the trials are over: %s", "others go on" if self._blamed else "nobody alone is to blame")
        self._moving = False
