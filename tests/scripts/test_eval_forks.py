"""The script that forks states which decode wrote: clean runs are clean, and a forced layout bit is seen."""

import dataclasses
import json
import os
import signal

import pytest

from scripts import eval_forks

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.mark.thorough
def test_forks_are_clean_and_the_broken_bit_is_seen(tmp_path, capsys):
    file = tmp_path / "forks.json"
    arguments = ["--runs", "6", "--states", "2", "--max-tokens", "24", "--output", str(file)]
    assert eval_forks.main(arguments) == 0
    found = json.loads(file.read_text())
    assert (found["runs"], found["hits"], found["clean"]) == (6, 6, 6)
    assert max(found["clean_states"]) < 1e-5
    assert min(found["broken_states"]) > 0.1
    assert found["broken"] > 0
    assert found["complete"]
    out, err = capsys.readouterr()
    assert "clean                                    6 of 6" in out
    # One batch of runs, then two states.
    assert [line.split(":")[0] for line in err.splitlines()] == ["loading the model", *["6 of 6 runs"] * 3]


@pytest.mark.thorough
def test_interrupted_run_leaves_the_batches_that_it_has(tmp_path, capsys, monkeypatch):
    file = tmp_path / "forks.json"
    monkeypatch.setattr(eval_forks, "ROWS", 2)
    complete, calls = eval_forks._complete, []

    def ended(*arguments):
        calls.append(arguments)
        # Each batch has two turns in three engines.
        if len(calls) == 6 + 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return complete(*arguments)

    monkeypatch.setattr(eval_forks, "_complete", ended)
    arguments = ["--runs", "6", "--states", "2", "--max-tokens", "8", "--output", str(file)]
    assert eval_forks.main(arguments) == 143
    found = json.loads(file.read_text())
    assert (found["complete"], found["runs"], found["clean"]) == (False, 2, 2)
    out, err = capsys.readouterr()
    assert out.endswith("partial: 2 of 6 runs, 0 states\n")
    assert "clean                                    2 of 2" in out
    assert err.endswith("\nterminated\n")


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
