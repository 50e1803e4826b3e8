"""Checks and times every kernel at the sizes of the published models, beside its ceiling and its peers."""

import argparse
import dataclasses
import fnmatch
import json
import pathlib
import sys
import time

from command import exit_status, prepare_environment

DESCRIPTION = """\
For each named workload: random inputs, the kernel's values against float64 (outputs poisoned with NaN before), then
its time, what it achieves in bytes/s and FLOP/s, and the share of the ceiling that was measured in the same run: of a
copy for what moves bytes, of a large matrix product for what computes. Values are checked first; a workload whose
values are wrong is not timed, and the exit status is 1.

Peers stand beside it where they are installed: flash-linear-attention (with PyTorch), jax's own paged attention,
`lax.ragged_dot`, cuDNN's attention through jax.nn. They run in a process of their own, on the same GPU.
"""

EXAMPLES = """\
examples:
  python scripts/bench_kernels.py                                everything
  python scripts/bench_kernels.py 'gdn-decode-*' 'conv-*'        some
  python scripts/bench_kernels.py --no-peers --output kernels.json --plot roofline.png
  python scripts/bench_kernels.py --sweep 'gdn-prefill-48h-*'    other tiles, and the best as a row of the table
  python scripts/bench_kernels.py --list

Exit status: 0 done, 1 wrong values, 2 an error.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=["*"], help="patterns of workloads (default: all)")
    parser.add_argument("--kernels", default="auto", help="auto, pallas, reference or interpret (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=12, help="timed runs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of the inputs (default: fresh ones)")
    parser.add_argument("--no-peers", action="store_true", help="leave other implementations out")
    parser.add_argument("--check-only", action="store_true", help="values, no times")
    parser.add_argument("--sweep", action="store_true", help="time other tiles, too, and print the best")
    parser.add_argument("--output", metavar="FILE", help="also write all figures there, as JSON")
    parser.add_argument("--plot", metavar="FILE", help="also draw a roofline there, as PNG")
    parser.add_argument("--list", action="store_true", help="the names of the workloads, and no more")
    arguments = parser.parse_args(argv)
    if arguments.runs < 1:
        parser.error("--runs must be at least 1")
    if arguments.check_only and (arguments.sweep or arguments.plot):
        parser.error("--check-only measures no times; --sweep and --plot need them")
    return exit_status("bench_kernels.py", lambda: run(arguments))


def run(arguments) -> int:
    prepare_environment()
    from kernel_bench.workloads import WORKLOADS

    names = [name for name in WORKLOADS if any(fnmatch.fnmatchcase(name, wanted) for wanted in arguments.names)]
    if not names:
        raise ValueError(f"no workload is named like {' or '.join(arguments.names)}; --list prints them")
    if arguments.list:
        print("\n".join(names))
        return 0

    import jax
    from kernel_bench import measure, report, timing

    from gdnjax import backend

    device = jax.devices()[0]
    implementation = backend.of_device(arguments.kernels, device)
    seed = time.time_ns() % 2**31 if arguments.seed is None else arguments.seed
    head = {"device": device.device_kind, "jax": jax.__version__, "kernels": dataclasses.asdict(implementation)}
    print(f"{device.device_kind}, jax {jax.__version__}, kernels {implementation.kernels}, seed {seed}", flush=True)
    others = {} if arguments.no_peers or arguments.check_only else measure.torch_peers(names, arguments.runs)
    ceilings = None
    if not arguments.check_only:
        # What keeps a GPU busy is minutes on a CPU.
        small = device.platform == "cpu"
        ceilings = {
            "copy": timing.copy_ceiling(0.25 if small else 2.0),
            "matmul": timing.matmul_ceiling(1024 if small else 8192),
        }
        print(f"copy {ceilings['copy'] / 1e12:.2f} TB/s, matmul {ceilings['matmul'] / 1e12:.0f} TFLOP/s", flush=True)
    rows = []
    for name in names:
        runs = None if arguments.check_only else arguments.runs
        row = measure.one(WORKLOADS[name], implementation, seed, runs, peers=not arguments.no_peers)
        row.peers |= others.get(name, {})
        rows.append(row)
        print(report.line(row, ceilings), flush=True)
        if arguments.output:
            # After each: a run that is killed keeps what it had.
            found = json.dumps(report.as_json(head, ceilings, rows), indent=1)
            pathlib.Path(arguments.output).write_text(found + "\n")
        if arguments.sweep and row.right and ceilings:
            measure.sweep(WORKLOADS[name], implementation, seed, arguments.runs)
    if ceilings:
        print(report.table(rows, ceilings))
    if arguments.plot and ceilings:
        report.plot(rows, ceilings, head, arguments.plot)
    return 0 if all(row.right for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
