"""What the commands share: exit statuses, signals, one line for an error, the environment before jax, and the flags of
speculation.
"""

import argparse
import contextlib
import json
import logging
import math
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from gdnjax.cli.interrupt import STATUSES, WORDS, end_now, leave_at_once
from gdnjax.distributed import LOST, ProcessLostError

CLOSED_PIPE = 141

PATIENCE_S = 5.0
"""Seconds that a signal waits for the command to end. Python looks at signals between its own steps alone, and one step
may be the compilation of a program."""

RETRY_S = 0.02
"""How soon a signal that came during an import, or was dropped, comes again."""

IMPORT_PATIENCE_S = 0.5
"""So long it waits for imports. Those that take longer stand at the start, where there is nothing to put in order."""


class TerminatedError(KeyboardInterrupt):
    """SIGTERM has come: as Ctrl-C is, it is for whoever has something to write down, and then for the exit status."""


def run_as_process(main: Callable[[], int], *, needs_torch: bool = False) -> NoReturn:
    """Runs a command and ends the process with its status. After a signal at once, and when another process is gone,
    for which the runtime would wait; see `leave_at_once`. transformers does without PyTorch, unless the command
    `needs_torch`.
    """
    if not needs_torch:
        from gdnjax.config import forgo_torch

        forgo_torch()
    status = main()
    if status in (LOST, *STATUSES.values()):
        leave_at_once(status)
    sys.exit(status)


def exit_status(
    script: str, run: Callable[[], int], *, verbose: bool = False, patience_s: float | None = PATIENCE_S
) -> int:
    """The status of `run`, or of what ends it. An error that a user can cause becomes one line on stderr.

    `verbose` shows where it came from, too. A signal that has not ended `run` after `patience_s` ends the process; None
    waits for as long as it takes.
    """
    heard: list[signal.Signals] = []
    try:
        with _listening(heard, patience_s):
            status = run()
        # Where an interrupt was raised in a callback, Python has dropped it.
        return _told(heard[0]) if heard else status
    except TerminatedError:
        return _told(signal.SIGTERM)
    except KeyboardInterrupt:
        return _told(signal.SIGINT)
    except BrokenPipeError:
        # The reader has left (head, less): nothing is wrong, and the interpreter must not flush into the pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except Exception as error:
        if heard:
            # What was under way (an import, a call into a library) has made another error of it.
            return _told(heard[0])
        if not isinstance(error, OSError | ValueError | MemoryError | RuntimeError | ImportError):
            raise
        if verbose:
            traceback.print_exc()
        if isinstance(error, ProcessLostError):
            # It has been logged.
            return LOST
        print(f"{script}: error: {in_one_line(error)}", file=sys.stderr)
        return 2


def _told(number: signal.Signals) -> int:
    """Says what came, and gives its status."""
    print(WORDS[number].decode(), end="", file=sys.stderr)
    return STATUSES[number]


_pipes: list[int] = []
"""Where C's handler of this process writes."""


def _forget_pipes() -> None:
    """In a forked child: its signals are not the parent's."""
    if _pipes:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_pipes)


