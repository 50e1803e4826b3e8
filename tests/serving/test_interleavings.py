"""Rung 1: exact integers through the real step, scheduler and cache equal a plain Python run of each request alone.

Every bookkeeping fault (a slot, block, window, position, length, layout bit, checkpoint or row that is not the
request's own) changes a token, so random interleavings compare tokens. Where the engine speculates they compare how
many drafts each step keeps, too, since that is what a fault of the head's cache changes; and at the end all that the
prefix cache owns.
"""

import collections
import dataclasses
import functools
import tempfile

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, seed, settings, stateful

from gdnjax import LLM, SamplingParams
from gdnjax.serving.request import Status
from tests.serving.ledgers import (
    ALONE,
    DRAWN,
    HOST,
    INVARIANT,
    KV,
    KV_DRAFTS,
    LARGE_BLOCKS,
    MAX_MODEL_LEN,
    MIXED,
    MIXED_DRAFTS,
    NO_CACHE,
    NO_SLOTS,
    PAGES,
    PAGES_DRAFTS,
    RINGS,
    RINGS_DRAFTS,
    STATES_ALONE,
    STOPS,
    TWO_RANKS,
    VK,
    VK_DRAFTS,
    WITHOUT_DRAFTS,
    Watch,
    check_cache,
    check_greedy,
    check_nothing_is_held,
    drain,
    engine_of,
    fresh,
    greedy,
    harvest_all,
    prompt_of,
    queue,
)

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A prompt that begins with `shared` tokens of a family and goes on with `own` ones, and how it is continued."""

    family: int
    shared: int
    own: int
    max_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = True
    n: int = 1
    drawn: int | None = None
    tail: int = 0
    speculate: bool = True

    @property
    def prompt(self) -> list[int]:
        begin = prompt_of(self.family, 256)[: self.shared]
        return [*begin, *prompt_of(10 + self.tail, max(self.own, int(self.shared == 0)))]

    @property
    def params(self) -> SamplingParams:
        how = {"temperature": 0.0} if self.drawn is None else DRAWN[self.drawn]
        if how.get("min_tokens", 0) > self.max_tokens:
            how = how | {"min_tokens": self.max_tokens}
        return SamplingParams(
            max_tokens=self.max_tokens, stop_token_ids=self.stop_token_ids, ignore_eos=self.ignore_eos, n=self.n,
            seed=self.family + (1 << 40), speculate=self.speculate, **how,
        )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def solo_on_engine(name: str, wanted: Wanted) -> tuple[tuple[int, ...], ...]:
    """Each sample of the request alone in the idle engine, with nothing cached."""
    llm, found = engine_of(name), []
    for sample in range(wanted.n):
        llm.reset_prefix_cache()
        params = dataclasses.replace(wanted.params, n=1, seed=wanted.params.seed ^ (sample << 32))
        (request,) = queue(llm, wanted.prompt, params)
        drain(llm)
        found.append(tuple(request.output_token_ids))
    return tuple(found)


def solo_run_of(name: str, wanted: Wanted) -> tuple[tuple[int, ...], ...]:
    """Of a speculating engine the tokens have to be those of one that does not speculate."""
    if engine_of(name).config.num_speculative_tokens:
        return solo_on_engine(WITHOUT_DRAFTS.get(name, ALONE), dataclasses.replace(wanted, speculate=True))
    return solo_on_engine(name, wanted)


SEEN: collections.Counter = collections.Counter()
"""What happened over all examples of one geometry: interleavings in which nothing happens would show nothing."""


class LedgerMachine(stateful.RuleBasedStateMachine):
    """Requests of all kinds come at any time, are aborted and preempted, and the cache is kept or not.

    What an example does depends on what those before it have left in the cache; what it draws must not, so no rule has
    a precondition.
    """

    geometry: str
    draws = True

    def __init__(self):
        super().__init__()
        self.llm = engine_of(self.geometry)
        self.asked: list[tuple[Wanted, list]] = []
        self.turns_allowed = 20
        self.last_turn = None
        self.preempted_before = self.scheduler.num_preemptions
        self.drills = 0
        self.before = dataclasses.replace(self.llm.engine.scheduler.cache.counters)
        host = self.llm.engine.scheduler.cache.host
        self.host_before = dataclasses.asdict(host.counters) if host else {}
        self.watch = Watch(self.llm)
        self.watch.__enter__()
        self.read_before = None
        # What decode steps have written: the request whose state it is, by slot.
        self.sealed = {}

    @property
    def scheduler(self):
        return self.llm.engine.scheduler

    wanted = st.builds(
        Wanted,
        family=st.integers(0, 2),
        shared=st.sampled_from((0, 15, 16, 17, 48, 63, 64, 65, 128, 130, 192)),
        own=st.sampled_from((0, 1, 2, 15, 17, 50)),
        max_tokens=st.sampled_from((1, 2, 9, 20, 33, 48)),
        stop_token_ids=st.sampled_from(((), (), STOPS[:2], STOPS)),
        ignore_eos=st.booleans(),
        n=st.sampled_from((1, 1, 1, 2)),
        drawn=st.none() | st.none() | st.integers(0, len(DRAWN) - 1),
        tail=st.integers(0, 1),
        speculate=st.sampled_from((True, True, True, False)),
    )

    @stateful.rule(several=st.lists(st.tuples(wanted, st.sampled_from((0, 0, 0, 1, -1))), min_size=1, max_size=3))
    def arrive(self, several):
        for wanted, priority in several:
            if not self.draws:
                wanted = dataclasses.replace(wanted, drawn=None)
            self.ask(wanted, wanted.prompt, wanted.params, priority)

    def ask(self, wanted, prompt, params, priority):
        self.asked.append((wanted, queue(self.llm, prompt, params, priority)))
        self.turns_allowed += wanted.n * (wanted.max_tokens + len(prompt) // 64 + 3)

    @stateful.rule(which=st.integers(0, 20), more=st.sampled_from((1, 5, 20)), max_tokens=st.sampled_from((3, 25)))
    def follow_up(self, which, more, max_tokens):
        """The next turn of a conversation: prompt, answer, and what comes then."""
        ended = [r for _, group in self.asked for r in group if r.finished]
        if not ended:
            return
        last = ended[which % len(ended)]
        prompt = [*last.tokens(0, last.num_tokens), *prompt_of(20, more)]
        if len(prompt) < MAX_MODEL_LEN:
            self.ask(Wanted(0, 0, 1, max_tokens), prompt, greedy(max_tokens), 0)

    @stateful.rule(which=st.integers(0, 7), more=st.sampled_from((1, 9)), max_tokens=st.sampled_from((3, 25)))
    def branch(self, which, more, max_tokens):
        """Two requests that go on from what a running one has come to."""
        running = [r for r in self.scheduler.running if r.output_token_ids]
        if not running:
            return
        source = running[which % len(running)]
        prompt = [*source.tokens(0, source.num_tokens), *prompt_of(21, more)]
        if len(prompt) < MAX_MODEL_LEN:
            self.ask(Wanted(0, 0, 1, max_tokens, n=2), prompt, greedy(max_tokens, n=2), 0)

    @stateful.rule(own=st.sampled_from((17, 40, 100)))
    def crowd(self, own):
        """Four that go on for long; where blocks are scarce they cannot all stay."""
        for tail in range(2, 6):
            wanted = Wanted(0, 0, own, 48, tail=tail)
            self.ask(wanted, wanted.prompt, wanted.params, 0)

    @stateful.rule(turns=st.integers(1, 20), harvest=st.booleans())
    def go_on(self, turns, harvest):
        for _ in range(turns):
            self.step()
        if harvest:
            harvest_all(self.llm)
            self.scheduler.check_integrity()

    @stateful.rule(which=st.integers(0, 12))
    def abort(self, which):
        if which < len(self.asked):
            SEEN["aborted"] += 1
            for request in self.asked[which][1]:
                self.llm.engine.abort(request)

    @stateful.rule(which=st.integers(0, 7))
    def preempt(self, which):
        """As want of blocks would."""
        if self.llm.config.batch_invariant or not self.scheduler.running:
            return
        self.turns_allowed += 8
        request = self.scheduler.running[which % len(self.scheduler.running)]
        before, slot = request.num_preemptions, request.slot
        self.llm.engine.preempt(request)
        self.drills += request.num_preemptions - before
        if request.status is Status.WAITING:
            SEEN["preempted with pending rows"] += any(seal.write_slot == slot for seal in self.scheduler._seals)

    def step(self):
        engine = self.llm.engine
        engine.step()
        self.scheduler.check_integrity()
        self.look_at_steps()
        turn = engine._in_flight[-1] if engine._in_flight else None
        if turn is not None and turn is not self.last_turn:
            self.last_turn = turn
            self.look_at(turn.plan)

    def look_at(self, plan):
        """Counts what the plan has asked of the device, and sees that no slot is written twice in its prefill step."""
        written = [slot for piece in plan.pieces for slot in (piece.request.slot, *dict(piece.checkpoints).values())]
        assert len(set(written)) == len(written)
        own = {admission.request: admission for admission in plan.admitted}
        reads = collections.Counter(p.read_slot for p in plan.pieces if p.request in own and own[p.request].position)
        SEEN["hit"] += reads.total()
        SEEN["two forks of one checkpoint in a step"] += sum(count > 1 for count in reads.values())
        SEEN["fork of a tail"] += sum(bool(admission.copy_from) for admission in plan.admitted)
        SEEN["resumed"] += sum(bool(a.position and a.request.num_preemptions) for a in plan.admitted)
        SEEN["states recomputed over shared blocks"] += sum(a.position < a.request.num_cached for a in plan.admitted)
        SEEN["checkpoint in a piece"] += sum(len(piece.checkpoints) for piece in plan.pieces)
        SEEN["checkpoint at a branch"] += sum(
            own[piece.request].request.num_cached in dict(piece.checkpoints)
            for piece in plan.pieces
            if piece.request in own
        )
        SEEN["grown"] += len(plan.growth)
        SEEN["several blocks at once"] += sum(len(grown) > 1 for grown in plan.growth.values())
        SEEN["checkpoint of a decode step"] += len(plan.marks)
        SEEN["sealed in place"] += sum(seal.read_slot == seal.write_slot for seal in plan.seals)
        if self.llm.config.num_speculative_tokens:
            drafting = {bound > 1 for bound in plan.bounds}
            alone = any(not request.params.speculate for request in plan.decoding)
            SEEN["opted out beside others that draft"] += alone and len(drafting) > 1
            self.look_at_forks(plan, own)

    def look_at_forks(self, plan, own):
        """Of states that decode steps have left."""
        owners = {request.slot: request for request in plan.decoding}
        self.sealed |= {seal.write_slot: owners.get(seal.read_slot) for seal in plan.seals}
        forked = [self.sealed[p.read_slot] for p in plan.pieces if p.request in own and p.read_slot in self.sealed]
        SEEN["hit on a state that decode left"] += len(forked)
        SEEN["fork beside its running source"] += sum(source in plan.decoding for source in forked)
        for piece in plan.pieces:
            for slot in (piece.request.slot, *dict(piece.checkpoints).values()):
                self.sealed.pop(slot, None)

    def look_at_steps(self):
        """Counts what the decode step that was read last has done."""
        if self.watch.seen is self.read_before:
            return
        self.read_before = self.watch.seen
        for request, step, right in self.watch.seen:
            SEEN["drafts accepted"] += step.count > 1
            SEEN["drafts rejected"] += step.count <= step.drafts
            SEEN["all drafts accepted"] += 0 < step.drafts < step.count
            if request.finished:
                SEEN["stopped among accepted tokens"] += step.count <= right
                SEEN["max_tokens among accepted tokens"] += request.finish_reason == "length" and step.count > 1

    def teardown(self):
        try:
            for _ in range(self.turns_allowed):
                if not self.llm.engine.has_work:
                    break
                self.step()
            self.check()
        finally:
            self.watch.__exit__()
            fresh_if_failed(self.llm)

    def check(self):
        assert not self.llm.engine.has_work, "the queue has not drained"
        counters = self.scheduler.cache.counters
        for name in ("evicted_states", "evicted_blocks", "orphaned_states", "lost_tokens"):
            SEEN[name] += getattr(counters, name) - getattr(self.before, name)
        for name, before in self.host_before.items():
            SEEN[f"host: {name}"] += getattr(self.scheduler.cache.host.counters, name) - before
        SEEN["preempted for want of room"] += self.scheduler.num_preemptions - self.preempted_before - self.drills
        SEEN["checkpoint inside a fold"] += self.watch.num_inside
        if self.llm.config.enable_prefix_caching:
            SEEN["states looked at"] += check_cache(self.llm)
        for wanted, group in self.asked:
            if wanted.drawn is None:
                for request in group:
                    check_greedy(self.llm, request)
                    if self.llm.config.num_speculative_tokens:
                        self.watch.check_counts(request)
        # The cache stays for the next example, unless something has to be run alone.
        for wanted, group in self.asked:
            if wanted.drawn is not None:
                for request, expected in zip(group, solo_run_of(self.geometry, wanted), strict=True):
                    produced = tuple(request.output_token_ids)
                    cut = len(produced) if request.finish_reason == "abort" else None
                    assert produced == expected[:cut]
        if len(self.asked) % 4 == 0:
            check_nothing_is_held(self.llm)


class KilledMachine(LedgerMachine):
    """The process may end at any moment at which it has just saved its state, and another one goes on."""

    @stateful.rule(turns=st.integers(1, 12))
    def kill(self, turns):
        for _ in range(turns):
            self.step()
        engine, running = self.llm.engine, len(self.scheduler.running)
        with tempfile.TemporaryDirectory() as directory:
            self.llm.save_state(f"{directory}/state")
            saved = list(self.scheduler.unfinished)
            engine.abort(*saved)
            engine.step()
            engine.runner.start_over([])
            self.scheduler.start_over()
            groups = self.llm.restore(f"{directory}/state")
        self.scheduler.check_integrity()
        back = {(request.request_id, request.index): request for group in groups for request in group.requests}
        went_on = {request: back[request.request_id, request.index] for request in saved}
        self.asked = [(wanted, [went_on.get(r, r) for r in group]) for wanted, group in self.asked]
        self.watch.went_on(went_on)
        self.sealed = {slot: went_on.get(request, request) for slot, request in self.sealed.items()}
        SEEN["killed while somebody ran"] += running > 0
        SEEN["killed with pending rows"] += any(r.num_folded < r.num_settled for r in self.scheduler.running)
        self.turns_allowed += 4


def fresh_if_failed(llm: LLM) -> None:
    """Ends what a failed example has left, so that shrinking starts from an idle engine."""
    if llm.engine.has_work:
        harvest_all(llm)
        llm.engine.abort(*llm.engine.scheduler.unfinished)
        llm.reset_prefix_cache()


MOST_ROUNDS = 10
"""Rounds of examples in which everything must have happened."""


def interleave(name: str, examples: int, *, draws: bool = True, kills: bool = False, sees: tuple[str, ...]) -> None:
    """Random interleavings on one engine; `sees` is what must have happened in them.

    What happens by chance may not: hypothesis draws otherwise where other modules are loaded. Then they go on, by
    another seed.
    """
    llm = fresh(name)
    SEEN.clear()
    how = settings(
        max_examples=examples, stateful_step_count=18, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    missing: list[str] = []
    for number in range(MOST_ROUNDS):
        kind = KilledMachine if kills else LedgerMachine
        machine = type("Machine", (kind,), {"geometry": name, "draws": draws})
        stateful.run_state_machine_as_test(seed(number)(machine), settings=how)
        print(number, dict(SEEN))
        check_nothing_is_held(llm)
        missing = [event for event in sees if not SEEN[event]]
        if not missing:
            return
    assert not missing


unchecked = pytest.mark.usefixtures("without_type_checks")
"""Types are checked by every other test; here that would take half of the time."""

CACHED = ("hit", "aborted", "resumed", "checkpoint in a piece", "grown", "lost_tokens", "states looked at")
SCARCE = ("preempted for want of room", "evicted_states", "evicted_blocks", "orphaned_states")
DRAFTS = (
    "drafts accepted",
    "drafts rejected",
    "all drafts accepted",
    "max_tokens among accepted tokens",
    "opted out beside others that draft",
)
STATES = (
    "checkpoint of a decode step",
    "checkpoint inside a fold",
    "sealed in place",
    "preempted with pending rows",
    "hit on a state that decode left",
)
FORKS = ("fork of a tail", "two forks of one checkpoint in a step", "checkpoint at a branch")


@pytest.mark.thorough
@unchecked
def test_random_interleavings_with_room_equal_solo_runs():
    rest = ("states recomputed over shared blocks", "checkpoint of a decode step", "evicted_states")
    interleave(KV, 16, sees=CACHED + FORKS + rest)


@pytest.mark.thorough
@unchecked
def test_random_interleavings_with_room_and_drafts_equal_solo_runs():
    interleave(KV_DRAFTS, 14, sees=CACHED + FORKS + DRAFTS + STATES + ("stopped among accepted tokens",))


@pytest.mark.thorough
@unchecked
def test_random_interleavings_with_scarce_blocks_equal_solo_runs():
    interleave(VK, 12, sees=CACHED + SCARCE)


@pytest.mark.thorough
@unchecked
def test_random_interleavings_with_scarce_blocks_and_drafts_equal_solo_runs():
    rest = ("fork beside its running source", "several blocks at once")
    interleave(VK_DRAFTS, 14, sees=CACHED + SCARCE + DRAFTS + STATES + rest)


@pytest.mark.thorough
@unchecked
def test_random_interleavings_in_a_mixed_pool_equal_solo_runs():
    interleave(MIXED, 20, sees=(*CACHED, *SCARCE, "fork of a tail", "checkpoint of a decode step"))


@pytest.mark.thorough
@unchecked
def test_random_interleavings_in_a_mixed_pool_with_drafts_equal_solo_runs():
    interleave(MIXED_DRAFTS, 16, sees=CACHED + SCARCE + DRAFTS + STATES + ("fork of a tail",))


@pytest.mark.short_cases("6")
@unchecked
@pytest.mark.parametrize("examples", [6, 12])
def test_random_interleavings_with_a_host_tier_and_kills_equal_solo_runs(examples):
    """Small as the device's pools are, and smaller; and whoever is killed goes on from what he has saved."""
    rest = ("host: states_in", "host: blocks_in", "host: dropped_blocks", "host: dropped_states", "fork of a tail")
    rest += ("killed while somebody ran", "killed with pending rows")
    interleave(HOST, examples, draws=False, kills=True, sees=CACHED + SCARCE + DRAFTS + STATES + rest)


