"""Measures the whole engine in one process, from few compilations: the figures that docs/benchmarks.md quotes."""

if __name__ == "__main__":
    from gdnjax.cli import interrupt

    interrupt.expected()

import argparse
import dataclasses
import sys
import time
from typing import Any

from gdnjax.cli.command import (
    PROCESSES_HELP,
    add_device_flags,
    add_process_flags,
    devices,
    exit_status,
    in_one_line,
    over_processes,
    prepare_environment,
    run_as_process,
)

DESCRIPTION = """\
Makes a model of random weights once, and at most two engines of it, one after the other: without drafts, and with
them. Each section measures one thing, prints a line for every figure as soon as it is there, and has the JSON file
rewritten: a run that is killed keeps what it had. A section that fails is noted, and those after it go on.

Sections:
  decode       batches of --input-len tokens, each a little further: ms a step, tokens/s. Steps are dispatched ahead
  prefill      long prompts: tokens/s of several, seconds to the first token of one alone
  throughput   many requests in and out through LLM.generate: output tokens/s
  accounting   the same in a packed pool, where every block carries a state, that holds half of the requests, against
               the decoupled pool of the same bytes. What is emulated is its scheduling, as in bench_serving.py
  prefix       requests that share a long prefix, with the prefix cache and without, from an empty one
  balance      of a model with experts: how evenly its routers send tokens to experts, and to the ranks that hold them
               (busiest over mean). Of random weights and tokens; gdnjax.routing measures any others
  speculation  decode with drafts, against none. Of random weights drafts are random, so the tokens of a step are
               forced: the outputs are not the model's

Steps are compiled, and run once, before they are timed; how long that took is among the figures.
"""

EXAMPLES = """\
examples:
  python scripts/bench_engine.py --output engine.json                        everything
  python scripts/bench_engine.py decode speculation --batches 64,1           some
  python scripts/bench_engine.py decode --batches 128 --padded 9             what rows of padding cost
  python scripts/bench_engine.py --config qwen3.5-397b-a17b --quantization fp8 --tensor-parallel-size 4 \\
      --enable-expert-parallel
  python scripts/bench_engine.py --config tiny --scale 0.03                  a look on a CPU

{processes}
Exit status: 0 done, 2 an error, or a section that failed, 3 another process is gone; 130 interrupted.
"""

LENGTHS = {"batches": "batches", "padded": "padded", "input_len": "input_len", "output_len": "output_len",
           "max_num_batched_tokens": "batched_tokens", "checkpoints": "checkpoints"}  # fmt: skip
