"""The radix tree: what is found, what is shared, what is given up first, and that nothing is lost on the way."""

import hypothesis
import pytest
from hypothesis import stateful
from hypothesis import strategies as st

from gdnjax.serving.allocator import Allocator
from gdnjax.serving.prefix_cache import PrefixCache
from tests.serving.paper import make_request

SIZE = 4


class Rig:
    """A cache over its pools, and what nobody but the test holds."""

    def __init__(self, blocks: int = 40, slots: int = 12):
        self.allocator = Allocator(slots, blocks, 0, 0)
        self.cache = PrefixCache(SIZE, self.allocator)
        self.cache.begin_turn()

    def insert(self, tokens, *, state: bool = False):
        """The whole blocks of a sequence, under the root, as a request that ends hands them over."""
        keys = keys_of(tokens)
        blocks = self.allocator.blocks.take(len(keys))
        node, known = self.cache.insert(self.cache.root, keys, blocks)
        self.allocator.blocks.give(blocks[:known])
        if state:
            self.keep_state(node)
        return node

    def keep_state(self, node) -> int:
        (slot,) = self.allocator.slots.take(1)
        self.cache.keep_state(node, slot)
        return slot

    def keep_tail(self, node, tokens) -> bool:
        """False, and nothing taken, where the tail is there already."""
        (slot,), (block,) = self.allocator.slots.take(1), self.allocator.blocks.take(1)
        if self.cache.keep_tail(node, tuple(tokens), block, slot):
            return True
        self.allocator.slots.give([slot])
        self.allocator.blocks.give([block])
        return False

    def match(self, tokens, limit: int | None = None):
        """From the next turn on, when all states have been written."""
        self.cache.begin_turn()
        return self.cache.match(make_request(list(tokens)), len(tokens) if limit is None else limit)

    def found(self, tokens, limit: int | None = None) -> tuple[int, int]:
        match = self.match(tokens, limit)
        return match.position, match.seen

    def check(self, blocks=(), slots=()) -> None:
        """Whatever the test does not hold is free or the cache's."""
        own_blocks, own_slots = self.cache.check_integrity()
        self.allocator.blocks.check_integrity([*own_blocks, *blocks])
        self.allocator.slots.check_integrity([*own_slots, *slots])


def keys_of(tokens) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + SIZE]) for i in range(0, len(tokens) - SIZE + 1, SIZE)]


@pytest.fixture
def rig():
    rig = Rig()
    yield rig
    rig.check()


A = list(range(24))
"""Six blocks."""
B = [*A[:12], *[50 + i for i in range(12)]]
"""Parts from A after three of them."""


def test_empty_cache_has_nothing(rig):
    match = rig.match(A)
    assert (match.position, match.slot, match.seen, match.tail, match.pending) == (0, 0, 0, 0, False)
    assert match.node is rig.cache.root


def test_hit_is_the_deepest_place_with_state_and_blocks(rig):
    rig.insert(A[:8], state=True)
    rig.insert(A)
    assert rig.found(A) == (8, 24)
    assert rig.found(A[:7]) == (0, 4)
    assert rig.found([*A[:8], 99, 99, 99, 99]) == (8, 8)


def test_match_changes_nothing(rig):
    rig.insert(A, state=True)
    before = repr(sorted((node.end, node.used, node.locks) for node in rig.cache._nodes))
    rig.match(B)
    assert repr(sorted((node.end, node.used, node.locks) for node in rig.cache._nodes)) == before


@pytest.mark.parametrize(("limit", "expected"), [(24, (24, 24)), (23, (8, 20)), (8, (8, 8)), (7, (0, 4)), (0, (0, 0))])
def test_nothing_past_the_limit_is_found(rig, limit, expected):
    rig.insert(A[:8], state=True)
    rig.insert(A, state=True)
    assert rig.found(A, limit) == expected


def test_state_that_this_turn_writes_is_pending_until_the_next(rig):
    rig.insert(A, state=True)
    request = make_request(A)
    assert rig.cache.match(request, 24).pending
    rig.cache.begin_turn()
    assert not rig.cache.match(request, 24).pending


