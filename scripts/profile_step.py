"""Where the time of whole steps goes on a device: kernel by kernel, for a model of random weights."""

if __name__ == "__main__":
    from gdnjax.cli import interrupt

    interrupt.expected()

import argparse
import collections
import json
import pathlib
import re
import tempfile
import time

from gdnjax.cli.command import (
    PROCESSES_HELP,
    add_device_flags,
    add_process_flags,
    check_writable,
    devices,
    exit_status,
    over_processes,
    prepare_environment,
    run_as_process,
)

DESCRIPTION = """\
Serves requests with a model of random weights, and reads the profiler: the time of every kernel on the device, summed
by kind, for prefill and for decode, beside the wall clock of a decode step, the time in which no kernel ran, and what
the host did meanwhile.
"""

EXAMPLES = """\
examples:
  python scripts/profile_step.py --config qwen3.5-9b --requests 128 --input-len 1024
  python scripts/profile_step.py --config qwen3.5-9b --requests 1 --num-speculative-tokens 3 --output profile.json

{processes}
Exit status: 0 done, 2 an error, 3 another process is gone.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES.replace("{processes}", PROCESSES_HELP),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="qwen3.5-9b", help="a preset, or a config.json (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="of the model; fewer than it has for a quick look")
    parser.add_argument("--requests", type=int, default=128, help="at once (default: %(default)s)")
    parser.add_argument("--input-len", type=int, default=1024, help="tokens of each prompt (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=32, help="decode steps in the profile (default: %(default)s)")
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192, help="of a prefill (default: %(default)s)")
    parser.add_argument("--num-speculative-tokens", type=int, default=0, help="drafts a step (default: %(default)s)")
    parser.add_argument("--spec-acceptance-length", type=float, help="forced tokens a step")
    parser.add_argument("--draft-head", default="target", help="see EngineConfig (default: %(default)s)")
    parser.add_argument(
        "--quantization",
        choices=("fp8", "fp8_per_channel"),
        help="random weights of eight bits: in blocks of 128 x 128, or with a scale for each output (default: none)",
    )
    parser.add_argument("--quantize-activations", action="store_true", help="W8A8 in prefill; for fp8_per_channel")
    parser.add_argument("--kv-cache-dtype", default="auto", help="see EngineConfig (default: %(default)s)")
    parser.add_argument("--ssm-dtype", default="float32", help="see EngineConfig (default: %(default)s)")
    add_device_flags(parser.add_argument)
    add_process_flags(parser.add_argument)
    parser.add_argument("--kernels", default="auto", help="see EngineConfig (default: %(default)s)")
    parser.add_argument("--state-layout", default=None, help="see EngineConfig")
    parser.add_argument("--memory-fraction", type=float, help="of the device's memory")
    parser.add_argument("--output", metavar="FILE", help="also write all kernels there, as JSON")
    arguments = parser.parse_args(argv)
    for name in ("layers", "requests", "input_len", "max_num_batched_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if arguments.quantize_activations and arguments.quantization != "fp8_per_channel":
        parser.error("--quantize-activations is of weights of --quantization fp8_per_channel")
    if arguments.steps < 2:
        parser.error(f"--steps must be at least 2, got {arguments.steps}: half are timed, the other half profiled")
    return exit_status("profile_step.py", lambda: run(arguments))


def run(arguments) -> int:
    check_writable("--output", arguments.output)
    prepare_environment(arguments.memory_fraction)
    return over_processes(arguments, lambda: profile(arguments), lambda: profile(arguments, leads=False))


def profile(arguments, *, leads: bool = True) -> int:
    """The tables, of the process that `leads`; others take part in it."""

    import jax
    import numpy as np

    from gdnjax import LLM, EngineConfig, ModelConfig, SamplingParams
    from gdnjax.assets import config_file
    from gdnjax.cli.bench.serving.engines import check_size_on_cpu, first_layers, follow, load_random

    config = ModelConfig.from_hf(config_file(arguments.config))
    if arguments.layers is not None:
        config = first_layers(config, arguments.layers)
    if arguments.enable_expert_parallel:
        config = config.with_expert_parallel()
    drafts = arguments.num_speculative_tokens
    # Enough that every request decodes through all profiled steps and those before them.
    tokens = (arguments.steps + 24) * (1 + drafts)
    # As many are timed as are profiled.
    steps = arguments.steps // 2
    length = arguments.input_len + tokens + 64
    options = {} if arguments.state_layout is None else {"state_layout": arguments.state_layout}
    engine = EngineConfig(
        kernels=arguments.kernels,
        **devices(arguments),
        kv_cache_dtype=arguments.kv_cache_dtype,
        ssm_dtype=arguments.ssm_dtype,
        quantize_activations=arguments.quantize_activations,
        max_num_seqs=arguments.requests,
        # Else it would be cut to what engines take where nobody says.
        max_model_len=length,
        decode_buckets=(arguments.requests,),
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        prefill_buckets=(arguments.max_num_batched_tokens,),
        num_speculative_tokens=drafts,
        spec_acceptance_length=arguments.spec_acceptance_length,
        draft_head=arguments.draft_head,
        enable_prefix_caching=False,
        # Of all steps it needs two.
        warmup=False,
        num_kv_blocks=arguments.requests * -(-length // 16),
        **options,
    )
    prompts = arguments.requests * arguments.input_len
    check_size_on_cpu(config, "auto", prompts, "--config tiny --requests 8 --input-len 64 --max-num-batched-tokens 512")
    own = {"tensor_parallel_size": arguments.tensor_parallel_size, "dtype": "auto"}
    loaded = load_random(config, own, 0, mtp=drafts > 0, quantization=arguments.quantization)
    if not leads:
        follow(loaded)
        return 0
    begin = time.perf_counter()
    with LLM.from_model(loaded.model, loaded.params, engine, max_model_len=length) as llm:
        print(f"ready after {time.perf_counter() - begin:.1f} s", flush=True)
        rng = np.random.default_rng(0)
        params = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True)

        def submit(count):
            for _ in range(count):
                llm.submit(rng.integers(0, config.vocab_size, arguments.input_len).tolist(), params)

        submit(1)
        while llm.engine.has_work:
            llm.step()
        submit(arguments.requests)
        with tempfile.TemporaryDirectory() as scratch:
            begin = time.perf_counter()
            with jax.profiler.trace(scratch):
                while not llm.engine.scheduler.running or llm.engine.scheduler.waiting or _prefilling(llm):
                    llm.step()
                jax.block_until_ready(llm.engine.runner.state)
            prefill = kernels_of(scratch)
        seconds = time.perf_counter() - begin
        print(f"prefill: {arguments.requests * arguments.input_len / seconds:.0f} tokens/s, profiled")
        for _ in range(8):
            llm.step()
        jax.block_until_ready(llm.engine.runner.state)
        before, begin = llm.stats()["seconds"], time.perf_counter()
        for _ in range(steps):
            llm.step()
        jax.block_until_ready(llm.engine.runner.state)
        wall = (time.perf_counter() - begin) / steps
        after = llm.stats()["seconds"]
        host = {part: (after[part] - before[part]) / steps for part in after}
        with tempfile.TemporaryDirectory() as scratch:
            with jax.profiler.trace(scratch):
                for _ in range(steps):
                    llm.step()
                jax.block_until_ready(llm.engine.runner.state)
            decode = kernels_of(scratch)
    print(table("prefill", prefill, 1))
    print(table("decode", decode, steps))
    busy = sum(seconds for _, seconds in decode.values()) / steps if decode else None
    print(f"a decode step: {wall * 1e3:.2f} ms by the clock" + (f", kernels {busy * 1e3:.2f} ms" if busy else ""))
    # Waiting for the device is in "read": a step of which little is left there is bound by the host.
    print("the host in it: " + ", ".join(f"{part} {seconds * 1e3:.2f} ms" for part, seconds in host.items()))
    if arguments.output:
        figures = {
            "device": jax.devices()[0].device_kind,
            "devices": arguments.tensor_parallel_size,
            "quantization": arguments.quantization,
            "wall": wall,
            "busy": busy,
            "host": host,
            "prefill": prefill,
            "decode": decode,
        }
        pathlib.Path(arguments.output).write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def _prefilling(llm) -> bool:
    return any(not request.output_token_ids for request in llm.engine.scheduler.running)


def kernels_of(directory: str) -> dict[str, tuple[float, float]]:
    """Kernel -> (launches, seconds) of a device, the mean over them where there are several, by the devices' streams of
    a profile; empty on a CPU, which has none. Collectives are among them, their waiting included.
    """
    from jax.profiler import ProfileData

    found: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    devices = 0
    for file in pathlib.Path(directory).rglob("*.xplane.pb"):
        for plane in ProfileData.from_file(str(file)).planes:
            if not plane.name.startswith("/device:"):
                continue
            streams = [line for line in plane.lines if line.name.startswith("Stream")]
            devices += bool(streams)
            for stream in streams:
                for event in stream.events:
                    entry = found[event.name]
                    entry[0] += 1
                    entry[1] += event.duration_ns / 1e9
    return {name: (count / devices, seconds / devices) for name, (count, seconds) in found.items()}


def table(what: str, kernels: dict[str, tuple[float, float]], steps: int, most: int = 30) -> str:
    """Kernels by kind, numbers taken off their names, longest first."""
    if not kernels:
        return f"{what}: the profile has no kernels of a device"
    kinds: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for name, (count, seconds) in kernels.items():
        kind = kinds[re.sub(r"[._]\d+$", "", name)[:70]]
        kind[0] += count
        kind[1] += seconds
    total = sum(seconds for _, seconds in kinds.values())
    lines = [f"{what}: {total / steps * 1e3:.2f} ms of kernels a {'step' if steps > 1 else 'run'}"]
    for name, (count, seconds) in sorted(kinds.items(), key=lambda item: -item[1][1])[:most]:
        lines.append(f"  {seconds / steps * 1e6:10.1f} us {seconds / total:6.1%} {count / steps:8.1f} x  {name}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_as_process(main)
