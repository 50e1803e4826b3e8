"""Slots, blocks and logit rows: the numbers 1..n of each pool, handed out all or nothing. Plain ints."""

from collections.abc import Iterable


class Pool:
    """Owns the numbers 1..size that nobody holds; 0 is null and never handed out."""

    def __init__(self, name: str, size: int):
        self.name: str = name
        self.size: int = size
        # Since the beginning, never fewer.
        self.num_given: int = 0
        # A stack with the lowest number on top: what was used last is used next.
        self._free = list(range(size, 0, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.size - len(self._free)

    def take(self, count: int) -> list[int] | None:
        """`count` numbers; None, and nothing taken, if there are fewer."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def give(self, numbers: Iterable[int]) -> None:
        """Takes numbers back; the first of them is the next to be handed out."""
        numbers = list(numbers)
        self.num_given += len(numbers)
        self._free.extend(reversed(numbers))

    def record(self) -> list[int]:
        """Who is free, as plain data for `restore`."""
        return list(self._free)

    def restore(self, free: Iterable[int]) -> None:
        """Everybody else is handed out."""
        self._free = list(free)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Raises AssertionError unless every number is either free or held once, and 0 is neither."""
        held = sorted(held)
        if sorted([*self._free, *held]) != list(range(1, self.size + 1)):
            raise AssertionError(f"{self.name}s are lost or held twice: free {sorted(self._free)}, held {held}")


class Allocator:
    """The pools of one engine. Slots are handed out to requests and to checkpoints alike."""

    def __init__(self, num_slots: int, num_blocks: int, num_logit_rows: int, num_count_rows: int):
        self.slots: Pool = Pool("slot", num_slots)
        self.blocks: Pool = Pool("block", num_blocks)
        self.logit_rows: Pool = Pool("logit row", num_logit_rows)
        self.count_rows: Pool = Pool("count row", num_count_rows)

    @property
    def pools(self) -> dict[str, Pool]:
        """By their names."""
        return {pool.name: pool for pool in (self.slots, self.blocks, self.logit_rows, self.count_rows)}

    def fresh(self) -> "Allocator":
        """The same pools, nothing handed out."""
        return Allocator(self.slots.size, self.blocks.size, self.logit_rows.size, self.count_rows.size)
