"""What is saved of a scheduler is all of it: another one goes on from the record, to the token."""

import collections
import json

import pytest

from gdnjax.sampling_params import SamplingParams, StructuredOutputsParams
from gdnjax.serving import records
from gdnjax.serving.outputs import Logprob
from gdnjax.serving.submission import Submission
from tests.serving.paper import LETTERS, Loop, check_output, distinct, make_request, make_scheduler
from tests.serving.schedules import schedule


def through_json(content):
    return json.loads(json.dumps(content))


def test_random_schedules_with_kills_equal_solo_runs(without_type_checks):
    happened = sum((schedule(seed, kills=True) for seed in range(1000, 1030)), collections.Counter())
    print(dict(happened))
    wanted = ("killed while somebody ran", "hits", "blocks_in", "states_in", "sealed at the end", "refused")
    wanted += ("masked", "masked in company")
    assert all(happened[name] > 20 for name in wanted)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {
            "logit_bias": {3: 1.5, 7: -100.0},
            "stop": ["ab", "c"],
            "stop_token_ids": [4, 5],
            "n": 3,
            "seed": (1 << 64) - 1,
        },
        {"structured_outputs": StructuredOutputsParams(json={"type": "object"}, disable_any_whitespace=True)},
        {"structured_outputs": StructuredOutputsParams(choice=["a", "b"])},
        {"allowed_token_ids": (1, 2, 3), "bad_words": ["x"], "temperature": 0.3, "top_k": 5, "logprobs": 2},
    ],
)
def test_parameters_come_back_as_they_were(params):
    request = make_request(20)
    request.params = SamplingParams(**params)
    found = records.request_of(through_json(records.of_request(request, {}, 7.0)), [], LETTERS, 7.0)
    assert found.params == request.params


def test_request_comes_back_as_it_was():
    """Every field that is not made anew, and the text with what is held back of it."""
    request = make_request(distinct(0, 40), name="17", max_tokens=30, stop=["zz", "bcd"], deadline=5.0, priority=-2)
    request.output_token_ids = [4, 8, 1, 2]
    request.detokenizer.append(request.output_token_ids)
    request.output_logprobs = [{4: Logprob(-0.25, 1, "e"), 9: Logprob(float("-inf"), 3, None)}]
    request.prompt_logprobs = [{1: Logprob(-1.5, 2, "b")}]
    request.marks, request.unpublished, request.wanted = [(32, 5)], [(16, 2)], (16, 32)
    request.order, request.first_token_time, request.seed = (7, 7), 2.5, (1 << 63) + 1
    found = records.request_of(through_json(records.of_request(request, {}, 3.0)), [], LETTERS, 103.0)
    assert (found.deadline, found.first_token_time, found.finished_time) == (105.0, 102.5, None)
    assert found.detokenizer.text == request.detokenizer.text == "ei"
    assert found.detokenizer.append([3]) == request.detokenizer.append([3]) == ""
    assert found.detokenizer.stop_reason == request.detokenizer.stop_reason == "bcd"
    for name in ("marks", "unpublished", "wanted", "order", "seed", "output_logprobs", "prompt_logprobs", "priority"):
        assert getattr(found, name) == getattr(request, name), name
    assert type(found.wanted) is type(found.marks[0]) is type(found.stop_token_ids) is tuple


def test_sample_that_has_ended_comes_back_with_its_group():
    loop = Loop(make_scheduler())
    ended = make_request(distinct(0, 20), max_tokens=3, ignore_eos=True, name="4")
    loop.run(ended)
    waiting = make_request(distinct(0, 20), max_tokens=9, ignore_eos=True, name="4")
    group = Submission("4", "a text", ended.prompt_token_ids, [ended, waiting], forced_acceptance=True)
    record = through_json(records.of_submission(group, {waiting: 0}, 1.0))
    found = records.submission_of(record, [waiting], LETTERS, 1.0)
    assert found.requests[1] is waiting
    assert (found.prompt, found.token_ids, found.forced_acceptance) == ("a text", ended.prompt_token_ids, True)
    assert found.output().outputs[0] == group.output().outputs[0]


def test_deadline_and_order_outlive_the_process():
    """Who waits stays in his place, and who comes later stands behind him; the clock is another one."""
    loop = Loop(make_scheduler(seqs=1))
    first, second, third = (
        make_request(distinct(which, 30), max_tokens=20, ignore_eos=True, deadline=deadline)
        for which, deadline in ((0, None), (1, None), (2, 4.0))
    )
    for request in (first, second, third):
        loop.scheduler.add(request)
    loop.turn()
    loop.harvest_all()
    record = through_json(loop.scheduler.record(loop.now))
    other = make_scheduler(seqs=1)
    first, second, third = other.restore(record, LETTERS, 1000.0)
    later = make_request(distinct(3, 30), max_tokens=2, ignore_eos=True)
    other.add(later)
    assert third.deadline == 1003.0
    assert other.running == [first]
    assert [*other.waiting] == [second, third, later]
    loop.scheduler, loop.now = other, 1000.0
    loop.drain()
    for request in (first, second, later):
        assert request.finish_reason == "length"
        check_output(request)
    assert (third.finish_reason, third.stop_reason) == ("abort", "timeout")
