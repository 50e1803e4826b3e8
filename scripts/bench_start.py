"""Measures the way from a shell command to the first token, with a cold and with a warm compilation cache."""

if __name__ == "__main__":
    from gdnjax.cli import interrupt

    interrupt.expected()

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from gdnjax.assets import EMBEDDED_MODEL
from gdnjax.cli.command import check_writable, exit_status, run_as_process, write_json

DESCRIPTION = """\
Runs scripts/generate.py in fresh processes and prints where the time until the first token goes:

  import       jax and gdnjax
  devices      the platform's own start
  tokenizer    configuration and tokenizer, with the import of transformers
  weights      from the checkpoint to the devices, and how many GiB of parameters a second
  pools        the plan of the memory, and the rest of building an engine
  trace        JAX's stages of everything that is compiled between import and first token: functions to jaxprs,
  lowering     those to StableHLO, kernels with them,
  xla          that to programs, or programs from the persistent cache
  rehearsal    the rest of the short request that compiles the steps: running them
  first token  of the prompt itself, once everything is compiled
  sum          of these
  process      the whole command by the clock, with the start and the end of the interpreter

"cold" is the first run, with an empty compilation cache; "warm" is the best of those after it. Weights come from where
the operating system has them: a checkpoint that was written or read just now, from memory.
"""

EXAMPLES = """\
examples:
  python scripts/bench_start.py                                the embedded model, of 8 layers
  python scripts/bench_start.py --layers 24                    a random one with as many layers as a small real model
  python scripts/bench_start.py --config qwen3.5-9b            random weights of a published model's sizes (writes them)
  python scripts/bench_start.py --config qwen3.5-9b --layers 4 --warm-runs 1 --limit-s 300    a part of it
  python scripts/bench_start.py --model Qwen3.5-4B --json start.json
  python scripts/bench_start.py --model Qwen3.5-4B -- --dtype bfloat16 --temp 0    more flags for generate.py

Exit status: 0 done, 2 a run failed or took longer than --limit-s (the reason is on stderr).
"""

SCRIPTS = pathlib.Path(__file__).resolve().parent

STAGES = ("import", "devices", "tokenizer", "weights", "pools", "trace", "lowering", "xla", "rehearsal")

PHASES: dict[str, Callable[[dict[str, Any]], float]] = {
    **{stage: lambda stats, stage=stage: stats["stages"].get(stage, 0.0) for stage in STAGES},
    "first token": lambda stats: stats["time_to_first_token"],
    "sum": lambda stats: sum(stats["stages"].values()) + stats["time_to_first_token"],
    "process": lambda stats: stats["process_time"],
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="DIR", help="a checkpoint (default: the embedded model)")
    parser.add_argument("--config", metavar="NAME|PATH", help="in its place, random weights of a preset's sizes")
    parser.add_argument("--layers", type=int, metavar="N", help="so many layers of --config, or else of a tiny one")
    parser.add_argument("--prompt-words", type=int, default=20, help="length of the prompt (default: %(default)s)")
    parser.add_argument("--warm-runs", type=int, default=3, help="runs with a warm cache (default: %(default)s)")
    parser.add_argument(
        "--limit-s", type=float, default=900.0, metavar="S", help="longest time of one process (default: %(default)g)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write all numbers there")
    parser.add_argument("flags", nargs="*", help="flags for generate.py, after --")
    arguments = parser.parse_args(argv)
    if arguments.warm_runs < 1 or arguments.prompt_words < 1:
        parser.error("--warm-runs and --prompt-words must be at least 1")
    if arguments.limit_s <= 0:
        parser.error("--limit-s must be above 0")
    if arguments.model is not None and (arguments.layers is not None or arguments.config is not None):
        parser.error("--config and --layers make a checkpoint of their own; leave them or --model out")
    return exit_status("bench_start.py", lambda: measure(arguments))


def measure(arguments: argparse.Namespace) -> int:
    """Everything between the arguments and the exit status."""
    check_writable("--json", arguments.json)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            runs = bench(arguments, pathlib.Path(scratch))
    except subprocess.CalledProcessError as error:
        print(f"bench_start.py: error: {error.cmd[1]} failed:\n{error.stderr}", file=sys.stderr)
        return 2
    except subprocess.TimeoutExpired as error:
        print(
            f"bench_start.py: error: {error.cmd[1]} had not ended after {error.timeout:g} s and was ended; "
            "--limit-s allows more",
            file=sys.stderr,
        )
        return 2
    if arguments.json:
        write_json(arguments.json, runs)
    print(table(runs))
    return 0


def bench(arguments: argparse.Namespace, scratch: pathlib.Path) -> list[dict[str, Any]]:
    """The numbers of each run: the cold one, then the warm ones."""
    model = arguments.model or EMBEDDED_MODEL
    if arguments.layers is not None or arguments.config is not None:
        model = str(scratch / "model")
        sizes = [] if arguments.config is None else ["--config", arguments.config]
        sizes += [] if arguments.layers is None else ["--layers", str(arguments.layers)]
        seconds = run("make_random_checkpoint.py", [model, *sizes], {}, arguments.limit_s)
        print(f"random weights written in {seconds:.1f} s", file=sys.stderr, flush=True)
    prompt = " ".join(["word"] * arguments.prompt_words)
    stats_file = scratch / "stats.json"
    flags = ["--model", model, "-p", prompt, "--max-tokens", "2", "--stats-json", str(stats_file), *arguments.flags]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(scratch / "cache"),
        # As the engine sets it for its own cache; JAX's default of a second leaves the small steps out.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    runs = []
    for number in range(1 + arguments.warm_runs):
        process_time = run("generate.py", flags, cache, arguments.limit_s)
        runs.append({**json.loads(stats_file.read_text()), "process_time": process_time})
        print(f"{'warm' if number else 'cold'} run: {process_time:.1f} s", file=sys.stderr, flush=True)
    return runs


def run(script: str, flags: list[str], environment: dict[str, str], limit: float) -> float:
    """Seconds that a script of this directory took. Raises subprocess's errors if it fails or takes over `limit`."""
    began = time.monotonic()
    subprocess.run(
        [sys.executable, str(SCRIPTS / script), *flags],
        env=os.environ | environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=limit,
    )
    return time.monotonic() - began


def table(runs: list[dict[str, Any]]) -> str:
    """Seconds of each part: of the first run, and of the quickest of the others."""
    cold, warm = runs[0], min(runs[1:], key=PHASES["sum"])
    prompt_tokens = int(cold["prompt_tokens"])
    lines = [f"seconds, {os.cpu_count()} CPU cores, a prompt of {prompt_tokens} tokens", f"{'':<12}    cold    warm"]
    for name, phase in PHASES.items():
        line = f"{name:<12}  {phase(cold):6.2f}  {phase(warm):6.2f}"
        if name == "weights":
            rates = " and ".join(f"{stats['weights_rate']:.2f}" for stats in (cold, warm))
            line += f"   {cold['weights_bytes'] / (1 << 30):.2f} GiB, at {rates} GiB/s"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    run_as_process(main)
