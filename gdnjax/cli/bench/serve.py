"""`gdnjax bench serve`: throughput and latencies of a workload, without a server or through one, and what a setting
changes.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import math
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gdnjax.assets import EMBEDDED_MODEL, config_file, model_directory
from gdnjax.cli.bench.serving import engines, workloads
from gdnjax.cli.bench.serving.engines import Arm, Loaded, Sizes
from gdnjax.cli.bench.serving.workloads import Conversation, Spec
from gdnjax.cli.command import (
    add_device_flags,
    add_host_cache_flag,
    add_process_flags,
    add_speculation_flags,
    command_parser,
    devices,
    exit_status,
    over_processes,
    prepare_environment,
    speculation,
)
from gdnjax.config import DTYPES, KERNELS, KV_CACHE_DTYPES, STATE_LAYOUTS, ModelConfig
from gdnjax.memory import StateGeometry
from gdnjax.version import __version__

if TYPE_CHECKING:
    from gdnjax.cli.bench.serving.measurement import Plan
    from gdnjax.cli.bench.serving.report import ClosedForm

DESCRIPTION = """\
Serves a workload as fast as it can, or at a rate of arrivals, and prints throughput, the time to the first token
(TTFT), the time per output token after it (TPOT) and the latencies between tokens (ITL). Times count from when a
request was due. Steps are compiled, and one request is served, before the clock starts. All output tokens that are
asked for are produced: EOS is ignored.

Workloads:
  random         prompts of random tokens
  shared-prefix  the same with one of a few long prefixes
  multi-turn     conversations: each prompt is all before it and a few tokens more, sent when the reply is complete
  FILE           JSON Lines of {"prompt": "text"} or {"prompt_token_ids": [...]}, with "max_tokens" and "arrival" (in
                 seconds) where wanted; {"turns": [...]} of such is a conversation

Tokens that one step brings are one to ITL: with speculation it is the time between steps, and TPOT that of a token.

Comparisons run settings by turns on one workload, and print what the second is of the first:
  --compare accounting    packed against decoupled, in pools of the same bytes, without a prefix cache
  --compare prefix-cache  the cache off against on, in pools that hold all requests (or in --pool-gib)
  --compare invariance    the engine as it is against batch_invariant=True, the cache on in both
  --compare speculation   no drafts, one, and so on up to --num-speculative-tokens, against none, the cache on in all

Of random weights the drafts are as random. --spec-acceptance-length forces the tokens of a step on average, so that the
time of such a model can be measured; everything that comes of it is marked, since the outputs are not the model's.

Accounting is who pays for the recurrent state. Packed is the field's old way: every KV block carries a whole state, so
that the same bytes give few blocks. What is emulated is its scheduling: the engine gets the number of blocks that such
a pool would have, admits and preempts by them alone, and has a state for every request. What is not: blocks of that
width. Memory traffic and kernels are those of the decoupled pool, so the ratio is of capacity, not of layout. Blocks
that no request could use are left out of either pool.

--url asks a server for the workload in place of an engine of its own, over HTTP, by POST /v1/completions with token
ids: gdnjax's, vLLM's, or another that takes ignore_eos and return_token_ids. --model is then where the vocabulary, and
the tokenizer of a file's texts, are read from; engine and speculation are the server's own. --goodput counts the
requests a second that keep all of its goals.

--overhead prints what plan, pack and commit, the host's own work in a step, take while 256 requests decode, and
detokenising, dispatching and reading apart. Where the device is the CPU itself, its threads interrupt the host's: then
the median says what the work takes.
"""

EXAMPLES = """\
examples:
  {command}                                            32 random requests at once
  {command} --request-rate 4 --output result.json --plot result.png
  {command} --compare accounting --num-requests 128 --input-len 1024 --output-len 1024
  {command} --compare prefix-cache --repeat 3
  {command} --compare prefix-cache --workload multi-turn
  {command} --compare speculation --num-speculative-tokens 3 --workload requests.jsonl
  {command} --url http://127.0.0.1:8000 --request-rate 8 --goodput ttft:500 tpot:50
  {command} --url http://127.0.0.1:8000 --workload multi-turn --prefix-len 512 --turn-growth 1.5
  {command} --overhead                                 the host's work with 256 running requests
  {command} --workload requests.jsonl --model Qwen3.5-4B
  {command} --random-weights qwen3.5-9b --dtype bfloat16   a geometry without its weights

