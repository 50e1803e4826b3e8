"""The scheduler under random arrivals, steps, late harvests and aborts: nobody overtaken, nothing lost."""

import collections

import hypothesis
import pytest
from hypothesis import stateful
from hypothesis import strategies as st

from gdnjax.config import CHUNK, EngineConfig
from gdnjax.sampling_params import SamplingParams
from gdnjax.serving.allocator import Allocator
from gdnjax.serving.detokenizer import Detokenizer
from gdnjax.serving.request import Request, Status
from gdnjax.serving.scheduler import Scheduler
from gdnjax.serving.tokenizer import Tokenizer

MAX_MODEL_LEN = 400
EOS = 9


class Letters:
    """Stands for a transformers tokenizer: token i is the i-th letter."""

    eos_token_id = EOS

    def __init__(self):
        self.added_tokens_decoder = {}

    def __len__(self):
        return 26

    def decode(self, token_ids, **_):
        return "".join(chr(ord("a") + token) for token in token_ids)


LETTERS = Tokenizer(Letters())


def make_scheduler(*, seqs=3, tokens=128, blocks=40, rows=1, block_size=16):
    config = EngineConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens, block_size=block_size)
    return Scheduler(config, Allocator(seqs, blocks, rows))


def make_request(prompt_length, *, name="r", **params):
    params = SamplingParams(**({"max_tokens": 8} | params))
    return Request(
        request_id=name,
        prompt_token_ids=list(range(prompt_length)),
        params=params,
        max_length=min(prompt_length + params.max_tokens, MAX_MODEL_LEN),
        stop_token_ids=(*(() if params.ignore_eos else (EOS,)), *params.stop_token_ids),
        seed=0,
        detokenizer=Detokenizer(LETTERS, params),
    )