def _imports(frame: types.FrameType | None) -> bool:
    """Whether an import is under way there. Modules in C print what is raised in theirs, or crash."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def _listening(heard: list[signal.Signals], patience_s: float | None) -> Iterator[None]:
    """Signals raise KeyboardInterrupt or TerminatedError meanwhile and are noted in `heard`; during an import they wait
    for its end, and what Python drops comes again. A thread ends the process where that leads to nothing. Signals are
    for the main thread alone.
    """
    numbers = [number for number in STATUSES if signal.getsignal(number) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread() or not numbers:
        yield
        return

    def raise_it(number, frame):
        heard.append(signal.Signals(number))
        if _imports(frame):
            postponed.append(number)
            return
        raise TerminatedError if number == signal.SIGTERM else KeyboardInterrupt

    def watch():
        while came := os.read(reader, 1):
            if came[0] not in numbers:
                continue
            began = time.monotonic()
            while not ended.wait(RETRY_S):
                patience = min(patience_s, IMPORT_PATIENCE_S) if postponed and patience_s is not None else patience_s
                if patience is not None and time.monotonic() - began > patience:
                    end_now(came[0])
                if postponed:
                    signal.pthread_kill(main_thread, postponed.pop())
        os.close(reader)

    def drop(unraisable):
        # Raised in a callback, of the garbage collector say, from which Python lets nothing out: it comes again.
        if heard and isinstance(unraisable.exc_value, KeyboardInterrupt):
            postponed.append(heard[-1])
        else:
            hook_before(unraisable)

    main_thread = threading.get_ident()
    ended = threading.Event()
    postponed: list[int] = []
    # C's handler writes the number of each signal there, whatever Python is at.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=watch, name="signals", daemon=True).start()
    pipe_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _pipes.append(writer)
    hook_before, sys.unraisablehook = sys.unraisablehook, drop
    before = {number: signal.signal(number, raise_it) for number in numbers}
    try:
        yield
    finally:
        ended.set()
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook_before
        signal.set_wakeup_fd(pipe_before)
        _pipes.remove(writer)
        os.close(writer)


def check_writable(flag: str, file: str | None) -> None:
    """Raises ValueError where nothing can be written at `file`. Long work must not end with that news."""
    if not file:
        return
    path = pathlib.Path(file).absolute()
    if path.is_dir():
        raise ValueError(f"{flag} {file}: is a directory")
    if not path.parent.is_dir():
        raise ValueError(f"{flag} {file}: no such directory")
    # The directory, too: a new file takes the place of the one before.
    missing = [part for part in (path.parent, path) if part.exists() and not os.access(part, os.W_OK)]
    if missing and not (path.exists() and not path.is_file()):
        raise ValueError(f"{flag} {file}: {missing[0]} is not writable")


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
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


PINNED_GIB = 64
"""GiB of the host's memory that XLA pins for a GPU, unless XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB says otherwise."""


def prepare_environment(
    memory_fraction: float | None = None, *, host_cache_gib: int | float = 0, verbose: bool = False
) -> None:
    """What must be settled before jax and transformers are imported. ValueError for a fraction that is none, and for
    a size that is none.
    """
    if not 0 <= host_cache_gib < math.inf:
        raise ValueError(f"--host-cache-gib must be a number of GiB, 0 or more, got {host_cache_gib:g}")
    # XLA divides what it has pinned among arrays of all sizes, and loses some in between.
    pinned = math.ceil(1.25 * host_cache_gib) + 4
    if pinned > PINNED_GIB:
        os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(pinned))
    if memory_fraction is not None and not 0 < memory_fraction <= 1:
        raise ValueError(f"--memory-fraction must be in (0, 1], got {memory_fraction:g}")
    if memory_fraction is not None:
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(memory_fraction)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("gdnjax").setLevel(logging.INFO if verbose else logging.WARNING)
    # Where there is no terminal for bars, lines say now and then how far something is.
    logging.getLogger("gdnjax.progress").setLevel(logging.INFO)


def command_parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A command line without flags yet, for who calls it `command`: that stands for {command} in `examples`, and what
    is to be said of several processes for {processes}.
    """
    return argparse.ArgumentParser(
        # Without an interpreter before it.
        prog=command.removeprefix("python "),
        description=description,
        epilog=examples.replace("{command}", command).replace("{processes}", PROCESSES_HELP),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_number_flags(add: Callable[..., Any]) -> None:
    """The tokenizer, and what a model's numbers are, which `EngineConfig` has fields for."""
    from gdnjax.config import DTYPES, KV_CACHE_DTYPES, QUANTIZATIONS

    add("--tokenizer", metavar="DIR", help="directory of the tokenizer, or tiny (default: the model's)")
    add("--dtype", choices=DTYPES, default="auto", help="of weights and activations; auto: the checkpoint's")
    add(
        "--quantization",
        choices=QUANTIZATIONS,
        default="auto",
        help="weights in eight bits; auto: those that the checkpoint has so; fp8_per_channel: all projections, made as "
        "they are loaded; dequantized: none (default: auto)",
    )
    add("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto", help="of keys and values; auto: as --dtype")


