"""The host tier: what leaves the device, what comes back, what is dropped first, and that nothing is made up."""

import collections

import pytest

from gdnjax.memory import HOST_BUNDLES, HostSizes
from gdnjax.serving.host_tier import HostTier
from gdnjax.serving.plan import Moves, Restore, Spill
from gdnjax.serving.radix_tree import NO_TOKENS, digest_after
from tests.serving.paper import Loop, check_output, distinct, make_request, make_scheduler
from tests.serving.schedules import schedule


def tier_of(capacity: int, state: int = 3) -> HostTier:
    return HostTier(HostSizes(capacity_bytes=capacity, block_bytes=1, state_bytes=state, staging_bytes=0))


def digests(count: int, which: int = 0) -> list[bytes]:
    found = [digest_after(NO_TOKENS, (which,))]
    while len(found) < count:
        found.append(digest_after(found[-1], (which,)))
    return found


def leave(tier: HostTier, names: list[bytes]) -> Moves | None:
    """A turn in which these blocks are evicted, in this order."""
    tier.begin_turn()
    for row, digest in enumerate(names, start=1):
        tier.keep_block(digest, row)
    moves = tier.take_moves()
    tier.check_integrity()
    return moves


def loop_of(**options) -> Loop:
    return Loop(make_scheduler(**({"seqs": 2, "blocks": 12, "checkpoints": 2, "host": 1000} | options)))


def run(loop: Loop, prompt, max_tokens: int = 2, **params):
    request = make_request(prompt, max_tokens=max_tokens, ignore_eos=True, **params)
    loop.run(request)
    check_output(request)
    return request


def test_digest_names_the_tokens_before_it_and_its_own():
    keys = [(1, 2), (1, 2, 3), (1,), (2, 1), (0,)]
    found = {digest_after(before, key) for before in (NO_TOKENS, *digests(3)) for key in keys}
    assert len(found) == 4 * len(keys)


def test_blocks_that_leave_together_are_bundles_of_fixed_sizes():
    tier = tier_of(1000)
    moves = leave(tier, digests(27))
    assert moves is not None
    assert sorted((len(spill.rows) for spill in moves.spills), reverse=True) == [16, 4, 4, 1, 1, 1]
    assert {len(spill.rows) for spill in moves.spills} <= set(HOST_BUNDLES)
    assert sorted(row for spill in moves.spills for row in spill.rows) == list(range(1, 28))
    assert (tier.num_blocks, tier.used_bytes) == (27, 27)
    assert (tier.counters.blocks_out, tier.counters.bytes_out) == (27, 27)


def test_what_was_of_use_longest_ago_is_dropped_first():
    tier = tier_of(3)
    first, second, third, fourth = digests(4)
    for digest in (first, second, third):
        leave(tier, [digest])
    # Evicted again while it is there: no copy, and it is the last to be dropped now.
    assert leave(tier, [first]) is None
    moves = leave(tier, [fourth])
    assert moves is not None
    assert len(moves.dropped) == 1
    assert tier.block(second) is None
    assert all(tier.block(digest) for digest in (first, third, fourth))
    assert (tier.used_bytes, tier.counters.dropped_blocks) == (3, 1)


def test_more_than_there_is_room_for_keeps_what_is_nearest_to_the_root():
    """Blocks are evicted from their ends on."""
    tier, names = tier_of(4), digests(7)
    moves = leave(tier, names[::-1])
    assert moves is not None
    assert not moves.dropped
    assert [tier.block(digest) is not None for digest in names] == [True] * 3 + [False] * 4
    assert tier.used_bytes == 3


def test_bundle_that_a_turn_reads_is_not_dropped_in_it():
    tier = tier_of(2)
    first, second, third, fourth = digests(4)
    leave(tier, [first])
    leave(tier, [second])
    tier.begin_turn()
    entry = tier.block(first)
    assert entry is not None
    tier.bring_back(entry, 7)
    for row, digest in enumerate((third, fourth), start=1):
        tier.keep_block(digest, row)
    moves = tier.take_moves()
    assert moves is not None
    assert moves.restores == (Restore(entry.bundle.number, False, (7,)),)
    assert tier.block(first)
    assert tier.block(second) is tier.block(third) is None
    assert tier.block(fourth)
    # The next turn may.
    leave(tier, [second, third])
    assert tier.block(first) is None


def test_plan_that_is_given_up_leaves_its_moves_to_the_next():
    tier = tier_of(2)
    first, second = digests(2)
    leave(tier, [first])
    tier.begin_turn()
    entry = tier.block(first)
    assert entry is not None
    tier.bring_back(entry, 7)
    tier.keep_block(second, 3)
    tier.begin_turn()
    moves = tier.take_moves()
    assert moves is not None
    assert [spill.rows for spill in moves.spills] == [(3,)]
    assert moves.restores == (Restore(entry.bundle.number, False, (7,)),)


def test_row_that_is_given_up_before_its_bundle_came_is_not_written():
    """The row may be somebody else's by then; the bundle is still there."""
    tier = tier_of(2)
    (first,) = digests(1)
    leave(tier, [first])
    tier.begin_turn()
    entry = tier.block(first)
    assert entry is not None
    tier.bring_back(entry, 7)
    tier.begin_turn()
    tier.keep_block(first, 7)
    assert tier.take_moves() is None
    assert tier.block(first) is entry


