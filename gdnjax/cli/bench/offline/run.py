"""From the arguments to the figures: what is checked first, the weights, the sections. Imports jax late."""

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable

from gdnjax.assets import EMBEDDED_MODEL, config_file, model_directory
from gdnjax.cli.bench.offline import sections
from gdnjax.cli.bench.offline.record import Record
from gdnjax.cli.bench.offline.sizes import Sizes
from gdnjax.cli.bench.serving.engines import (
    Loaded,
    check_size_on_cpu,
    first_layers,
    follow,
    load_checkpoint,
    load_random,
)
from gdnjax.cli.command import devices, in_one_line, over_processes, prepare_environment
from gdnjax.config import EngineConfig, MlpKind, ModelConfig
from gdnjax.memory import StateGeometry, numbered_blocks
from gdnjax.version import __version__


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """What one of the commands has of its own.

    name      what it is called in messages.
    sizes     the sizes by its arguments. Raises ValueError.
    made_for  sections that the engines are made for, so that figures are of the same engine, whichever are measured.
    lower     flags that make less of what does not fit into the memory.
    shorter   those that make requests shorter.
    on_cpu    those of a look on a CPU.
    """

    name: str
    sizes: Callable[[argparse.Namespace], Sizes]
    made_for: tuple[str, ...] = tuple(sections.SECTIONS)
    lower: str
    shorter: str
    on_cpu: str


def run(arguments: argparse.Namespace, kind: Kind) -> int:
    """Everything between the arguments and the exit status."""
    prepare_environment(arguments.memory_fraction)
    return over_processes(arguments, lambda: run_here(arguments, kind), lambda: run_here(arguments, kind, leads=False))


def run_here(arguments: argparse.Namespace, kind: Kind, *, leads: bool = True) -> int:
    """What this process does: it measures, or takes part in what the one that `leads` measures."""
    sizes = kind.sizes(arguments)
    config = read_config(arguments)
    if arguments.distributed and "balance" in arguments.sections:
        raise ValueError("balance computes in one process alone; leave it or --distributed out")
    experts = MlpKind.MOE in config.mlp_kinds and not arguments.distributed
    names = sections.choose(arguments.sections, experts=experts)
    engines = choose_engines(arguments, config, sizes, names, kind.made_for)
    longest = max(engine.max_model_len or 0 for engine in engines.values())
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"the longest request may have {longest} tokens, more than the model's context of "
            f"{config.max_position_embeddings}; lower {kind.shorter}"
        )
    if any(engines):
        config.require_mtp()
    if not leads:
        follow(load(arguments, config, engines, progress=False))
        return 0
    record = Record(arguments.output)
    return measure(names, arguments, kind, config, sizes, engines, record)


def read_config(arguments: argparse.Namespace) -> ModelConfig:
    """The model's configuration, with fewer layers and whole experts on a rank if so asked. Raises ValueError for flags
    of the model that exclude one another.
    """
    if arguments.config is None:
        if arguments.layers is not None:
            raise ValueError("--layers is of random weights; give --random-weights, or leave it out")
        if arguments.quantization == "fp8":
            raise ValueError("--quantization fp8 is of random weights; of a checkpoint: fp8_per_channel or dequantized")
        config = ModelConfig.from_hf(model_directory(arguments.model or EMBEDDED_MODEL))
    else:
        if arguments.model is not None:
            raise ValueError("--random-weights makes a model of its own; leave it or --model out")
        if arguments.quantization == "dequantized":
            raise ValueError("--quantization dequantized is of a checkpoint; of random weights: fp8 or fp8_per_channel")
        config = ModelConfig.from_hf(config_file(arguments.config))
    if arguments.layers is not None:
        config = first_layers(config, arguments.layers)
    return config.with_expert_parallel() if arguments.enable_expert_parallel else config


def directory_of(arguments: argparse.Namespace) -> pathlib.Path | None:
    """Where the checkpoint is; None for random weights."""
    return None if arguments.config is not None else model_directory(arguments.model or EMBEDDED_MODEL)