{processes}
Exit status: 0 done, 2 a bad argument, file or checkpoint (the reason is on stderr), 3 another process is gone, 130
interrupted.
"""

GIB = 1 << 30

DEFAULTS: dict[str, dict[str, Any]] = {
    "random": {"num_requests": 32, "input_len": 256, "output_len": 64},
    "shared-prefix": {"num_requests": 32, "input_len": 64, "output_len": 16, "prefix_len": 768, "num_prefixes": 4},
    "multi-turn": {"num_requests": 8, "input_len": 64, "output_len": 32, "turns": 6},
    "overhead": {"num_requests": 256, "input_len": 16, "output_len": 128},
}
"""Of flags that describe a workload, by workload."""

OPTIONAL = {
    "random": {"range_ratio": 0.0},
    "shared-prefix": {"range_ratio": 0.0},
    "multi-turn": {"range_ratio": 0.0, "prefix_len": 0, "num_prefixes": 1, "turn_growth": 1.0},
    "overhead": {},
}
"""Flags that apply to a workload, too, and change nothing where they are not given."""

FILE_DEFAULTS = {"output_len": 64}

SHAPE = ("num_requests", "input_len", "output_len", "range_ratio", "prefix_len", "num_prefixes", "turns", "turn_growth")
"""All flags that describe a workload."""

GOALS = ("ttft", "tpot", "e2el")
"""Latencies that --goodput has goals for."""

SERVER_FLAGS = ("served_model_name", "api_key", "goodput")

REACHES_A_SERVER = ("url", *SERVER_FLAGS, *SHAPE, "model", "random_weights", "enable_expert_parallel", "workload")
REACHES_A_SERVER += ("request_rate", "temperature", "seed", "repeat", "output", "plot", "verbose")
"""Flags that mean something with --url; the others are the server's to decide."""

MOST_ROWS = 128

SPECULATION = "speculation"
"""The comparison whose settings depend on --num-speculative-tokens."""

PUBLISHED_CONFIG, PUBLISHED_TP, PUBLISHED_BLOCKS, PUBLISHED_REQUESTS = "qwen3.5-397b-a17b", 4, 6906, 128
"""The geometry of the field's published figure: so many packed blocks, in 157.88 GiB."""