def test_second_copy_of_a_block_stays_with_whoever_brought_it(rig):
    rig.insert(A)
    blocks = rig.allocator.blocks.take(6)
    node, known = rig.cache.insert(rig.cache.root, keys_of(B), blocks)
    assert (known, node.end) == (3, 24)
    assert node.blocks == blocks[3:]
    rig.check(blocks=blocks[:3])
    rig.allocator.blocks.give(blocks[:3])


def test_split_leaves_state_locks_and_children_below(rig):
    lower = rig.insert(A, state=True)
    slot = lower.slot
    rig.cache.lock(lower)
    other = rig.insert(B)
    upper = lower.parent
    assert upper is other.parent
    assert (upper.end, upper.slot, upper.locks) == (12, 0, 1)
    assert (lower.end, lower.slot, lower.locks) == (24, slot, 1)
    assert (len(upper.blocks), len(lower.blocks), len(other.blocks)) == (3, 3, 3)
    rig.check()
    assert rig.found(A) == (24, 24)
    rig.cache.unlock(lower)
    assert (upper.locks, lower.locks) == (0, 0)


def test_share_gives_all_blocks_on_the_way_and_locks_them(rig):
    rig.insert(A)
    match = rig.match(A, 17)
    node, blocks = rig.cache.share(match)
    assert (node.end, len(blocks), len(set(blocks))) == (16, 4, 4)
    assert rig.cache.num_evictable_blocks == 2
    assert not rig.cache.make_room(rig.allocator.blocks.num_free + 3)
    assert rig.cache.make_room(rig.allocator.blocks.num_free + 2)
    rig.cache.unlock(node)
    assert rig.cache.num_evictable_blocks == 4


def test_node_at_parts_a_node_where_asked(rig):
    node = rig.insert(A)
    assert rig.cache.node_at(node, 24) is node
    upper = rig.cache.node_at(node, 8)
    assert (upper.end, node.end, node.parent) == (8, 24, upper)
    # From below, over the cut that is there already.
    assert rig.cache.node_at(node, 8) is upper
    assert rig.cache.node_at(node, 4).end == 4
    assert rig.cache.node_at(node, 0) is rig.cache.root


def test_second_state_for_a_place_is_given_back(rig):
    node = rig.insert(A, state=True)
    kept, free = node.slot, rig.allocator.slots.num_free
    rig.keep_state(node)
    assert (node.slot, rig.allocator.slots.num_free) == (kept, free)
    assert rig.cache.counters.kept_states == 1


# Tails: a state within a block.


def test_tail_is_found_beyond_the_whole_blocks(rig):
    node = rig.insert(A[:12])
    assert rig.keep_tail(node, A[12:15])
    match = rig.match(A)
    assert (match.position, match.seen) == (15, 12)
    (tail,) = node.tails.values()
    assert (match.slot, match.tail) == (tail.slot, tail.blocks[0])
    assert rig.found([*A[:14], 99]) == (0, 12)
    assert rig.found(A, 14) == (0, 12)


def test_longest_tail_that_fits_is_taken(rig):
    node = rig.insert(A[:12])
    for end in (13, 15, 14):
        rig.keep_tail(node, A[12:end])
    assert rig.found(A) == (15, 12)
    assert rig.found(A, 14) == (14, 12)
    assert not rig.keep_tail(node, A[12:14]), "it is there already"


def test_tail_under_whole_blocks_needs_no_copy(rig):
    """Somebody has filled the block since: its whole blocks reach past the tail's state."""
    node = rig.insert(A[:12])
    rig.keep_tail(node, A[12:14])
    rig.insert(A)
    match = rig.match(A)
    assert (match.position, match.seen, match.tail) == (14, 24, 0)


def test_tail_at_the_root_serves_prompts_shorter_than_a_block(rig):
    rig.keep_tail(rig.cache.root, A[:3])
    assert rig.found(A[:4], 3) == (3, 0)


def test_tail_goes_with_its_state(rig):
    node = rig.insert(A[:12])
    rig.keep_tail(node, A[12:14])
    free = rig.allocator.blocks.num_free
    rig.cache.begin_turn()
    assert rig.cache._evict_state()
    assert not node.tails
    assert rig.allocator.blocks.num_free == free + 1
    assert rig.found(A) == (0, 12)


