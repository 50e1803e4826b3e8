"""What a request gives back, and the times that follow from its events."""

import dataclasses

import pytest

from gdnjax import CompletionOutput, Logprob, RequestMetrics, RequestOutput


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
    }
    assert names(Logprob) == {"logprob", "rank", "decoded_token"}


@pytest.mark.parametrize("output", [metrics(), Logprob(-1.0), CompletionOutput(index=0, text="", token_ids=())])
def test_outputs_cannot_be_changed(output):
    (name, *_) = (field.name for field in dataclasses.fields(output))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(output, name, None)
