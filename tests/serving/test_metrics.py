"""What an engine counts, and what it says of it."""

import threading

import numpy as np
import pytest

from gdnjax.serving.metrics import UNSORTED, Counters, Histogram, Metrics


def test_nothing_is_said_before_anything_was_drafted():
    metrics = Metrics()
    assert metrics.speculation() == {
        "num_draft_tokens": 0,
        "num_accepted_draft_tokens": 0,
        "draft_acceptance_rate": None,
        "acceptance_per_position": [],
        "mean_acceptance_length": None,
    }
    assert metrics.speculation_line() == ""
    # Steps that were given no drafts, as an engine takes them that finds drafting too dear.
    metrics.speculated([0, 0], [1, 1])
    assert metrics.speculation()["draft_acceptance_rate"] is None
    assert metrics.speculation()["mean_acceptance_length"] == 1
    assert metrics.speculation_line() == ""


def test_drafts_are_counted_by_position():
    metrics = Metrics()
    # Three rows of three drafts: all kept, one kept, none kept; and one row that was given a single draft.
    metrics.speculated([3, 3, 3, 1], [4, 2, 1, 2])
    counters = metrics.counters
    assert (counters.num_decode_rows, counters.num_draft_tokens, counters.num_accepted_draft_tokens) == (4, 10, 5)
    assert (counters.drafted_at, counters.accepted_at) == ([4, 3, 3], [3, 1, 1])
    found = metrics.speculation()
    assert found["draft_acceptance_rate"] == 0.5
    assert found["acceptance_per_position"] == [0.75, pytest.approx(1 / 3), pytest.approx(1 / 3)]
    assert found["mean_acceptance_length"] == 2.25
    # Deeper drafts later, of which none is kept.
    metrics.speculated([5], [1])
    assert metrics.speculation()["acceptance_per_position"] == [0.6, 0.25, 0.25, 0, 0]


def test_rows_that_were_done_count_for_nothing():
    metrics = Metrics()
    metrics.speculated([3, 3], [0, 0])
    assert metrics.counters == Counters()
    metrics.speculated([3, 2], [0, 3])
    assert (metrics.counters.num_decode_rows, metrics.counters.num_draft_tokens) == (1, 2)
    assert metrics.speculation()["mean_acceptance_length"] == 3


def test_step_of_no_rows_counts_for_nothing():
    metrics = Metrics()
    metrics.speculated([], [])
    assert metrics.counters == Counters()


def test_counts_are_those_of_a_loop_over_rows():
    random = np.random.default_rng(0)
    metrics, drafts, kept = Metrics(), np.zeros(7, int), np.zeros(7, int)
    rows = steps = 0
    for _ in range(50):
        drafted = random.integers(0, 8, random.integers(1, 257))
        count = random.integers(0, drafted + 2)
        metrics.speculated(drafted.tolist(), count.tolist())
        for v, c in zip(drafted, count, strict=True):
            if c:
                drafts[:v] += 1
                kept[: c - 1] += 1
                rows += 1
                steps += c
    counters = metrics.counters
    assert counters.num_decode_rows == rows
    assert (counters.num_draft_tokens, counters.num_accepted_draft_tokens) == (drafts.sum(), kept.sum())
    assert (counters.drafted_at, counters.accepted_at) == (drafts.tolist(), kept.tolist())
    assert metrics.speculation()["mean_acceptance_length"] == pytest.approx(steps / rows)
    # What statistics are printed and written as is plain Python.
    assert {type(n) for n in (*counters.drafted_at, *counters.accepted_at, counters.num_draft_tokens)} == {int}


def test_line_of_the_log_is_short():
    metrics = Metrics()
    metrics.speculated([2] * 100, [3] * 60 + [2] * 22 + [1] * 18)
    assert metrics.speculation_line() == "drafts accepted 71%, 2.4 tokens a step"


def test_histogram_counts_up_to_and_with_each_bound():
    histogram = Histogram((1.0, 2.0, 5.0))
    for value in (0.5, 1.0, 1.5, 5.0, 5.1, 100.0):
        histogram.observe(value)
    assert histogram.counts() == [2, 1, 1, 2]
    assert histogram.counts() == [2, 1, 1, 2]
    assert histogram.total == pytest.approx(113.1)


def test_histogram_keeps_few_values_and_loses_none():
    """Threads that look do not disturb the one that observes."""
    histogram, over = Histogram((10.0,)), threading.Event()

    def look():
        while not over.is_set():
            assert sum(histogram.counts()) <= 20_000

    looking = [threading.Thread(target=look) for _ in range(2)]
    for thread in looking:
        thread.start()
    for value in range(20_000):
        histogram.observe(float(value))
        assert len(histogram._unsorted) < UNSORTED
    over.set()
    for thread in looking:
        thread.join()
    assert histogram.counts() == [11, 19_989]
    assert histogram.total == sum(range(20_000))