# What is given up.


def test_tombstone_is_seen_and_not_hit(rig):
    """The state is gone, the keys are not."""
    rig.insert(A, state=True)
    rig.cache.begin_turn()
    assert rig.cache._evict_state()
    assert rig.found(A) == (0, 24)
    counters = rig.cache.counters
    assert (counters.evicted_states, counters.evicted_blocks, counters.orphaned_states) == (1, 0, 0)
    # And gets a state again.
    rig.keep_state(rig.match(A).node)
    assert rig.found(A) == (24, 24)


def test_blocks_are_evicted_from_the_ends_of_the_oldest_leaves(rig):
    old, new = rig.insert(A[:8]), rig.insert([90, *A[1:8]])
    free = rig.allocator.blocks.num_free
    assert rig.cache.make_room(free + 1)
    assert (len(old.blocks), len(new.blocks), old.end) == (1, 2, 4)
    assert rig.found(A[:8]) == (0, 4)
    assert rig.cache.make_room(free + 3)
    assert old not in rig.cache._nodes
    assert len(new.blocks) == 1


def test_what_was_of_use_last_is_evicted_last(rig):
    old, new = rig.insert(A[:8]), rig.insert([90, *A[1:8]])
    node, _ = rig.cache.share(rig.match(A[:8]))
    rig.cache.unlock(node)
    rig.cache.make_room(rig.allocator.blocks.num_free + 2)
    assert old in rig.cache._nodes
    assert new not in rig.cache._nodes


def test_children_are_evicted_before_their_parents(rig):
    rig.insert(A)
    rig.insert(B)
    rig.cache.make_room(rig.allocator.blocks.num_free + 6)
    assert rig.found(A) == (0, 12)


def test_state_without_the_blocks_before_it_is_orphaned(rig):
    rig.insert(A, state=True)
    rig.cache.begin_turn()
    rig.cache.make_room(rig.allocator.blocks.num_free + 1)
    assert rig.cache.counters.orphaned_states == 1
    assert rig.cache.num_states == 0
    assert rig.found(A) == (0, 20)


def test_states_nobody_asked_for_go_first(rig):
    """The ends of requests may not push out what they share, however many they are."""
    shared = rig.insert(A[:8], state=True)
    rig.cache.begin_turn()
    assert rig.cache.hold(shared.slot)
    ends = [rig.insert([*A[:8], 70 + i, 0, 0, 0], state=True) for i in range(4)]
    rig.cache.begin_turn()
    for _ in ends:
        assert rig.cache._evict_state()
        assert shared.slot
    assert not any(node.slot for node in ends)
    assert rig.cache._evict_state()
    assert not shared.slot
    assert not rig.cache._evict_state()


def test_state_at_a_branch_counts_as_asked_for(rig):
    rig.insert(A)
    branch = rig.insert(B).parent
    end = rig.insert(A)
    for node in (branch, end):
        rig.keep_state(node)
    rig.cache.begin_turn()
    rig.cache._evict_state()
    assert branch.slot
    assert not end.slot


def test_no_more_than_half_of_the_slots_are_kept_apart(rig):
    """Otherwise what was asked for once would stay for ever."""
    nodes = [rig.insert([60 + i, *A[1:4]], state=True) for i in range(10)]
    rig.cache.begin_turn()
    for node in nodes:
        rig.cache.hold(node.slot)
    assert len(rig.cache._proven) == 6
    rig.cache.begin_turn()
    rig.cache._evict_state()
    assert [bool(node.slot) for node in nodes] == [False, *[True] * 9]


def test_state_in_use_stays(rig):
    """What the turn being planned reads or writes; its blocks stay as well."""
    node = rig.insert(A, state=True)
    rig.cache.begin_turn()
    assert rig.cache.hold(node.slot)
    assert not rig.cache.hold(node.slot), "held already"
    assert rig.cache.num_busy_states == 1
    assert not rig.cache._evict_state()
    assert not rig.cache.make_room(rig.allocator.blocks.num_free + 1)
    rig.check()
    rig.cache.let_go(node.slot)
    assert rig.cache.make_room(rig.allocator.blocks.num_free + 1)


