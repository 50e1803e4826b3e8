"""The scheduler over a device of plain Python: nobody overtaken without bound, nothing lost, every token right."""

import collections
import gc
import itertools
import weakref

import hypothesis
import pytest
from hypothesis import stateful
from hypothesis import strategies as st

from gdnjax.config import CHUNK
from gdnjax.serving import scheduler as scheduler_module
from gdnjax.serving.plan import Seal, check_fits, max_growth
from gdnjax.serving.prefix_cache import NO_CHECKPOINT
from gdnjax.serving.request import Status
from tests.serving.paper import (
    EOS,
    MAX_MODEL_LEN,
    Loop,
    check_nothing_is_held,
    check_output,
    distinct,
    make_request,
    make_scheduler,
    next_token,
    solo_run,
)

PLACES = 3
"""What a priority is worth here, so that its bound is reached."""

FAMILIES = tuple([next_token(hash((family, i))) for i in range(MAX_MODEL_LEN)] for family in range(2))
"""Prompts begin with the first tokens of one of these."""


def sizes_of(scheduler) -> dict[str, int]:
    """Of its pool of blocks, for check_fits."""
    return {"num_blocks": scheduler.allocator.blocks.size, "block_size": scheduler.config.block_size}


SEEN = collections.Counter()
"""What happened over all runs of the machine: it would show nothing if nothing happened."""