"""Arguments that are sizes, and which."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    arguments = build_parser().parse_args(argv)
    return exit_status("bench_engine.py", lambda: run(arguments))


def build_parser() -> argparse.ArgumentParser:
    """The command line. Imports no jax: --help and mistakes answer at once."""
    from engine_bench.sizes import Sizes

    from gdnjax.config import KERNELS, KV_CACHE_DTYPES, STATE_LAYOUTS

    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES.replace("{processes}", PROCESSES_HELP),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    default = Sizes()
    batches = ",".join(map(str, default.batches))
    add("sections", nargs="*", metavar="SECTION", help="what to measure (default: everything)")
    add("--config", default="qwen3.5-9b", help="a preset, or a config.json (default: %(default)s)")
    add("--layers", type=int, metavar="N", help="of the model; fewer than it has for a quick look")
    add("--batches", type=_batches, metavar="N,N", help=f"requests that decode together (default: {batches})")
    add(
        "--padded",
        type=_batches,
        metavar="N,N",
        help="fewer that decode in the next larger batch's bucket (default: none)",
    )
    add("--input-len", type=int, metavar="N", help=f"tokens of most prompts (default: {default.input_len})")
    add("--output-len", type=int, metavar="N", help=f"output tokens of throughput (default: {default.output_len})")
    add("--max-num-batched-tokens", type=int, metavar="N", help=f"of a step (default: {default.batched_tokens})")
    add("--checkpoints", type=int, metavar="N", help=f"slots for the prefix cache (default: {default.checkpoints})")
    add("--scale", type=float, metavar="F", help="all numbers of requests and tokens that are not given, times that")
    add("--num-speculative-tokens", type=int, default=3, metavar="K", help="drafts a step (default: %(default)s)")
    add(
        "--acceptance-length", type=float, default=3.49, metavar="L", help="forced tokens a step (default: %(default)s)"
    )
    add(
        "--quantization",
        choices=("fp8", "fp8_per_channel"),
        help="random weights of eight bits: in blocks of 128 x 128, or with a scale for each output (default: none)",
    )
    add("--quantize-activations", action="store_true", help="W8A8 in prefill; for fp8_per_channel")
    add_device_flags(add)
    add_process_flags(add)
    add("--kernels", choices=KERNELS, default="auto", help="which implementation of the ops runs (default: auto)")
    add("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto", help="of keys and values (default: the model's)")
    add("--state-layout", choices=STATE_LAYOUTS, help="of the recurrent state (default: the engine's)")
    add("--memory-fraction", type=float, metavar="F", help="share of a GPU's memory, 0 to 1 (default: 0.9)")
    add("--seed", type=int, default=0, metavar="N", help="of the weights (default: 0)")
    add("--output", metavar="FILE", help="also write all figures there, as JSON, after each of them")
    return parser


def _batches(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(item) for item in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"numbers with commas between them, got {text!r}") from None


def run(arguments: argparse.Namespace) -> int:
    """Everything between the arguments and the exit status."""
    prepare_environment(arguments.memory_fraction)
    return over_processes(arguments, lambda: run_here(arguments), lambda: run_here(arguments, leads=False))


def run_here(arguments: argparse.Namespace, *, leads: bool = True) -> int:
    """What this process does: it measures, or takes part in what the one that `leads` measures."""
    from engine_bench import sections
    from engine_bench.record import Record

    from gdnjax.config import MlpKind

    sizes = choose_sizes(arguments)
    config = read_config(arguments)
    if arguments.distributed and "balance" in arguments.sections:
        raise ValueError("balance computes in one process alone; leave it or --distributed out")
    experts = MlpKind.MOE in config.mlp_kinds and not arguments.distributed
    names = sections.choose(arguments.sections, experts=experts)
    engines = choose_engines(arguments, config, sizes, names)
    longest = max(engine.max_model_len or 0 for engine in engines.values())
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"the longest request may have {longest} tokens, more than the model's context of "
            f"{config.max_position_embeddings}; lower --scale"
        )
    if any(engines):
        config.require_mtp()
    if not leads:
        from serving_bench.engines import follow

        follow(load(arguments, config, engines))
        return 0
    record = Record(arguments.output)
    return measure(names, arguments, config, sizes, engines, record)


def choose_sizes(arguments: argparse.Namespace) -> Any:
    """The sizes, those that were given as they are, the others by --scale. Raises ValueError for one that is none."""
    from engine_bench.sizes import Sizes

    sizes = Sizes()
    if arguments.scale is not None:
        sizes = sizes.scaled(arguments.scale)
    given = {size: getattr(arguments, name) for name, size in LENGTHS.items() if getattr(arguments, name) is not None}
    return dataclasses.replace(sizes, **given)


def read_config(arguments: argparse.Namespace) -> Any:
    """The model's configuration, with fewer layers and whole experts on a rank if so asked."""
    from gdnjax.assets import config_file
    from gdnjax.config import ModelConfig

    config = ModelConfig.from_hf(config_file(arguments.config))
    layers = arguments.layers
    if layers is not None:
        if not 0 < layers <= config.num_layers:
            raise ValueError(f"--layers must be between 1 and the model's {config.num_layers}, got {layers}")
        kinds, mlps = config.layer_kinds[:layers], config.mlp_kinds[:layers]
        config = dataclasses.replace(config, layer_kinds=kinds, mlp_kinds=mlps)
    return config.with_expert_parallel() if arguments.enable_expert_parallel else config


