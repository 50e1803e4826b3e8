"""Measures the way from a shell command to the first token, with a cold and with a warm compilation cache."""

if __name__ == "__main__":
    from gdnjax.cli import interrupt

    interrupt.expected()

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from gdnjax.assets import EMBEDDED_MODEL, model_directory
from gdnjax.cli.command import check_writable, exit_status, prepare_environment, run_as_process, write_json
from gdnjax.config.quantization import GRIDS

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

--loading N measures the weights alone, in one process: N times with the checkpoint's files out of the page cache
(posix_fadvise, which needs no rights), so that they come from the disk, and N times with them in it. Its parts:

  names        names, shapes and dtypes of all tensors, and where each parameter lies in them
  weights      from the checkpoint to the devices; and of both, how many GiB of the files a second
"""

EXAMPLES = """\
examples:
  python scripts/bench_start.py                                the embedded model, of 8 layers
  python scripts/bench_start.py --layers 24                    a random one with as many layers as a small real model
  python scripts/bench_start.py --config qwen3.5-9b            random weights of a published model's sizes (writes them)
  python scripts/bench_start.py --config qwen3.5-9b --layers 4 --warm-runs 1 --limit-s 300    a part of it
  python scripts/bench_start.py --model Qwen3.5-4B --json start.json
  python scripts/bench_start.py --model Qwen3.5-4B -- --dtype bfloat16 --temp 0    more flags for generate.py
  python scripts/bench_start.py --config qwen3.5-0.8b --quantization fp8 --loading 3    from disk, and from memory

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
    parser.add_argument("--quantization", choices=tuple(GRIDS), help="store the random weights so")
    parser.add_argument("--loading", type=int, metavar="N", help="load the weights alone, N times from disk and memory")
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
    sizes = (arguments.layers, arguments.config, arguments.quantization)
    if arguments.model is not None and any(size is not None for size in sizes):
        parser.error("--config, --layers and --quantization make a checkpoint; leave them or --model out")
    if arguments.loading is not None and arguments.loading < 1:
        parser.error("--loading must be at least 1")
    if arguments.loading is not None and arguments.flags:
        parser.error("--loading runs no generate.py; leave it or its flags out")
    return exit_status("bench_start.py", lambda: measure(arguments))


def measure(arguments: argparse.Namespace) -> int:
    """Everything between the arguments and the exit status."""
    check_writable("--json", arguments.json)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            model = checkpoint_of(arguments, pathlib.Path(scratch))
            if arguments.loading is not None:
                loads = bench_loading(model_directory(model), arguments.loading)
                if arguments.json:
                    write_json(arguments.json, loads)
                print(loading_table(loads))
                return 0
            runs = bench(arguments, model, pathlib.Path(scratch))
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


def checkpoint_of(arguments: argparse.Namespace, scratch: pathlib.Path) -> str:
    """The model to start: the one given, or random weights, which are written first."""
    sizes = {name: getattr(arguments, name) for name in ("config", "layers", "quantization")}
    flags = [part for name, size in sizes.items() if size is not None for part in (f"--{name}", str(size))]
    if not flags:
        return arguments.model or EMBEDDED_MODEL
    model = str(scratch / "model")
    seconds = run("make_random_checkpoint.py", [model, *flags], {}, arguments.limit_s)
    print(f"random weights written in {seconds:.1f} s", file=sys.stderr, flush=True)
    return model


def bench_loading(directory: pathlib.Path, times: int) -> dict[str, Any]:
    """Seconds of each load, by whether the page cache had the files."""
    prepare_environment()
    from gdnjax.checkpoint.sources import ORBAX_FOLDER

    orbax = (file for file in (directory / ORBAX_FOLDER).rglob("*") if file.is_file())
    files = [*directory.glob("*.safetensors"), *orbax]
    found: dict[str, Any] = {"loads": []}
    for cold in [True] * times + [False] * times:
        if cold:
            drop_pages(files)
        found["loads"].append({"pages": "cold" if cold else "warm", **load(directory, found)})
        told = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in list(found["loads"][-1].items())[1:])
        print(f"pages {found['loads'][-1]['pages']}: {told}", file=sys.stderr, flush=True)
    return found | {"files_bytes": sum(file.stat().st_size for file in files)}


def drop_pages(files: Sequence[pathlib.Path]) -> None:
    """Has the operating system forget what it holds of files in memory. Nobody may have them mapped."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            # What is not on the disk yet would stay.
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def load(directory: pathlib.Path, about: dict[str, Any]) -> dict[str, float]:
    """Loads a checkpoint once: seconds of each part. What was loaded is told to `about`."""
    from gdnjax import ModelConfig, abstract_params, checkpoint, sharding

    config = ModelConfig.from_hf(directory)
    abstract = abstract_params(config, 1, config.dtype)
    began = time.monotonic()
    with checkpoint.opened(directory, config, abstract, sharding.make_mesh(1)) as stored:
        coded = checkpoint.coded_formats(stored, "auto")
        opened = time.monotonic()
        abstract = abstract_params(config, 1, config.dtype, coded=coded)
        prepared = time.monotonic()
        _, report = checkpoint.load_params(stored, abstract, progress=False)
    about["parameter_bytes"], about["codes"] = report.parameter_bytes, len(coded)
    return {"names": opened - began, "weights": time.monotonic() - prepared}


def loading_table(loads: dict[str, Any]) -> str:
    """The median of each part, from the disk and from memory."""
    size, parameters = (loads[key] / (1 << 30) for key in ("files_bytes", "parameter_bytes"))
    lines = [
        f"{os.cpu_count()} CPU cores, {size:.2f} GiB of files, {parameters:.2f} GiB of parameters, {loads['codes']} of "
        "them codes",
        f"{'':<8}    from disk    from memory",
    ]
    middle = {
        (name, pages): statistics.median(one[name] for one in loads["loads"] if one["pages"] == pages)
        for name in ("names", "weights")
        for pages in ("cold", "warm")
    }
    for name in ("names", "weights"):
        lines.append(f"{name:<8}  {middle[name, 'cold']:9.3f} s  {middle[name, 'warm']:11.3f} s")
    rates = [size / (middle["names", pages] + middle["weights", pages]) for pages in ("cold", "warm")]
    lines.append(f"{'':<8}  {rates[0]:5.2f} GiB/s    {rates[1]:5.2f} GiB/s")
    return "\n".join(lines)


def bench(arguments: argparse.Namespace, model: str, scratch: pathlib.Path) -> list[dict[str, Any]]:
    """The numbers of each run: the cold one, then the warm ones."""
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