def test_null_slot_is_never_held(rig):
    assert not rig.cache.hold(0)
    assert rig.cache.num_busy_states == 0


def test_slots_are_taken_from_the_free_ones_first(rig):
    rig.insert(A, state=True)
    rig.cache.begin_turn()
    taken = [rig.cache.take_slot() for _ in range(11)]
    assert 0 not in taken
    assert rig.cache.num_states == 1
    taken.append(rig.cache.take_slot())
    assert rig.cache.num_states == 0
    assert rig.cache.take_slot() == 0
    rig.allocator.slots.give(taken)


def test_room_that_cannot_be_made_evicts_nothing(rig):
    node = rig.insert(A)
    assert not rig.cache.make_room(41)
    assert rig.cache.num_blocks == 6
    rig.cache.lock(node)
    assert not rig.cache.make_room(35)
    rig.cache.unlock(node)
    assert rig.cache.num_blocks == 6


def test_room_that_cannot_be_made_beside_a_held_state_evicts_nothing(rig):
    """The tail of a fork stays until it is copied, so it does not count as room."""
    rig.insert([90, *A[1:8]])
    node = rig.insert(A[:12])
    rig.keep_tail(node, A[12:14])
    rig.cache.begin_turn()
    match = rig.match(A)
    assert rig.cache.hold(match.slot)
    free = rig.allocator.blocks.num_free
    assert rig.cache.num_evictable_blocks == 2
    assert not rig.cache.make_room(free + 3)
    assert rig.cache.num_blocks == 6
    assert rig.cache.make_room(free + 2)
    rig.cache.begin_turn()
    assert rig.cache.make_room(free + 6)
    assert rig.cache.num_blocks == rig.cache.num_states == 0


def test_second_state_that_this_turn_writes_is_free_in_the_next(rig):
    node = rig.insert(A, state=True)
    rig.cache.begin_turn()
    (slot,) = rig.allocator.slots.take(1)
    rig.cache.hold(slot)
    free = rig.allocator.slots.num_free
    rig.cache.keep_state(node, slot)
    assert (node.slot == slot, rig.allocator.slots.num_free) == (False, free)
    rig.check()
    rig.cache.begin_turn()
    assert rig.allocator.slots.num_free == free + 1


def test_blocks_on_several_ways_are_counted_once(rig):
    first, second = rig.insert(A), rig.insert(B)
    match = rig.match([*A[:20], 99])
    assert rig.cache.num_blocks_before([], match) == 5
    assert rig.cache.num_blocks_before([second], match) == 3 + 3 + 2
    assert rig.cache.num_blocks_before([first, second, first], match) == 3 + 3 + 3
    assert rig.cache.num_blocks_before([second], rig.match([99])) == 6


def test_reset_forgets_all_and_leaves_running_requests_their_blocks(rig):
    rig.insert(A, state=True)
    rig.insert([90, *A], state=True)
    node, blocks = rig.cache.share(rig.match(A, 12))
    rig.cache.reset()
    rig.check()
    assert rig.found(A) == (0, 0)
    assert rig.cache.num_states == 0
    assert rig.allocator.slots.num_free == 12
    assert rig.cache.num_blocks == len(blocks) == 3
    # What comes after begins anew, beside what is still held.
    rig.insert(A, state=True)
    assert rig.found(A) == (24, 24)
    rig.cache.unlock(node)
    assert rig.cache.make_room(40)
    assert rig.cache.num_blocks == 0


def test_line_of_leaves_does_not_pile_up(rig):
    """Where nothing is evicted, every use adds an entry that makes an older one void."""
    rig.insert(A)
    for _ in range(1000):
        node, _ = rig.cache.share(rig.match(A))
        rig.cache.unlock(node)
    assert len(rig.cache._leaves) <= 4 * len(rig.cache._nodes) + 65
    rig.check()
    assert rig.cache.make_room(40)


