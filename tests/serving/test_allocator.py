"""The numbers of a pool are conserved, whatever is asked for and given back."""

import hypothesis
import pytest
from hypothesis import stateful
from hypothesis import strategies as st

from gdnjax.serving.allocator import Allocator, Pool

SIZE = 11


@hypothesis.settings(derandomize=True, deadline=None, max_examples=100, stateful_step_count=40)
class PoolMachine(stateful.RuleBasedStateMachine):
    """Numbers taken and given back in any order, beside a model that only counts."""

    def __init__(self):
        super().__init__()
        self.pool = Pool("block", SIZE)
        self.held = []

    @stateful.rule(count=st.integers(0, SIZE + 2))
    def take(self, count):
        free = self.pool.num_free
        numbers = self.pool.take(count)
        if count > free:
            assert numbers is None
            assert self.pool.num_free == free
            return
        assert len(numbers) == count
        assert self.pool.num_free == free - count
        self.held += numbers

    @stateful.rule(data=st.data())
    def give(self, data):
        order = data.draw(st.permutations(self.held))
        count = data.draw(st.integers(0, len(order)))
        self.pool.give(order[:count])
        self.held = order[count:]

    @stateful.invariant()
    def nothing_is_lost_or_held_twice(self):
        self.pool.check_integrity(self.held)
        assert len(set(self.held)) == len(self.held) == self.pool.num_used == SIZE - self.pool.num_free
        assert all(1 <= number <= SIZE for number in self.held)


test_pool_conserves_its_numbers = PoolMachine.TestCase


def test_null_is_never_handed_out():
    pool = Pool("slot", 3)
    assert sorted(pool.take(3)) == [1, 2, 3]
    assert pool.take(1) is None
    assert pool.take(0) == []


def test_lowest_numbers_come_first():
    assert Pool("slot", 5).take(3) == [1, 2, 3]


def test_last_given_back_is_handed_out_first():
    """What was used last is used next: its memory is warm, and faults of reuse show early."""
    pool = Pool("block", 6)
    taken = pool.take(4)
    pool.give(taken[1:3])
    assert pool.take(3) == [taken[1], taken[2], 5]


def test_pools_of_an_engine_are_apart():
    allocator = Allocator(num_slots=2, num_blocks=3, num_logit_rows=0, num_count_rows=0)
    assert allocator.slots.take(2) == [1, 2]
    assert allocator.blocks.take(3) == [1, 2, 3]
    assert allocator.logit_rows.take(1) is None


@pytest.mark.parametrize("fault", ["lost", "held twice", "free and held", "null"])
def test_integrity_check_sees_every_fault(fault):
    pool = Pool("logit row", 4)
    held = pool.take(2)
    pool.check_integrity(held)
    match fault:
        case "lost":
            held.pop()
        case "held twice":
            held.append(held[0])
        case "free and held":
            pool.give(held[:1])
        case "null":
            held.append(0)
    with pytest.raises(AssertionError, match="logit rows are lost or held twice"):
        pool.check_integrity(held)
