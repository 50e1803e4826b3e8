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
from concurrent.futures import ThreadPoolExecutor

from gdnjax.cli.command import exit_status, run_as_process
from tests.line_faults import LINE_FAULTS, LineFault

DESCRIPTION = """\
Whether the short run of the tests can fail: each fault of tests/line_faults.py is put into a copy of the repository,
and the tests near it are run until one fails; where none does, all short tests are. Without a fault they must pass, so
that is tried first.
"""

EXAMPLES = """\
examples:
  python scripts/check_tests.py
  python scripts/check_tests.py "*state*" "*draft*" --output caught.json

Exit status: 0 all faults are caught, 1 some are missed, 2 refused (the reason is on stderr), 130 interrupted,
143 terminated.
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
    arguments = parser.parse_args(argv)
    if arguments.processes < 1:
        parser.error(f"--processes must be at least 1, got {arguments.processes}")
    return exit_status("check_tests.py", lambda: run(arguments))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a fault: the test that caught it (None: it was missed), and the seconds until then."""

    name: str
    caught_by: str | None
    seconds: float


def run(arguments: argparse.Namespace) -> int:
    faults = [fault for fault in LINE_FAULTS if any(fnmatch.fnmatch(fault.name, name) for name in arguments.names)]
    if not faults:
        raise ValueError(f"no fault is called {', '.join(map(repr, arguments.names))}")
    with tempfile.TemporaryDirectory() as scratch:
        copies: queue.SimpleQueue[pathlib.Path] = queue.SimpleQueue()
        for index in range(arguments.processes):
            copies.put(copied(pathlib.Path(scratch) / f"copy-{index}"))
        if not arguments.without_trial:
            copy = copies.get()
            began = time.monotonic()
            side_by_side = ["-n", str(arguments.processes), "--dist", "worksteal"] * (arguments.processes > 1)
            failed = failing(copy, side_by_side)
            if failed is not None:
                raise ValueError(f"without a fault the short tests fail: {failed}")
            print(f"without a fault all short tests pass ({time.monotonic() - began:.0f} s)", flush=True)
            copies.put(copy)

        def judged(fault: LineFault) -> Verdict:
            copy = copies.get()
            try:
                verdict = judge(fault, copy)
            finally:
                # Or the next would wait for it for ever.
                copies.put(copy)
            print(line(verdict), flush=True)
            return verdict

        with ThreadPoolExecutor(arguments.processes) as pool:
            verdicts = list(pool.map(judged, faults))
    missed = [verdict for verdict in verdicts if verdict.caught_by is None]
    print(f"{len(verdicts) - len(missed)} of {len(verdicts)} faults are caught")
    if arguments.output:
        rows = [dataclasses.asdict(verdict) for verdict in verdicts]
        pathlib.Path(arguments.output).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 1 if missed else 0


def line(verdict: Verdict) -> str:
    found = "MISSED" if verdict.caught_by is None else f"caught by {verdict.caught_by}"
    return f"{verdict.name}: {found} ({verdict.seconds:.0f} s)"


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


def judge(fault: LineFault, copy: pathlib.Path) -> Verdict:
    """Puts the fault in, has the tests look for it, and takes it out again."""
    file = copy / fault.file
    right = file.read_text(encoding="utf-8")
    began = time.monotonic()
    file.write_text(faulty(fault, right), encoding="utf-8")
    try:
        caught_by = failing(copy, [fault.near]) or failing(copy, [])
    finally:
        file.write_text(right, encoding="utf-8")
    return Verdict(fault.name, caught_by, round(time.monotonic() - began, 1))


def faulty(fault: LineFault, text: str) -> str:
    """The text of the file with the fault in it. Raises ValueError where it does not have the line once."""
    if (count := text.count(fault.line)) != 1:
        raise ValueError(f"{fault.file} has the line of {fault.name!r} {count} times, and once is wanted: {fault.line}")
    return text.replace(fault.line, fault.wrong)


def failing(copy: pathlib.Path, arguments: Sequence[str]) -> str | None:
    """The first short test that fails; None where all pass. Raises RuntimeError where they cannot be run."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--no-header", "-p", "no:cacheprovider", *arguments]
    # Also for the commands that tests start.
    environment = os.environ | {
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(copy.parent / "jax"),
    }
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"no end within {LIMIT_S} s"
    if done.returncode in (0, NOTHING_RUN):
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode != TEST_FAILED or found is None:
        # A process that crashed is no test that failed.
        raise RuntimeError(f"pytest ended with status {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return found[1]


if __name__ == "__main__":
    run_as_process(main)
