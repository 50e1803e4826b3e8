"""Puts faults of one line into a copy of the package, and has the short run of the tests notice each."""

if __name__ == "__main__":
    from gdnjax.cli import interrupt

    interrupt.expected()

import argparse
import dataclasses
import fnmatch
import json
import os
import pathlib
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from gdnjax.cli.command import exit_status, run_as_process
from tests.line_faults import LINE_FAULTS, LineFault

DESCRIPTION = """\
Whether the short run of the tests can fail: each fault of tests/line_faults.py is put into a copy of the repository,
and the tests near it are run until one fails; where none does, all short tests are. Without a fault they must pass, so
that is tried first. Hypothesis does not shrink what it finds.
"""

EXAMPLES = """\
examples:
  python scripts/check_tests.py
  python scripts/check_tests.py "*state*" "*draft*" --output caught.json
  python scripts/check_tests.py "a key*" --without-trial --near-alone --processes 1

What the runs compile is kept in $JAX_COMPILATION_CACHE_DIR, where that is set, for the next call.

Exit status: 0 all faults are caught, 1 some are missed or ended pytest itself, 2 refused (the reason is on stderr),
130 interrupted, 143 terminated.
"""

ROOT = pathlib.Path(__file__).resolve().parents[1]

TEST_FAILED, NOTHING_RUN = 1, 5
"""Exit statuses of pytest."""

LIMIT_S = 1800
"""Of one run of pytest. A fault that hangs the tests is caught, too."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=["*"], help="patterns of faults (default: all)")
    parser.add_argument("--processes", type=int, default=2, help="faults at a time (2)")
    parser.add_argument("--output", metavar="FILE", help="also write what caught each fault there, as JSON")
    parser.add_argument("--without-trial", action="store_true", help="do not run the tests without a fault first")
    parser.add_argument("--near-alone", action="store_true", help="run the tests near each fault, and no others")
    arguments = parser.parse_args(argv)
    if arguments.processes < 1:
        parser.error(f"--processes must be at least 1, got {arguments.processes}")
    return exit_status("check_tests.py", lambda: run(arguments))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a fault.

    caught_by  the test that caught it; None where none did.
    crash      how pytest itself ended, where it came to no result; None else. Nobody has caught such a fault: what
               ended may have nothing to do with it.
    seconds    until then.
    """

    name: str
    caught_by: str | None
    crash: str | None
    seconds: float


class PytestCrashError(Exception):
    """pytest came to no result: its process died, or what it was given cannot be collected."""


def run(arguments: argparse.Namespace) -> int:
    faults = [fault for fault in LINE_FAULTS if any(fnmatch.fnmatch(fault.name, name) for name in arguments.names)]
    if not faults:
        raise ValueError(f"no fault is called {', '.join(map(repr, arguments.names))}")
    for fault in faults:
        faulty(fault, (ROOT / fault.file).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch:
        copies: queue.SimpleQueue[pathlib.Path] = queue.SimpleQueue()
        for index in range(arguments.processes):
            copies.put(copied(pathlib.Path(scratch) / f"copy-{index}"))
        if not arguments.without_trial:
            copy = copies.get()
            try_without(copy, arguments.processes)
            copies.put(copy)

        def judged(fault: LineFault) -> Verdict:
            copy = copies.get()
            try:
                return judge(fault, copy, arguments.near_alone)
            finally:
                # Or the next would wait for it for ever.
                copies.put(copy)

        verdicts: list[Verdict] = []
        with ThreadPoolExecutor(arguments.processes) as pool:
            for done in as_completed([pool.submit(judged, fault) for fault in faults]):
                verdicts.append(done.result())
                print(line(verdicts[-1]), flush=True)
                if arguments.output:
                    # One by one: whoever interrupts it has what there is.
                    write(verdicts, pathlib.Path(arguments.output))
    caught = sum(verdict.caught_by is not None for verdict in verdicts)
    print(f"{caught} of {len(verdicts)} faults are caught")
    return 0 if caught == len(verdicts) else 1


def try_without(copy: pathlib.Path, processes: int) -> None:
    """Runs the short tests without a fault. Raises ValueError where they do not pass."""
    began = time.monotonic()
    side_by_side = ["-n", str(processes), "--dist", "worksteal"] * (processes > 1)
    try:
        failed = failing(copy, side_by_side)
    except PytestCrashError as error:
        raise ValueError(f"without a fault the short tests cannot be run: {error}") from None
    if failed is not None:
        raise ValueError(f"without a fault the short tests fail: {failed}")
    print(f"without a fault all short tests pass ({time.monotonic() - began:.0f} s)", flush=True)


def line(verdict: Verdict) -> str:
    if verdict.crash is not None:
        found = f"CRASHED: {verdict.crash}"
    else:
        found = "MISSED" if verdict.caught_by is None else f"caught by {verdict.caught_by}"
    return f"{verdict.name}: {found} ({verdict.seconds:.0f} s)"


def write(verdicts: Sequence[Verdict], path: pathlib.Path) -> None:
    """In the order of the table, as a JSON list of objects."""
    names = [fault.name for fault in LINE_FAULTS]
    rows = [dataclasses.asdict(verdict) for verdict in sorted(verdicts, key=lambda found: names.index(found.name))]
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def copied(target: pathlib.Path) -> pathlib.Path:
    """The repository's files at `target`: those that git knows or would take."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        # A file that was deleted and not yet committed is still listed.
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def judge(fault: LineFault, copy: pathlib.Path, near_alone: bool) -> Verdict:
    """Puts the fault in, has the tests look for it, and takes it out again."""
    file = copy / fault.file
    right = file.read_text(encoding="utf-8")
    caught_by = crash = None
    began = time.monotonic()
    file.write_text(faulty(fault, right), encoding="utf-8")
    try:
        caught_by = failing(copy, [fault.near])
        if caught_by is None and not near_alone:
            caught_by = failing(copy, [])
    except PytestCrashError as error:
        crash = str(error)
    finally:
        file.write_text(right, encoding="utf-8")
    return Verdict(fault.name, caught_by, crash, round(time.monotonic() - began, 1))


def faulty(fault: LineFault, text: str) -> str:
    """The text of the file with the fault in it. Raises ValueError where it does not have the line once."""
    if (count := text.count(fault.line)) != 1:
        raise ValueError(f"{fault.file} has the line of {fault.name!r} {count} times, and once is wanted: {fault.line}")
    return text.replace(fault.line, fault.wrong)


def failing(copy: pathlib.Path, arguments: Sequence[str]) -> str | None:
    """The first short test that fails; None where all pass. Raises PytestCrashError where there is no result."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--no-header", "-p", "no:cacheprovider", *arguments]
    # Also for the commands that tests start.
    environment = {"JAX_COMPILATION_CACHE_DIR": str(copy.parent / "jax")} | os.environ
    environment |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "TESTS_WITHOUT_SHRINKING": "1"}
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"no end within {LIMIT_S} s"
    if done.returncode in (0, NOTHING_RUN):
        return None
    # By xdist's word a test that ended its process failed.
    # Names of cases may have blanks; behind a dash stands why.
    found = re.search(r"^(?:FAILED|ERROR) (\S+?(?:\[.*?\])?)(?: - |$)", done.stdout, re.MULTILINE)
    if done.returncode != TEST_FAILED or found is None:
        raise PytestCrashError(f"pytest ended with status {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return found[1]


if __name__ == "__main__":
    run_as_process(main)
