"""How a checkpoint's weights are quantised: from the quantization_config of a config.json to a `Quantization`, and such
an object for files that are written. No jax.

The formats, by quant_method: `fp8` (fine-grained FP8, as Qwen and DeepSeek publish it), `quark` (AMD),
`compressed-tensors` (vLLM's llm-compressor), `gptq`, `awq`. What is said of activations is without effect: they are not
quantised here. Nor are lists of modules read that are left alone: a tensor is quantised where its scale is there.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

WHOLE = 0
"""In a grid: all of an axis has one scale."""

BLOCK = (128, 128)
"""Weights of one scale, rows by columns, where a block is not said to be of another size."""

GRIDS: dict[str, tuple[int, int]] = {"fp8": BLOCK, "fp8_per_channel": (1, WHOLE)}
"""FP8 as it is published -> the weights that share a scale."""


def cell_of(size: int, cell: int, *, cut: bool) -> int:
    """How many of the `size` places that one rank has of an axis share a scale, where `cell` of all of it do. On an
    axis that ranks `cut`, so many that every rank has whole cells.
    """
    if cell == WHOLE:
        return size
    return math.gcd(cell, size) if cut else min(cell, size)


INSTEAD = (
    "use a checkpoint in bfloat16, FP8 (fp8, quark, compressed-tensors), int8 or int4 (compressed-tensors, gptq, awq)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
    """What the tensors of a quantised weight are.

    method      quant_method, as config.json has it
    codes       "float8_e4m3fn", "int8", or "int4": eight numbers in each int32
    grids       (rows, columns) of weights that share a scale; with several, a scale's shape says which is meant
    symmetric   codes stand around zero; otherwise there are zero points
    zero_shift  what is added to a stored zero point
    """

    method: str
    codes: str
    grids: tuple[tuple[int, int], ...]
    symmetric: bool = True
    zero_shift: int = 0


def read_quantization(raw: dict[str, Any]) -> Quantization:
    """The quantization_config of a config.json. Raises ValueError for what cannot be read, with what can."""
    method = raw.get("quant_method")
    parse = PARSERS.get(method) if isinstance(method, str) else None
    if parse is None:
        raise _unsupported(f"quant_method {method!r}")
    return parse(raw)


def write_quantization(quantization: str, left_alone: Sequence[str]) -> dict[str, Any]:
    """The quantization_config of a file with weights as a name of GRIDS says. `left_alone`: modules that have none."""
    if quantization == "fp8":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(BLOCK),
            "modules_to_not_convert": list(left_alone),
        }
    numbers = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**numbers, "strategy": "channel", "dynamic": False},
        "input_activations": {**numbers, "strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(left_alone),
    }


def without_quantization(content: dict[str, Any]) -> dict[str, Any]:
    """A config.json less what it says of how weights are stored."""
    content = {key: value for key, value in content.items() if key != "quantization_config"}
    if isinstance(text := content.get("text_config"), dict):
        content["text_config"] = {key: value for key, value in text.items() if key != "quantization_config"}
    return content


def _unsupported(what: str) -> ValueError:
    return ValueError(f"quantization_config: {what} is not supported; {INSTEAD}")


def _one_of(where: str, key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise _unsupported(f"{where}{key}={value!r} (allowed: {', '.join(map(repr, allowed))})")


def _object(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"quantization_config: {where} must be a JSON object, got {value!r}")
    return value


def _size(where: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"quantization_config: {where} must be an integer above 0, got {value!r}")
    return value


def _block(where: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"quantization_config: {where} must be two integers, got {value!r}")
    return _size(where, value[0]), _size(where, value[1])


def _fine_grained(raw: dict[str, Any]) -> Quantization:
    """quant_method fp8."""
    _one_of("", "fmt", raw.get("fmt", "e4m3"), ("e4m3", "float8_e4m3fn"))
    block = raw.get("weight_block_size", BLOCK)
    grid = (WHOLE, WHOLE) if block is None else _block("weight_block_size", block)
    return Quantization(method="fp8", codes="float8_e4m3fn", grids=(grid,))


def _quark(raw: dict[str, Any]) -> Quantization:
    layers = _object("layer_quant_config", raw.get("layer_quant_config") or {})
    groups = {"global_quant_config": raw.get("global_quant_config"), **layers}
    grids = []
    for name, group in groups.items():
        weight = _object(f"{name}.weight", _object(name, group).get("weight"))
        where = f"{name}.weight."
        _one_of(where, "dtype", weight.get("dtype"), ("fp8_e4m3",))
        _one_of(where, "symmetric", weight.get("symmetric", True), (True, None))
        _one_of(where, "is_dynamic", weight.get("is_dynamic", False), (False,))
        scheme = weight.get("qscheme")
        _one_of(where, "qscheme", scheme, ("per_channel", "per_block", "per_tensor"))
        if scheme == "per_channel":
            _one_of(where, "ch_axis", weight.get("ch_axis", 0), (0,))
        block = _block(f"{where}block_size", weight.get("block_size") or BLOCK)
        grids.append({"per_channel": (1, WHOLE), "per_block": block, "per_tensor": (WHOLE, WHOLE)}[str(scheme)])
    return Quantization(method="quark", codes="float8_e4m3fn", grids=tuple(dict.fromkeys(grids)))


# Type and bits of compressed-tensors -> the codes, and the format that stores them.
_COMPRESSED = {
    "float8": ("float8_e4m3fn", "float-quantized"),
    "int8": ("int8", "int-quantized"),
    "int4": ("int4", "pack-quantized"),
}


def _compressed_tensors(raw: dict[str, Any]) -> Quantization:
    groups = _object("config_groups", raw.get("config_groups"))
    if not groups:
        raise ValueError("quantization_config: config_groups is empty")
    found = []
    for name, group in groups.items():
        where = f"config_groups.{name}.weights"
        weights = _object(where, _object(f"config_groups.{name}", group).get("weights"))
        kind, bits, form = weights.get("type"), weights.get("num_bits"), group.get("format") or raw.get("format")
        if f"{kind}{bits}" not in _COMPRESSED:
            raise _unsupported(f"{where} of {bits} bits of the type {kind!r} ({form})")
        codes, its_form = _COMPRESSED[f"{kind}{bits}"]
        _one_of(f"config_groups.{name}.", "format", form, (its_form,))
        _one_of(f"{where}.", "actorder", weights.get("actorder"), (None, False, "static", "weight"))
        _one_of(f"{where}.", "dynamic", weights.get("dynamic", False), (False, None))
        strategy = weights.get("strategy")
        _one_of(f"{where}.", "strategy", strategy, ("channel", "group", "block", "tensor"))
        if strategy == "group":
            grid = (1, _size(f"{where}.group_size", weights.get("group_size")))
        elif strategy == "block":
            grid = _block(f"{where}.block_structure", weights.get("block_structure"))
        else:
            grid = (1, WHOLE) if strategy == "channel" else (WHOLE, WHOLE)
        symmetric = weights.get("symmetric", True)
        _one_of(f"{where}.", "symmetric", symmetric, (True, False) if codes == "int4" else (True,))
        found.append((codes, grid, symmetric))
    if len({(codes, symmetric) for codes, _, symmetric in found}) > 1:
        raise _unsupported(f"config_groups of several kinds of weights ({', '.join(sorted({f[0] for f in found}))})")
    codes, _, symmetric = found[0]
    grids = tuple(dict.fromkeys(grid for _, grid, _ in found))
    return Quantization(method="compressed-tensors", codes=codes, grids=grids, symmetric=symmetric)


def _group(raw: dict[str, Any]) -> tuple[int, int]:
    size = raw.get("group_size")
    return (1, WHOLE) if size == -1 else (1, _size("group_size", size))


def _gptq(raw: dict[str, Any]) -> Quantization:
    _one_of("", "bits", raw.get("bits"), (4,))
    _one_of("", "desc_act", raw.get("desc_act", False), (False,))
    overridden = [pattern for pattern in _object("dynamic", raw.get("dynamic") or {}) if not pattern.startswith("-:")]
    if overridden:
        raise _unsupported(f"dynamic={', '.join(overridden)}")
    form = raw.get("checkpoint_format", "gptq")
    _one_of("", "checkpoint_format", form, ("gptq", "gptq_v2"))
    shift = 1 if form == "gptq" else 0
    return Quantization(method="gptq", codes="int4", grids=(_group(raw),), symmetric=False, zero_shift=shift)


def _awq(raw: dict[str, Any]) -> Quantization:
    _one_of("", "bits", raw.get("bits", raw.get("w_bit")), (4,))
    _one_of("", "version", str(raw.get("version", "gemm")).lower(), ("gemm",))
    _one_of("", "zero_point", raw.get("zero_point", True), (True,))
    return Quantization(method="awq", codes="int4", grids=(_group(raw),), symmetric=False)


PARSERS = {
    "fp8": _fine_grained,
    "quark": _quark,
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
}
