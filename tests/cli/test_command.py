"""What all commands share, in processes of their own: signals at any moment, one line, and their status."""

import argparse
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from gdnjax import distributed
from gdnjax.cli import command

ROOT = pathlib.Path(__file__).parents[2]

COMMAND = """
import hashlib, sys, threading, time
from gdnjax.cli import interrupt
interrupt.expected()
{early}
from gdnjax.cli.command import exit_status, run_as_process

def ready():
    print("ready", flush=True)

class Dropping:
    def __del__(self):
        ready()
        time.sleep(60)

def run():
    {body}
    return 0

run_as_process(lambda: exit_status("command", run, patience_s={patience}))
"""

BODIES = {
    # While its modules are imported.
    "early": ("print('ready', flush=True); time.sleep(60)", "pass", 60),
    "python": ("", "ready(); time.sleep(60)", 60),
    # Python's handlers run between its own steps alone, and this is one step of a minute.
    "outside of python": ("", "ready(); hashlib.pbkdf2_hmac('sha512', b'', b'', 10**8)", 0.5),
    # Python would say "Exception ignored in" and go on.
    "dropped": ("", "Dropping(); time.sleep(30)", 60),
    "made another error of": (
        "",
        "\n    ".join(
            ("try:", "    ready(); time.sleep(60)", "except BaseException:", "    raise KeyError('x') from None")
        ),
        60,
    ),
    # Without end: the interpreter would wait for it at exit.
    "threads": ("", "threading.Thread(target=time.sleep, args=(600,)).start(); ready(); time.sleep(60)", 60),
}


def _interrupted(code, number=signal.SIGINT, ignored=False):
    """Status and stderr of a program that gets a signal once it has said that it is ready."""
    before = signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(number, before)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        # It has to have come to what it says that it is ready for.
        time.sleep(0.2)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.parametrize("body", BODIES)
def test_interrupt_ends_with_130_and_one_line_whatever_is_under_way(body):
    early, run, patience = BODIES[body]
    assert _interrupted(COMMAND.format(early=early, body=run, patience=patience)) == (130, "\ninterrupted\n")


SLOW_MODULE = """
import sys, time
print("ready", flush=True)
try:
    time.sleep({seconds})
except BaseException:
    print("raised in an import", file=sys.stderr)
"""


@pytest.mark.parametrize("seconds", [0.4, 60])
def test_interrupt_is_never_raised_in_an_import(tmp_path, seconds):
    """A module in C prints it, or crashes. What takes long ends with the process."""
    (tmp_path / "slow_module.py").write_text(SLOW_MODULE.format(seconds=seconds))
    body = f"sys.path.insert(0, {str(tmp_path)!r}); import slow_module; time.sleep(60)"
    assert _interrupted(COMMAND.format(early="", body=body, patience=60)) == (130, "\ninterrupted\n")


def test_termination_ends_with_143():
    code = COMMAND.format(early="", body="ready(); time.sleep(60)", patience=60)
    assert _interrupted(code, signal.SIGTERM) == (143, "\nterminated\n")


def test_signal_that_is_to_be_ignored_is():
    code = COMMAND.format(early="", body="ready(); time.sleep(0.5)", patience=60)
    assert _interrupted(code, ignored=True) == (0, "")


def test_signals_of_a_forked_child_are_not_the_parent_s():
    """The child inherits where the parent's handler writes; the parent would take the signal for its own."""
    body = "\n    ".join(
        (
            "import multiprocessing",
            "child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))",
            "child.start(); time.sleep(0.2); child.terminate(); child.join(); time.sleep(0.5); ready()",
        )
    )
    code = COMMAND.format(early="", body=body, patience=0.1)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "ready\n")


def test_other_signals_and_handlers_are_left_as_they_were():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert command.exit_status("command", lambda: 7) == 7
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_programming_errors_are_not_hidden(capsys):
    def run():
        raise KeyError("x")

    with pytest.raises(KeyError):
        command.exit_status("command", run)
    assert capsys.readouterr().err == ""


def test_error_of_the_system_has_its_words_alone():
    assert command.in_one_line(OSError(28, "No space left on device")) == "No space left on device"
    assert command.in_one_line(OSError(2, "No such file", "x.txt")) == "x.txt: No such file"


def test_place_of_a_result_is_checked(tmp_path):
    command.check_writable("--output", None)
    command.check_writable("--output", str(tmp_path / "new.json"))
    command.check_writable("--output", "/dev/null")
    with pytest.raises(ValueError, match=r"--output .*none/x\.json: no such directory"):
        command.check_writable("--output", str(tmp_path / "none" / "x.json"))
    with pytest.raises(ValueError, match="is a directory"):
        command.check_writable("--output", str(tmp_path))


def over_processes(*argv: str, follow=lambda: None) -> int:
    parser = argparse.ArgumentParser()
    command.add_process_flags(parser.add_argument)
    return command.over_processes(parser.parse_args(argv), lambda: 7, follow)


def test_one_process_joins_nobody(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    assert over_processes() == 7


@pytest.mark.parametrize("flag", [("--process-id", "1"), ("--num-processes", "2"), ("--coordinator-address", "a:1")])
def test_flags_of_several_processes_need_to_be_asked_for(flag):
    with pytest.raises(ValueError, match=f"{flag[0]} is of one of several processes; it needs --distributed"):
        over_processes(*flag)


def test_number_in_the_environment_that_is_none_raises(monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    with pytest.raises(ValueError, match="the environment has JAX_PROCESS_ID='first'; allowed: a number"):
        over_processes("--distributed")


def test_environment_says_which_process_this_is_and_flags_say_it_louder(monkeypatch):
    for name, value in {"NUM_PROCESSES": "3", "PROCESS_ID": "2"}.items():
        monkeypatch.setenv(f"JAX_{name}", value)
    joined, followed = [], []
    monkeypatch.setattr(distributed, "initialize", lambda **named: joined.append(named) or named["process_id"])
    assert over_processes("--distributed", "--process-id", "1", follow=lambda: followed.append(True)) == 0
    assert joined == [{"coordinator_address": None, "num_processes": 3, "process_id": 1}]
    assert followed
