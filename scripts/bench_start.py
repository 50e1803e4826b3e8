"""Measures the way from a shell command to the first token, with a cold and with a warm compilation cache."""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from gdnjax.assets import EMBEDDED_MODEL

DESCRIPTION = """\
Runs scripts/generate.py in fresh processes and prints where the time until the first token goes:

  import       jax and gdnjax
  load         configuration, tokenizer (with the import of transformers), weights, pools
  compile      the steps that the prompt needs, by one short request
  first token  of the prompt itself, once everything is compiled
  process      the whole command by the clock, with the start and the end of the interpreter

"cold" is the first run, with an empty compilation cache; "warm" is the best of those after it.
"""

EXAMPLES = """\
examples:
  python scripts/bench_start.py                                the embedded model, of 8 layers
  python scripts/bench_start.py --layers 24                    a random one with as many layers as a small real model
  python scripts/bench_start.py --model Qwen3.5-4B --json start.json
  python scripts/bench_start.py --model Qwen3.5-4B -- --dtype bfloat16 --temp 0    more flags for generate.py

Exit status: 0 done, 2 a run failed (its error is on stderr).
"""

SCRIPTS = pathlib.Path(__file__).resolve().parent

PHASES: dict[str, Callable[[dict[str, float]], float]] = {
    "import": lambda stats: stats["import_time"],
    "load": lambda stats: stats["load_time"],
    "compile": lambda stats: stats["compile_time"],
    "first token": lambda stats: stats["time_to_first_token"],
    "sum": lambda stats: (
        sum(stats[f"{part}_time"] for part in ("import", "load", "compile")) + stats["time_to_first_token"]
    ),
    "process": lambda stats: stats["process_time"],
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="DIR", help="a checkpoint (default: the embedded model)")
    parser.add_argument("--layers", type=int, metavar="N", help="in its place, one of N layers with random weights")
    parser.add_argument("--prompt-words", type=int, default=20, help="length of the prompt (default: %(default)s)")
    parser.add_argument("--warm-runs", type=int, default=3, help="runs with a warm cache (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write all numbers there")
    parser.add_argument("flags", nargs="*", help="flags for generate.py, after --")
    arguments = parser.parse_args(argv)
    if arguments.warm_runs < 1 or arguments.prompt_words < 1:
        parser.error("--warm-runs and --prompt-words must be at least 1")
    if arguments.model is not None and arguments.layers is not None:
        parser.error("--layers makes a checkpoint of its own; leave it or --model out")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            runs = bench(arguments, pathlib.Path(scratch))
        if arguments.json:
            pathlib.Path(arguments.json).write_text(json.dumps(runs, indent=2) + "\n")
    except OSError as error:
        print(f"bench_start.py: error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"bench_start.py: error: {error.cmd[1]} failed:\n{error.stderr}", file=sys.stderr)
        return 2
    print(table(runs))
    return 0


def bench(arguments: argparse.Namespace, scratch: pathlib.Path) -> list[dict[str, float]]:
    """The numbers of each run: the cold one, then the warm ones."""
    model = arguments.model or EMBEDDED_MODEL
    if arguments.layers is not None:
        model = str(scratch / "model")
        run("make_random_checkpoint.py", [model, "--layers", str(arguments.layers)], {})
    prompt = " ".join(["word"] * arguments.prompt_words)
    stats_file = scratch / "stats.json"
    flags = ["--model", model, "-p", prompt, "--max-tokens", "2", "--stats-json", str(stats_file), *arguments.flags]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(scratch / "cache"),
        # As the engine sets it for its own cache; JAX's default of a second leaves the small steps out.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    runs = []
    for _ in range(1 + arguments.warm_runs):
        process_time = run("generate.py", flags, cache)
        runs.append({**json.loads(stats_file.read_text()), "process_time": process_time})
    return runs


def run(script: str, flags: list[str], environment: dict[str, str]) -> float:
    """Seconds that a script of this directory took."""
    began = time.monotonic()
    subprocess.run(
        [sys.executable, str(SCRIPTS / script), *flags],
        env=os.environ | environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return time.monotonic() - began


def table(runs: list[dict[str, float]]) -> str:
    """Seconds of each phase: of the first run, and of the quickest of the others."""
    cold, warm = runs[0], min(runs[1:], key=PHASES["sum"])
    prompt_tokens = int(cold["prompt_tokens"])
    lines = [f"seconds, {os.cpu_count()} CPU cores, a prompt of {prompt_tokens} tokens", f"{'':<12}    cold    warm"]
    lines += [f"{name:<12}  {phase(cold):6.2f}  {phase(warm):6.2f}" for name, phase in PHASES.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
