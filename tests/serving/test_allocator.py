"""Slots, blocks and logit rows are conserved, whatever is asked for and given back."""

import hypothesis
import pytest
from hypothesis import stateful
from hypothesis import strategies as st

from gdnjax.serving.allocator import Allocator

SLOTS, BLOCKS, ROWS = 4, 11, 2


@hypothesis.settings(derandomize=True, deadline=None, max_examples=100, stateful_step_count=40)
class AllocatorMachine(stateful.RuleBasedStateMachine):
    """Random grants and releases, beside a model that only counts."""

    def __init__(self):
        super().__init__()
        self.allocator = Allocator(SLOTS, BLOCKS, ROWS)
        self.grants = []

    def free(self):
        return self.allocator.num_free_slots, self.allocator.num_free_blocks, self.allocator.num_free_logit_rows

    @stateful.rule(blocks=st.integers(0, BLOCKS + 2), row=st.booleans())
    def grant(self, blocks, row):
        before = self.free()
        grant = self.allocator.grant(blocks, row)
        if before[0] < 1 or before[1] < blocks or before[2] < row:
            assert grant is None
            assert self.free() == before
            return
        assert self.free() == (before[0] - 1, before[1] - blocks, before[2] - row)
        assert len(grant.blocks) == blocks
        assert bool(grant.logit_row) == row
        self.grants.append(grant)

    @stateful.precondition(lambda self: self.grants)
    @stateful.rule(data=st.data())
    def release(self, data):
        grant = self.grants.pop(data.draw(st.integers(0, len(self.grants) - 1)))
        self.allocator.release(grant.slot)
        with pytest.raises(KeyError):
            self.allocator.release(grant.slot)

    @stateful.invariant()
    def nothing_is_lost_or_held_twice(self):
        self.allocator.check_integrity()
        slots = [grant.slot for grant in self.grants]
        blocks = [block for grant in self.grants for block in grant.blocks]
        rows = [grant.logit_row for grant in self.grants if grant.logit_row]
        for held, count, free in zip((slots, blocks, rows), (SLOTS, BLOCKS, ROWS), self.free(), strict=True):
            assert len(set(held)) == len(held) == count - free
            assert all(1 <= number <= count for number in held)


test_allocator_conserves_slots_blocks_and_rows = AllocatorMachine.TestCase


def test_null_is_never_handed_out():
    allocator = Allocator(2, 3, 1)
    first, second = allocator.grant(2, True), allocator.grant(1, False)
    assert {first.slot, second.slot} == {1, 2}
    assert {*first.blocks, *second.blocks} == {1, 2, 3}
    assert (first.logit_row, second.logit_row) == (1, 0)


def test_last_released_is_handed_out_first():
    """What was used last is used next: its memory is warm, and faults of reuse show early."""
    allocator = Allocator(3, 6, 0)
    grants = [allocator.grant(2, False) for _ in range(3)]
    allocator.release(grants[1].slot)
    assert allocator.grant(2, False) == grants[1]


@pytest.mark.parametrize(
    ("pool", "number", "named"),
    [("_slots", 1, "slots are lost or held twice"), ("_blocks", 2, "blocks are"), ("_logit_rows", 1, "logit rows are")],
)
@pytest.mark.parametrize("fault", ["lost", "doubled", "null"])
def test_integrity_check_sees_every_fault(pool, number, named, fault):
    allocator = Allocator(3, 5, 2)
    allocator.grant(2, True)
    free = getattr(allocator, pool)
    if fault == "lost":
        free.pop()
    else:
        free.append(number if fault == "doubled" else 0)
    with pytest.raises(AssertionError, match=named):
        allocator.check_integrity()