def add_device_flags(add: Callable[..., Any]) -> None:
    """The flags that `devices` reads. `add` is an argparse group's add_argument."""
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="devices that share the model (default: 1)")
    add(
        "--enable-expert-parallel",
        action="store_true",
        help="share out routed experts whole over these devices, in place of a slice of every expert on each",
    )


def devices(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of EngineConfig: which devices share a model, and how. What cannot be, EngineConfig says."""
    return {name: getattr(arguments, name) for name in ("tensor_parallel_size", "enable_expert_parallel")}


def add_host_cache_flag(add: Callable[..., Any]) -> None:
    """`--host-cache-gib`. `add` is an argparse group's add_argument."""
    add(
        "--host-cache-gib",
        type=float,
        default=0.0,
        metavar="GIB",
        help="memory of the host, of all ranks together, for cached prefixes that the device has no more room for "
        f"(default: 0). Where it may exceed the {PINNED_GIB} GiB that XLA pins for a GPU, "
        "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB is set, unless it is",
    )


PROCESSES_HELP = """\
Several processes, on one host or many, run one model together: start the same command in each, by any launcher, with
--distributed. Slurm, Open MPI and Kubernetes jobs say themselves which process is which; else --coordinator-address,
--num-processes and --process-id do, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. The devices that
a process of Slurm or Open MPI has, beyond one, JAX_LOCAL_DEVICE_IDS names (0,1,2,3). Process 0 does what the command
line says and has all output; the others take part in it. --tensor-parallel-size counts the devices of all. Where a
process is lost, the others end with status 3, and say which.
"""


def add_process_flags(add: Callable[..., Any]) -> None:
    """The flags that `over_processes` reads. `add` is an argparse group's add_argument."""
    add("--distributed", action="store_true", help="this is one of several processes that run the model together")
    add("--coordinator-address", metavar="HOST:PORT", help="of process 0, any free port (default: the launcher's)")
    add("--num-processes", type=int, metavar="N", help="how many there are (default: the launcher's)")
    add("--process-id", type=int, metavar="I", help="which of them this is, from 0 (default: the launcher's)")


def over_processes(arguments: argparse.Namespace, run: Callable[[], int], follow: Callable[[], object]) -> int:
    """`run` where this process is the only one, or process 0 of several, and its status. In the others `follow`, and 0.

    The environment is prepared. Raises ValueError for flags that say which process this is, without --distributed, and
    for values that are none.
    """
    named = {name: getattr(arguments, name) for name in ("coordinator_address", "num_processes", "process_id")}
    if not arguments.distributed:
        if given := [f"--{name.replace('_', '-')}" for name, value in named.items() if value is not None]:
            raise ValueError(f"{given[0]} is of one of several processes; it needs --distributed")
        return run()
    for name in ("num_processes", "process_id"):
        if named[name] is None and (value := os.environ.get(f"JAX_{name.upper()}")) is not None:
            if not value.isdigit():
                raise ValueError(f"the environment has JAX_{name.upper()}={value!r}; allowed: a number")
            named[name] = int(value)
    from gdnjax import distributed

    process = distributed.initialize(**named)
    from gdnjax.serving.processes import leading

    if process == 0:
        with leading():
            return run()
    follow()
    return 0


def add_speculation_flags(add: Callable[..., Any]) -> None:
    """The flags that `speculation` reads. `add` is an argparse group's add_argument."""
    from gdnjax.config import DRAFT_ACCEPTANCES, DRAFT_HEADS, MAX_SPECULATIVE_TOKENS

    add(
        "--num-speculative-tokens",
        type=int,
        metavar="K",
        help=f"tokens that the model's MTP head drafts for each step, 0 to {MAX_SPECULATIVE_TOKENS} (default: 0)",
    )
    add(
        "--draft-acceptance",
        choices=DRAFT_ACCEPTANCES,
        help="shared_noise gives the tokens of a run without drafts, up to rounding (in bfloat16 a near tie may "
        "fall the other way); rejection keeps more drafts at a temperature (default: shared_noise)",
    )
    add(
        "--draft-head",
        choices=DRAFT_HEADS,
        help="what drafts are drawn by: the target's own head, or a copy of it in float8, which takes half as long to "
        "read and a byte for each number of it; what is emitted is as exact (default: target)",
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
        "draft_head": arguments.draft_head,
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