@hypothesis.settings(derandomize=True, deadline=None, database=None, max_examples=370, stateful_step_count=40)
class SchedulerMachine(stateful.RuleBasedStateMachine):
    """Drives a scheduler as the engine does, with up to two turns in flight, over pools of every scarcity."""

    @stateful.initialize(
        seqs=st.integers(1, 4),
        chunks=st.integers(1, 3),
        block_size=st.sampled_from((1, 4, 16, 64, 128)),
        spare_blocks=st.sampled_from((0, 0, 1, 3, 8, 20)),
        rows=st.integers(1, 2),
        checkpoints=st.sampled_from((0, 1, 2, 5, 9)),
        interval=st.integers(1, 4),
        mode=st.sampled_from(("cache", "cache", "cache", "no cache", "invariant")),
        drafts=st.sampled_from((0, 1, 3, 3)),
        adaptive=st.booleans(),
        needs_state=st.sampled_from((True, True, True, False)),
    )
    def build(
        self, seqs, chunks, block_size, spare_blocks, rows, checkpoints, interval, mode, drafts, adaptive, needs_state
    ):
        cached = mode != "no cache"
        self.scheduler = make_scheduler(
            seqs=seqs,
            tokens=chunks * CHUNK,
            block_size=block_size,
            blocks=-(-(MAX_MODEL_LEN - 1) // block_size) + spare_blocks,
            rows=rows,
            checkpoints=checkpoints if cached else 0,
            state_checkpoint_interval=max(interval, max_growth(drafts, block_size)) * block_size,
            enable_prefix_caching=cached,
            batch_invariant=mode == "invariant",
            num_speculative_tokens=drafts,
            needs_state=needs_state,
        )
        self.adaptive = adaptive and mode != "invariant"
        self.loop = Loop(self.scheduler)
        self.requests, self.admitted = [], []
        self.stood = 0

    @stateful.rule(
        family=st.integers(0, 1),
        shared=st.sampled_from((0, 16, 40, 64, 65, 128, 130, 200, 256)),
        own=st.sampled_from((0, 1, 2, 5, 17, 60, 64, 130)),
        max_tokens=st.sampled_from((1, 2, 5, 40, 100)),
        priority=st.sampled_from((0, 0, 0, 1, -1, -2)),
        patience=st.sampled_from((None, None, None, None, 1, 12)),
        row=st.sampled_from((False, False, True)),
        ends=st.sampled_from(("eos", "length", "length", "stop string", "prompt_logprobs")),
        speculate=st.sampled_from((True, True, False)),
    )
    def add(self, family, shared, own, max_tokens, priority, patience, row, ends, speculate):
        number = len(self.requests)
        prompt = FAMILIES[family][:shared] + [next_token(hash((number, i))) for i in range(max(own, shared == 0))]
        self.queue(prompt, max_tokens, priority, patience, row, ends, speculate)

    @stateful.precondition(lambda self: any(request.finished for request in self.requests))
    @stateful.rule(which=st.integers(0, 99), more=st.sampled_from((0, 1, 3, 20)), max_tokens=st.sampled_from((5, 40)))
    def follow_up(self, which, more, max_tokens):
        """The next turn of a conversation, or all that was folded of the last one: its end is cached then."""
        ended = [request for request in self.requests if request.finished]
        last = ended[which % len(ended)]
        known = last.tokens(0, last.num_tokens if more else last.num_tokens - 1)
        prompt = known + [next_token(hash((which, i))) for i in range(more)]
        if 0 < len(prompt) < MAX_MODEL_LEN:
            self.queue(prompt, max_tokens, 0, None, False, "length")

    def queue(self, prompt, max_tokens, priority, patience, row, ends, speculate=True):
        number = len(self.requests)
        how = {
            "eos": {},
            "length": {"ignore_eos": True},
            "stop string": {"ignore_eos": True, "stop": ["bc", "da", "gf", "hhi"]},
            "prompt_logprobs": {"prompt_logprobs": 0},
        }
        request = make_request(
            prompt,
            name=str(number),
            max_tokens=max_tokens,
            priority=priority,
            deadline=None if patience is None else self.loop.now + patience,
            turn_start=max(0, len(prompt) - 5),
            system_end=len(prompt) // 3,
            speculate=speculate,
            **how[ends],
            **({"logit_bias": {0: 1.0}} if row else {}),
        )
        check_fits(request.max_length, request.prompt_length, **sizes_of(self.scheduler))
        self.scheduler.add(request)
        self.requests.append(request)

    @stateful.rule(steps=st.lists(st.booleans(), min_size=4, max_size=16))
    def go_on(self, steps):
        """Dispatches and harvests in any order, late by up to two turns."""
        for dispatch in steps:
            if dispatch and len(self.loop.in_flight) < 2:
                self.dispatch()
            elif self.loop.in_flight:
                self.loop.harvest()
            self.nothing_is_lost_and_everything_is_right()

    def dispatch(self) -> bool:
        """Plans, and holds the plan to the promise that the first in order moves on."""
        scheduler, waited = self.scheduler, bool(self.loop.in_flight)
        overdue = [r for r in self.requests if r.deadline is not None and r.deadline <= self.loop.now + 1]
        live = [r for r in [*scheduler.running, *scheduler.waiting] if r not in overdue]
        first = min(live, key=lambda request: request.order, default=None)
        was_running = [request for request in scheduler.running if request not in overdue]
        ready = [request for request in was_running if request.may_decode]
        before = scheduler.num_preemptions
        plan = self.loop.dispatch(0 if self.adaptive and self.loop.now % 3 == 0 else None)
        assert all(request.finish_reason == "abort" for request in overdue if request.stop_reason == "timeout")
        assert not [request for request in overdue if request.status is not Status.FINISHED]
        preempted = scheduler.num_preemptions - before
        SEEN["preempted"] += preempted
        if waited:
            assert not preempted, "preemption waits for the truth"
        elif not preempted and not overdue:
            assert (plan is not None) == bool(live)
        if first is not None and not waited and not scheduler.config.batch_invariant:
            self.check_first(first, was_running, plan, preempted)
        if plan is None:
            SEEN["harvest first"] += waited and bool(ready)
            return False
        assert plan.decoding == [r for r in ready if r.status is Status.RUNNING], "decode goes on between pieces"
        assert plan.pieces or plan.decoding
        for admission in plan.admitted:
            assert admission.position < admission.request.num_tokens, "at least one token is computed"
            self.admitted += [admission.request] if admission.request not in self.admitted else []
            SEEN["hit"] += bool(admission.position)
            SEEN["tail"] += bool(admission.copy_from)
            SEEN["resumed"] += bool(admission.position and admission.request.num_preemptions)
        SEEN["grown"] += len(plan.growth)
        SEEN["marked"] += len(plan.marks)
        return True

    def check_first(self, first, was_running, plan, preempted):
        """It moves on by a chunk or a token; while it waits, somebody makes room for it or ends a prompt."""
        if first in was_running:
            assert first.status is Status.RUNNING, "the first in order is never preempted"
            assert first in plan.decoding or first in [piece.request for piece in plan.pieces]
        elif first.status is Status.WAITING and not (preempted or any(p.request in was_running for p in plan.pieces)):
            # What it was promised has just been taken by a request that grew, or by a state that was being written.
            self.stood += 1
            assert self.stood <= 2
            return
        self.stood = 0

    @stateful.precondition(lambda self: self.requests)
    @stateful.rule(which=st.integers(0, 20))
    def abort(self, which):
        # Now and then; and rather one of the last, which may still run.
        if which >= 2 * len(self.requests):
            return
        request = self.requests[-1 - which // 2]
        reason = request.finish_reason
        self.scheduler.finish(request, "abort")
        assert request.finish_reason == (reason or "abort")

    @stateful.precondition(lambda self: self.scheduler.running)
    @stateful.rule(which=st.integers(0, 3))
    def preempt(self, which):
        """As want of blocks would, whoever it is."""
        self.loop.harvest_all()
        if which < len(self.scheduler.running):
            self.scheduler.preempt(self.scheduler.running[which])

    @stateful.rule(fail=st.booleans(), chance=st.integers(0, 5))
    def forget(self, fail, chance):
        """Now and then: the user resets the cache, or a dispatch fails."""
        if chance == 0 and fail:
            self.loop.fail()
            assert not self.scheduler.running
            assert not self.scheduler.cache.num_states
            assert self.scheduler.allocator.blocks.num_used == 0
        elif chance == 0:
            self.scheduler.cache.reset()

    @stateful.invariant()
    def nothing_is_lost_and_everything_is_right(self):
        if not hasattr(self, "scheduler"):
            return
        self.loop.check()
        assert len(self.scheduler.running) <= self.scheduler.config.max_num_seqs
        for request in self.requests:
            if request.status is not Status.RUNNING:
                assert (request.slot, request.blocks, request.logit_row) == (0, [], 0)
                assert (request.unpublished, request.marks, request.num_steps, request.num_ahead) == ([], [], 0, 0)

    def teardown(self):
        """Everything ends by itself, in a bounded number of turns."""
        if not hasattr(self, "scheduler"):
            return
        alone = sum(-(-r.prompt_length // CHUNK) + r.params.max_tokens + 3 for r in self.requests)
        for _ in range(3 * alone + 3):
            if not self.scheduler.has_work and not self.loop.in_flight:
                break
            dispatched = self.dispatch()
            if self.loop.in_flight and (not dispatched or len(self.loop.in_flight) > 1):
                self.loop.harvest()
            self.nothing_is_lost_and_everything_is_right()
        for request in self.requests:
            check_output(request)
        self.check_order()
        SEEN["evicted states"] += self.scheduler.cache.counters.evicted_states
        SEEN["evicted blocks"] += self.scheduler.cache.counters.evicted_blocks
        SEEN["orphaned states"] += self.scheduler.cache.counters.orphaned_states
        SEEN["lost tokens"] += self.scheduler.cache.counters.lost_tokens
        SEEN.update(self.loop.device.seen)
        check_nothing_is_held(self.scheduler)

    def check_order(self):
        """A later request comes before an earlier one by its priority alone, and no more than so many of them do."""
        for request in self.admitted:
            place = self.requests.index(request)
            ahead = self.admitted[: self.admitted.index(request)]
            if request.params.needs_logit_row:
                # Who needs no row need not wait for one.
                SEEN["passed for want of a row"] += sum(
                    self.requests.index(r) > place for r in ahead if not r.params.needs_logit_row
                )
                ahead = [r for r in ahead if r.params.needs_logit_row]
            passed = collections.Counter(r.priority for r in ahead if self.requests.index(r) > place)
            SEEN["overtaken"] += passed.total()
            for priority, count in passed.items():
                assert count <= PLACES * (request.priority - priority)


@pytest.fixture
def few_places(monkeypatch):
    monkeypatch.setattr(scheduler_module, "PLACES_PER_PRIORITY", PLACES)


OFTEN = (
    "hit", "grown", "marked", "overtaken", "evicted states", "evicted blocks", "orphaned states", "lost tokens", "kept",
    "refused", "grown by several", "sealed at the end", "passed for want of a row",
)  # fmt: skip
RARELY = (
    "preempted", "tail", "resumed", "harvest first", "short of blocks", "cut by a seal", "marked within a run",
)  # fmt: skip


@pytest.mark.short_cases("few")
@pytest.mark.usefixtures("few_places", "without_type_checks")
@pytest.mark.parametrize(("examples", "seen"), [(100, OFTEN), (370, OFTEN + RARELY)], ids=["few", "many"])
def test_scheduler_serves_everyone_and_loses_nothing(examples, seen):
    SEEN.clear()
    how = hypothesis.settings(SchedulerMachine.TestCase.settings, max_examples=examples)
    stateful.run_state_machine_as_test(SchedulerMachine, settings=how)
    print(dict(SEEN))
    for name in seen:
        assert SEEN[name] >= 5, name


def fill(loop, *requests):
    """Queues requests and dispatches until all their prompts are in flight, harvested as it goes."""
    for request in requests:
        loop.scheduler.add(request)
    while not all(request.filled for request in requests):
        assert not any(request.finished for request in requests)
        loop.turn()


def test_request_of_one_piece_is_admitted_and_prefilled_at_once():
    scheduler = make_scheduler()
    request = make_request(30)
    scheduler.add(request)
    plan = scheduler.plan()
    assert [(a.request, a.position, a.copy_from, a.copy_to) for a in plan.admitted] == [(request, 0, 0, 0)]
    (piece,) = plan.pieces
    assert (piece.start, piece.length, piece.is_last, piece.read_slot) == (0, 30, True, request.slot)
    assert plan.decoding == []
    assert request.status is Status.RUNNING


def test_long_prompt_is_cut_at_chunks_while_others_decode():
    loop = Loop(make_scheduler(tokens=128))
    short, long = make_request(10, max_tokens=20, ignore_eos=True), make_request(300)
    fill(loop, short)
    loop.scheduler.add(long)
    pieces = []
    while not long.filled:
        plan = loop.turn()
        assert plan.decoding == [short]
        pieces += [(piece.start, piece.length, piece.is_last) for piece in plan.pieces]
    assert pieces == [(0, 128, False), (128, 128, False), (256, 44, True)]
    loop.drain()


def test_prefill_step_takes_no_more_rows_than_it_is_compiled_for():
    scheduler = make_scheduler(seqs=20, blocks=60)
    requests = [make_request(2) for _ in range(12)]
    for request in requests:
        scheduler.add(request)
    assert [piece.request for piece in scheduler.plan().pieces] == requests[:10]
    assert [piece.request for piece in scheduler.plan().pieces] == requests[10:]


@pytest.mark.parametrize(
    ("options", "steps"),
    [({"tokens": 8192}, 2), ({"tokens": 8192, "max_num_prefill_seqs": 256}, 1), ({"tokens": 1024}, 11)],
)
def test_many_short_prompts_share_a_prefill_step(options, steps):
    """256 prompts of 24 tokens. The states that they might leave after 16 tokens take nobody's place."""
    scheduler = make_scheduler(seqs=256, blocks=1000, **options)
    for index in range(256):
        scheduler.add(make_request([index % 26, index // 26, *distinct(0, 22)], max_tokens=2))
    taken = 0
    while scheduler.waiting:
        taken += bool(scheduler.plan(in_flight=True).pieces)
    assert taken == steps


def test_head_of_the_queue_is_not_overtaken_by_who_would_fit():
    """The second request would fit where the first does not: it waits, or the first might wait for ever."""
    loop = Loop(make_scheduler(seqs=3, blocks=20))
    running, large, small = make_request(100, max_tokens=50), make_request(250), make_request(1)
    fill(loop, running)
    loop.scheduler.add(large)
    loop.scheduler.add(small)
    assert loop.turn().admitted == []
    assert list(loop.scheduler.waiting) == [large, small]
    loop.scheduler.finish(running, "abort")
    assert [admission.request for admission in loop.dispatch().admitted] == [large]


def test_room_for_who_runs_to_grow_is_kept_at_admission():
    """Or whoever comes in would be the next to be preempted."""
    for spare, admitted in ((0, False), (1, True)):
        loop = Loop(make_scheduler(seqs=2, blocks=4 + 3 + spare, checkpoints=0))
        running, coming = (make_request(distinct(i, n), max_tokens=40) for i, n in enumerate((60, 40)))
        fill(loop, running)
        loop.scheduler.add(coming)
        assert [admission.request for admission in loop.dispatch().admitted] == [coming] * admitted


def test_request_that_lacks_blocks_is_looked_at_again_when_enough_are_freed(monkeypatch):
    loop = Loop(make_scheduler(seqs=4, blocks=34, tokens=512))
    going_on, ending, large = (
        make_request(distinct(which, length), max_tokens=most, ignore_eos=True)
        for which, (length, most) in enumerate([(60, 60), (150, 20), (300, 5)])
    )
    fill(loop, going_on, ending)
    looked_at, match = [], loop.scheduler.cache.match
    monkeypatch.setattr(loop.scheduler.cache, "match", lambda *asked: looked_at.append(asked[0]) or match(*asked))
    loop.scheduler.add(large)
    while not ending.finished:
        loop.turn()
    assert looked_at == [large]
    while not large.filled:
        loop.turn()
    assert (len(looked_at), going_on.finished) == (2, False)
    loop.drain()
    for request in (going_on, ending, large):
        check_output(request)


ROW = {"logit_bias": {0: 1.0}}


def test_who_needs_no_logit_row_passes_who_waits_for_one():
    loop = Loop(make_scheduler(seqs=4, rows=1))
    first, second, third = (make_request(10 + i, ignore_eos=True, **ROW) for i in range(3))
    plain = [make_request(20 + i, ignore_eos=True) for i in range(2)]
    for request in (first, second, third, *plain):
        loop.scheduler.add(request)
    assert [admission.request for admission in loop.turn().admitted] == [first, *plain]
    assert list(loop.scheduler.waiting) == [second, third]
    loop.drain()
    assert loop.scheduler.num_preemptions == 0
    assert first.finished_time < second.finished_time < third.finished_time
    for request in (first, second, third, *plain):
        check_output(request)


def test_few_logit_rows_keep_nobody_back_who_needs_none():
    """Half of them need one of two rows; the other half runs as if they were alone."""
    loop = Loop(make_scheduler(seqs=32, blocks=200, tokens=1024, rows=2))
    requests = [
        make_request(distinct(i, 20), max_tokens=20, ignore_eos=True, **(ROW if i % 2 else {})) for i in range(60)
    ]
    for request in requests:
        loop.scheduler.add(request)
    for _ in range(30):
        loop.turn()
    assert all(request.finished for request in requests[::2])
    loop.drain()
    for request in requests:
        check_output(request)


def test_who_has_been_passed_takes_blocks_back_when_it_gets_its_row():
    """Those that have passed hold all blocks. The last-come of them make room, and no more than have to."""
    loop = Loop(make_scheduler(seqs=6, blocks=24, rows=1, checkpoints=0, tokens=512))
    holder = make_request(distinct(0, 20), max_tokens=12, ignore_eos=True, **ROW)
    passed = make_request(distinct(1, 100), max_tokens=20, ignore_eos=True, **ROW)
    others = [make_request(distinct(2 + i, 60), max_tokens=60, ignore_eos=True) for i in range(4)]
    fill(loop, holder)
    for request in (passed, *others):
        loop.scheduler.add(request)
    loop.turn()
    assert loop.scheduler.running == [holder, *others]
    while not passed.filled:
        loop.turn()
        loop.check()
    assert [request.num_preemptions for request in others] == [0, 0, 1, 1]
    assert holder.finished
    loop.drain()
    for request in (holder, passed, *others):
        check_output(request)


@pytest.mark.parametrize("priority", [0, -2])
def test_urgent_request_takes_the_row_that_it_lacks_from_its_holder_or_from_nobody(priority):
    """Seats and blocks there are enough: whoever else were preempted, nothing would be won."""
    loop = Loop(make_scheduler(seqs=8, rows=1, blocks=80, tokens=512))
    holder = make_request(distinct(0, 20), max_tokens=40, priority=priority, ignore_eos=True, **ROW)
    plain = [make_request(distinct(1 + i, 20), max_tokens=80, ignore_eos=True) for i in range(6)]
    fill(loop, holder, *plain)
    urgent = make_request(distinct(9, 20), priority=-1, ignore_eos=True, **ROW)
    loop.scheduler.add(urgent)
    while not urgent.filled:
        assert len(loop.scheduler.running) >= 6
        loop.turn()
    assert holder.num_preemptions == (priority == 0)
    assert not any(request.num_preemptions for request in plain)
    loop.drain()
    for request in (holder, urgent, *plain):
        check_output(request)


@pytest.mark.parametrize("blocks", [30, 37])
def test_blocks_that_an_urgent_request_would_share_are_not_asked_for_again(blocks):
    """It needs one block of its own, and there are ten or more."""
    loop = Loop(make_scheduler(seqs=2, blocks=blocks))
    prefix = distinct(0, 18 * 16)
    running = make_request(prefix, max_tokens=20, ignore_eos=True)
    fill(loop, running)
    urgent = make_request([*prefix, 1, 2, 3], priority=-1)
    loop.scheduler.add(urgent)
    while not urgent.filled:
        loop.turn()
    assert urgent in loop.scheduler.running
    assert loop.scheduler.num_preemptions == 0
    loop.drain()


@pytest.mark.parametrize("spare", [0, 1])
def test_urgent_request_counts_the_room_that_others_need_to_grow(spare):
    """As admission does; else it would wait for a block that it is not given, while all go on that came after it."""
    loop = Loop(make_scheduler(seqs=3, blocks=4 + 4 + 3 + 1 + spare, checkpoints=0))
    others = [make_request(distinct(i, 50), max_tokens=14, ignore_eos=True) for i in range(2)]
    fill(loop, *others)
    urgent = make_request(distinct(2, 40), priority=-1, ignore_eos=True)
    loop.scheduler.add(urgent)
    loop.turn()
    loop.turn()
    loop.turn()
    assert urgent in loop.scheduler.running
    assert [request.num_preemptions for request in others] == [0, 1 - spare]
    loop.drain()


def test_nobody_is_preempted_where_that_would_not_make_room_enough():
    """What stands before the urgent request holds too much, so it waits for that anyhow."""
    loop = Loop(make_scheduler(seqs=3, blocks=24, tokens=512))
    first = make_request(distinct(0, 200), max_tokens=30, priority=-2, ignore_eos=True)
    behind = make_request(distinct(1, 20), max_tokens=30, ignore_eos=True)
    fill(loop, first, behind)
    urgent = make_request(distinct(2, 200), priority=-1, ignore_eos=True)
    loop.scheduler.add(urgent)
    while not first.finished:
        loop.turn()
        assert behind.num_preemptions == 0
    loop.drain()
    for request in (first, behind, urgent):
        check_output(request)


def test_request_waits_for_a_logit_row():
    scheduler = make_scheduler(rows=1)
    first, second = (make_request(5, logit_bias={0: 1.0}) for _ in range(2))
    scheduler.add(first)
    scheduler.add(second)
    assert [admission.request for admission in scheduler.plan().admitted] == [first]
    assert first.logit_row == 1
    scheduler.finish(first, "abort")
    assert [admission.request for admission in scheduler.plan().admitted] == [second]


@pytest.mark.parametrize(
    "params", [{"presence_penalty": 1.5}, {"repetition_penalty": 1.1}, {"frequency_penalty": -1.0}, {"min_tokens": 3}]
)
def test_penalties_and_minimum_wait_for_no_row(params):
    scheduler = make_scheduler(seqs=4, rows=1)
    requests = [make_request(5, **params) for _ in range(4)]
    for request in requests:
        scheduler.add(request)
    assert [admission.request for admission in scheduler.plan().admitted] == requests
    scheduler.check_integrity()
    assert [request.logit_row for request in requests] == [0] * 4
    assert [request.count_row for request in requests] == ([0] * 4 if "min_tokens" in params else [1, 2, 3, 4])


def test_lower_priority_number_comes_first_by_a_bounded_number_of_places():
    scheduler = make_scheduler(seqs=1)
    places = scheduler_module.PLACES_PER_PRIORITY
    plain = make_request(5)
    scheduler.add(plain)
    urgent = [make_request(5, priority=-1) for _ in range(places + 2)]
    for request in urgent:
        scheduler.add(request)
    # The one that came `places` later stands in the very place, and who came first goes first.
    assert list(scheduler.waiting) == [*urgent[: places - 1], plain, *urgent[places - 1 :]]


def test_urgent_request_takes_the_place_of_a_less_urgent_one():
    """The one preempted keeps its tokens and its place, and resumes from what it had computed."""
    loop = Loop(make_scheduler(seqs=1))
    slow, urgent = make_request(40, max_tokens=30, ignore_eos=True), make_request(50, priority=-1, ignore_eos=True)
    fill(loop, slow)
    for _ in range(5):
        loop.turn()
    loop.scheduler.add(urgent)
    assert loop.turn() is None
    assert loop.turn() is None
    produced = len(slow.output_token_ids)
    assert (slow.status, slow.num_preemptions) == (Status.WAITING, 1)
    assert produced > 3
    loop.drain()
    assert urgent.finished_time < slow.finished_time
    # Of the tokens that were computed twice there is the last alone.
    assert slow.prefill_length == 0
    for request in (slow, urgent):
        check_output(request)


def test_last_come_is_preempted_when_no_block_is_left():
    """The last of three, whoever asks for the block."""
    loop = Loop(make_scheduler(seqs=3, blocks=15, checkpoints=0, tokens=256))
    requests = [make_request(distinct(i, 60), name=str(i), max_tokens=60, ignore_eos=True) for i in range(3)]
    for request in requests:
        loop.scheduler.add(request)
    while not loop.scheduler.num_preemptions:
        loop.turn()
    assert [request.num_preemptions for request in requests] == [0, 0, 1]
    loop.drain()
    assert requests[0].num_preemptions == 0
    for request in requests:
        check_output(request)


def test_request_starts_afresh_where_all_other_slots_are_live():
    """The one slot that is left is the checkpoint's that it would go on from: it is taken, and nobody waits for it."""
    loop = Loop(make_scheduler(seqs=2, checkpoints=0, tokens=256))
    before = make_request(distinct(1, 100), ignore_eos=True)
    loop.run(before)
    running = make_request(distinct(0, 30), max_tokens=60, ignore_eos=True)
    fill(loop, running)
    assert loop.scheduler.cache.num_states == 1
    follow_up = make_request([*before.tokens(0, before.num_tokens), 1, 2], ignore_eos=True)
    loop.scheduler.add(follow_up)
    (admission,) = loop.turn().admitted
    assert (admission.request, admission.position, follow_up.num_cached) == (follow_up, 0, 0)
    loop.drain()
    for request in (running, follow_up):
        check_output(request)


def test_checkpoint_that_this_turn_writes_is_no_slot_for_a_request():
    """Somebody else has computed the same blocks, so the checkpoint is with its request still."""
    loop = Loop(make_scheduler(seqs=2, checkpoints=1))
    running = make_request(40, max_tokens=40, ignore_eos=True)
    fill(loop, running)
    scheduler = loop.scheduler
    scheduler.cache.begin_turn()
    running.detached, running.unpublished = True, [(32, scheduler.cache.take_slot())]
    rest = scheduler.allocator.slots.take(scheduler.allocator.slots.num_free)
    scheduler.cache.hold(running.unpublished[0][1])
    scheduler._num_kept_back += 1
    while scheduler.cache.num_states:
        rest.append(scheduler.cache.take_slot())
    assert scheduler._take_live_slot() == 0
    scheduler.cache.begin_turn()
    assert scheduler._take_live_slot() != 0
    assert (running.unpublished, scheduler._num_kept_back) == ([], 0)


def test_checkpoints_of_a_piece_leave_a_slot_for_who_waits():
    """The piece wants four; of the two slots that are left one is kept for the request behind it, in the same turn."""
    options = {"checkpoints": 1, "state_checkpoint_interval": 16, "tokens": 128}
    scheduler = make_scheduler(seqs=2, **options)
    first, second = make_request(distinct(0, 64)), make_request(distinct(1, 30))
    for request in (first, second):
        scheduler.add(request)
    plan = scheduler.plan()
    assert [admission.request for admission in plan.admitted] == [first, second]
    assert [len(piece.checkpoints) for piece in plan.pieces] == [1, 0]
    assert scheduler.cache.counters.skipped_states == 2
    scheduler.check_integrity()


@pytest.mark.parametrize("length", [500, 512, 70])
def test_second_chat_behind_a_system_prompt_goes_on_from_its_end(length):
    """The first leaves a state where another question would part from it. Others begin on the grid of blocks."""
    loop = Loop(make_scheduler(tokens=512, blocks=150, checkpoints=8))
    system, questions = distinct(0, length), [distinct(1 + i, 30) for i in range(3)]
    chats = [make_request([*system, *q], system_end=length, turn_start=length + 27, longest=600) for q in questions]
    loop.run(chats[0])
    for chat in chats[1:]:
        loop.run(chat)
        assert chat.num_cached_tokens == length // 16 * 16
        check_output(chat)
    # It stands there once.
    assert sum(node.slot > 0 and node.end == length // 16 * 16 for node in loop.scheduler.cache._nodes) == 1


def test_chats_that_come_together_compute_their_system_prompt_once():
    loop = Loop(make_scheduler(seqs=4, tokens=1024, blocks=150, checkpoints=8))
    system = distinct(0, 500)
    chats = [make_request([*system, *distinct(1 + i, 30)], system_end=500, longest=600) for i in range(4)]
    for chat in chats:
        loop.scheduler.add(chat)
    loop.drain()
    assert [chat.num_cached_tokens for chat in chats] == [0, 496, 496, 496]


def test_third_prompt_goes_on_from_where_the_first_two_parted():
    """Of plain prompts nobody knows where they part before the second comes."""
    loop = Loop(make_scheduler(tokens=512, blocks=150, checkpoints=8))
    prompts = [make_request([*distinct(0, 500), *distinct(1 + i, 30)], longest=600) for i in range(4)]
    for prompt in prompts:
        loop.run(prompt)
    assert [prompt.num_cached_tokens for prompt in prompts] == [0, 0, 496, 496]
    assert prompts[1].cache_miss_reason == NO_CHECKPOINT


def test_tokens_that_were_there_without_a_state_are_counted_as_lost():
    loop = Loop(make_scheduler(tokens=512, blocks=60))
    prompt = distinct(0, 100)
    loop.run(make_request(prompt))
    while loop.scheduler.cache._evict_state():
        pass
    counters = loop.scheduler.cache.counters
    again, third = make_request([*prompt[:70], 1, 2]), make_request([*prompt[:80], 3, 4])
    loop.run(again)
    assert (again.num_cached_tokens, again.cache_miss_reason) == (0, NO_CHECKPOINT)
    assert (counters.hit_tokens, counters.lost_tokens) == (0, 64)
    loop.run(third)
    assert third.num_cached_tokens == 64
    assert (counters.queried_tokens, counters.hit_tokens, counters.lost_tokens) == (100 + 72 + 82, 64, 64 + 16)


def test_requests_that_have_ended_are_not_kept_until_their_deadlines():
    loop = Loop(make_scheduler(seqs=8, blocks=60))
    requests = [make_request(distinct(i, 20), deadline=1e9, max_tokens=2) for i in range(40)]
    ended = [weakref.ref(request) for request in requests]
    for request in requests:
        loop.scheduler.add(request)
    del request, requests
    while loop.scheduler.has_work or loop.in_flight:
        loop.turn()
        # As the engine does, once it has told of them.
        loop.scheduler.ended.clear()
        alive = sum(request() is not None for request in ended)
        live = len(loop.scheduler.waiting) + len(loop.scheduler.running)
        assert alive <= 2 * live + 2 * 8
    gc.collect()
    assert not any(request() for request in ended)


def test_finishing_a_request_that_is_nowhere_changes_nothing_else():
    """An interrupt may have come before it was queued."""
    scheduler = make_scheduler()
    queued, stray = make_request(20), make_request(30)
    scheduler.add(queued)
    scheduler.finish(stray, "abort")
    scheduler.check_integrity()
    assert stray.finished
    assert list(scheduler.waiting) == [queued]


@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_preempted_request_resumes_from_its_deepest_checkpoint(drafts):
    """What was pending when it was preempted is folded, so nothing but its last token is computed twice."""
    loop = Loop(make_scheduler(seqs=2, num_speculative_tokens=drafts))
    request = make_request(100, max_tokens=40, ignore_eos=True)
    fill(loop, request)
    for _ in range(10):
        loop.turn()
    loop.harvest_all()
    computed, slot = request.num_computed, request.slot
    assert (request.num_folded < computed) == (drafts > 0)
    loop.scheduler.preempt(request)
    loop.check()
    plan = loop.turn()
    assert plan.admitted[0].position == computed == request.num_tokens - 1
    assert plan.seals == ([Seal(slot, slot, computed)] if drafts else [])
    assert request.num_cached_tokens == 0, "what its first admission found"
    loop.drain()
    check_output(request)


def test_request_preempted_between_pieces_resumes_there():
    loop = Loop(make_scheduler(seqs=2, tokens=64))
    request = make_request(200)
    loop.scheduler.add(request)
    loop.turn()
    loop.turn()
    loop.harvest_all()
    loop.scheduler.preempt(request)
    (admission,) = loop.turn().admitted
    assert admission.position == 128
    loop.drain()
    check_output(request)


@pytest.mark.parametrize("how", ["preempted", "aborted"])
def test_state_behind_its_cached_blocks_makes_no_tail(how):
    """A request that recomputes states over shared blocks has less behind it than the blocks that it shares."""
    loop = Loop(make_scheduler(seqs=1, tokens=64, block_size=128, blocks=8, checkpoints=2))
    loop.run(make_request(300))
    loop.scheduler.cache.begin_turn()
    while loop.scheduler.cache._evict_state():
        pass
    request = make_request(300, name="again")
    loop.scheduler.add(request)
    loop.turn()
    assert (request.num_computed, request.num_cached) == (64, 256)
    loop.harvest_all()
    if how == "preempted":
        loop.scheduler.preempt(request)
    else:
        loop.scheduler.finish(request, "abort")
    loop.check()
    loop.drain()
    check_output(request)
    check_nothing_is_held(loop.scheduler)


def test_nobody_is_preempted_in_invariant_mode():
    """All blocks are reserved at admission, so whoever does not fit waits, urgent or not."""
    loop = Loop(make_scheduler(seqs=3, blocks=12, batch_invariant=True))
    requests = [make_request(60 + i, priority=-i, max_tokens=60, ignore_eos=True) for i in range(4)]
    loop.run(*requests)
    assert [request.num_preemptions for request in requests] == [0] * 4
    for request in requests:
        check_output(request)


def test_overdue_request_ends_wherever_it_is():
    loop = Loop(make_scheduler(seqs=1))
    running, waiting = (make_request(20, deadline=5.0, max_tokens=50, ignore_eos=True) for _ in range(2))
    patient = make_request(21)
    loop.run(running, waiting, patient)
    for request in (running, waiting):
        assert (request.finish_reason, request.stop_reason) == ("abort", "timeout")
    assert 0 < len(running.output_token_ids) < 5
    assert waiting.output_token_ids == []
    check_output(patient)


def test_blocks_cover_all_tokens_but_the_last():
    """The last token is drawn and never fed."""
    scheduler = make_scheduler(block_size=16)
    assert [scheduler.num_blocks_for(n) for n in (2, 17, 18, 33, 34)] == [1, 1, 2, 2, 3]


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("drafts", [0, 1, 3, 7])
def test_blocks_come_as_a_request_grows(drafts, size):
    """It begins with room for its prompt and the drafts behind it, and gets the next blocks with the step that writes
    into them: for all drafts that the step verifies, and all that it makes.
    """
    loop = Loop(make_scheduler(block_size=size, blocks=80, num_speculative_tokens=drafts))
    request = make_request(7, max_tokens=40, ignore_eos=True)
    loop.scheduler.add(request)
    held = 0
    while not request.finished:
        plan = loop.dispatch()
        if plan is not None:
            assert plan.bounds == [1 + drafts] * len(plan.decoding)
            told = [growth.index for growth in plan.growth.get(0, [])]
            assert told == (list(range(held, len(request.blocks))) if plan.decoding else [])
            assert len(told) <= max_growth(drafts, size)
            held = max(held, -(-min(request.num_computed + drafts, 46) // size))
            assert len(request.blocks) == held
        if plan is None or len(loop.in_flight) > 1:
            loop.harvest()
            loop.check()
    assert request.prompt_length + len(request.output_token_ids) == 47
    check_output(request)


def test_request_that_can_never_fit_is_refused_by_its_numbers():
    sizes = sizes_of(make_scheduler(blocks=4))
    check_fits(65, 60, **sizes)
    with pytest.raises(
        ValueError, match=r"prompt of 60 tokens with up to 6 output tokens needs 5 KV blocks, the pool has 4"
    ):
        check_fits(66, 60, **sizes)


def test_no_plan_without_work():
    assert make_scheduler().plan() is None


# Drafts.


def test_drafts_take_no_block_that_another_needs():
    """Of two free blocks one stays for the second request, which may fill its last one at any time."""
    loop = Loop(make_scheduler(seqs=2, blocks=6, block_size=4, checkpoints=0, num_speculative_tokens=3))
    requests = [make_request([i] * 5, max_tokens=20, ignore_eos=True) for i in range(2)]
    fill(loop, *requests)
    loop.harvest_all()
    assert [len(request.blocks) for request in requests] == [2, 2]
    plan = loop.dispatch()
    assert plan.bounds == [4, 2]
    assert {row: len(grown) for row, grown in plan.growth.items()} == {0: 1}
    assert loop.scheduler.allocator.blocks.num_free == 1
    loop.drain()
    for request in requests:
        check_output(request)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_pool_that_holds_everyone_holds_all_drafts(size):
    loop = Loop(make_scheduler(blocks=3 * -(-59 // size), block_size=size, checkpoints=0, num_speculative_tokens=3))
    requests = [make_request([i] * 20, max_tokens=40, ignore_eos=True) for i in range(3)]
    loop.run(*requests)
    assert loop.device.seen["kept"] > 30
    assert loop.device.seen["short of blocks"] == loop.scheduler.num_preemptions == 0
    for request in requests:
        check_output(request)


def test_invariant_mode_verifies_all_drafts_whatever_is_in_flight():
    """All blocks are there from the beginning, so that upper bounds of lengths cut nothing."""
    loop = Loop(make_scheduler(blocks=8, seqs=2, checkpoints=2, batch_invariant=True, num_speculative_tokens=3))
    requests = [make_request([i] * 8, max_tokens=50, ignore_eos=True) for i in range(2)]
    for request in requests:
        loop.scheduler.add(request)
    for _ in range(18):
        loop.dispatch()
    plans = [plan for plan, *_ in loop.in_flight]
    assert {bound for plan in plans for bound in plan.bounds} == {4}
    assert not any(plan.seals or plan.growth for plan in plans)
    loop.harvest_all()
    loop.drain()
    for request in requests:
        check_output(request)


def test_request_may_opt_out_of_drafts():
    loop = Loop(make_scheduler(num_speculative_tokens=3))
    requests = [make_request(20 + i, max_tokens=30, ignore_eos=True, speculate=i != 1) for i in range(3)]
    fill(loop, *requests)
    plan = loop.dispatch()
    assert (plan.num_drafts, plan.bounds) == (3, [4, 1, 4])
    loop.drain()
    for request in requests:
        check_output(request)


def test_step_may_verify_fewer_drafts_than_the_engine_could():
    loop = Loop(make_scheduler(num_speculative_tokens=3))
    request = make_request(20, max_tokens=30, ignore_eos=True)
    fill(loop, request)
    for drafts in (0, 0, 2, 3, 0, 1):
        plan = loop.dispatch(drafts)
        assert (plan.num_drafts, plan.bounds) == (drafts, [1 + drafts])
    loop.drain()
    check_output(request)


def test_what_is_in_flight_settles_as_it_is_harvested():
    scheduler = make_scheduler(num_speculative_tokens=3)
    request = make_request(5, max_tokens=20, ignore_eos=True)
    scheduler.add(request)

    def progress():
        scheduler.check_integrity()
        return request.num_folded, request.num_settled, request.num_computed, request.num_steps

    scheduler.plan()
    assert progress() == (5, 5, 5, 0)
    for steps in (1, 2):
        assert scheduler.plan(in_flight=True).bounds == [4]
        assert progress() == (5, 5, 5 + 4 * steps, steps)
    scheduler.commit(request, [0], False)
    assert progress() == (5, 5, 13, 2)
    scheduler.commit(request, [1, 2], False, 4)
    assert progress() == (5, 7, 11, 1)
    scheduler.commit(request, [3, 4, 5, 6], False, 4)
    assert progress() == (7, 11, 11, 0)


# Late harvest: what is in flight is an upper bound.


@pytest.mark.parametrize("drafts", [0, 3])
def test_request_is_never_dispatched_past_its_length(drafts):
    """Each step in flight may feed no more than one token."""
    scheduler = make_scheduler(num_speculative_tokens=drafts)
    request = make_request(10, max_tokens=3)
    scheduler.add(request)
    scheduler.plan()
    assert scheduler.plan(in_flight=True).decoding == [request]
    assert scheduler.plan(in_flight=True).decoding == [request]
    assert scheduler.plan(in_flight=True) is None, "three tokens are in flight"
    scheduler.commit(request, [0], False)
    assert scheduler.plan(in_flight=True) is None
    scheduler.commit(request, [1], False, 1 + drafts)
    assert scheduler.plan(in_flight=True) is None
    scheduler.commit(request, [2], True, 1 + drafts)
    assert (request.finish_reason, request.output_token_ids) == ("length", [0, 1, 2])


def test_nobody_is_preempted_while_steps_are_in_flight():
    """They may have ended somebody already: the plan is put off until they are harvested."""
    loop = Loop(make_scheduler(seqs=2, blocks=9, checkpoints=0))
    requests = [make_request([token + i for token in range(60)], max_tokens=60, ignore_eos=True) for i in range(2)]
    fill(loop, *requests)
    while loop.dispatch() is not None:
        if len(loop.in_flight) == 2:
            loop.harvest()
    assert loop.in_flight
    assert loop.scheduler.num_preemptions == 0
    loop.harvest_all()
    loop.dispatch()
    assert loop.scheduler.num_preemptions == 1
    loop.drain()


def test_blocks_of_steps_in_flight_are_reserved():
    loop = Loop(make_scheduler(seqs=2, block_size=4, blocks=40))
    request = make_request(6, max_tokens=30, ignore_eos=True)
    loop.scheduler.add(request)
    for _ in range(6):
        loop.dispatch()
    assert len(loop.in_flight) == 6
    assert len(request.blocks) * 4 >= request.num_computed == 11
    assert request.output_token_ids == []
    loop.harvest_all()
    loop.drain()
    check_output(request)


def test_step_belongs_to_the_requests_of_its_plan():
    """The slot has a new owner when the old one's tokens arrive."""
    loop = Loop(make_scheduler(seqs=1, checkpoints=0, enable_prefix_caching=False))
    old, new = (make_request(length, max_tokens=20, ignore_eos=True) for length in (20, 30))
    fill(loop, old)
    loop.turn()
    slot, kept = old.slot, list(old.output_token_ids)
    loop.scheduler.finish(old, "abort")
    loop.scheduler.add(new)
    loop.dispatch()
    assert new.slot == slot
    loop.drain()
    assert old.output_token_ids == kept
    check_output(new)


def stopping_late():
    """Requests whose stop string ends at a token that others follow, and the tokens kept."""
    for length in range(20, 200):
        request = make_request(length, max_tokens=60, ignore_eos=True, stop="bc")
        if 20 < len(solo_run(request)) < 50:
            yield request, solo_run(request)


@pytest.mark.parametrize("drafts", [0, 1, 3])
@pytest.mark.parametrize("late", [0, 1, 2])
def test_nothing_past_a_late_found_stop_string_is_published(late, drafts):
    """Where the state can be sealed behind what is kept, a follow-up goes on from there; else from an earlier
    checkpoint.
    """
    cut_within_a_run = 0
    for request, kept in itertools.islice(stopping_late(), 5):
        options = {"checkpoints": 8, "state_checkpoint_interval": 4, "num_speculative_tokens": drafts}
        loop = Loop(make_scheduler(seqs=2, block_size=4, blocks=100, **options))
        loop.scheduler.add(request)
        while not request.finished:
            if len(loop.in_flight) <= late and loop.dispatch() is not None:
                continue
            before = request.num_settled
            settled = before + sum(len(tokens) for tokens, _ in loop.in_flight[0][2])
            loop.harvest()
            loop.check()
        assert (request.output_token_ids, request.stop_reason) == (kept, "bc")
        known = request.prompt_length + len(kept)
        assert max(node.end for node in loop.scheduler.cache._nodes) <= known
        follow_up = make_request([*request.tokens(0, known), 3, 4, 5])
        loop.scheduler.add(follow_up)
        plan = loop.dispatch()
        loop.check()
        # Without drafts a step in flight folds the last token itself; with them it folds what was pending before it.
        reached = min(settled, known) if late == 0 else (settled if drafts else known)
        position = reached if late < 2 and reached <= known else before // 4 * 4
        assert plan.admitted[0].position == position
        loop.drain()
        check_output(follow_up)
        cut_within_a_run += settled > known
    # The last token of a run is not fed yet.
    assert (cut_within_a_run > 0) == (drafts > 1)


@pytest.mark.parametrize("drafts", [0, 1, 3])
@pytest.mark.parametrize("late", [0, 1, 2, 3])
@pytest.mark.parametrize("first", ["read", "in flight"])
def test_abort_keeps_a_state_of_known_length(first, late, drafts):
    """However many decode steps are in flight, and whether its first token has been read or not."""
    loop = Loop(make_scheduler(num_speculative_tokens=drafts))
    request = make_request(30, max_tokens=40, ignore_eos=True)
    loop.scheduler.add(request)
    loop.dispatch()
    if first == "read":
        loop.dispatch()
        loop.dispatch()
        loop.harvest_all()
    settled, known = request.num_settled, request.num_tokens
    for _ in range(late):
        loop.dispatch()
    loop.scheduler.finish(request, "abort")
    loop.check()
    loop.scheduler.add(make_request([*request.tokens(0, known), 3, 4, 5]))
    (admission,) = loop.dispatch().admitted
    reached = settled if drafts else settled + late
    # Of a second step in flight nobody knows where it began.
    sealed = reached <= known and (late <= 1 or not drafts)
    # The checkpoint of its prompt stands at 16.
    assert admission.position == (reached if sealed else 16)
    loop.harvest_all()
    loop.drain()


# Checkpoints that decode steps write.


@pytest.mark.parametrize("drafts", [0, 1, 3])
@pytest.mark.parametrize("late", [0, 1, 3])
def test_checkpoint_is_asked_for_from_the_first_chance_until_it_is_seen(late, drafts):
    """Then it is the cache's, and stands at the very position, in the middle of a run of kept drafts as well."""
    options = {"checkpoints": 20, "state_checkpoint_interval": 8, "num_speculative_tokens": drafts}
    loop = Loop(make_scheduler(block_size=4, blocks=60, **options))
    scheduler, request = loop.scheduler, make_request(21, max_tokens=58, ignore_eos=True)
    scheduler.add(request)
    wanted, seen = range(24, 120, 8), 21
    while not request.finished:
        # Its 79th token is drawn and never fed.
        most = min(request.num_settled + request.num_ahead, 78)
        plan = loop.dispatch() if len(loop.in_flight) <= late else None
        if plan is not None:
            asked = [p for p in wanted if p <= most and p not in seen_at(scheduler)] if plan.decoding else []
            assert [mark.position for mark in plan.marks] == asked
            assert plan.seals == [Seal(request.slot, mark.slot, mark.position) for mark in plan.marks]
            continue
        seen = request.num_settled if loop.in_flight[0][0].decoding else seen
        loop.harvest()
        loop.check()
        if not request.finished:
            assert [p for p in wanted if p <= seen] == [p for p in seen_at(scheduler) if p >= 24]
    assert (loop.device.seen["marked within a run"] > 0) == (drafts > 0)
    check_output(request)


def seen_at(scheduler):
    """Positions of the cache's checkpoints."""
    return sorted(node.end for node in scheduler.cache._nodes if node.slot)


def test_prompt_that_lost_its_states_leaves_them_at_intervals_of_what_is_new_only():
    """Or whoever computes a long prompt again would push out what others go on from, and lose it again himself."""
    loop = Loop(make_scheduler(checkpoints=20, tokens=256, state_checkpoint_interval=16))
    prompt = [number % 8 for number in range(100)]
    loop.run(make_request(prompt, max_tokens=4))
    assert set(range(16, 100, 16)) <= set(seen_at(loop.scheduler))
    while loop.scheduler.cache._evict_state():
        pass
    assert seen_at(loop.scheduler) == []
    again = make_request([*prompt, *[8] * 50], max_tokens=4)
    loop.run(again)
    check_output(again)
    # Where the two part within the last whole block that was seen, and behind it.
    assert seen_at(loop.scheduler)[:4] == [96, 112, 128, 144]


@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_checkpoint_that_a_row_never_reached_is_given_back(drafts):
    """The device found the end first, while a step in flight was asked for a checkpoint behind it."""
    for length in range(10, 200):
        request = make_request(length, max_tokens=40)
        produced = solo_run(request)
        # It draws EOS with a state that ends one token before the interval.
        if produced[-1] == EOS and (length + len(produced)) % 4 == 0 and len(produced) > 2:
            break
    options = {"checkpoints": 8, "state_checkpoint_interval": 4, "num_speculative_tokens": drafts}
    loop = Loop(make_scheduler(block_size=4, blocks=80, **options))
    loop.scheduler.add(request)
    while not request.finished:
        if len(loop.in_flight) > 2 or loop.dispatch() is None:
            loop.harvest()
    assert any(mark.position == request.num_tokens for plan, *_ in loop.in_flight for mark in plan.marks)
    loop.harvest_all()
    loop.check()
    check_output(request)
    check_nothing_is_held(loop.scheduler)


def test_request_takes_the_slot_of_a_checkpoint_that_nobody_has_seen():
    """Or it would wait for drafts to be kept, and a step may keep none."""
    options = {"checkpoints": 1, "state_checkpoint_interval": 4, "num_speculative_tokens": 3}
    loop = Loop(make_scheduler(seqs=2, block_size=4, blocks=80, **options))
    first, second = (make_request([i] * 5, max_tokens=40, ignore_eos=True) for i in range(2))
    loop.scheduler.add(first)
    for _ in range(4):
        loop.dispatch()
    assert len(first.marks) == 2
    assert loop.scheduler.allocator.slots.num_free == 0
    loop.scheduler.add(second)
    plan = loop.dispatch()
    assert [admission.request for admission in plan.admitted] == [second]
    assert len(first.marks) == len(plan.marks) == 1
    loop.scheduler.check_integrity()
    loop.harvest_all()
    loop.drain()
    for request in (first, second):
        check_output(request)


def test_checkpoints_that_nobody_has_seen_leave_a_slot_for_who_waits():
    """The second request waits for blocks. Of the two slots that are left one is kept for it."""
    options = {"checkpoints": 1, "state_checkpoint_interval": 4, "num_speculative_tokens": 3}
    loop = Loop(make_scheduler(seqs=2, block_size=4, blocks=20, **options))
    first, second = (make_request([i] * length, max_tokens=8 * (5 - 4 * i)) for i, length in enumerate((5, 70)))
    for request in (first, second):
        loop.scheduler.add(request)
    for _ in range(4):
        loop.dispatch()
    assert list(loop.scheduler.waiting) == [second]
    assert (len(first.marks), loop.scheduler.cache.counters.skipped_states) == (1, 1)
    loop.harvest_all()
    loop.drain()
    for request in (first, second):
        check_output(request)


def test_end_of_a_turn_is_sealed_before_anything_reads_it():
    """The seal waits for the next plan, however long that takes, and comes before everything else in it."""
    loop = Loop(make_scheduler(num_speculative_tokens=3))
    request = make_request(30, max_tokens=20, ignore_eos=True)
    loop.scheduler.add(request)
    while not request.finished:
        loop.turn()
    loop.harvest_all()
    state = next(s for s in loop.device.states.values() if s.num_fed == 49)
    assert state.pending
    assert loop.turn() is None
    follow_up = make_request([*request.tokens(0, 50), 1, 2])
    loop.scheduler.add(follow_up)
    plan = loop.turn()
    slot = plan.pieces[0].read_slot
    assert plan.admitted[0].position == 49
    assert plan.seals == [Seal(slot, slot, 49)]
    loop.drain()
    check_output(follow_up)


def test_slot_that_is_to_be_sealed_may_have_another_owner_by_then():
    """The end of a turn gives way to a checkpoint of the plan that would seal it: one write, that of the checkpoint."""
    coincided = 0
    for length in range(20, 40):
        loop = Loop(make_scheduler(seqs=2, checkpoints=0, state_checkpoint_interval=16, num_speculative_tokens=3))
        ending = make_request([3] * 20, max_tokens=8, ignore_eos=True)
        going_on = make_request([length] * length, max_tokens=30, ignore_eos=True)
        for request in (ending, going_on):
            loop.scheduler.add(request)
        while loop.scheduler.has_work or loop.in_flight:
            queued = {seal.write_slot for seal in loop.scheduler._seals}
            plan = loop.turn()
            loop.check()
            if plan is not None:
                coincided += any(s.write_slot in queued and s.read_slot != s.write_slot for s in plan.seals)
                assert len({seal.write_slot for seal in plan.seals}) == len(plan.seals)
        check_output(going_on)
    assert coincided


def test_what_was_to_be_sealed_is_forgotten_with_a_failed_dispatch():
    loop = Loop(make_scheduler(num_speculative_tokens=3))
    fill(loop, make_request(30, max_tokens=20, ignore_eos=True))
    loop.turn()
    loop.harvest_all()
    loop.fail()
    loop.scheduler.add(make_request(30))
    assert loop.turn().seals == []
    loop.drain()


def committed(tokens, ended=False, **params):
    """A request that has got the first token from its prefill step, and the others from one decode step."""
    scheduler = make_scheduler(num_speculative_tokens=5)
    request = make_request(5, **({"max_tokens": 20} | params))
    scheduler.add(request)
    scheduler.plan()
    scheduler.commit(request, tokens[:1], False)
    scheduler.commit(request, tokens[1:], ended, scheduler.plan().bounds[0])
    scheduler.check_integrity()
    return request


def test_several_tokens_are_committed_at_once():
    request = committed([0, 1, 2])
    assert request.output_token_ids == [0, 1, 2]
    assert request.detokenizer.text == "abc"
    assert not request.finished


def test_stop_string_inside_a_run_cuts_the_tokens_after_it():
    request = committed([0, 1, 2, 3, 4], stop="cd")
    assert (request.finish_reason, request.stop_reason) == ("stop", "cd")
    assert request.output_token_ids == [0, 1, 2, 3]
    assert request.detokenizer.text == "ab"


def test_stop_string_wins_over_an_end_after_it_in_the_same_run():
    request = committed([0, 1, 2, EOS], ended=True, stop="bc")
    assert (request.finish_reason, request.stop_reason) == ("stop", "bc")
    assert request.output_token_ids == [0, 1, 2]


def test_included_stop_string_stays_in_the_text():
    request = committed([0, 1, 2, 3, 4], stop="cd", include_stop_str_in_output=True)
    assert request.detokenizer.text == "abcd"
    assert request.output_token_ids == [0, 1, 2, 3]


def test_eos_ends_without_text_and_without_a_reason():
    request = committed([0, 1, EOS], ended=True)
    assert (request.finish_reason, request.stop_reason) == ("stop", None)
    assert request.output_token_ids == [0, 1, EOS]
    assert request.detokenizer.text == "ab"


def test_stop_token_is_the_reason_it_names():
    request = committed([0, 4], ended=True, stop_token_ids=[4])
    assert (request.finish_reason, request.stop_reason) == ("stop", 4)
    assert request.detokenizer.text == "a"
    shown = committed([0, 4], ended=True, stop_token_ids=[4], include_stop_str_in_output=True)
    assert shown.detokenizer.text == "ae"


def test_ignored_eos_is_a_token_like_any_other():
    request = committed([0, EOS, 1], ignore_eos=True)
    assert not request.finished
    assert request.output_token_ids == [0, EOS, 1]


def test_tokens_of_a_finished_request_are_dropped():
    scheduler = make_scheduler()
    request = make_request(5, stop="b")
    scheduler.add(request)
    scheduler.plan()
    scheduler.plan(in_flight=True)
    scheduler.commit(request, [1], False)
    assert request.finish_reason == "stop"
    scheduler.commit(request, [2], False, 1)
    assert request.output_token_ids == [1]


@pytest.mark.parametrize("when", ["waiting", "prefilling", "decoding"])
def test_abort_frees_everything_wherever_a_request_is(when):
    scheduler = make_scheduler(tokens=64)
    request = make_request(100, logit_bias={0: 1.0})
    scheduler.add(request)
    for _ in range(("waiting", "prefilling", "decoding").index(when)):
        scheduler.plan(in_flight=True)
    assert (request.status is Status.WAITING) == (when == "waiting")
    assert request.filled == (when == "decoding")
    scheduler.finish(request, "abort")
    scheduler.check_integrity()
    check_nothing_is_held(scheduler)
    assert (request.finish_reason, scheduler.has_work) == ("abort", False)
    scheduler.finish(request, "length")
    assert request.finish_reason == "abort"


@pytest.mark.parametrize("pool", ["blocks", "slots", "logit_rows", "count_rows"])
def test_integrity_check_sees_what_nobody_holds(pool):
    scheduler = make_scheduler()
    scheduler.add(make_request(30, logit_bias={0: 1.0}, presence_penalty=1.0))
    scheduler.plan()
    scheduler.check_integrity()
    getattr(scheduler.allocator, pool).take(1)
    if pool == "logit_rows":
        scheduler.running[0].logit_row = 0
    with pytest.raises(AssertionError, match="are lost or held twice"):
        scheduler.check_integrity()


def test_failed_dispatch_sends_everybody_back_with_the_tokens_that_they_have():
    """Nothing that was promised to be computed is taken for computed, and nobody else pays."""
    loop = Loop(make_scheduler())
    first, second = make_request(100, max_tokens=20), make_request(100)
    fill(loop, first)
    loop.scheduler.add(second)
    loop.fail()
    assert list(loop.scheduler.waiting) == [first, second]
    third = make_request(100)
    loop.scheduler.add(third)
    assert loop.turn().admitted[0].position == 0
    loop.drain()
    for request in (first, second, third):
        check_output(request)