def build_parser(command: str = "gdnjax bench serve") -> argparse.ArgumentParser:
    """The command line, for who calls it `command`. Imports no jax: --help and mistakes answer at once."""
    parser = command_parser(command, DESCRIPTION, EXAMPLES)
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="DIR", default=EMBEDDED_MODEL, help="checkpoint directory (default: the embedded model)")
    add(
        "--random-weights",
        metavar="PRESET",
        help="random weights: a preset (gdnjax memory --list) or config.json",
    )
    add("--dtype", choices=DTYPES, default="auto", help="of weights and activations; auto: the checkpoint's")
    add("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto", help="of keys and values (default: as --dtype)")
    add("--ssm-dtype", choices=DTYPES[1:], default="float32", help="of the recurrent state (default: float32)")
    add(
        "--ssm-rounding",
        choices=("nearest", "stochastic"),
        default="nearest",
        help="of a state in bfloat16 (default: nearest)",
    )
    add("--state-layout", choices=STATE_LAYOUTS, default="vk", help="of the recurrent state (default: vk)")
    add_device_flags(add)
    add("--kernels", choices=KERNELS, default="auto", help="which implementation of the ops runs (default: auto)")
    add("--memory-fraction", type=float, metavar="F", help="share of a GPU's memory, 0 to 1 (default: 0.9)")
    add_process_flags(parser.add_argument_group("processes").add_argument)
    add = parser.add_argument_group("workload").add_argument
    add("--workload", metavar="KIND|FILE", help="random, shared-prefix, multi-turn or a file (default: random)")
    add(
        "--num-requests",
        type=int,
        metavar="N",
        help=f"requests; of multi-turn: conversations ({by_workload('num_requests')})",
    )
    add(
        "--input-len",
        type=int,
        metavar="N",
        help=f"prompt tokens, those of a prefix or of earlier turns aside ({by_workload('input_len')})",
    )
    add(
        "--output-len",
        type=int,
        metavar="N",
        help=f"output tokens of a request ({by_workload('output_len')}, file {FILE_DEFAULTS['output_len']})",
    )
    add(
        "--range-ratio", type=float, metavar="R", help="lengths are uniform from 1 - R to 1 + R times that (default: 0)"
    )
    add(
        "--prefix-len",
        type=int,
        metavar="N",
        help=f"tokens of a prefix; of multi-turn: of a system prompt ({by_workload('prefix_len')})",
    )
    add("--num-prefixes", type=int, metavar="N", help=f"different prefixes ({by_workload('num_prefixes')})")
    add("--turns", type=int, metavar="N", help=f"requests of a conversation ({by_workload('turns')})")
    add("--turn-growth", type=float, metavar="G", help="tokens of a turn over those of the turn before (default: 1)")
    add("--request-rate", type=float, metavar="R", help="Poisson arrivals a second (default: all at once)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: 0)")
    add("--seed", type=int, default=0, metavar="N", help="of workload and random weights (default: 0)")
    add = parser.add_argument_group("server").add_argument
    add("--url", metavar="URL", help="ask the server there, in place of an engine of its own")
    add("--served-model-name", metavar="NAME", help="what it calls the model (default: the first of /v1/models)")
    add("--api-key", metavar="KEY", help="that it wants")
    add("--goodput", nargs="+", metavar="NAME:MS", help=f"goals of a request: {', '.join(GOALS)} and milliseconds")
    add = parser.add_argument_group("engine").add_argument
    add("--max-num-seqs", type=int, metavar="N", help=f"requests at once (default: all, at most {MOST_ROWS})")
    add("--max-num-batched-tokens", type=int, default=1024, metavar="N", help="prompt tokens of a step (default: 1024)")
    add("--block-size", type=int, default=16, metavar="N", help="tokens of a KV block (default: 16)")
    add("--accounting", choices=engines.ACCOUNTINGS, help="who pays for the recurrent state (default: decoupled)")
    add("--prefix-cache", choices=("on", "off"), help="default: on, and off with packed accounting")
    add(
        "--pool-gib",
        type=float,
        metavar="F",
        help="bytes of states and KV blocks of a device (default: what is needed)",
    )
    add("--pool-requests", type=int, metavar="N", help="in its place: what packed accounting needs for N requests "
        "(default with packed accounting: half of those at once)")  # fmt: skip
    add("--num-checkpoint-slots", type=int, metavar="N", help="states that the prefix cache may keep")
    add_host_cache_flag(add)
    add = parser.add_argument_group("speculation").add_argument
    add_speculation_flags(add)
    add(
        "--spec-acceptance-length",
        type=float,
        metavar="L",
        help="force this many tokens a step on average, 1 to 1 + K: the outputs are not the model's",
    )
    add = parser.add_argument_group("what is measured").add_argument
    add("--compare", choices=(*engines.COMPARISONS, SPECULATION), help="run several settings and print ratios")
    add(
        "--repeat",
        type=int,
        default=1,
        metavar="N",
        help="runs of every setting, by turns; medians are shown (default: 1)",
    )
    add("--overhead", action="store_true", help="what a step costs the host while all of 256 requests decode")
    add = parser.add_argument_group("output").add_argument
    add("--output", metavar="FILE", help="write settings, figures and requests there, as JSON")
    add("--plot", metavar="FILE", help="draw distributions and times there, as PNG (needs matplotlib)")
    add("--verbose", action="store_true", help="log what the engine does, and show where an error came from")
    return parser


def by_workload(name: str) -> str:
    """The defaults of a flag that describes a workload."""
    found = {kind: {**OPTIONAL[kind], **flags}.get(name) for kind, flags in DEFAULTS.items()}
    return "default: " + ", ".join(f"{kind} {value}" for kind, value in found.items() if value is not None)


def main(argv: list[str] | None = None, command: str = "gdnjax bench serve") -> int:
    """Runs the command line and returns the exit status. `command` is what it is called in messages."""
    arguments = build_parser(command).parse_args(argv)
    return exit_status(command.rpartition("/")[2], lambda: run(arguments), verbose=arguments.verbose)


def run(arguments: argparse.Namespace) -> int:
    """Everything between the arguments and the exit status."""
    check_arguments(arguments)
    if arguments.url:
        return run_on_server(arguments)
    prepare_environment(arguments.memory_fraction, host_cache_gib=arguments.host_cache_gib, verbose=arguments.verbose)
    return over_processes(arguments, lambda: run_here(arguments), lambda: follow(arguments))


