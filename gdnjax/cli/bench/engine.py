"""`gdnjax bench engine`: all figures of an engine, from few compilations; those that docs/benchmarks.md quotes."""

import argparse
import dataclasses

from gdnjax.cli.bench.offline.flags import add_engine_flags, add_size_flags, given_sizes
from gdnjax.cli.bench.offline.run import Kind, run
from gdnjax.cli.bench.offline.sizes import Sizes
from gdnjax.cli.command import command_parser, exit_status
from gdnjax.config import DRAFT_HEADS

DESCRIPTION = """\
Makes a model of random weights once, and at most two engines of it, one after the other: without drafts, and with
them. Each section measures one thing, prints a line for every figure as soon as it is there, and has the JSON file
rewritten: a run that is killed keeps what it had. A section that fails is noted, and those after it go on.

Sections:
  decode       batches of --input-len tokens, each a little further: ms a step, tokens/s. Steps are dispatched ahead
  prefill      long prompts: tokens/s of several, seconds to the first token of one alone
  throughput   many requests in and out through LLM.generate: output tokens/s
  accounting   the same in a packed pool, where every block carries a state, that holds half of the requests, against
               the decoupled pool of the same bytes. What is emulated is its scheduling, as by gdnjax bench serve
  prefix       requests that share a long prefix, with the prefix cache and without, from an empty one
  balance      of a model with experts: how evenly its routers send tokens to experts, and to the ranks that hold them
               (busiest over mean). Of random weights and tokens; gdnjax.routing measures any others
  speculation  decode with drafts, against none. Of random weights drafts are random, so the tokens of a step are
               forced: the outputs are not the model's

Steps are compiled, and run once, before they are timed; how long that took is among the figures.
"""

EXAMPLES = """\
examples:
  {command} --output engine.json                        everything
  {command} decode speculation --batches 64,1           some
  {command} decode --batches 128 --padded 9             what rows of padding cost
  {command} --config qwen3.5-397b-a17b --quantization fp8 --tensor-parallel-size 4 --enable-expert-parallel
  {command} --config tiny --scale 0.03                  a look on a CPU

{processes}
Exit status: 0 done, 2 an error, or a section that failed, 3 another process is gone; 130 interrupted.
"""

SIZES = ("batches", "padded", "input_len", "output_len", "max_num_batched_tokens", "checkpoints")


def main(argv: list[str] | None = None, command: str = "gdnjax bench engine") -> int:
    """Runs the command line and returns the exit status. `command` is what it is called in messages."""
    arguments = build_parser(command).parse_args(argv)
    name = command.rpartition("/")[2]
    kind = Kind(
        name=name,
        sizes=choose_sizes,
        lower="--batches, --output-len, --max-num-batched-tokens, --checkpoints or --scale",
        shorter="--scale",
        on_cpu="--config tiny --scale 0.03",
    )
    return exit_status(name, lambda: run(arguments, kind))


def build_parser(command: str = "gdnjax bench engine") -> argparse.ArgumentParser:
    """The command line, for who calls it `command`. Imports no jax: --help and mistakes answer at once."""
    parser = command_parser(command, DESCRIPTION, EXAMPLES)
    # Of a checkpoint nothing is read.
    parser.set_defaults(model=None, dtype="auto")
    add = parser.add_argument
    add("sections", nargs="*", metavar="SECTION", help="what to measure (default: everything)")
    add("--config", default="qwen3.5-9b", help="a preset, or a config.json (default: %(default)s)")
    add("--layers", type=int, metavar="N", help="of the model; fewer than it has for a quick look")
    add_size_flags(add, Sizes(), SIZES)
    add("--scale", type=float, metavar="F", help="all numbers of requests and tokens that are not given, times that")
    add("--num-speculative-tokens", type=int, default=3, metavar="K", help="drafts a step (default: %(default)s)")
    add(
        "--acceptance-length", type=float, default=3.49, metavar="L", help="forced tokens a step (default: %(default)s)"
    )
    add(
        "--draft-head",
        choices=DRAFT_HEADS,
        default="target",
        help="what drafts are drawn by: the target's head, or a copy of it in float8 (default: %(default)s)",
    )
    add(
        "--quantization",
        choices=("fp8", "fp8_per_channel"),
        help="random weights of eight bits: in blocks of 128 x 128, or with a scale for each output (default: none)",
    )
    add_engine_flags(add)
    return parser


def choose_sizes(arguments: argparse.Namespace) -> Sizes:
    """The sizes, those that were given as they are, the others by --scale. Raises ValueError for one that is none."""
    sizes = Sizes()
    if arguments.scale is not None:
        sizes = sizes.scaled(arguments.scale)
    return dataclasses.replace(sizes, **given_sizes(arguments, SIZES))
