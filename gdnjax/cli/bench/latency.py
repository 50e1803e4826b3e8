"""`gdnjax bench latency`: seconds to the first token, and milliseconds of a decode step, without a server."""

import argparse
import dataclasses

from gdnjax.cli.bench.offline.flags import add_engine_flags, add_model_flags, add_size_flags, given_sizes, is_embedded
from gdnjax.cli.bench.offline.run import Kind, run
from gdnjax.cli.bench.offline.sizes import Sizes
from gdnjax.cli.command import command_parser, exit_status

DESCRIPTION = """\
Has batches of requests of random tokens decode together, each of them a little further, and prints milliseconds a
step, which is what one token takes, and tokens a second. Then it prefills prompts of the same length, several and one
alone, and prints tokens a second and seconds to the first token. Each is a median. Steps are compiled, and run once,
before the clock starts.

Latencies under load, by percentiles: gdnjax bench serve. Of random weights in any published size: gdnjax bench engine,
whose sections decode and prefill these are.
"""

EXAMPLES = """\
examples:
  {command}                                                     the embedded model, for a look
  {command} --model Qwen3.5-4B --batches 8,1 --input-len 512
  {command} --random-weights qwen3.5-9b --output result.json    a published size without its weights

{processes}
Exit status: 0 done, 2 an error, 3 another process is gone; 130 interrupted.
"""

SECTIONS = ("decode", "prefill")

PROMPTS = 8
"""Prompts that are prefilled together, at most."""

DEFAULT = Sizes()
SMALL = Sizes(batches=(8, 1), input_len=256, batched_tokens=512)
"""Of the embedded model, which is there to try things out: seconds on a CPU."""

SIZES = ("batches", "input_len", "max_num_batched_tokens", "repeat")


def main(argv: list[str] | None = None, command: str = "gdnjax bench latency") -> int:
    """Runs the command line and returns the exit status. `command` is what it is called in messages."""
    arguments = build_parser(command).parse_args(argv)
    kind = Kind(
        name=command,
        sizes=choose_sizes,
        made_for=SECTIONS,
        lower="--batches, --input-len or --max-num-batched-tokens",
        shorter="--input-len",
        on_cpu="--batches 8,1 --input-len 256",
    )
    return exit_status(command, lambda: run(arguments, kind))


def build_parser(command: str = "gdnjax bench latency") -> argparse.ArgumentParser:
    """The command line, for who calls it `command`. Imports no jax: --help and mistakes answer at once."""
    parser = command_parser(command, DESCRIPTION, EXAMPLES)
    parser.set_defaults(sections=list(SECTIONS))
    add = parser.add_argument
    add_model_flags(add)
    add_size_flags(add, DEFAULT, SIZES, SMALL)
    add_engine_flags(add)
    return parser


def choose_sizes(arguments: argparse.Namespace) -> Sizes:
    """What is given, and the defaults of the model. Raises ValueError for a size that is none."""
    sizes = dataclasses.replace(SMALL if is_embedded(arguments) else DEFAULT, **given_sizes(arguments, SIZES))
    return dataclasses.replace(sizes, prefill_len=sizes.input_len, prefill_requests=min(PROMPTS, sizes.rows))
