"""Bytes of temporaries of a model's compiled steps, by rows, drafts and sampler. Nothing runs, no weights are read."""

if __name__ == "__main__":
    from gdnjax.cli import interrupt

    interrupt.expected()

import argparse
import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

from gdnjax.cli.command import add_device_flags, devices, exit_status, prepare_environment, run_as_process

DESCRIPTION = """\
Compiles the steps that an engine plans its workspace by, each in its largest bucket, from shapes alone: for the devices
of this machine, or with --arch for an AMD GPU that is not there (pip install -e ".[rocm-gate]"). The whole model's
steps need as much as those of its first layers do: one layer follows another in the same bytes.
"""

EXAMPLES = """\
examples:
  python scripts/measure_workspace.py --rows 8 --drafts 0
  python scripts/measure_workspace.py --arch gfx942 --rows 128 256 --drafts 0 3 --acceptance shared_noise rejection

Exit status: 0 done, 2 an error.
"""

MIB = 1 << 20

ARCHITECTURES = ("gfx942", "gfx950")

STEPS = ("prefill", "decode, plain sampler", "decode, full sampler", "seal", "admit")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", default="qwen3.5-9b", metavar="NAME|PATH", help="a preset or a config.json (default: qwen3.5-9b)")
    add("--layers", type=int, default=4, metavar="N", help="of the model, from the first on (default: 4)")
    add("--rows", type=int, nargs="+", default=[256], metavar="N", help="requests of a decode step (default: 256)")
    add("--drafts", type=int, nargs="+", default=[0, 3], metavar="K", help="drafts of a request (default: 0 3)")
    add("--acceptance", nargs="+", default=["shared_noise"], metavar="RULE", help="shared_noise, rejection, or both")
    add("--tokens", type=int, default=1024, metavar="N", help="tokens of a prefill step (default: 1024)")
    add_device_flags(add)
    add("--arch", choices=ARCHITECTURES, help="compile for this chip (default: for the devices of this machine)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Prints a table; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    return exit_status("measure_workspace.py", lambda: measure(arguments))


def measure(arguments: argparse.Namespace) -> int:
    """A line for each rule, rows and drafts, as it comes."""
    cases = [
        (rule, rows, drafts)
        for rule, rows, drafts in itertools.product(arguments.acceptance, arguments.rows, arguments.drafts)
        if drafts or rule == "shared_noise"
    ]
    with devices_of(arguments.arch, arguments.tensor_parallel_size) as (found, backend):
        print("| rows | drafts | rule | logits, MiB | " + " | ".join(STEPS) + " | full sampler / logits |")
        print("|---:|---:|---|---:|" + "---:|" * (len(STEPS) + 1))
        for case in cases:
            print(line(arguments, found, backend, *case), flush=True)
    return 0


@contextlib.contextmanager
def devices_of(arch: str | None, ranks: int) -> Iterator[tuple[list[Any], Any]]:
    """The devices to compile for, and what runs the ops there."""
    if arch is None:
        prepare_environment()
        import jax

        from gdnjax import backend

        yield jax.devices(), backend.of_device("auto", jax.devices()[0])
        return
    import rocm_gate

    with rocm_gate.compiler():
        from rocm import compiling

        from gdnjax.backend import Backend

        yield compiling.devices(arch, ranks), Backend("pallas", arch)


def line(arguments: argparse.Namespace, found: list[Any], backend: Any, rule: str, rows: int, drafts: int) -> str:
    """One line of the table."""
    from gdnjax.assets import config_file
    from gdnjax.cli.bench.serving.engines import first_layers
    from gdnjax.config import EngineConfig, ModelConfig
    from gdnjax.models import abstract_params, build_model
    from gdnjax.serving import planning
    from gdnjax.sharding import make_mesh

    config = first_layers(ModelConfig.from_hf(config_file(arguments.config)), arguments.layers)
    if arguments.enable_expert_parallel:
        config = config.with_expert_parallel()
    engine = EngineConfig(
        max_num_seqs=rows,
        max_num_batched_tokens=arguments.tokens,
        num_speculative_tokens=drafts,
        draft_acceptance=rule,
        **devices(arguments),
    )
    dtype, mtp, tp = config.dtype, drafts > 0, engine.tensor_parallel_size
    model = build_model(config, dtype, tp, mtp=mtp, backend=backend)
    params = abstract_params(config, tp, dtype, mtp=mtp)
    length = engine.length_within(config.max_position_embeddings)
    sizes = planning.workspaces(model, engine, make_mesh(tp, found), length, params)
    logits = rows * (1 + drafts) * config.shard(tp).vocab_size * 4
    columns = [f"{sizes[name] / MIB:,.0f}" for name in STEPS]
    return (
        f"| {rows} | {drafts} | {rule if drafts else ''} | {logits / MIB:,.0f} | {' | '.join(columns)} | "
        f"{sizes['decode, full sampler'] / logits:.2f} |"
    )


if __name__ == "__main__":
    run_as_process(main)
