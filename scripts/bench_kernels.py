"""Checks and times every kernel at the sizes of the published models, beside its ceiling and its peers."""

if __name__ == "__main__":
    from gdnjax.cli import interrupt

    interrupt.expected()

import argparse
import dataclasses
import fnmatch
import os
import time
from concurrent.futures import ThreadPoolExecutor

from gdnjax.cli.command import exit_status, prepare_environment, run_as_process, write_json

DESCRIPTION = """\
For each named workload: random inputs, the kernel's values against float64 (outputs poisoned with NaN before), then
its time, what it achieves in bytes/s and FLOP/s, and the share of the ceiling that was measured in the same run: of a
copy for what moves bytes, of a large matrix product for what computes. Values are checked first; a workload whose
values are wrong is not timed, and the exit status is 1.

Many calls are timed in one compiled function, each of which needs what the one before it gave. That function is
counted: with fewer kernels than as many calls have by themselves there is no time. Nor is there one where it would
need more bytes a second than the device reads, or more operations than a large product has, by over 5%. Both are said
to be faults of the measurement, and the exit status is 1.

Peers stand beside it where they are installed: flash-linear-attention (with PyTorch, in a process of its own on the
same GPU), jax's own paged attention, XLA's products and `lax.ragged_dot`, cuDNN's attention through jax.nn. One that
wants more memory than the device has is left out.
"""

EXAMPLES = """\
examples:
  python scripts/bench_kernels.py                                everything
  python scripts/bench_kernels.py 'gdn-decode-*' 'conv-*'        some
  python scripts/bench_kernels.py --no-peers --output kernels.json --plot roofline.png
  python scripts/bench_kernels.py --sweep 'gdn-prefill-48h-*'    other tiles, and the best as a row of the table
  python scripts/bench_kernels.py --kernels triton gdn-decode-48h-128         the decode step in Triton, by jax_triton
  python scripts/bench_kernels.py --list

Exit status: 0 done, 1 wrong values or a fault of the measurement, 2 an error, 3 --limit-s left workloads out, 130
interrupted, 143 terminated.
"""

LIMIT_S = 540.0
TOGETHER = 8
"""Workloads that are compiled side by side."""
OUT_OF_TIME = 3


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=["*"], help="patterns of workloads (default: all)")
    kernels = "auto, pallas, reference, interpret, or triton, of gdn-decode-* alone (default: %(default)s)"
    parser.add_argument("--kernels", default="auto", help=kernels)
    parser.add_argument("--runs", type=int, default=12, help="timed runs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of the inputs (default: fresh ones)")
    parser.add_argument("--no-peers", action="store_true", help="leave other implementations out")
    parser.add_argument("--check-only", action="store_true", help="values, no times")
    parser.add_argument("--sweep", action="store_true", help="time other tiles, too, and print the best")
    parser.add_argument(
        "--limit-s",
        type=float,
        default=LIMIT_S,
        metavar="S",
        help="seconds after which no workload is begun; inf for none (default: %(default)g)",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="also write all figures there, as JSON, anew after each workload"
    )
    parser.add_argument("--plot", metavar="FILE", help="also draw a roofline there, as PNG")
    parser.add_argument("--list", action="store_true", help="the names of the workloads, and no more")
    arguments = parser.parse_args(argv)
    if arguments.runs < 1:
        parser.error("--runs must be at least 1")
    if not arguments.limit_s > 0:
        parser.error("--limit-s must be above 0")
    if arguments.kernels == "triton" and arguments.sweep:
        parser.error("--sweep changes the tiles of the kernels in Pallas")
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

    began = time.monotonic()
    deadline = began + arguments.limit_s
    device = jax.devices()[0]
    implementation = implementation_of(arguments.kernels, device)
    seed = time.time_ns() % 2**31 if arguments.seed is None else arguments.seed
    head = {"device": device.device_kind, "jax": jax.__version__, "kernels": dataclasses.asdict(implementation)}
    print(f"{device.device_kind}, jax {jax.__version__}, kernels {implementation.kernels}, seed {seed}", flush=True)
    timed = not arguments.check_only
    peers = timed and not arguments.no_peers
    # At most a third of the time is for others.
    others = measure.torch_peers(names, arguments.runs, arguments.limit_s / 3) if peers else {}
    ceilings = None
    if timed:
        ceilings = timing.ceilings(implementation, small=device.platform == "cpu")
        print(
            f"copy {ceilings.copy / 1e12:.2f} TB/s, read {ceilings.read / 1e12:.2f} TB/s, "
            f"matmul {ceilings.matmul / 1e12:.0f} TFLOP/s ({time.monotonic() - began:.0f} s)",
            flush=True,
        )
    bytes_limit = (device.memory_stats() or {}).get("bytes_limit")
    rows: list[measure.Row] = []

    def write() -> None:
        if arguments.output:
            write_json(arguments.output, report.as_json(head, ceilings, rows, names[len(rows) :]), indent=1)

    write()
    longest = 0.0
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for part in (names[i : i + TOGETHER] for i in range(0, len(names), TOGETHER)):
            # What is compiled is to be measured, too.
            if time.monotonic() + longest > deadline:
                break
            start = time.monotonic()
            prepared = [
                measure.Prepared(WORKLOADS[name], implementation, pool, ceilings, peers=peers, bytes_limit=bytes_limit)
                for name in part
            ]
            traced = time.monotonic()
            for one in prepared:
                one.wait()
            longest = max(longest, time.monotonic() - start)
            compiled = (
                f"{traced - start:.1f} s of tracing, then {time.monotonic() - traced:.1f} s until all was compiled"
            )
            print(f"[{time.monotonic() - began:.0f} s] {len(part)} workloads: {compiled}", flush=True)
            for one in prepared:
                if time.monotonic() > deadline:
                    break
                row = one.measure(seed, arguments.runs if timed else None)
                for name, figures in others.get(row.name, {}).items():
                    if ceilings:
                        row.add_peer(name, figures, ceilings)
                rows.append(row)
                print(report.line(row, ceilings), flush=True)
                # After each: a run that is killed keeps what it had.
                write()
                if arguments.sweep and row.right and ceilings:
                    measure.sweep(WORKLOADS[row.name], implementation, seed, arguments.runs, ceilings, pool, deadline)
    if ceilings:
        print(report.table(rows, ceilings))
    if arguments.plot and ceilings:
        report.plot(rows, ceilings, head, arguments.plot)
    faults = [row.name for row in rows if not row.is_as_it_should_be]
    if faults:
        print(f"not as it should be: {', '.join(faults)}", flush=True)
    left = names[len(rows) :]
    if left:
        print(f"not run within --limit-s {arguments.limit_s:g}: {', '.join(left)}", flush=True)
    print(f"{len(rows)} of {len(names)} workloads in {time.monotonic() - began:.0f} s", flush=True)
    return 1 if faults else OUT_OF_TIME if left else 0


def implementation_of(kernels: str, device):
    """The Backend; "triton" among them, which no engine has. Raises ValueError for what the device cannot run."""
    from gdnjax import backend

    if kernels != "triton":
        return backend.of_device(kernels, device)
    if backend.platform_of(device) not in backend.PALLAS_PLATFORMS:
        raise ValueError(f"--kernels triton on {device.platform}: the kernel is compiled for ROCm and CUDA")
    return dataclasses.replace(backend.of_device("pallas", device), kernels=kernels)


if __name__ == "__main__":
    run_as_process(main)