def run_on_server(arguments: argparse.Namespace) -> int:
    """The workload on a server. Needs no jax."""
    import asyncio

    from gdnjax.cli.bench.serving import figures, over_http, report

    config, directory = read_model(arguments)
    conversations = make_workload(arguments, config, directory)
    goals = figures.Goals(**goals_of(arguments.goodput or []))
    server = over_http.Server(
        arguments.url, arguments.served_model_name or "", arguments.temperature, arguments.api_key
    )

    async def measure() -> list[Any]:
        own = server
        if not own.model:
            own = dataclasses.replace(server, model=(await server.models())[0])
        # What runs for the first time is slow.
        first = dataclasses.replace(conversations[0].turns[0], max_tokens=2)
        await over_http.run(own, [Conversation([first])])
        names = [f"run {i + 1} of {arguments.repeat}" for i in range(arguments.repeat)]
        return [await over_http.run(own, conversations, description=name, progress=True) for name in names]

    try:
        logs = asyncio.run(measure())
    except* (OSError, over_http.ServerError) as errors:
        first = errors.exceptions[0]
        raise OSError(f"--url {arguments.url}: {first}") from first
    requests = sum(len(item.turns) for item in conversations)
    print(report.server_table(logs, goals, f"{arguments.url}: {arguments.workload}, {requests} requests"))
    if arguments.output:
        leave = ("output", "plot", "verbose", "api_key")
        chosen = {name: getattr(arguments, name) for name in REACHES_A_SERVER if name not in leave}
        content = {"settings": chosen, **report.server_json(logs, goals)}
        pathlib.Path(arguments.output).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if arguments.plot:
        from gdnjax.cli.bench.serving import pictures

        pictures.draw({"the server": logs}, pathlib.Path(arguments.plot))
        print(f"wrote {arguments.plot}", file=sys.stderr)
    return 0


def goals_of(given: Sequence[str]) -> dict[str, float]:
    """The goals of --goodput by their fields. Raises ValueError for what is none."""
    found = {}
    for item in given:
        name, _, value = item.partition(":")
        try:
            milliseconds = float(value)
        except ValueError:
            milliseconds = math.nan
        if name not in GOALS or not 0 < milliseconds < math.inf:
            raise ValueError(f"--goodput {item}: a goal is NAME:MILLISECONDS, of {', '.join(GOALS)}")
        found[f"{name}_ms"] = milliseconds
    return found


def check_server(arguments: argparse.Namespace) -> None:
    """Raises ValueError for flags that say nothing to a server, and for a server's flags without one."""
    if arguments.url is None:
        given = [name for name in SERVER_FLAGS if getattr(arguments, name) is not None]
        if given:
            raise ValueError(f"{flag(given[0])} is about a server; give --url, too")
        return
    from gdnjax.cli.bench.serving.over_http import Server

    _ = Server(arguments.url, "").parts
    goals_of(arguments.goodput or [])
    usual = vars(build_parser().parse_args([]))
    others = [name for name in usual if name not in REACHES_A_SERVER and getattr(arguments, name) != usual[name]]
    if others:
        raise ValueError(f"{flag(others[0])} is the server's to decide; leave it or --url out")


def follow(arguments: argparse.Namespace) -> None:
    """What another process than process 0 does: it takes part in what is measured there."""
    config, directory = read_model(arguments)
    mtp = any(arm.num_drafts for arm in choose_arms(arguments))
    engines.follow(load(arguments, config, directory, mtp=mtp))