def choose_engines(arguments: argparse.Namespace, config: Any, sizes: Any, names: list[str]) -> dict[int, Any]:
    """The engines' settings by their drafts, their blocks no more than kernels can number. Raises ValueError for
    settings that cannot be.
    """
    from gdnjax.memory import StateGeometry, numbered_blocks

    own = {"kernels": arguments.kernels, "kv_cache_dtype": arguments.kv_cache_dtype, **devices(arguments)}
    if arguments.quantize_activations:
        if arguments.quantization != "fp8_per_channel":
            raise ValueError("--quantize-activations is of weights of --quantization fp8_per_channel")
        own["quantize_activations"] = True
    if arguments.state_layout is not None:
        own["state_layout"] = arguments.state_layout
    engines = {0: sizes.engine(0, None)}
    if "speculation" in names:
        drafts = arguments.num_speculative_tokens
        if drafts < 1:
            raise ValueError(f"--num-speculative-tokens must be at least 1, got {drafts}")
        engines[drafts] = sizes.engine(drafts, arguments.acceptance_length)

    def whole(engine: Any) -> Any:
        engine = dataclasses.replace(engine, **own)
        geometry = StateGeometry.of(
            config,
            tp=engine.tensor_parallel_size,
            block_size=engine.block_size,
            dtype=config.dtype,
            ssm_dtype=engine.ssm_dtype,
            kv_cache_dtype=engine.kv_cache_dtype,
            speculation=engine,
        )
        return dataclasses.replace(engine, num_kv_blocks=numbered_blocks(geometry.cache, engine.num_kv_blocks))

    return {drafts: whole(engine) for drafts, engine in engines.items()}


def load(arguments: argparse.Namespace, config: Any, engines: dict[int, Any]) -> Any:
    """The random weights of all engines."""
    from serving_bench.engines import load_random

    own = {**devices(arguments), "dtype": "auto"}
    return load_random(config, own, arguments.seed, mtp=any(engines), quantization=arguments.quantization)


def measure(
    names: list[str], arguments: argparse.Namespace, config: Any, sizes: Any, engines: dict[int, Any], record: Any
) -> int:
    """Loads the weights, runs the sections, and returns the exit status: 2 if one of them failed."""
    import jax
    from engine_bench.engines import Bench, DoesNotFit, device_memory, saying_what_does_not_fit
    from engine_bench.sections import SECTIONS
    from serving_bench.engines import check_size_on_cpu

    import gdnjax
    from gdnjax import backend

    tokens = max(sizes.requests * sizes.input_len, sizes.prefill_requests * sizes.prefill_len)
    check_size_on_cpu(config, "auto", tokens, "--config tiny --scale 0.03")
    device = jax.devices()[0]
    implementation = backend.of_device(arguments.kernels, device)
    record.head(
        device=device.device_kind,
        jax=jax.__version__,
        gdnjax=gdnjax.__version__,
        preset=str(arguments.config),
        layers=config.num_layers,
        kernels=dataclasses.asdict(implementation),
        quantization=arguments.quantization,
        **devices(arguments),
        sizes=dataclasses.asdict(sizes),
    )
    begin = time.perf_counter()
    with saying_what_does_not_fit():
        loaded = load(arguments, config, engines)
        jax.block_until_ready(loaded.params)
    seconds = time.perf_counter() - begin
    what = f"{arguments.config}, {config.num_layers} layers, random weights in {seconds:.1f} s"
    ranks = f"{arguments.tensor_parallel_size} x " if arguments.tensor_parallel_size > 1 else ""
    print(f"{what}; {ranks}{device.device_kind}, jax {jax.__version__}, kernels {implementation.kernels}", flush=True)
    record.head(load_seconds=seconds, loaded_memory=device_memory())
    bench = Bench(loaded, engines, record)
    try:
        for name in names:
            try:
                SECTIONS[name](bench, sizes)
            except (ValueError, RuntimeError, MemoryError) as error:
                record.failure(name, in_one_line(error))
                if isinstance(error, DoesNotFit):
                    raise
                # Its engine may have work in flight, or have lost its pools: the next section gets a new one.
                bench.close()
                print(f"bench_engine.py: {name} failed: {in_one_line(error)}", file=sys.stderr, flush=True)
    finally:
        bench.close()
    failed = list(record.content["failed"])
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(names)} sections failed: {', '.join(failed)}")
    return 0


if __name__ == "__main__":
    run_as_process(main)
