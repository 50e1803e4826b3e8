"""The script that forks states which decode wrote: clean runs are clean, and a forced layout bit is seen."""

import dataclasses
import json

import pytest

from scripts import eval_forks


def test_forks_are_clean_and_the_broken_bit_is_seen(tmp_path, capsys):
    file = tmp_path / "forks.json"
    arguments = ["--runs", "6", "--states", "2", "--max-tokens", "24", "--output", str(file)]
    assert eval_forks.main(arguments) == 0
    found = json.loads(file.read_text())
    assert (found["runs"], found["hits"], found["clean"]) == (6, 6, 6)
    assert max(found["clean_states"]) < 1e-5
    assert min(found["broken_states"]) > 0.1
    assert found["broken"] > 0
    assert "clean                                    6 of 6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "0"], "--runs must be at least 1, got 0"),
        (["--first-tokens", "1"], "--first-tokens must be at least 2, got 1"),
        (["--output", "no/such/file.json"], "--output no/such/file.json: no such directory"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(arguments, message, capsys):
    assert eval_forks.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("eval_forks.py: error: ")
    assert error.count("\n") == 1


def test_broken_forks_that_nobody_sees_are_a_failure():
    seen = eval_forks.Forks(2, 2, 2, 0, 1, [3], [1e-6], [0.9])
    assert seen.is_as_it_should_be
    for field, value in (("hits", 1), ("clean", 1), ("clean_states", [0.5]), ("broken_states", [1e-6])):
        assert not dataclasses.replace(seen, **{field: value}).is_as_it_should_be
