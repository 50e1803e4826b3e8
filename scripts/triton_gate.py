"""Compiles, executes and interprets the one kernel that is written in Triton's own language, without a GPU."""

if __name__ == "__main__":
    from gdnjax.cli import interrupt

    interrupt.expected()

import argparse
import fnmatch
import importlib.util
import os
import subprocess
import sys

import rocm_gate
from rocm import report

from gdnjax.cli.command import exit_status, run_as_process

DESCRIPTION = """\
The decode step of the gated delta rule is also there as a kernel in Triton (`Backend("triton")` of the op), by
jax_triton. This is what is known of it where there is no GPU:

  gfx942, gfx950  bench_kernels' workloads, through jax_triton, Triton's own compiler for AMD and XLA around them:
                  registers, waves, no spills, the pool updated in place; then the machine code, executed in the
                  emulator: small cases, and pools of 9.4 GB
  sm_90           the same workloads as PTX, and the registers that ptxas gives it; no spills
  interpreter     the small cases, interpreted by Triton

Optional: .ci/run does not run it. It needs an environment of its own, and gcc:

  pip install -e ".[rocm-gate,triton]"
"""

EXAMPLES = """\
examples:
  python scripts/triton_gate.py                          everything
  python scripts/triton_gate.py --on gfx942 '*-kv-*'     some, for one of them

Exit status: 0 all is right, 1 something is wrong, 2 an error.
"""

PLACES = ("interpreter", "sm_90", "gfx942", "gfx950")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=["*"], help="patterns of workloads and cases (default: all)")
    parser.add_argument("--on", choices=PLACES, action="append", help="where (default: everywhere)")
    parser.add_argument("--worker", choices=PLACES, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    return exit_status("triton_gate.py", lambda: (work if arguments.worker else gate)(arguments))


def gate(arguments) -> int:
    """A process for each place: Triton interprets all that a process does, or nothing."""
    if not importlib.util.find_spec("jax_triton"):
        raise ImportError("jax_triton is not installed: pip install -e '.[rocm-gate,triton]'")
    rocm_gate.plugin_libraries()
    rocm_gate.decoder()
    statuses = []
    for place in arguments.on or PLACES:
        command = [sys.executable, __file__, *arguments.names, "--worker", place]
        environment = os.environ | {"TRITON_INTERPRET": str(int(place == "interpreter"))}
        statuses.append(subprocess.run(command, env=environment).returncode)
    return max(statuses)


def work(arguments) -> int:
    """Says a line of each task of one place."""
    place, passed = arguments.worker, []
    with rocm_gate.compiler() as cache:
        from rocm import by_triton, compiling, executing

        compiling.let_plugin_start()
        others = {"interpreter": by_triton.interpreted, "sm_90": by_triton.on_nvidia}
        for task in others[place]() if place in others else by_triton.on_amd(place, cache):
            if any(fnmatch.fnmatchcase(task.name, pattern) for pattern in arguments.names):
                result = executing.result_of(task, place)
                text = (rocm_gate.line if "alias_bytes" in result else report.line)(result)
                print(text + (f", {result['registers']} registers" if "registers" in result else ""), flush=True)
                passed.append(result["passed"])
    if not passed:
        raise ValueError(f"nothing on {place} is called {' or '.join(map(repr, arguments.names))}")
    print(f"{place}: {sum(passed)} of {len(passed)} are as they should be", flush=True)
    return 0 if all(passed) else 1


if __name__ == "__main__":
    run_as_process(main)