@pytest.mark.thorough
@unchecked
def test_random_interleavings_on_two_ranks_equal_solo_runs():
    """With a host tier for whatever they evict."""
    sees = ("hit", "resumed", "drafts accepted", "drafts rejected", "host: states_out", "host: states_in")
    interleave(TWO_RANKS, 8, draws=False, sees=sees)


@pytest.mark.thorough
@unchecked
def test_random_interleavings_without_slots_for_checkpoints_equal_solo_runs():
    interleave(NO_SLOTS, 16, draws=False, sees=("hit", "resumed", "evicted_states", "drafts accepted"))


@pytest.mark.thorough
@unchecked
def test_random_interleavings_with_large_blocks_equal_solo_runs():
    sees = ("hit", "preempted for want of room", "evicted_blocks", "drafts accepted")
    interleave(LARGE_BLOCKS, 8, draws=False, sees=sees)


@pytest.mark.thorough
@unchecked
def test_random_interleavings_without_the_cache_equal_solo_runs():
    sees = ("preempted for want of room", "aborted", "grown", "drafts accepted", "drafts rejected")
    interleave(NO_CACHE, 8, draws=False, sees=sees)
    assert not SEEN["hit"]


PAGED = ("hit", "aborted", "resumed", "grown", "preempted for want of room", "evicted_blocks")
"""Of a model without a state: there is none to keep, and none to lack."""

