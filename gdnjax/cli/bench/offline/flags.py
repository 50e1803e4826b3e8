"""Flags that the commands share which measure engines of one process. Imports no jax."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from gdnjax.assets import EMBEDDED_MODEL
from gdnjax.cli.bench.offline.sizes import Sizes
from gdnjax.cli.command import add_device_flags, add_process_flags

SIZES = {
    "batches": ("batches", "requests that decode together"),
    "padded": ("padded", "fewer that decode in the next larger batch's bucket"),
    "num_requests": ("requests", "requests, all there from the beginning"),
    "input_len": ("input_len", "tokens of a prompt"),
    "output_len": ("output_len", "output tokens of a request"),
    "max_num_batched_tokens": ("batched_tokens", "prompt tokens of a step"),
    "checkpoints": ("checkpoints", "slots for the prefix cache"),
    "repeat": ("repeat", "prompts that are timed, of which the median is shown"),
}
"""Flags that are sizes: the field of Sizes, and what it is."""


def add_size_flags(add: Callable[..., Any], default: Sizes, names: Sequence[str], small: Sizes | None = None) -> None:
    """The flags of SIZES so named. `add` is an argparse group's add_argument; `small` has the defaults of the embedded
    model.
    """

    def shown(value: Any) -> str:
        return ",".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)

    for name in names:
        field, what = SIZES[name]
        value = getattr(default, field)
        several = isinstance(value, tuple)
        usual = shown(value) + ("" if small is None else f"; of the embedded model {shown(getattr(small, field))}")
        add(
            f"--{name.replace('_', '-')}",
            type=whole_numbers if several else int,
            metavar="N,N" if several else "N",
            help=f"{what} (default: {usual})",
        )


def given_sizes(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Fields of Sizes: those flags of SIZES that were given."""
    return {SIZES[name][0]: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def whole_numbers(text: str) -> tuple[int, ...]:
    """What "64,16,1" says, each number once."""
    try:
        return tuple(dict.fromkeys(int(item) for item in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"numbers with commas between them, got {text!r}") from None


def add_model_flags(add: Callable[..., Any]) -> None:
    """Which model, and its weights. `add` is an argparse group's add_argument."""
    from gdnjax.config import DTYPES

    add("--model", metavar="DIR", help="checkpoint directory, or tiny (default: tiny, the embedded model)")
    add(
        "--random-weights",
        dest="config",
        metavar="PRESET",
        help="in its place random weights: a preset (gdnjax memory --list) or config.json",
    )
    add("--layers", type=int, metavar="N", help="of random weights; fewer than the model has for a quick look")
    add("--dtype", choices=DTYPES, default="auto", help="of weights and activations; auto: the checkpoint's")
    add(
        "--quantization",
        choices=("fp8", "fp8_per_channel", "dequantized"),
        help="weights in eight bits: fp8_per_channel, with a scale for each output; fp8, of random weights, in blocks "
        "of 128 x 128; dequantized, of a checkpoint: none (default: as the checkpoint has them)",
    )


def is_embedded(arguments: argparse.Namespace) -> bool:
    """Whether the model is the one in the package."""
    return arguments.config is None and arguments.model in (None, EMBEDDED_MODEL)


def add_engine_flags(add: Callable[..., Any]) -> None:
    """Devices, kernels, numbers and memory of the engines, and the output."""
    from gdnjax.config import KERNELS, KV_CACHE_DTYPES, STATE_LAYOUTS
    from gdnjax.config.engine import SSM_DTYPES

    add("--quantize-activations", action="store_true", help="W8A8 in prefill; for fp8_per_channel")
    add_device_flags(add)
    add_process_flags(add)
    add("--kernels", choices=KERNELS, default="auto", help="which implementation of the ops runs (default: auto)")
    add("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto", help="of keys and values (default: the model's)")
    add("--ssm-dtype", choices=SSM_DTYPES, default="float32", help="of the recurrent state (default: float32)")
    add("--state-layout", choices=STATE_LAYOUTS, help="of the recurrent state (default: the engine's)")
    add("--memory-fraction", type=float, metavar="F", help="share of a GPU's memory, 0 to 1 (default: 0.9)")
    add("--seed", type=int, default=0, metavar="N", help="of random weights (default: 0)")
    add("--output", metavar="FILE", help="also write all figures there, as JSON, after each of them")
