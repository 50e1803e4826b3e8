"""Compiles every kernel and whole steps for AMD GPUs, without one, refuses what could not run well there, and executes
kernels in an emulator.
"""

if __name__ == "__main__":
    from gdnjax.cli import interrupt

    interrupt.expected()

import argparse
import contextlib
import dataclasses
import fnmatch
import gc
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from rocm import report
from site_pages import markers

from gdnjax.cli.command import check_writable, exit_status, prepare_environment, run_as_process

DESCRIPTION = """\
Every kernel at every workload of bench_kernels.py, and whole prefill, decode and seal steps at the layer sizes of
published models, through XLA's own ROCm compiler; some of both in pools over 4 GiB. Refused are: what does not
compile, registers that spill, scratch, more LDS than the chip has, fewer waves than a kernel has now, launches that the
hardware cannot do, pools that are copied or not updated in place, arrays that buffer instructions do not reach, and
products that XLA makes one of, their matrices laid side by side in every call. Three must be refused, or the gate
itself is broken: a kernel that spills, one whose offsets are cut, and two products that XLA makes one.

With --emulate the machine code of every kernel is executed, in an emulator on the CPU: small cases of all orders and
types with poison around what may be read, pools of more than 4 GiB, and mutants of the code, of which enough must be
noticed; they try the cases, which are the same for both chips, so each chip has every other kernel's. What is known to
be wrong must be found wrong. That says nothing of speed, and it is no run on hardware.

It needs an environment of its own with the compiler's wheels (160 MB, no ROCm and no GPU), readelf and gcc:

  pip install -e ".[rocm-gate]"
"""

EXAMPLES = """\
examples:
  python scripts/rocm_gate.py                        gfx942 (MI300X) and gfx950 (MI355X)
  python scripts/rocm_gate.py --arch gfx942 'gdn-*'  some, for one
  python scripts/rocm_gate.py --emulate --arch gfx942 'gdn-decode-*'      execute the small cases of one kernel
  python scripts/rocm_gate.py --write-docs           and put the table of resources into docs/amd.md
  python scripts/rocm_gate.py --emulate              execute instead of compile alone
  python scripts/rocm_gate.py --emulate 'mutants*' '*-without-bounds'    all of these, for both

Exit status: 0 all passed, 1 something was refused or wrong, 2 an error.
"""

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "amd.md"
ARCHITECTURES = ("gfx942", "gfx950")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=["*"], help="patterns of workloads and steps (default: all)")
    parser.add_argument("--arch", choices=ARCHITECTURES, action="append", help="architecture (default: both)")
    parser.add_argument("--output", metavar="FILE", help="also write all figures there, as JSON")
    parser.add_argument("--write-docs", action="store_true", help="replace the table of resources in docs/amd.md")
    parser.add_argument("--emulate", action="store_true", help="execute cases, large pools and mutants in an emulator")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.emulate and arguments.write_docs:
        parser.error("--write-docs writes what is compiled, not what is executed")
    if arguments.worker:
        work = emulate_one if arguments.emulate else compile_one
        return exit_status("rocm_gate.py", lambda: work(arguments))
    return exit_status("rocm_gate.py", lambda: (emulate if arguments.emulate else gate)(arguments))


def gate(arguments) -> int:
    """Compiles, and refuses."""
    results = in_processes(arguments, line)
    if arguments.write_docs:
        write_docs(results)
    print(launches_table(results), end="")
    refused = [result for result in results if not result["passed"]]
    print(f"{len(results) - len(refused)} passed, {len(refused)} refused")
    return 1 if refused else 0


def emulate(arguments) -> int:
    """Compiles, and executes."""
    decoder()
    results = in_processes(arguments, report.line)
    everything = arguments.names == ["*"]
    faults = report.too_few(results) if everything else []
    print("\n".join(filter(None, (report.table(results), *faults, report.summary(results)))))
    return 1 if faults or not all(result["passed"] for result in results) else 0


def in_processes(arguments, say: Callable[[dict], str]) -> list[dict]:
    """The results of all architectures, side by side: a process compiles for one kind of chip, on one core.

    Raises ValueError for a pattern that fits nothing, before anything is compiled, and for an `--output` that cannot be
    written.
    """
    check_writable("--output", arguments.output)
    # Missing wheels are said once, not by each process.
    plugin_libraries()
    architectures = arguments.arch or ARCHITECTURES
    with tempfile.TemporaryDirectory() as shared, ThreadPoolExecutor(len(architectures)) as pool:
        shares = [(index, len(architectures)) for index in range(len(architectures))]
        by_architecture = pool.map(
            lambda arch, share: in_process(arch, arguments, say, shared, share), architectures, shares
        )
        results = [result for results in by_architecture for result in results]
    if arguments.output:
        pathlib.Path(arguments.output).write_text(json.dumps(results, indent=1) + "\n")
    return results