KEPT = ("lost_tokens", "states looked at", "checkpoint in a piece", "evicted_states", "sealed in place")


@pytest.mark.thorough
@unchecked
def test_random_interleavings_without_a_state_equal_solo_runs():
    interleave(PAGES, 10, sees=PAGED)
    assert not any(SEEN[event] for event in KEPT)


@pytest.mark.thorough
@unchecked
def test_random_interleavings_without_a_state_with_drafts_equal_solo_runs():
    interleave(PAGES_DRAFTS, 10, sees=(*PAGED, *DRAFTS, "host: blocks_in"))
    assert not any(SEEN[event] for event in KEPT)


@pytest.mark.thorough
@unchecked
def test_random_interleavings_without_pages_equal_solo_runs():
    interleave(STATES_ALONE, 10, sees=("hit", "aborted", "resumed", "states looked at", "evicted_states"))


@pytest.mark.thorough
@unchecked
def test_random_interleavings_with_rings_equal_solo_runs():
    """Rings are all the state that there is."""
    interleave(RINGS, 10, sees=(*CACHED, *SCARCE, "fork of a tail", "checkpoint of a decode step"))


@pytest.mark.thorough
@unchecked
def test_random_interleavings_with_rings_and_drafts_equal_solo_runs():
    """Beside states of a mixed pool, under drafts that overwrite rows and are rejected."""
    interleave(RINGS_DRAFTS, 10, sees=CACHED + SCARCE + DRAFTS + STATES)


@pytest.mark.thorough
@unchecked
def test_random_interleavings_in_invariant_mode_equal_solo_runs():
    sees = ("hit", "aborted", "checkpoint in a piece", "drafts accepted", "drafts rejected")
    interleave(INVARIANT, 8, sees=sees)
    assert not SEEN["preempted for want of room"]
