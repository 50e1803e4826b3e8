"""Times the sums over devices that a step of a sharded model makes, by several ways to make them."""

if __name__ == "__main__":
    from gdnjax.cli import interrupt

    interrupt.expected()

import argparse
import re
import statistics
import tempfile
import time
from typing import Any

import profile_step

from gdnjax.cli.command import check_writable, exit_status, prepare_environment, run_as_process, write_json

DESCRIPTION = """\
Sums rows of bfloat16 over devices, many times in one compiled function, each time what the sum before it gave times a
number of the device's own. Values are checked first against float64. Then it prints, for each number of rows and each
way, microseconds a sum: by the clock, the multiplication and the launches included, and by the profiler, what the
collectives' kernels took on a device.

  psum            as a step makes it; XLA chooses by size between kernels of its own and NCCL's
  scatter-gather  psum_scatter, and all_gather of its parts

XLA's own kernels can be switched off beforehand: XLA_FLAGS=--xla_gpu_unsupported_use_all_reduce_one_shot_kernel=false.
"""

EXAMPLES = """\
examples:
  python scripts/bench_collectives.py --tensor-parallel-size 4
  python scripts/bench_collectives.py --tensor-parallel-size 2 --width 5120 --rows 1,16,128,512 --json sums.json
  JAX_NUM_CPU_DEVICES=2 python scripts/bench_collectives.py --tensor-parallel-size 2 --width 64 --rows 1,8 --sums 4

Exit status: 0 done, 1 wrong sums, 2 an error.
"""

ROWS = (1, 4, 16, 64, 128, 512)
# How the names of kernels begin that sum or gather: XLA's own, called as in JAX, and NCCL's.
COLLECTIVES = ("psum", "all-", "all_", "reduce-scatter", "reduce_scatter", "ncclDevKernel")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=2, metavar="N", help="devices (default: %(default)s)"
    )
    parser.add_argument("--width", type=int, default=4096, help="of a row (default: %(default)s)")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="numbers of them (default: %(default)s)")
    parser.add_argument("--sums", type=int, default=64, help="one behind the other (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=20, help="timed of each (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the figures here, too")
    arguments = parser.parse_args(argv)
    try:
        arguments.rows = [int(count) for count in arguments.rows.split(",")]
    except ValueError:
        parser.error(f"--rows is a list of integers like 1,16,128, got {arguments.rows!r}")
    ranks = arguments.tensor_parallel_size
    for name, least in (("tensor_parallel_size", 2), ("width", 1), ("sums", 1), ("runs", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(arguments, name)}")
    if min(arguments.rows) < 1:
        parser.error(f"--rows must be at least 1, got {min(arguments.rows)}")
    if arguments.width % ranks:
        parser.error(f"--width {arguments.width} is no multiple of --tensor-parallel-size {ranks}")
    return exit_status("bench_collectives.py", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    check_writable("--json", arguments.json)
    prepare_environment()
    import jax

    from gdnjax import sharding

    ranks = arguments.tensor_parallel_size
    mesh = sharding.make_mesh(ranks)
    device = mesh.devices.flat[0].device_kind
    print(f"{ranks} x {device}, jax {jax.__version__}, rows of {arguments.width} numbers in bfloat16", flush=True)
    print(f"{'way':16}{'rows':>6}{'kB':>9}{'clock, us':>12}{'device, us':>12}  kernel", flush=True)
    found = []
    for rows in arguments.rows:
        for way in ("psum", "scatter-gather"):
            one = measured(mesh, way, rows, arguments)
            if one is None:
                print(f"{way} of {rows} rows: wrong sums", flush=True)
                return 1
            found.append(one)
            on_device = "" if one["device_us"] is None else f"{one['device_us']:.1f}"
            size = rows * arguments.width * 2 / 1e3
            kernels = ", ".join(one["kernels"])
            print(f"{way:16}{rows:6}{size:9.0f}{one['clock_us']:12.1f}{on_device:>12}  {kernels}", flush=True)
    if arguments.json:
        write_json(
            arguments.json,
            {"device": device, "devices": ranks, "jax": jax.__version__, "width": arguments.width, "sums": found},
        )
    return 0


def measured(mesh: Any, way: str, rows: int, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Times of a sum of so many rows; None: its values are wrong."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from gdnjax import sharding

    ranks, width = arguments.tensor_parallel_size, arguments.width

    def summed(x):
        if way == "psum":
            return sharding.psum(x, ranks)
        part = lax.psum_scatter(x, sharding.AXIS, scatter_dimension=1, tiled=True)
        return sharding.all_gather(part, ranks, axis=1)

    def chain(x, scale, count):
        for _ in range(count):
            # By a number of the device's own: the sum of what all devices have alike would be no collective.
            x = summed(x) * scale[0]
        return x

    specs = P(None, sharding.AXIS), P(sharding.AXIS)
    functions = [
        jax.jit(sharding.shard_step(lambda x, s, n=n: chain(x, s, n), mesh, specs, specs[0]))
        for n in (1, arguments.sums)
    ]
    rng = np.random.default_rng(0)
    # Side by side along the second axis: [rows, width] of each device.
    parts = jnp.asarray(rng.standard_normal((rows, ranks * width)), jnp.bfloat16)
    x = jax.device_put(parts, NamedSharding(mesh, specs[0]))
    scale = jax.device_put(jnp.full((ranks,), 1 / ranks, jnp.bfloat16), NamedSharding(mesh, specs[1]))
    exact = np.asarray(parts, np.float64).reshape(rows, ranks, width).mean(axis=1)
    got = np.asarray(functions[0](x, scale), np.float64).reshape(rows, ranks, width)
    # Of `ranks` numbers of about one each addition rounds to 8 bits.
    if not np.allclose(got, exact[:, None], atol=2.0**-7 * ranks, rtol=0):
        return None
    function = functions[1]
    function(x, scale).block_until_ready()
    seconds = []
    for _ in range(arguments.runs):
        begin = time.perf_counter()
        function(x, scale).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    with tempfile.TemporaryDirectory() as scratch:
        with jax.profiler.trace(scratch):
            for _ in range(arguments.runs):
                function(x, scale).block_until_ready()
        kernels = profile_step.kernels_of(scratch)
    collectives = {name: took for name, (_, took) in kernels.items() if name.startswith(COLLECTIVES)}
    sums = arguments.sums * arguments.runs
    return {
        "way": way,
        "rows": rows,
        "clock_us": 1e6 * statistics.median(seconds) / arguments.sums,
        "device_us": 1e6 * sum(collectives.values()) / sums if collectives else None,
        "kernels": sorted({re.sub(r"[_.]?\d+.*|\(.*", "", name) for name in collectives}),
    }


if __name__ == "__main__":
    run_as_process(main)