def run_here(arguments: argparse.Namespace) -> int:
    """Everything between the arguments and the result."""
    config, directory = read_model(arguments)
    conversations = make_workload(arguments, config, directory)
    arms = choose_arms(arguments)
    mtp = any(arm.num_drafts for arm in arms)
    if mtp:
        config.require_mtp()
    sizes = choose_sizes(arguments, arms, conversations)
    geometries = {arm.name: engines.geometry_of(arm, config, vars(arguments), arguments.block_size) for arm in arms}
    for arm in arms:
        # Pools that hold too little are an error before anything is loaded.
        engines.pools(arm, geometries[arm.name], sizes)
    loaded = load(arguments, config, directory, mtp=mtp)
    plan = make_plan(arguments, arms, sizes, conversations)
    geometry = geometries[arms[0].name]
    result = measure_host_work(loaded, plan) if arguments.overhead else measure(arguments, loaded, plan, geometry)
    if arguments.output:
        content = {"settings": settings(arguments, plan), **result}
        pathlib.Path(arguments.output).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises ValueError for values that cannot work, and fills in the defaults that depend on others."""
    check_server(arguments)
    for name in ("num_requests", "input_len", "output_len", "num_prefixes", "turns", "max_num_seqs", "pool_requests"):
        _check_least(arguments, name, 1)
    _check_least(arguments, "repeat", 1)
    for name in ("prefix_len", "num_checkpoint_slots", "seed"):
        _check_least(arguments, name, 0)
    if arguments.range_ratio is not None and not 0 <= arguments.range_ratio <= 1:
        raise ValueError(f"--range-ratio must be in [0, 1], got {arguments.range_ratio:g}")
    for name in ("request_rate", "pool_gib", "turn_growth"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{flag(name)} must be a number above 0, got {value:g}")
    if arguments.random_weights and arguments.model != EMBEDDED_MODEL:
        raise ValueError("--random-weights makes a model of its own; leave it or --model out")
    _check_settings(arguments)
    _check_workload(arguments)
    _check_outputs(arguments)


def _check_least(arguments: argparse.Namespace, name: str, least: int) -> None:
    value = getattr(arguments, name)
    if value is not None and value < least:
        raise ValueError(f"{flag(name)} must be at least {least}, got {value}")


def _check_settings(arguments: argparse.Namespace) -> None:
    """What is measured: flags that exclude one another."""
    compare = arguments.compare
    if compare and arguments.distributed:
        raise ValueError(
            f"--compare {compare} has several engines at a time, and --distributed one; run each by itself"
        )
    if arguments.overhead and (compare or arguments.plot or arguments.repeat > 1):
        raise ValueError("--overhead is a measurement of its own; leave --compare, --plot and --repeat out")
    if compare and arguments.accounting:
        raise ValueError(f"--compare {compare} chooses the accounting; leave --accounting out")
    if compare and arguments.prefix_cache:
        raise ValueError(f"--compare {compare} chooses the cache; leave --prefix-cache out")
    packed = arguments.accounting == "packed"
    if packed and arguments.prefix_cache == "on":
        raise ValueError("--accounting packed is emulated without a cache; allowed with it: --prefix-cache off")
    if arguments.pool_gib is not None and arguments.pool_requests is not None:
        raise ValueError("--pool-gib and --pool-requests both size the pools; give one")
    if compare == SPECULATION:
        if arguments.pool_requests is not None:
            raise ValueError("--pool-requests is a packed pool of one width; with --compare speculation: --pool-gib")
        if arguments.num_speculative_tokens is None:
            arguments.num_speculative_tokens = engines.DRAFTS
        elif arguments.num_speculative_tokens < 1:
            raise ValueError(
                f"--compare speculation needs --num-speculative-tokens above 0, got {arguments.num_speculative_tokens}"
            )
    speculation(arguments)
    arguments.accounting = arguments.accounting or "decoupled"
    arguments.prefix_cache = arguments.prefix_cache or ("off" if packed else "on")


def _check_workload(arguments: argparse.Namespace) -> None:
    """Fills in what the flags of the workload leave open. A flag of another workload is an error."""
    if arguments.workload is None:
        arguments.workload = "shared-prefix" if arguments.compare == "prefix-cache" else "random"
    kind = arguments.workload
    if arguments.overhead and (kind != "random" or arguments.request_rate):
        raise ValueError("--overhead has random requests at once; leave --workload and --request-rate out")
    if kind in workloads.KINDS:
        described = "overhead" if arguments.overhead else kind
        allowed = DEFAULTS[described] | OPTIONAL[described]
    elif pathlib.Path(kind).is_file():
        allowed = FILE_DEFAULTS
        if arguments.request_rate is not None:
            raise ValueError('--request-rate: a file says itself when requests come ("arrival")')
    else:
        raise ValueError(f"--workload {kind}: no such file; allowed: {', '.join(workloads.KINDS)}, or a file")
    for name in SHAPE:
        if getattr(arguments, name) is None:
            setattr(arguments, name, allowed.get(name))
        elif name not in allowed:
            raise ValueError(f"{flag(name)} is nothing of this workload; allowed: {', '.join(map(flag, allowed))}")


def _check_outputs(arguments: argparse.Namespace) -> None:
    """A long run must not end with the news that its result cannot be written."""
    for name in ("output", "plot"):
        value = getattr(arguments, name)
        if value and not pathlib.Path(value).absolute().parent.is_dir():
            raise ValueError(f"{flag(name)} {value}: no such directory")
    if arguments.plot:
        if pathlib.Path(arguments.plot).suffix != ".png":
            raise ValueError(f"--plot {arguments.plot}: a picture is a .png")
        if importlib.util.find_spec("matplotlib") is None:
            raise ImportError("--plot needs matplotlib: pip install 'gdnjax[bench]'")


def flag(name: str) -> str:
    """An argument as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def read_model(arguments: argparse.Namespace) -> tuple[ModelConfig, pathlib.Path | None]:
    """The model's configuration, and its directory unless its weights are to be random."""

    directory = None if arguments.random_weights else model_directory(arguments.model)
    config = ModelConfig.from_hf(directory or config_file(arguments.random_weights))
    return config.with_expert_parallel() if arguments.enable_expert_parallel else config, directory