def test_bundle_comes_back_whole_and_its_other_rows_go_nowhere():
    tier, names = tier_of(100), digests(4)
    moves = leave(tier, names)
    assert moves is not None
    assert moves.spills == (Spill(moves.spills[0].bundle, False, (1, 2, 3, 4)),)
    tier.begin_turn()
    for digest, row in ((names[1], 9), (names[3], 8)):
        entry = tier.block(digest)
        assert entry is not None
        tier.bring_back(entry, row)
    moves = tier.take_moves()
    assert moves is not None
    assert [restore.rows for restore in moves.restores] == [(0, 9, 0, 8)]
    assert (tier.counters.blocks_in, tier.counters.bytes_in) == (2, 4)


@pytest.mark.parametrize("drafts", [0, 3])
def test_prefix_that_was_evicted_is_a_hit_once_more(drafts):
    """As deep as it was while the device had it, and it stays on the host."""
    loop = loop_of(num_speculative_tokens=drafts)
    first = run(loop, distinct(0, 100))
    assert run(loop, distinct(0, 100)).num_cached_tokens == 96
    run(loop, distinct(1, 170))
    assert loop.scheduler.cache.match(first, 99).seen < 96
    host = loop.scheduler.cache.host
    before = host.counters.blocks_out
    assert run(loop, distinct(0, 100)).num_cached_tokens == 96
    assert host.counters.hits == 1
    assert host.counters.states_in == 1
    # Evicted a second time, it is there already.
    run(loop, distinct(1, 170))
    assert host.counters.blocks_out - before <= 11
    loop.check()


def test_turn_of_a_chat_goes_on_from_a_tail_on_the_host():
    loop = loop_of()
    first = run(loop, distinct(0, 50), max_tokens=6)
    run(loop, distinct(1, 170))
    run(loop, distinct(2, 170))
    second = run(loop, [*first.tokens(0, first.num_tokens), *distinct(3, 5)])
    assert second.num_cached_tokens == first.num_tokens - 1 == 55
    assert loop.scheduler.cache.host.counters.hits == 1


def test_state_alone_comes_back_to_blocks_that_the_device_has():
    loop = loop_of(blocks=60, checkpoints=1, seqs=1)
    first = run(loop, distinct(0, 100))
    for other in range(1, 4):
        run(loop, distinct(other, 20))
    match = loop.scheduler.cache.match(first, 99)
    assert (match.position, match.seen) == (0, 96)
    host = loop.scheduler.cache.host
    assert run(loop, distinct(0, 100)).num_cached_tokens == 96
    assert (host.counters.blocks_in, host.counters.states_in) == (0, 1)


def test_model_without_a_state_brings_back_blocks():
    loop = loop_of(needs_state=False)
    run(loop, distinct(0, 100))
    run(loop, distinct(1, 170))
    assert run(loop, distinct(0, 100)).num_cached_tokens == 96
    assert loop.scheduler.cache.host.counters.states_out == 0


def test_hit_for_which_there_is_no_slot_is_none():
    """A request goes on without what it could have had, and nobody waits for ever."""
    loop = loop_of(checkpoints=0, seqs=1)
    run(loop, distinct(0, 100))
    run(loop, distinct(1, 170))
    request = run(loop, distinct(0, 100))
    assert request.num_cached_tokens == 0
    host = loop.scheduler.cache.host
    assert (host.counters.hits, host.counters.blocks_in, host.counters.states_in) == (0, 0, 0)


def test_hit_for_which_there_are_no_blocks_moves_nothing():
    loop = loop_of(blocks=14, checkpoints=4)
    run(loop, distinct(0, 100))
    run(loop, distinct(1, 200))
    running = make_request(distinct(2, 100), max_tokens=40, ignore_eos=True)
    loop.scheduler.add(running)
    for _ in range(4):
        loop.turn()
    waiting = make_request(distinct(0, 100), max_tokens=30, ignore_eos=True)
    loop.scheduler.add(waiting)
    host = loop.scheduler.cache.host
    loop.turn()
    assert not waiting.slot
    assert host.counters.blocks_in == 0
    loop.drain()
    check_output(waiting)
    assert host.counters.hits == 1


def test_reset_forgets_what_is_on_the_host():
    """What running requests outlive it with is found by nobody, and does not go there."""
    loop = loop_of()
    run(loop, distinct(0, 100))
    run(loop, distinct(1, 170))
    running = make_request(distinct(2, 100), max_tokens=30, ignore_eos=True)
    loop.scheduler.add(running)
    for _ in range(3):
        loop.turn()
    loop.scheduler.cache.reset()
    host = loop.scheduler.cache.host
    assert (host.num_blocks, host.num_states, host.used_bytes) == (0, 0, 0)
    loop.drain()
    check_output(running)
    assert run(loop, distinct(0, 100)).num_cached_tokens == 0
    assert run(loop, distinct(2, 100)).num_cached_tokens == 0
    assert host.counters.hits == 0


def test_prompt_that_bypasses_the_cache_leaves_the_host_alone():
    loop = loop_of()
    run(loop, distinct(0, 100))
    run(loop, distinct(1, 170))
    request = make_request(distinct(0, 100), max_tokens=2, prompt_logprobs=0)
    assert loop.scheduler._limit_of(request) == 0
    match = loop.scheduler._match(request)
    assert loop.scheduler.cache.look_on_host(request, 0, match) is None


def test_random_schedules_with_a_host_tier_equal_solo_runs(without_type_checks):
    happened = sum((schedule(seed) for seed in range(40)), collections.Counter())
    print(dict(happened))
    wanted = ("hits", "blocks_in", "states_in", "dropped_blocks", "dropped_states", "sealed at the end", "refused")
    wanted += ("masked", "masked in company")
    assert all(happened[name] > 20 for name in wanted)