def in_process(arch: str, arguments, say: Callable[[dict], str], shared: str, share: tuple[int, int]) -> list[dict]:
    """The results of a worker, which are said as they come. What it compiles for the CPU it leaves in `shared`."""
    results = []
    command = [sys.executable, __file__, *arguments.names, "--worker", arch, *["--emulate"] * arguments.emulate]
    command += ["--share", *map(str, share)]
    environment = os.environ | ({"JAX_COMPILATION_CACHE_DIR": shared} if arguments.emulate else {})
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for text in process.stdout:
            if not text.startswith("{"):
                print(text, end="", flush=True)
                continue
            result = json.loads(text)
            if "idle" in result:
                beginnings = ", ".join(result["beginnings"])
                raise ValueError(
                    f"nothing is called {', '.join(map(repr, result['idle']))}; names begin with {beginnings}"
                )
            results.append(result)
            # Line and end in one piece: the other architecture's come between.
            print(say(results[-1]) + "\n", end="", flush=True)
    if process.returncode:
        raise RuntimeError(f"the compiler of {arch} ended with status {process.returncode}")
    return results


def misses(patterns: Iterable[str], names: list[str]) -> bool:
    """Whether a pattern fits none of the names, which is then said in a line of JSON: a misspelled one would pass."""
    idle = [pattern for pattern in patterns if not any(fnmatch.fnmatchcase(name, pattern) for name in names)]
    if idle:
        beginnings = sorted({re.split(r"\W", name, maxsplit=1)[0] for name in names})
        print(json.dumps({"idle": idle, "beginnings": beginnings}), flush=True)
    return bool(idle)


@contextlib.contextmanager
def compiler() -> Iterator[pathlib.Path]:
    """The process can compile for AMD meanwhile; code objects come to the directory. Before jax is imported."""
    from rocm import compiling, stand_ins

    prepare_environment()
    # Traces are many small objects: to look for cycles among them as often as Python does takes a fifth of the time of
    # tracing.
    gc.set_threshold(200_000, 50, 100)
    with tempfile.TemporaryDirectory() as scratch:
        libraries, cache = pathlib.Path(scratch, "libraries"), pathlib.Path(scratch, "code")
        libraries.mkdir()
        cache.mkdir()
        compiling.prepare(cache)
        stand_ins.load(stand_ins.build(plugin_libraries(), libraries))
        yield cache


def emulate_one(arguments) -> int:
    """Executes for one architecture and prints a line of JSON for each case."""
    with compiler() as cache:
        from rocm import emulation, executing

        backwards = arguments.worker != ARCHITECTURES[0]
        machine = emulation.Compiler(arguments.worker, cache)
        if misses(arguments.names, executing.names(machine)):
            return 0
        for result in executing.results(machine, arguments.names, backwards=backwards, share=tuple(arguments.share)):
            print(json.dumps(result), flush=True)
    return 0


def compile_one(arguments) -> int:
    """Compiles for one architecture and prints a line of JSON for each function."""
    from rocm import compiling

    arch = arguments.worker
    with compiler() as cache:
        from rocm import counts, functions

        (device,) = compiling.devices(arch)
        known = compiling.Known()
        counted = [*functions.counted(arch, [device])]
        if arguments.names == ["*"]:
            counted = [f for f in counted if any(f", {name}," in f.name for name in counts.STANDING[arch])]
        steps = functions.steps(arch, lambda n: compiling.devices(arch, n))
        todo = [*functions.kernels(arch, device), *steps, *counted]
        # Controls are not what a pattern is for.
        if misses(arguments.names, [f.name for f in todo]):
            return 0
        todo = [f for f in todo if any(fnmatch.fnmatchcase(f.name, wanted) for wanted in arguments.names)]
        for function in [*todo, *functions.controls(device)]:
            begin = time.perf_counter()
            try:
                compiled = compiling.compile_function(function.lower, cache, known)
            except Exception as failure:  # compilers and lowerings raise what they like: it is the answer
                wrong, kernels, memory = [f"{type(failure).__name__}: {str(failure)[:300]}"], [], (0, 0)
                sequence = []
            else:
                wrong = compiling.judge(compiled, function.demands, arch)
                kernels = [dataclasses.asdict(k) | {"waves": k.waves(arch)} for k in compiled.kernels]
                memory, sequence = (compiled.alias_bytes, compiled.temporary_bytes), compiled.sequence
            wanted = function.refused_for
            as_meant = not wrong if wanted is None else any(wanted in fault for fault in wrong)
            result = {
                "arch": arch,
                "name": function.name,
                "passed": as_meant,
                "wrong": [*wrong, *([f"was not refused for {wanted!r}"] if wanted and not as_meant else [])],
                "fails": wanted is not None,
                "kernels": kernels,
                "alias_bytes": memory[0],
                "temporary_bytes": memory[1],
                "launches": sequence,
                "seconds": round(time.perf_counter() - begin, 2),
            }
            print(json.dumps(result), flush=True)
    return 0