def make_workload(
    arguments: argparse.Namespace, config: ModelConfig, directory: pathlib.Path | None
) -> list[Conversation]:
    """The workload in token ids. Raises ValueError where it does not fit the model's context."""
    if arguments.workload in workloads.KINDS:
        given = {name: getattr(arguments, name) for name in SHAPE if getattr(arguments, name) is not None}
        spec = Spec(kind=arguments.workload, request_rate=arguments.request_rate, seed=arguments.seed, **given)
        conversations = workloads.draw(spec, config.vocab_size)
    else:
        conversations = workloads.read(pathlib.Path(arguments.workload), arguments.output_len)
        conversations = workloads.encode(conversations, functools.partial(_encode, directory))
    longest = max(item.length for item in conversations)
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"the longest request has {longest} tokens with its output, more than the model's context of "
            f"{config.max_position_embeddings}; shorten the workload"
        )
    return conversations


def _encode(directory: pathlib.Path | None, text: str) -> list[int]:
    if directory is None:
        raise ValueError("the workload has texts, and random weights have no tokenizer; give prompt_token_ids")
    return _tokenizer(directory).encode(text)


@functools.cache
def _tokenizer(directory: pathlib.Path) -> Any:
    from gdnjax.serving.tokenizer import Tokenizer

    return Tokenizer.from_directory(directory)


def choose_arms(arguments: argparse.Namespace) -> Sequence[Arm]:
    """The settings to run: one, the two of a comparison, or one for each number of drafts."""
    drafts = speculation(arguments)
    if arguments.compare == SPECULATION:
        return engines.drafting(drafts)
    name = f"{arguments.accounting}, cache {arguments.prefix_cache}"
    one = (Arm(name, arguments.accounting, arguments.prefix_cache == "on"),)
    arms = engines.COMPARISONS[arguments.compare] if arguments.compare else one
    arms = tuple(engines.speculating(arm, drafts) for arm in arms)
    for arm in arms:
        arm.check()
    return arms


