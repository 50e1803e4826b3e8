"""Requests are prepared without an engine, in any thread."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gdnjax import EngineConfig, SamplingParams
from gdnjax.serving.frontend import Frontend, as_list

VOCABULARY = 100


@pytest.fixture
def frontend():
    return Frontend(EngineConfig(), max_model_len=64, vocab_size=VOCABULARY, num_blocks=4, eos_token_ids=(7,))


def test_threads_get_numbers_and_seeds_of_their_own(frontend):
    with ThreadPoolExecutor(8) as threads:
        groups = list(threads.map(lambda _: frontend.prepare([[1, 2]] * 5), range(40)))
    submissions = [submission for group in groups for submission in group]
    assert sorted(int(submission.request_id) for submission in submissions) == list(range(200))
    assert len({submission.requests[0].seed for submission in submissions}) == 200
    for group in groups:
        # A call's prompts follow one another.
        first = int(group[0].request_id)
        assert [int(submission.request_id) for submission in group] == list(range(first, first + 5))


def test_call_that_fails_takes_no_number(frontend):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        frontend.prepare([[1], []])
    assert frontend.num_requests == 0


@pytest.mark.parametrize(
    "ids", [[3, 99, 0], (3, 99, 0), np.array([3, 99, 0]), np.array([3, 99, 0], np.uint8), list(np.array([3, 99, 0]))]
)
def test_token_ids_are_ints_whatever_holds_them(frontend, ids):
    found = frontend.token_ids(ids, "prompt 0")
    assert found == [3, 99, 0]
    assert {type(token) for token in found} == {int}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (b"abc", "must be a text or a list of token ids, got b'abc'"),
        (bytearray(b"abc"), "must be a text or a list"),
        ({1, 2}, "must be a text or a list"),
        (frozenset({1}), "must be a text or a list"),
        ([1, True], "got True in it"),
        ([1, 2.0], "got 2.0 in it"),
        (np.array([1.0]), "got .*1.0.* in it"),
        ([1, -1], "prompt 0 has token id -1, outside the vocabulary; allowed: 0 to 99"),
        ([1, 100, 101], "prompt 0 has token id 100, outside"),
        ([1, 1 << 70], "outside the vocabulary"),
        ("half \ud83d", "prompt 0 is no valid text: .* at character 5 is a lone surrogate"),
        (None, "must be a text or a list of token ids, got None"),
    ],
)
def test_what_is_no_prompt_is_named(frontend, prompt, message):
    with pytest.raises(ValueError, match=message):
        frontend.prepare([prompt])


@pytest.mark.parametrize("prompts", [b"abc", {"a", "b"}, 5, None])
def test_what_holds_no_prompts_is_named(prompts):
    with pytest.raises(ValueError, match="prompts must be texts or lists of token ids"):
        as_list(prompts)


def test_no_max_tokens_means_to_the_end_of_the_context(frontend):
    (submission,) = frontend.prepare([[1, 2, 3]], SamplingParams(max_tokens=None))
    assert submission.requests[0].max_length == 64