def test_cache_larger_than_its_pools_keeps_what_fits():
    rig = Rig(blocks=5, slots=2)
    for i in range(20):
        rig.cache.begin_turn()
        assert rig.cache.make_room(3)
        node = rig.insert([i, *A[1:12]])
        slot = rig.cache.take_slot()
        rig.cache.keep_state(node, slot)
        rig.check()
    assert rig.cache.num_blocks <= 5
    assert rig.cache.num_states <= 2
    assert rig.cache.counters.evicted_blocks >= 50


@hypothesis.settings(derandomize=True, deadline=None, database=None, max_examples=80, stateful_step_count=40)
class CacheMachine(stateful.RuleBasedStateMachine):
    """Few tokens, so that sequences begin alike; beside a dictionary of what was put in and not given up."""

    def __init__(self):
        super().__init__()
        self.rig = Rig(blocks=14, slots=5)
        self.held = []

    sequences = st.lists(st.integers(0, 1), min_size=1, max_size=5).map(
        lambda bits: [t for bit in bits for t in [bit] * 3]
    )

    @stateful.rule(tokens=sequences, state=st.booleans())
    def put(self, tokens, state):
        cache, keys = self.rig.cache, keys_of(tokens)
        cache.begin_turn()
        if not keys or not cache.make_room(len(keys)):
            return
        node = self.rig.insert(tokens)
        assert node.end == len(keys) * SIZE
        slot = cache.take_slot() if state else 0
        if slot:
            cache.keep_state(node, slot)

    @stateful.rule(tokens=sequences)
    def put_tail(self, tokens):
        cache, rest = self.rig.cache, tokens[len(tokens) // SIZE * SIZE :]
        cache.begin_turn()
        match = cache.match(make_request(tokens), len(tokens))
        if not rest or match.seen != len(tokens) - len(rest):
            return
        node, _ = cache.share(match)
        slot = cache.take_slot() if cache.make_room(1) else 0
        if slot:
            (block,) = self.rig.allocator.blocks.take(1)
            if not cache.keep_tail(node, tuple(rest), block, slot):
                self.rig.allocator.blocks.give([block])
                self.rig.allocator.slots.give([slot])
        cache.unlock(node)

    @stateful.rule(tokens=sequences)
    def share(self, tokens):
        match = self.rig.match(tokens)
        assert 0 <= match.position <= len(tokens)
        assert match.seen % SIZE == 0
        assert bool(match.slot) == bool(match.position)
        assert bool(match.tail) == (match.position > match.seen)
        if match.slot:
            owner = (self.rig.cache._untried | self.rig.cache._proven)[match.slot]
            assert path_tokens(owner) == tokens[: match.position]
        node, blocks = self.rig.cache.share(match)
        assert path_tokens(node) == tokens[: match.seen]
        assert len(blocks) * SIZE == match.seen
        self.held.append(node)

    @stateful.precondition(lambda self: self.held)
    @stateful.rule(which=st.integers(0, 9))
    def release(self, which):
        self.rig.cache.unlock(self.held.pop(which % len(self.held)))

    @stateful.rule(count=st.integers(1, 14))
    def make_room(self, count):
        cache, free = self.rig.cache, self.rig.allocator.blocks.num_free
        cache.begin_turn()
        possible = free + cache.num_evictable_blocks >= count
        assert cache.make_room(count) == possible
        assert (self.rig.allocator.blocks.num_free >= count) == possible

    @stateful.rule(chance=st.integers(0, 7))
    def reset(self, chance):
        if chance == 0:
            self.rig.cache.reset()
            assert self.rig.found([0] * 12) == (0, 0)

    @stateful.invariant()
    def nothing_is_lost(self):
        self.rig.check()

    def teardown(self):
        for node in self.held:
            self.rig.cache.unlock(node)
        self.rig.cache.reset()
        self.rig.check()
        assert self.rig.allocator.blocks.num_free == 14
        assert self.rig.allocator.slots.num_free == 5


def path_tokens(node) -> list[int]:
    runs = []
    while node.parent is not None:
        runs.append([token for key in node.keys for token in key])
        node = node.parent
    return [token for run in reversed(runs) for token in run]


test_cache_conserves_blocks_and_states = CacheMachine.TestCase
