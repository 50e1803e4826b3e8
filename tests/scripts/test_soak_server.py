"""The soak in short, and that it sees what would be wrong."""

import argparse
import json
import pathlib
import subprocess
import sys

import pytest
import soak_server as script

ROOT = pathlib.Path(__file__).parents[2]

CASE = script.Case({"prompt": [1]}, ((5, 6, 7), (8,)))


@pytest.mark.thorough
def test_soak_in_short_finds_nothing_wrong(tmp_path):
    """In a process of its own: here every function of the package is checked for types."""
    report = tmp_path / "report.json"
    flags = ["--seconds", "16", "--clients", "24", "--faults", "0.03", "--output", str(report)]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "soak_server.py", *flags], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["wrong"] == []
    assert found["requests"]["left"]
    assert found["start_overs"]


@pytest.mark.parametrize(
    ("found", "whole", "right"),
    [
        ({0: [5, 6, 7], 1: [8]}, True, True),
        ({0: [5, 6], 1: []}, False, True),
        ({}, False, True),
        ({0: [5, 6, 7]}, True, False),
        ({0: [5, 6], 1: [8]}, True, False),
        ({0: [5, 7]}, False, False),
        ({1: [8, 9]}, False, False),
    ],
)
def test_answer_that_is_not_the_one_alone_is_seen(found, whole, right):
    assert (script.fault_of(CASE, found, whole) is None) == right


@pytest.mark.parametrize(
    ("flags", "error"),
    [(["--leave", "1.5"], "--leave must be a share"), (["--clients", "0"], "--clients at least 1")],
)
def test_bad_arguments_are_named(flags, error, capsys):
    assert script.main(flags) == 2
    assert error in capsys.readouterr().err


def test_errors_that_nobody_injected_are_wrong():
    clients = script.Clients("http://127.0.0.1:1", [CASE], leave=0.0, seed=0)
    clients._count_error({"error": {"message": "the request failed: UnicodeError: injected: no such letter"}})
    assert (clients.done["text"], clients.wrong) == (1, [])
    clients._count_error({"error": {"message": "the request failed: injected: a step has failed"}})
    assert len(clients.wrong) == 1


def test_help_says_what_is_soaked():
    assert isinstance(script.build_parser(), argparse.ArgumentParser)
    assert "--leave" in script.build_parser().format_help()