def choose_engines(
    arguments: argparse.Namespace,
    config: ModelConfig,
    sizes: Sizes,
    names: list[str],
    made_for: tuple[str, ...] = tuple(sections.SECTIONS),
) -> dict[int, EngineConfig]:
    """The settings by their drafts of engines that measure the sections `names`, their pools large enough for all that
    they are `made_for`, their blocks no more than kernels can number. Raises ValueError for settings that cannot be.
    """
    fields = ("kernels", "kv_cache_dtype", "ssm_dtype", "dtype")
    own = {name: getattr(arguments, name) for name in fields} | devices(arguments)
    if arguments.quantize_activations:
        if arguments.quantization != "fp8_per_channel":
            raise ValueError("--quantize-activations is of weights of --quantization fp8_per_channel")
        own["quantize_activations"] = True
    if arguments.state_layout is not None:
        own["state_layout"] = arguments.state_layout
    engines = {0: sizes.engine(0, None, made_for)}
    if "speculation" in names:
        drafts = arguments.num_speculative_tokens
        if drafts < 1:
            raise ValueError(f"--num-speculative-tokens must be at least 1, got {drafts}")
        speculating = sizes.engine(drafts, arguments.acceptance_length, made_for)
        engines[drafts] = dataclasses.replace(speculating, draft_head=arguments.draft_head)

    def whole(engine: EngineConfig) -> EngineConfig:
        engine = dataclasses.replace(engine, **own)
        geometry = StateGeometry.of(
            config,
            tp=engine.tensor_parallel_size,
            block_size=engine.block_size,
            dtype=config.dtype if engine.dtype == "auto" else engine.dtype,
            ssm_dtype=engine.ssm_dtype,
            kv_cache_dtype=engine.kv_cache_dtype,
            speculation=engine,
        )
        return dataclasses.replace(engine, num_kv_blocks=numbered_blocks(geometry.cache, engine.num_kv_blocks or 0))

    return {drafts: whole(engine) for drafts, engine in engines.items()}


def load(
    arguments: argparse.Namespace, config: ModelConfig, engines: dict[int, EngineConfig], *, progress: bool
) -> Loaded:
    """The weights of all engines: the checkpoint's, or random ones."""
    own = {**devices(arguments), "dtype": arguments.dtype}
    directory = directory_of(arguments)
    if directory is None:
        return load_random(config, own, arguments.seed, mtp=any(engines), quantization=arguments.quantization)
    own |= {"kernels": arguments.kernels, "quantization": arguments.quantization or "auto"}
    return load_checkpoint(directory, own, mtp=any(engines), progress=progress)


def measure(
    names: list[str],
    arguments: argparse.Namespace,
    kind: Kind,
    config: ModelConfig,
    sizes: Sizes,
    engines: dict[int, EngineConfig],
    record: Record,
) -> int:
    """Loads the weights, runs the sections, and returns the exit status: 2 if one of them failed."""
    import jax

    from gdnjax import backend
    from gdnjax.cli.bench.offline.engines import Bench, DoesNotFit, device_memory, saying_what_does_not_fit

    random, name = arguments.config is not None, str(arguments.config or arguments.model or EMBEDDED_MODEL)
    check_size_on_cpu(config if random else None, arguments.dtype, sizes.prompt_tokens(kind.made_for), kind.on_cpu)
    device = jax.devices()[0]
    implementation = backend.of_device(arguments.kernels, device)
    record.head(
        device=device.device_kind,
        jax=jax.__version__,
        gdnjax=__version__,
        preset=name,
        random_weights=random,
        layers=config.num_layers,
        kernels=dataclasses.asdict(implementation),
        dtype=config.dtype if arguments.dtype == "auto" else arguments.dtype,
        quantization=arguments.quantization,
        **devices(arguments),
        sizes=dataclasses.asdict(sizes),
    )
    begin = time.perf_counter()
    with saying_what_does_not_fit(kind.lower):
        loaded = load(arguments, config, engines, progress=True)
        jax.block_until_ready(loaded.params)
    seconds = time.perf_counter() - begin
    what = f"{name}, {config.num_layers} layers, {'random ' if random else ''}weights in {seconds:.1f} s"
    ranks = f"{arguments.tensor_parallel_size} x " if arguments.tensor_parallel_size > 1 else ""
    print(f"{what}; {ranks}{device.device_kind}, jax {jax.__version__}, kernels {implementation.kernels}", flush=True)
    record.head(load_seconds=seconds, loaded_memory=device_memory())
    bench = Bench(loaded, engines, record, kind.lower)
    try:
        for section in names:
            try:
                sections.SECTIONS[section](bench, sizes)
            except (ValueError, RuntimeError, MemoryError) as error:
                record.failure(section, in_one_line(error))
                if isinstance(error, DoesNotFit):
                    raise
                # Its engine may have work in flight, or have lost its pools: the next section gets a new one.
                bench.close()
                print(f"{kind.name}: {section} failed: {in_one_line(error)}", file=sys.stderr, flush=True)
    finally:
        bench.close()
    failed = list(record.content["failed"])
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(names)} sections failed: {', '.join(failed)}")
    return 0