@hypothesis.settings(derandomize=True, deadline=None, max_examples=120, stateful_step_count=60)
class SchedulerMachine(stateful.RuleBasedStateMachine):
    """Drives a scheduler as the engine does: plans are dispatched, and harvested later. The device is a model of it."""

    @stateful.initialize(
        seqs=st.integers(1, 4), chunks=st.integers(1, 4), blocks=st.integers(26, 60), rows=st.integers(1, 2)
    )
    def build(self, seqs, chunks, blocks, rows):
        self.scheduler = make_scheduler(seqs=seqs, tokens=chunks * CHUNK, blocks=blocks, rows=rows)
        self.requests, self.arrivals = [], []
        self.in_flight = collections.deque()
        self.folded = collections.Counter()  # prompt tokens dispatched, as this test counts them
        self.drawn = collections.defaultdict(list)  # tokens the device drew
        self.device_done = set()
        self.admitted = []

    @stateful.rule(
        length=st.integers(1, 390), max_tokens=st.integers(1, 20), row=st.booleans(), stop=st.sampled_from([None, "bc"])
    )
    def add(self, length, max_tokens, row, stop):
        bias = {"logit_bias": {0: 1.0}} if row else {}
        request = make_request(length, name=str(len(self.requests)), max_tokens=max_tokens, stop=stop, **bias)
        self.scheduler.check_fits(request.max_length, length)
        self.scheduler.add(request)
        self.requests.append(request)
        self.arrivals.append(request)

    @stateful.precondition(lambda self: len(self.in_flight) < 2)
    @stateful.rule(data=st.data())
    def dispatch(self, data):
        running = list(self.scheduler.running)
        ready = [request for request in running if request.may_decode]
        plan = self.scheduler.plan()
        if plan is None:
            # Nothing to do but to wait for what is in flight.
            assert not ready
            assert all(request.prompt_dispatched for request in self.scheduler.running)
            assert self.scheduler.running or not self.scheduler.waiting
            return
        self.check_plan(plan, ready)
        emitted = {}
        for request in [piece.request for piece in plan.pieces if piece.is_last] + plan.decoding:
            emitted[request] = self.draw(request, data)
        self.in_flight.append((plan, emitted))

    def check_plan(self, plan, ready):
        config = self.scheduler.config
        assert plan.decoding == ready, "decode goes on between pieces"
        assert len(plan.decoding) <= config.max_num_seqs
        assert len(plan.pieces) <= config.prefill_rows
        assert sum(piece.length for piece in plan.pieces) <= config.max_num_batched_tokens
        assert plan.pieces or plan.decoding
        assert len({piece.request for piece in plan.pieces}) == len(plan.pieces)
        for request in plan.admitted:
            assert request.status is Status.RUNNING
            assert len(request.blocks) * config.block_size >= request.max_length - 1
            assert bool(request.logit_row) == request.params.needs_logit_row
        # Those who came first are admitted first.
        self.admitted += plan.admitted
        waiting = [request for request in self.arrivals if request.status is Status.WAITING]
        assert list(self.scheduler.waiting) == waiting
        order = [self.requests.index(request) for request in self.admitted]
        assert order == sorted(order)
        assert all(self.requests.index(request) > max(order) for request in waiting)
        # And get their prompts' tokens first: only the last piece may leave its prompt unfinished.
        places = [self.requests.index(piece.request) for piece in plan.pieces]
        assert places == sorted(places)
        assert all(piece.is_last for piece in plan.pieces[:-1])
        for piece in plan.pieces:
            assert piece.length > 0
            assert piece.start % CHUNK == 0
            assert piece.start == self.folded[piece.request], "pieces tile the prompt"
            self.folded[piece.request] += piece.length
            assert piece.is_last == (self.folded[piece.request] == piece.request.prompt_length)
        unfinished = [r for r in self.scheduler.running if not r.prompt_dispatched]
        if unfinished and plan.pieces:
            assert min(map(self.requests.index, unfinished)) >= max(places)

    def draw(self, request, data):
        """What the device emits for a row: nothing if it is done, else a token, and whether that ends it."""
        if request in self.device_done:
            return [], False
        assert self.folded[request] == request.prompt_length
        token = data.draw(st.integers(0, EOS))
        self.drawn[request].append(token)
        length = request.prompt_length + len(self.drawn[request])
        assert length <= request.max_length
        done = token in request.stop_token_ids or length == request.max_length
        if done:
            self.device_done.add(request)
        return [token], done

    @stateful.precondition(lambda self: self.in_flight)
    @stateful.rule()
    def harvest(self):
        plan, emitted = self.in_flight.popleft()
        del plan
        for request, (tokens, done) in emitted.items():
            self.scheduler.commit(request, tokens, done)

    @stateful.precondition(lambda self: self.requests)
    @stateful.rule(data=st.data())
    def abort(self, data):
        request = data.draw(st.sampled_from(self.requests))
        finished = request.finished
        reason = request.finish_reason
        self.scheduler.finish(request, "abort")
        assert request.finish_reason == (reason if finished else "abort")

    @stateful.invariant()
    def nothing_is_lost(self):
        self.scheduler.check_integrity()
        allocator = self.scheduler.allocator
        running = self.scheduler.running
        assert allocator.num_blocks - allocator.num_free_blocks == sum(len(r.blocks) for r in running)
        held = sum(bool(request.logit_row) for request in running)
        assert allocator.num_logit_rows - allocator.num_free_logit_rows == held
        for request in self.requests:
            if request.finished:
                assert (request.slot, request.blocks, request.logit_row) == (0, [], 0)
            tokens, drawn = request.output_token_ids, self.drawn[request]
            assert tokens == drawn[: len(tokens)], "what is committed is what was drawn, in order"

    def teardown(self):
        """Everything ends by itself: no request is starved or forgotten."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(10_000):
            plan = self.scheduler.plan()
            if plan is not None:
                emitted = {}
                for request in [piece.request for piece in plan.pieces if piece.is_last] + plan.decoding:
                    done = request in self.device_done
                    if not done:
                        self.drawn[request].append(0)
                        length = request.prompt_length + len(self.drawn[request])
                        if length == request.max_length:
                            self.device_done.add(request)
                    emitted[request] = ([] if done else [0], request in self.device_done)
                self.in_flight.append((plan, emitted))
            if self.in_flight and (plan is None or len(self.in_flight) > 1):
                self.harvest()
            if not self.scheduler.has_work and not self.in_flight:
                break
        assert all(request.finished for request in self.requests)
        allocator = self.scheduler.allocator
        assert allocator.num_free_slots == allocator.num_slots
        assert allocator.num_free_blocks == allocator.num_blocks
        for request in self.requests:
            tokens, limit = request.output_token_ids, request.max_length - request.prompt_length
            match request.finish_reason:
                case "length":
                    assert len(tokens) == limit
                case "stop":
                    assert tokens[-1] == EOS or request.stop_reason == "bc"


test_scheduler_serves_everyone_in_order_and_loses_nothing = SchedulerMachine.TestCase


def run_to_first_token(scheduler, request):
    """Adds a request and dispatches until its whole prompt is in flight."""
    scheduler.add(request)
    while not request.prompt_dispatched:
        scheduler.plan()


def test_request_of_one_piece_is_admitted_and_prefilled_at_once():
    scheduler = make_scheduler()
    request = make_request(30)
    scheduler.add(request)
    plan = scheduler.plan()
    assert plan.admitted == [request]
    (piece,) = plan.pieces
    assert (piece.start, piece.length, piece.is_last) == (0, 30, True)
    assert plan.decoding == []
    assert request.status is Status.RUNNING


def test_long_prompt_is_cut_at_chunks_while_others_decode():
    scheduler = make_scheduler(tokens=128)
    short, long = make_request(10, max_tokens=20), make_request(300)
    run_to_first_token(scheduler, short)
    scheduler.add(long)
    pieces = []
    while not long.prompt_dispatched:
        plan = scheduler.plan()
        assert plan.decoding == [short]
        pieces += [(piece.start, piece.length, piece.is_last) for piece in plan.pieces]
    assert pieces == [(0, 128, False), (128, 128, False), (256, 44, True)]


def test_prefill_step_takes_no_more_rows_than_it_is_compiled_for():
    scheduler = make_scheduler(seqs=20)
    requests = [make_request(2) for _ in range(12)]
    for request in requests:
        scheduler.add(request)
    assert [piece.request for piece in scheduler.plan().pieces] == requests[:8]
    assert [piece.request for piece in scheduler.plan().pieces] == requests[8:]


def test_head_of_the_queue_is_never_overtaken():
    """The second request would fit where the first does not: it waits, or the first might wait for ever."""
    scheduler = make_scheduler(seqs=3, blocks=20)
    running, large, small = make_request(100), make_request(250), make_request(1)
    run_to_first_token(scheduler, running)
    scheduler.add(large)
    scheduler.add(small)
    plan = scheduler.plan()
    assert plan.admitted == []
    assert list(scheduler.waiting) == [large, small]
    scheduler.finish(running, "abort")
    assert scheduler.plan().admitted == [large]


def test_request_waits_for_a_logit_row():
    scheduler = make_scheduler(rows=1)
    first, second = (make_request(5, logit_bias={0: 1.0}) for _ in range(2))
    scheduler.add(first)
    scheduler.add(second)
    assert scheduler.plan().admitted == [first]
    scheduler.finish(first, "abort")
    assert scheduler.plan().admitted == [second]


def test_blocks_cover_all_tokens_but_the_last():
    """The last token is drawn and never fed."""
    scheduler = make_scheduler(block_size=16)
    assert [scheduler.num_blocks_for(n) for n in (2, 17, 18, 33, 34)] == [1, 1, 2, 2, 3]


def test_request_that_can_never_fit_is_refused_by_its_numbers():
    scheduler = make_scheduler(blocks=4)
    scheduler.check_fits(65, 60)
    with pytest.raises(
        ValueError, match=r"prompt of 60 tokens with up to 6 output tokens needs 5 KV blocks, the pool has 4"
    ):
        scheduler.check_fits(66, 60)


def test_no_plan_without_work():
    assert make_scheduler().plan() is None


def test_request_is_never_dispatched_past_its_length():
    scheduler = make_scheduler()
    request = make_request(10, max_tokens=3)
    run_to_first_token(scheduler, request)
    assert scheduler.plan().decoding == [request]
    assert scheduler.plan().decoding == [request]
    assert scheduler.plan() is None, "three tokens are in flight"
    scheduler.commit(request, [0], False)
    assert scheduler.plan() is None
    scheduler.commit(request, [1], False)
    scheduler.commit(request, [2], True)
    assert (request.finish_reason, request.output_token_ids) == ("length", [0, 1, 2])


def committed(tokens, ended=False, **params):
    scheduler = make_scheduler()
    request = make_request(5, **({"max_tokens": 20} | params))
    run_to_first_token(scheduler, request)
    scheduler.commit(request, tokens, ended)
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
    run_to_first_token(scheduler, request)
    scheduler.plan()
    scheduler.commit(request, [1], False)
    assert request.finish_reason == "stop"
    scheduler.commit(request, [2], False)
    assert request.output_token_ids == [1]


@pytest.mark.parametrize("when", ["waiting", "prefilling", "decoding"])
def test_abort_frees_everything_wherever_a_request_is(when):
    scheduler = make_scheduler(tokens=64)
    request = make_request(100, logit_bias={0: 1.0})
    scheduler.add(request)
    for _ in range(("waiting", "prefilling", "decoding").index(when)):
        scheduler.plan()
    assert (request.status is Status.WAITING) == (when == "waiting")
    assert request.prompt_dispatched == (when == "decoding")
    scheduler.finish(request, "abort")
    allocator = scheduler.allocator
    assert (allocator.num_free_slots, allocator.num_free_blocks, allocator.num_free_logit_rows) == (3, 40, 1)
    assert (request.finish_reason, scheduler.has_work) == ("abort", False)
    scheduler.finish(request, "length")
    assert request.finish_reason == "abort"


def test_integrity_check_sees_a_running_request_without_its_blocks():
    scheduler = make_scheduler()
    request = make_request(30)
    run_to_first_token(scheduler, request)
    scheduler.check_integrity()
    request.blocks = request.blocks[1:]
    with pytest.raises(AssertionError, match="r holds 2 blocks"):
        scheduler.check_integrity()