def choose_sizes(arguments: argparse.Namespace, arms: Sequence[Arm], conversations: Sequence[Conversation]) -> Sizes:
    """What the engines are to hold."""
    rows = arguments.max_num_seqs or min(len(conversations), len(conversations) if arguments.overhead else MOST_ROWS)
    requests = arguments.pool_requests
    if requests is None and arguments.pool_gib is None and any(arm.accounting == "packed" for arm in arms):
        requests = max(1, rows // 2)
    return Sizes(
        rows=rows,
        longest=max(item.length for item in conversations),
        block_size=arguments.block_size,
        pool_bytes=None if arguments.pool_gib is None else math.floor(arguments.pool_gib * GIB),
        pool_requests=requests,
        checkpoints=arguments.num_checkpoint_slots,
        host_gib=arguments.host_cache_gib,
    )


def load(arguments: argparse.Namespace, config: ModelConfig, directory: pathlib.Path | None, *, mtp: bool) -> Loaded:
    """The model that all engines share, with its MTP head if `mtp`."""
    options = {"dtype": arguments.dtype, "kernels": arguments.kernels, **devices(arguments)}
    if directory is None:
        return engines.load_random(config, options, arguments.seed, mtp=mtp)
    return engines.with_tokenizer(engines.load_checkpoint(directory, options, mtp=mtp, progress=True), directory)


def make_plan(
    arguments: argparse.Namespace, arms: Sequence[Arm], sizes: Sizes, conversations: Sequence[Conversation]
) -> "Plan":
    """What is measured, as the arguments say."""
    from gdnjax.cli.bench.serving.measurement import Plan

    names = (
        "dtype",
        "kv_cache_dtype",
        "ssm_dtype",
        "ssm_rounding",
        "state_layout",
        "tensor_parallel_size",
        "enable_expert_parallel",
        "kernels",
        "max_num_batched_tokens",
    )
    return Plan(
        arms=arms,
        sizes=sizes,
        conversations=conversations,
        options={name: getattr(arguments, name) for name in names},
        temperature=arguments.temperature,
        repeat=arguments.repeat,
        progress=True,
    )


def measure(arguments: argparse.Namespace, loaded: Loaded, plan: "Plan", geometry: StateGeometry) -> dict[str, Any]:
    """Runs the workload, prints the tables, draws the picture, and returns what goes into the JSON."""
    from gdnjax.cli.bench.serving import measurement, report

    arms = measurement.compare(loaded, plan)
    of_drafts = arguments.compare == SPECULATION
    print((report.speculation_table if of_drafts else report.table)(arms, title(arguments, plan)))
    forced = arms[-1].arm.forced_length
    if forced is not None and not of_drafts:
        print(f"\nAcceptance was forced to {forced:g} tokens a step: the outputs are not the model's.")
    result: dict[str, Any] = {
        "arms": [arm.as_json() for arm in arms],
        "ratios": {name: ratio.as_json() for name, ratio in report.ratios(arms).items()},
    }
    if of_drafts:
        result["speculation"] = report.speculation_rows(arms)
    budget = plan.sizes.bytes_of(geometry)
    if arguments.compare == "accounting" and budget is not None:
        name = arguments.random_weights or arguments.model
        forms = [report.closed_form(name, geometry, budget, plan.sizes.rows), published_form()]
        print(f"\n{report.closed_form_table(forms)}")
        result["closed_forms"] = [form.as_json() for form in forms]
    if arguments.plot:
        from gdnjax.cli.bench.serving import pictures

        pictures.draw({arm.arm.name: arm.logs for arm in arms}, pathlib.Path(arguments.plot))
        print(f"wrote {arguments.plot}", file=sys.stderr)
    return result


def measure_host_work(loaded: Loaded, plan: "Plan") -> dict[str, Any]:
    """Runs the workload, prints what the host's part of a step takes, and returns what goes into the JSON."""
    from gdnjax.cli.bench.serving import measurement, report

    parts, steps = measurement.host_work(loaded, plan)
    running = len(plan.conversations)
    print(report.host_table(parts, f"The host in a step, {running} requests decoding, over {steps} steps"))
    return {"host_step": {"running": running, "steps": steps, "parts": parts}}


def published_form() -> "ClosedForm":
    """The geometry of the field's published figure, with 8-bit KV and a bfloat16 state."""
    from gdnjax.cli.bench.serving import report

    config = ModelConfig.from_hf(config_file(PUBLISHED_CONFIG))
    geometry = StateGeometry.of(
        config, tp=PUBLISHED_TP, block_size=16, dtype="bfloat16", ssm_dtype="bfloat16", kv_cache_dtype="fp8"
    )
    return report.closed_form(
        f"{PUBLISHED_CONFIG}, tp {PUBLISHED_TP}",
        geometry,
        PUBLISHED_BLOCKS * geometry.packed_block_bytes,
        PUBLISHED_REQUESTS,
    )


def title(arguments: argparse.Namespace, plan: "Plan") -> str:
    """What the table is of, in a line."""
    import jax

    requests = sum(len(item.turns) for item in plan.conversations)
    when = f"{arguments.request_rate:g} a second" if arguments.request_rate else "at once"
    if arguments.workload not in workloads.KINDS:
        when = "as the file says"
    runs = f", medians of {plan.repeat} runs" if plan.repeat > 1 else ""
    model = arguments.random_weights or arguments.model
    return f"{model} on {jax.devices()[0].device_kind}: {arguments.workload}, {requests} requests, {when}{runs}"


def settings(arguments: argparse.Namespace, plan: "Plan") -> dict[str, Any]:
    """What a result depends on, for the record."""
    import platform

    import jax

    leave = ("output", "plot", "verbose")
    return {
        **{name: value for name, value in vars(arguments).items() if name not in leave},
        "sizes": dataclasses.asdict(plan.sizes),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "cpu_cores": os.cpu_count(),
        "gdnjax": __version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
