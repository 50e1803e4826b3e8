"""The numbers of the host tier: bundles of rows in the host's memory, by the numbers that `host_tier` gives them.

Nothing here waits for the device, but where so much is on its way that the device would need more memory for it than
was planned.
"""

import collections
import weakref
from collections.abc import Iterable
from typing import Any

import jax

from gdnjax.memory import HOST_BUNDLES, STAGED_BUNDLES
from gdnjax.serving.plan import Restore, Spill
from gdnjax.state import ServeState
from gdnjax.transfer import Rows, Transfers


class HostStore:
    """The bundles of one engine."""

    def __init__(self, transfers: Transfers):
        self._transfers = transfers
        self._bundles: dict[int, Rows] = {}
        # What is there when a bundle has arrived, on either side, the oldest first.
        self._staged: collections.deque[Any] = collections.deque()
        # A program that ends with a copy under way would tear the device down under it.
        weakref.finalize(self, _wait_for_all, self._staged)

    @property
    def num_traces(self) -> int:
        return self._transfers.num_traces()

    @property
    def num_bytes(self) -> int:
        """Of all bundles, as one rank holds them."""
        return sum(
            leaf.addressable_shards[0].data.nbytes for rows in self._bundles.values() for leaf in jax.tree.leaves(rows)
        )

    def spill(self, state: ServeState, spills: Iterable[Spill]) -> None:
        """Copies rows as they are once all steps before have run. Steps that come later may write there."""
        transfers = self._transfers
        for spill in spills:
            self._stage()
            if spill.is_state:
                rows = transfers.read_state(state, spill.rows[0])
            else:
                rows = transfers.read_blocks(state, spill.rows)
            self._bundles[spill.bundle] = rows = transfers.to_host(rows, spill.is_state)
            self._staged.append(rows)

    def restore(self, state: ServeState, restores: Iterable[Restore]) -> ServeState:
        """The state, which is consumed, with bundles in rows of its pools."""
        transfers = self._transfers
        for restore in restores:
            self._stage()
            rows = transfers.to_device(self._bundles[restore.bundle], restore.is_state)
            if restore.is_state:
                state, arrived = transfers.write_state(state, rows, restore.rows[0])
            else:
                state, arrived = transfers.write_blocks(state, rows, restore.rows)
            self._staged.append(arrived)
        return state

    def _stage(self) -> None:
        """Makes room for another bundle on its way."""
        while len(self._staged) >= STAGED_BUNDLES:
            jax.block_until_ready(self._staged.popleft())

    def drop(self, bundles: Iterable[int]) -> None:
        """Forgets bundles. One that a plan was to bring, and that was cut off, may never have come."""
        for bundle in bundles:
            self._bundles.pop(bundle, None)

    def clear(self) -> None:
        """Forgets all of them, when what is under way has arrived or failed."""
        while self._staged:
            try:
                jax.block_until_ready(self._staged.popleft())
            except Exception:
                # Whoever started it has been told.
                continue
        self._bundles.clear()

    def warm_up(self, state: ServeState) -> ServeState:
        """Compiles everything, on null rows, which nobody looks at. The state is consumed."""
        transfers, needs_state = self._transfers, state.cache.spec.needs_state
        for size in HOST_BUNDLES:
            rows = transfers.to_host(transfers.read_blocks(state, [0] * size), False)
            state, _ = transfers.write_blocks(state, transfers.to_device(rows, False), [0] * size)
        if needs_state:
            row = transfers.to_host(transfers.read_state(state, 0), True)
            state, _ = transfers.write_state(state, transfers.to_device(row, True), 0)
        return state


def _wait_for_all(staged: collections.deque[Any]) -> None:
    while staged:
        jax.block_until_ready(staged.popleft())
