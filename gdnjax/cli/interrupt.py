"""Ctrl-C and SIGTERM from a command's first line on. Imports next to nothing, so that it can be imported first."""

# What `signal` is made of, which imports enum: that takes longer than all the rest.
import _signal as signal  # pyright: ignore[reportMissingImports]
import os
import sys

# Type checkers know it by its name; typing would take longer to import than all the rest.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

INTERRUPTED = 130
TERMINATED = 143

WORDS = {signal.SIGINT: b"\ninterrupted\n", signal.SIGTERM: b"\nterminated\n"}
STATUSES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED}


def expected() -> None:
    """Until the command itself takes over, a signal ends the process in a line: there is nothing to put in order yet.

    A signal that whoever started the process has it ignore stays ignored.
    """
    for number in STATUSES:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: end_now(number))


def end_now(number: int) -> "NoReturn":
    """Says what came, and ends the process without another step of Python's."""
    os.write(2, WORDS[number])
    leave_at_once(STATUSES[number])


def leave_at_once(status: int) -> "NoReturn":
    """Ends the process without taking the interpreter down: threads that compile would lose what they use and crash.

    What was printed is flushed; processes of `multiprocessing` are ended.
    """
    # In a handler anything may be half imported, and what was printed may have no reader: the end comes all the same.
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        processes = sys.modules.get("multiprocessing")
        for child in processes.active_children() if processes else ():
            child.terminate()
    finally:
        os._exit(status)
