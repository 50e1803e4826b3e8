"""Slots, blocks and logit rows: handed out all or nothing, taken back whole. Plain ints."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Grant:
    """What one request holds. `logit_row` is 0 for a request that needs none."""

    slot: int
    blocks: list[int]
    logit_row: int


class Allocator:
    """Owns the numbers 1..n of each pool; 0 is null and never handed out."""

    def __init__(self, num_slots: int, num_blocks: int, num_logit_rows: int):
        self.num_slots, self.num_blocks, self.num_logit_rows = num_slots, num_blocks, num_logit_rows
        # Stacks with the lowest number on top: what was used last is used next.
        self._slots = list(range(num_slots, 0, -1))
        self._blocks = list(range(num_blocks, 0, -1))
        self._logit_rows = list(range(num_logit_rows, 0, -1))
        self._granted: dict[int, Grant] = {}

    @property
    def num_free_slots(self) -> int:
        return len(self._slots)

    @property
    def num_free_blocks(self) -> int:
        return len(self._blocks)

    @property
    def num_free_logit_rows(self) -> int:
        return len(self._logit_rows)

    def grant(self, num_blocks: int, logit_row: bool) -> Grant | None:
        """A slot, `num_blocks` blocks and, if asked for, a logit row; None, and nothing taken, if any is short."""
        if not self._slots or len(self._blocks) < num_blocks or (logit_row and not self._logit_rows):
            return None
        grant = Grant(
            slot=self._slots.pop(),
            blocks=[self._blocks.pop() for _ in range(num_blocks)],
            logit_row=self._logit_rows.pop() if logit_row else 0,
        )
        self._granted[grant.slot] = grant
        return grant

    def release(self, slot: int) -> None:
        """Takes back everything granted with a slot. Raises KeyError for a slot that nobody holds."""
        grant = self._granted.pop(slot)
        self._slots.append(grant.slot)
        self._blocks.extend(reversed(grant.blocks))
        if grant.logit_row:
            self._logit_rows.append(grant.logit_row)

    def check_integrity(self) -> None:
        """Raises AssertionError unless every number of every pool is either free or held once, and 0 is neither."""
        grants = self._granted.values()
        for name, free, held, count in (
            ("slot", self._slots, list(self._granted), self.num_slots),
            ("block", self._blocks, [block for grant in grants for block in grant.blocks], self.num_blocks),
            ("logit row", self._logit_rows, [g.logit_row for g in grants if g.logit_row], self.num_logit_rows),
        ):
            found = sorted([*free, *held])
            if found != list(range(1, count + 1)):
                raise AssertionError(f"{name}s are lost or held twice: free {sorted(free)}, held {sorted(held)}")
