"""What the commands of this directory share: exit statuses, one line for an error, the environment before jax, and
the flags of speculation.
"""

import argparse
import contextlib
import json
import logging
import os
import pathlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

INTERRUPTED = 130
CLOSED_PIPE = 141
TERMINATED = 143


class TerminatedError(KeyboardInterrupt):
    """SIGTERM has come: as Ctrl-C is, it is for whoever has something to write down, and then for the exit status."""


def exit_status(script: str, run: Callable[[], int], *, verbose: bool = False) -> int:
    """The status of `run`, or of what ends it. An error that a user can cause becomes one line on stderr.

    `verbose` shows where it came from, too.
    """
    try:
        with _terminable():
            return run()
    except TerminatedError:
        print("\nterminated", file=sys.stderr)
        return TERMINATED
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has left (head, less): nothing is wrong, and the interpreter must not flush into the pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except (OSError, ValueError, MemoryError, RuntimeError, ImportError) as error:
        if verbose:
            traceback.print_exc()
        print(f"{script}: error: {in_one_line(error)}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises TerminatedError meanwhile. Signals are for the main thread alone."""

    def terminate(number, frame):
        raise TerminatedError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def write_json(file: str | pathlib.Path, content: Any, *, indent: int = 2) -> None:
    """Writes the file in one go: who is killed leaves the one before. Pipes and devices are written to."""
    file = pathlib.Path(file)
    text = json.dumps(content, indent=indent) + "\n"
    if file.exists() and not file.is_file():
        file.write_text(text, encoding="utf-8")
        return
    new = file.with_name(f"{file.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, file)


def in_one_line(error: Exception) -> str:
    """What an error says, without the line breaks and error numbers of those who raised it."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def prepare_environment(memory_fraction: float | None = None, *, verbose: bool = False) -> None:
    """What must be settled before jax and transformers are imported. ValueError for a fraction that is none."""
    if memory_fraction is not None and not 0 < memory_fraction <= 1:
        raise ValueError(f"--memory-fraction must be in (0, 1], got {memory_fraction:g}")
    if memory_fraction is not None:
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(memory_fraction)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    # transformers advises to install PyTorch, of which nothing is used.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("gdnjax").setLevel(logging.INFO if verbose else logging.WARNING)


def add_speculation_flags(add: Callable[..., Any]) -> None:
    """The flags that `speculation` reads. `add` is an argparse group's add_argument."""
    from gdnjax.config import DRAFT_ACCEPTANCES, MAX_SPECULATIVE_TOKENS

    add(
        "--num-speculative-tokens",
        type=int,
        metavar="K",
        help=f"tokens that the model's MTP head drafts for each step, 0 to {MAX_SPECULATIVE_TOKENS} (default: 0)",
    )
    add(
        "--draft-acceptance",
        choices=DRAFT_ACCEPTANCES,
        help="shared_noise gives the tokens of a run without drafts; rejection keeps more drafts at a temperature "
        "(default: shared_noise)",
    )
    add("--adaptive-speculation", action="store_true", help="draft in those steps only where it pays, as measured")


def speculation(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of EngineConfig by the flags of speculation, those that were given; empty without drafts.

    Raises ValueError for a value that is none, and for a flag that says how to draft where nothing is drafted.
    """
    from gdnjax.config import EngineConfig

    given = {
        "num_speculative_tokens": arguments.num_speculative_tokens,
        "draft_acceptance": arguments.draft_acceptance,
        "adaptive_speculation": arguments.adaptive_speculation or None,
        # Benchmarks alone have this one.
        "spec_acceptance_length": getattr(arguments, "spec_acceptance_length", None),
    }
    given = {name: value for name, value in given.items() if value is not None}
    if not given.get("num_speculative_tokens"):
        for name in given:
            if name != "num_speculative_tokens":
                raise ValueError(f"--{name.replace('_', '-')} needs --num-speculative-tokens above 0")
        return {}
    # For its errors, before anything slow begins.
    EngineConfig(**given)
    return given