def plugin_libraries() -> list[pathlib.Path]:
    """The shared objects of the jax-rocm7 wheels."""
    import importlib.util

    found: list[pathlib.Path] = []
    for package in ("jax_plugins.xla_rocm7", "jax_rocm7_plugin"):
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:  # what the package is in is missing, too
            spec = None
        for place in (spec.submodule_search_locations or []) if spec else []:
            found += sorted(pathlib.Path(place).rglob("*.so"))
    if not found:
        raise ImportError("the ROCm compiler is not installed: pip install -e '.[rocm-gate]'")
    return found


def decoder() -> None:
    """Raises ImportError where the emulator's decoder is missing."""
    import importlib.util

    if importlib.util.find_spec("tinygrad") is None:
        raise ImportError("the emulator's decoder is not installed: pip install -e '.[rocm-gate]'")


def line(result: dict) -> str:
    text = f"{'passed ' if result['passed'] else 'REFUSED'} {result['arch']} {result['name']} ({result['seconds']} s)"
    for kernel in result["kernels"]:
        text += f"\n    {kernel['name']}: {kernel['vgpr']} VGPR, {kernel['sgpr']} SGPR, {kernel['lds']} B LDS"
        text += f", {kernel['waves']:g} waves"
    if not result["passed"]:
        text += "".join(f"\n    {fault}" for fault in result["wrong"])
    return text


def write_docs(results: list[dict]) -> None:
    PAGE.write_text(markers.replaced(PAGE.read_text(), "rocm gate", table(results)))


def table(results: list[dict]) -> str:
    """A row for each kernel: over all workloads, the most registers and the fewest waves."""
    rows: dict[str, dict[str, list[dict]]] = {}
    for result in results:
        if not result["fails"]:
            for kernel in result["kernels"]:
                rows.setdefault(kernel["name"], {}).setdefault(result["arch"], []).append(kernel)
    head = "VGPR, LDS in kB, waves"
    lines = [f"| Kernel | gfx942: {head} | gfx950: {head} | spills |", "|---|---|---|---|"]
    for name, by_arch in sorted(rows.items()):
        cells = [
            f"{max(k['vgpr'] for k in by_arch[arch])}, {max(k['lds'] for k in by_arch[arch]) / 1024:.0f}, "
            f"{min(k['waves'] for k in by_arch[arch]):g}"
            if by_arch.get(arch)
            else ""
            for arch in ARCHITECTURES
        ]
        spills = sum(k["vgpr_spills"] for kernels in by_arch.values() for k in kernels)
        lines.append(f"| `{name}` | {cells[0]} | {cells[1]} | {spills} |")
    return "\n".join(lines)


def launches_table(results: list[dict]) -> str:
    """How many kernels a decode step launches, by what for: see `functions.COUNTED`. Empty where none was counted."""
    from rocm.counts import COUNTED, COUNTED_LAYERS

    found = {(result["arch"], result["name"]): len(result["launches"]) for result in results}
    lines = []
    for arch in ARCHITECTURES:
        for what in COUNTED:
            counts = [found.get((arch, what.of(kind)), 0) for kind in COUNTED_LAYERS]
            if all(counts):
                both, delta, attention = counts
                of = delta - both, attention - both, 3 * both - delta - attention
                lines.append(f"| {arch}, {what.name} | {of[0]} | {of[1]} | {of[2]} |")
    if not lines:
        return ""
    head = ["| kernels a decode step launches | GDN layer | attention layer | all else |", "|---|---:|---:|---:|"]
    return "\n".join([*head, *lines, ""])


if __name__ == "__main__":
    run_as_process(main)
