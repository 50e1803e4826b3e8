"""What a request gives back, and the times that follow from its events."""

import dataclasses

import pytest

from gdnjax import CompletionOutput, Logprob, RequestMetrics, RequestOutput, SamplingParams
from gdnjax.serving.detokenizer import Detokenizer
from gdnjax.serving.request import Request
from gdnjax.serving.submission import Submission


def metrics(**values):
    return RequestMetrics(
        **{
            "arrival_time": 10.0,
            "first_scheduled_time": 10.5,
            "first_token_time": 12.0,
            "finished_time": 15.0,
            "num_prompt_tokens": 7,
            "num_output_tokens": 4,
        }
        | values
    )


def test_times_are_differences_of_events():
    times = metrics()
    assert times.queue_time == 0.5
    assert times.time_to_first_token == 2.0
    assert times.latency == 5.0
    # Three tokens after the first in three seconds.
    assert times.time_per_output_token == 1.0


def test_acceptance_is_that_of_all_drafts_and_its_length_that_of_a_step():
    drafting = metrics(num_draft_tokens=30, num_accepted_draft_tokens=24, num_decode_steps=10)
    assert drafting.draft_acceptance_rate == 0.8
    assert drafting.mean_acceptance_length == 3.4
    none_kept = metrics(num_draft_tokens=30, num_decode_steps=10)
    assert (none_kept.draft_acceptance_rate, none_kept.mean_acceptance_length) == (0.0, 1.0)
    # Decode steps without a draft.
    plain = metrics(num_decode_steps=3)
    assert (plain.draft_acceptance_rate, plain.mean_acceptance_length) == (None, 1.0)
    before = metrics()
    assert (before.draft_acceptance_rate, before.mean_acceptance_length) == (None, None)


def sample(index=0, **counted):
    request = Request(
        request_id="0",
        prompt_token_ids=[1, 2, 3],
        params=SamplingParams(n=2),
        max_length=20,
        stop_token_ids=(),
        seed=0,
        detokenizer=Detokenizer(None, SamplingParams()),
        index=index,
    )
    for name, value in counted.items():
        setattr(request, name, value)
    return request


def test_numbers_of_drafts_are_those_of_all_samples():
    requests = [
        sample(0, num_draft_tokens=6, num_accepted_tokens=4, num_decode_steps=2),
        sample(1, num_draft_tokens=9, num_accepted_tokens=2, num_decode_steps=3),
    ]
    output = Submission("0", None, [1, 2, 3], requests).output()
    found = output.metrics
    assert (found.num_draft_tokens, found.num_accepted_draft_tokens, found.num_decode_steps) == (15, 6, 5)
    assert (found.draft_acceptance_rate, found.mean_acceptance_length) == (0.4, 2.2)


@pytest.mark.parametrize("forced", [False, True])
def test_output_says_whether_acceptance_was_forced(forced):
    submission = Submission("0", None, [1, 2, 3], [sample()], forced_acceptance=forced)
    assert submission.output().forced_acceptance is forced
    assert not Submission("0", None, [1, 2, 3], [sample()]).output().forced_acceptance


@pytest.mark.parametrize(
    ("missing", "unknown"),
    [
        ({"first_scheduled_time": None}, {"queue_time"}),
        ({"first_token_time": None}, {"time_to_first_token", "time_per_output_token"}),
        ({"finished_time": None}, {"latency", "time_per_output_token"}),
        ({"num_output_tokens": 1}, {"time_per_output_token"}),
        ({"num_output_tokens": 0}, {"time_per_output_token"}),
    ],
)
def test_time_of_an_event_that_has_not_happened_is_none(missing, unknown):
    times = metrics(**missing)
    names = ("queue_time", "time_to_first_token", "latency", "time_per_output_token")
    assert {name for name in names if getattr(times, name) is None} == unknown


def test_completion_is_finished_when_it_has_a_reason():
    running = CompletionOutput(index=0, text="", token_ids=())
    assert not running.finished
    assert dataclasses.replace(running, finish_reason="length").finished


def test_names_are_those_users_know():
    def names(cls):
        return {field.name for field in dataclasses.fields(cls)}

    assert names(CompletionOutput) == {
        "index",
        "text",
        "token_ids",
        "cumulative_logprob",
        "logprobs",
        "finish_reason",
        "stop_reason",
    }
    assert names(RequestOutput) >= {
        "request_id",
        "prompt",
        "prompt_token_ids",
        "outputs",
        "finished",
        "metrics",
        "num_cached_tokens",
        "forced_acceptance",
    }
    assert names(Logprob) == {"logprob", "rank", "decoded_token"}


@pytest.mark.parametrize("output", [metrics(), Logprob(-1.0), CompletionOutput(index=0, text="", token_ids=())])
def test_outputs_cannot_be_changed(output):
    (name, *_) = (field.name for field in dataclasses.fields(output))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(output, name, None)
