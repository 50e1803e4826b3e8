"""`gdnjax bench throughput`: output tokens a second of many requests at once, without a server."""

import argparse
import dataclasses

from gdnjax.cli.bench.offline.flags import add_engine_flags, add_model_flags, add_size_flags, given_sizes, is_embedded
from gdnjax.cli.bench.offline.run import Kind, run
from gdnjax.cli.bench.offline.sizes import Sizes
from gdnjax.cli.bench.serving.engines import decode_buckets
from gdnjax.cli.command import command_parser, exit_status

DESCRIPTION = """\
Serves requests of random tokens through LLM.generate, all of them there from the beginning, and prints output tokens a
second. All output tokens that are asked for are produced: EOS is ignored. No text is made of them. Steps are compiled,
and run once, before the clock starts.

Other workloads, arrivals, drafts and latencies: gdnjax bench serve. Of random weights in any published size: gdnjax
bench engine, whose section of this name it is.
"""

EXAMPLES = """\
examples:
  {command}                                                     the embedded model, for a look
  {command} --model Qwen3.5-4B --num-requests 256 --input-len 512 --output-len 128
  {command} --random-weights qwen3.5-9b --output result.json    a published size without its weights

{processes}
Exit status: 0 done, 2 an error, 3 another process is gone; 130 interrupted.
"""

ROWS = 128
"""Requests that run at once where nobody says."""

DEFAULT = Sizes()
SMALL = Sizes(requests=16, input_len=128, output_len=64, batched_tokens=512)
"""Of the embedded model, which is there to try things out: seconds on a CPU."""

SIZES = ("num_requests", "input_len", "output_len", "max_num_batched_tokens")


def main(argv: list[str] | None = None, command: str = "gdnjax bench throughput") -> int:
    """Runs the command line and returns the exit status. `command` is what it is called in messages."""
    arguments = build_parser(command).parse_args(argv)
    kind = Kind(
        name=command,
        sizes=choose_sizes,
        made_for=("throughput",),
        lower="--max-num-seqs, --input-len, --output-len or --max-num-batched-tokens",
        shorter="--input-len or --output-len",
        on_cpu="--num-requests 16 --input-len 128 --output-len 64",
    )
    return exit_status(command, lambda: run(arguments, kind))


def build_parser(command: str = "gdnjax bench throughput") -> argparse.ArgumentParser:
    """The command line, for who calls it `command`. Imports no jax: --help and mistakes answer at once."""
    parser = command_parser(command, DESCRIPTION, EXAMPLES)
    parser.set_defaults(sections=["throughput"])
    add = parser.add_argument
    add_model_flags(add)
    add_size_flags(add, DEFAULT, SIZES, SMALL)
    add("--max-num-seqs", type=int, metavar="N", help=f"requests that run at once (default: all, at most {ROWS})")
    add_engine_flags(add)
    return parser


def choose_sizes(arguments: argparse.Namespace) -> Sizes:
    """What is given, and the defaults of the model. Raises ValueError for a size that is none."""
    sizes = dataclasses.replace(SMALL if is_embedded(arguments) else DEFAULT, **given_sizes(arguments, SIZES))
    rows = arguments.max_num_seqs
    if rows is None:
        rows = min(ROWS, sizes.requests)
    if rows < 1:
        raise ValueError(f"--max-num-seqs must be at least 1, got {rows}")
    # Those that begin together end together: buckets of fewer are for the last of more.
    return dataclasses.replace(sizes, batches=decode_buckets(rows) if sizes.requests > rows else (rows,))
