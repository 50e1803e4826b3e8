"""Quantised checkpoints load as what their codes and scales stand for, to the bit, whatever the ranks cut."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from gdnjax import sharding
from gdnjax.checkpoint import coded_formats, convert, load_params, open_source, opened
from gdnjax.checkpoint.quantised import QuantisedSource, weights_of
from gdnjax.checkpoint.sources import read_whole
from gdnjax.config.quantization import read_quantization
from gdnjax.models import abstract_params, partition
from gdnjax.quantized import CodeFormat, Quantized
from tests import quantised
from tests.checkpoint import tiny

pytestmark = pytest.mark.usefixtures("quickly_compiled")

BLOCK = [5, 6]
"""Neither divides a dimension, nor what a rank holds of it: blocks are partial, and cut."""

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": BLOCK}
QUARK = {"quant_method": "quark", "layer_quant_config": {}, "exclude": ["lm_head"]}
QUARK_WEIGHT = {"dtype": "fp8_e4m3", "qscheme": "per_channel", "ch_axis": 0, "is_dynamic": False, "symmetric": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False, "sym": False}


def _compressed(form, **weights):
    groups = {"group_0": {"targets": ["Linear"], "weights": {"symmetric": True, **weights}, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


def _by_row(name, weight, *, flat=False):
    tensors, values = quantised.fp8(name, weight, rows=1, columns=weight.shape[-1], scale=np.float32, suffix="_scale")
    if flat:
        tensors[f"{name}_scale"] = tensors[f"{name}_scale"][..., 0]
    return tensors, values


def _whole(name, weight):
    tensors, values = quantised.fp8(name, weight, rows=weight.shape[0], columns=weight.shape[1])
    return tensors | {f"{name}_scale_inv": tensors[f"{name}_scale_inv"].reshape(())}, values


def _of_module(write, **options):
    return lambda name, weight: write(name.removesuffix(".weight"), weight, **options)


_blocks = functools.partial(quantised.fp8, rows=BLOCK[0], columns=BLOCK[1])

FORMATS = {
    "fp8, bfloat16 scales": (FP8, _blocks),
    "fp8, float32 scales": (FP8, functools.partial(_blocks, scale=np.float32)),
    "fp8, ue8m0 scales": (FP8 | {"scale_fmt": "ue8m0"}, functools.partial(_blocks, scale=np.uint8)),
    "fp8, one scale": (FP8 | {"weight_block_size": None}, _whole),
    "quark, by channel": (
        QUARK | {"global_quant_config": {"weight": QUARK_WEIGHT}},
        functools.partial(_by_row, flat=True),
    ),
    "quark, by block": (
        QUARK | {"global_quant_config": {"weight": QUARK_WEIGHT | {"qscheme": "per_block", "block_size": BLOCK}}},
        functools.partial(_blocks, scale=np.float32, suffix="_scale"),
    ),
    "compressed-tensors, FP8_DYNAMIC": (
        _compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        _by_row,
    ),
    "compressed-tensors, FP8_BLOCK": (
        _compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=BLOCK),
        functools.partial(_blocks, suffix="_scale"),
    ),
    "compressed-tensors, int8": (
        _compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
        quantised.int8,
    ),
    "compressed-tensors, int4": (
        _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=8),
        _of_module(quantised.packed, group=8, symmetric=True),
    ),
    "compressed-tensors, int4 with zero points": (
        _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=8, symmetric=False),
        _of_module(quantised.packed, group=8, symmetric=False),
    ),
    "gptq": (GPTQ, _of_module(quantised.gptq, group=8)),
    "gptq, version 2": (
        GPTQ | {"checkpoint_format": "gptq_v2"},
        _of_module(quantised.gptq, group=8, v2=True, g_idx=False),
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True, "version": "gemm"},
        _of_module(quantised.awq, group=8),
    ),
}

WIDE = dataclasses.replace(
    tiny.DENSE,
    hidden_size=16,
    intermediate_size=24,
    delta=dataclasses.replace(tiny.DENSE.delta, key_head_dim=4, value_head_dim=8),
)
MODELS = {
    "dense": (WIDE, {}),
    "moe": (
        dataclasses.replace(
            WIDE,
            model_type="qwen3_5_moe",
            mlp_kinds=tiny.MOE.mlp_kinds,
            moe=dataclasses.replace(tiny.MOE.moe, intermediate_size=8),
        ),
        {"fused": False},
    ),
}
MODELS["next"] = (
    dataclasses.replace(MODELS["moe"][0], model_type="qwen3_next", interleaved_projections=True),
    {"fused": False, "prefix": "model."},
)


def _write(directory, stored, method):
    """A checkpoint and the same with its weights as they are. Returns the configuration and what was quantised."""
    raw, write = FORMATS[method]
    codes, values, weights = {}, {}, []
    for name, tensor in stored.items():
        if quantised.is_quantised(name, tensor):
            tensors, values[name] = write(name, tensor)
            codes |= tensors
            weights.append(name)
        else:
            codes[name] = values[name] = tensor
    tiny.write_sharded(directory / "codes", codes)
    tiny.write_single(directory / "values", values)
    return read_quantization(raw), weights


@functools.cache
def _abstract(cfg, tp, mtp):
    return abstract_params(cfg, tp, "float32", mtp=mtp)


def _load(directory, cfg, tp, *, mtp=False, quantization="dequantized"):
    abstract = _abstract(dataclasses.replace(cfg, quantization=None), tp, mtp)
    with opened(directory, cfg, abstract, sharding.make_mesh(tp)) as stored:
        if coded := coded_formats(stored, quantization):
            abstract = abstract_params(cfg, tp, "float32", mtp=mtp, coded=coded)
        return load_params(stored, abstract, progress=False)


def _assert_equal(one, other):
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: np.testing.assert_array_equal(
            np.asarray(a), np.asarray(b), err_msg=sharding.path_name(path)
        ),
        one,
        other,
    )


@pytest.mark.short_cases
@pytest.mark.parametrize(("model", "tp"), [("dense", 1), ("dense", 4), ("moe", 4), ("next", 4)])
@pytest.mark.parametrize("method", FORMATS)
def test_parameters_are_code_times_scale(tmp_path, method, model, tp):
    cfg, how = MODELS[model]
    stored = tiny.stored_tensors(tiny.model_tensors(cfg), cfg, **how)
    quantization, weights = _write(tmp_path, stored, method)
    params, report = _load(tmp_path / "codes", dataclasses.replace(cfg, quantization=quantization), tp)
    expected, plain = _load(tmp_path / "values", cfg, tp)
    _assert_equal(params, expected)
    assert report.quantised == {quantization.codes: len(weights)}
    assert (report.loaded, plain.quantised) == (plain.loaded, {})
    told = f"quantised: {len(weights)} of {quantization.codes}, 0 of them of the MTP head, {len(weights)} of them deq"
    assert told in str(report)


def _on_ranks(leaf, tp, name):
    """What each rank has, of codes the numbers that they stand for there."""
    spec = partition.spec_of(name)

    def split(array):
        parts = [array]
        for axis, what in enumerate(spec):
            parts = np.split(np.asarray(array), tp, axis) if what else parts
        return parts

    if not isinstance(leaf, Quantized):
        return split(leaf)
    both = zip(*(split(part) if any(spec) else [part] for part in (leaf.codes, leaf.scale)), strict=True)
    return [_numbers(codes, scale, leaf.grid) for codes, scale in both]


def _numbers(codes, scale, grid):
    """Code times scale in float32, in numpy: each rank's shape of each weight would be a program."""
    for axis, cell in zip((-2, -1), grid, strict=True):
        if scale.shape[axis] > 1:
            scale = np.repeat(scale, cell, axis=axis)
    return codes.astype(np.float32) * scale[..., : codes.shape[-2], : codes.shape[-1]]


# A format of each kind; the test above has all of them.
@pytest.mark.short_cases(
    "fp8, bfloat16 scales-dense-1",
    "fp8, ue8m0 scales-next-4",
    "fp8, one scale-dense-4",
    "quark, by channel-moe-4",
    "compressed-tensors, int8-next-4",
    "compressed-tensors, int4 with zero points-moe-4",
    "gptq-dense-4",
    "awq-next-4",
)
@pytest.mark.parametrize(
    ("method", "model", "tp"),
    [("fp8, bfloat16 scales", "dense", 1), *itertools.product(FORMATS, ("dense", "moe", "next"), (4,))],
)
def test_numbers_on_the_ranks_are_those_of_the_file(tmp_path, method, model, tp):
    """They stand for the same numbers, to the bit, whatever a rank cuts of a block, and are codes wherever the file
    has codes.
    """
    cfg, how = MODELS[model]
    stored = tiny.stored_tensors(tiny.model_tensors(cfg), cfg, **how)
    quantization, _ = _write(tmp_path, stored, method)
    cfg = dataclasses.replace(cfg, quantization=quantization)
    params, report = _load(tmp_path / "codes", cfg, tp, quantization="auto")
    expected, of_numbers = _load(tmp_path / "codes", cfg, tp)
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda leaf: isinstance(leaf, Quantized))[0]
    held = {sharding.path_name(path): leaf for path, leaf in leaves}
    plain = {sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(expected)[0]}
    assert list(held) == list(plain)
    for name, leaf in held.items():
        for one, other in zip(_on_ranks(leaf, tp, name), _on_ranks(plain[name], tp, name), strict=True):
            np.testing.assert_array_equal(one, other, err_msg=name)
        # All that is quantised in a file is a projection.
        assert isinstance(leaf, Quantized) == (
            partition.CODED.fullmatch(name) is not None and "proj_a" not in name and "proj_b" not in name
        ), name
    assert report.dequantised == 0
    code = "float8_e4m3fn" if quantization.codes == "float8_e4m3fn" else "int8"
    assert {str(leaf.codes.dtype) for leaf in held.values() if isinstance(leaf, Quantized)} == {code}
    assert report.parameter_bytes < of_numbers.parameter_bytes


@pytest.mark.short_cases
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("method", ["fp8, float32 scales", "compressed-tensors, FP8_DYNAMIC"])
def test_whole_experts_keep_the_blocks_of_the_file(tmp_path, method, tp):
    """No rank cuts any: an expert's grid, codes and scales are those of one rank, bit for bit."""
    cfg, how = MODELS["moe"]
    # A width that no two ranks could share.
    cfg = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, num_experts=4, intermediate_size=7))
    quantization, _ = _write(tmp_path, tiny.stored_tensors(tiny.model_tensors(cfg), cfg, **how), method)
    cfg = dataclasses.replace(cfg, quantization=quantization)
    expected = _by_name(_load(tmp_path / "codes", cfg, 1, quantization="auto")[0])
    whole = cfg.with_expert_parallel()
    params, report = _load(tmp_path / "codes", whole, tp, quantization="auto")
    held = {name: leaf for name, leaf in _by_name(params).items() if ".experts." in name}
    assert len(held) == 4
    assert report.dequantised == 0
    for name, leaf in held.items():
        assert isinstance(leaf, Quantized)
        assert leaf.grid == expected[name].grid
        for part in ("codes", "scale"):
            found, one = getattr(leaf, part), np.asarray(getattr(expected[name], part))
            assert np.asarray(found).tobytes() == one.tobytes()
            assert {shard.data.shape for shard in found.addressable_shards} == {(4 // tp, *one.shape[1:])}
    # Made of the numbers, they are those of one rank as well.
    plain = dataclasses.replace(cfg, quantization=None)
    made = _by_name(_load(tmp_path / "values", plain.with_expert_parallel(), tp, quantization="fp8_per_channel")[0])
    alone = _by_name(_load(tmp_path / "values", plain, 1, quantization="fp8_per_channel")[0])
    for name in held:
        _assert_equal(made[name], alone[name])


@pytest.mark.parametrize(
    "method", [name for name in FORMATS if "int4" not in name and not name.startswith(("gptq", "awq"))]
)
def test_codes_and_scales_are_those_of_the_file_bit_by_bit(tmp_path, method):
    """Where nothing is cut and rows are in the file's order; scales as float32."""
    cfg, how = MODELS["dense"]
    quantization, _ = _write(tmp_path, tiny.stored_tensors(tiny.model_tensors(cfg), cfg, **how), method)
    params, _ = _load(tmp_path / "codes", dataclasses.replace(cfg, quantization=quantization), 1, quantization="auto")
    held = _by_name(params)
    name = "layers.1.mlp.down_proj.weight"
    with open_source(tmp_path / "codes") as stored:
        (codes,) = (read_whole(stored, other) for other in stored.names() if other.endswith(name))
        (scale,) = (read_whole(stored, other) for other in stored.names() if f"{name}_scale" in other)
    assert np.asarray(held[name].codes).tobytes() == codes.tobytes()
    if scale.dtype == np.uint8:
        scale = np.exp2(scale.astype(np.float32) - 127)
    found = np.asarray(held[name].scale)
    np.testing.assert_array_equal(found, scale.astype(np.float32).reshape(found.shape))


@pytest.mark.parametrize("method", [name for name in FORMATS if name.startswith("fp8, ") and "one" not in name])
def test_experts_may_be_stored_as_one_tensor(tmp_path, method):
    """With scales of the same axes."""
    cfg, _ = MODELS["moe"]
    quantization, weights = _write(tmp_path, tiny.stored_tensors(tiny.model_tensors(cfg), cfg), method)
    assert any(name.endswith("experts.gate_up_proj") for name in weights)
    params, _ = _load(tmp_path / "codes", dataclasses.replace(cfg, quantization=quantization), 4)
    _assert_equal(params, _load(tmp_path / "values", cfg, 4)[0])


def test_weights_of_the_mtp_head_are_counted(tmp_path):
    cfg = dataclasses.replace(MODELS["moe"][0], mtp_layers=1)
    stored = tiny.stored_tensors(tiny.model_tensors(cfg, mtp=True), cfg, fused=False)
    quantization, weights = _write(tmp_path, stored, "fp8, bfloat16 scales")
    cfg = dataclasses.replace(cfg, quantization=quantization)
    _, report = _load(tmp_path / "codes", cfg, 1, mtp=True)
    of_head = sum(name.startswith("mtp.") for name in weights)
    assert of_head == 4 + 3 + 3 * 3
    assert (report.quantised, report.mtp_quantised) == ({"float8_e4m3fn": len(weights)}, of_head)
    _, report = _load(tmp_path / "codes", cfg, 1)
    assert (report.quantised, report.mtp_quantised) == ({"float8_e4m3fn": len(weights) - of_head}, 0)


@pytest.mark.thorough
@pytest.mark.parametrize("method", FORMATS)
def test_conversion_keeps_codes_and_scales_bit_for_bit(tmp_path, method):
    cfg, how = MODELS["dense"]
    quantization, _ = _write(tmp_path, tiny.stored_tensors(tiny.model_tensors(cfg), cfg, **how), method)
    convert(tmp_path / "codes", tmp_path / "orbax", progress=False)
    convert(tmp_path / "orbax", tmp_path / "again", progress=False)
    with open_source(tmp_path / "codes") as one, open_source(tmp_path / "again") as other:
        assert set(one.names()) == set(other.names())
        for name in one.names():
            assert (one.dtype(name), one.shape(name)) == (other.dtype(name), other.shape(name))
            assert read_whole(one, name).tobytes() == read_whole(other, name).tobytes(), name
    cfg = dataclasses.replace(cfg, quantization=quantization)
    _assert_equal(_load(tmp_path / "orbax", cfg, 2)[0], _load(tmp_path / "codes", cfg, 2)[0])


WEIGHT = np.random.default_rng(0).standard_normal((24, 16)).astype(np.float32)
NAME = "layers.0.mlp.down_proj.weight"
MODULE = NAME.removesuffix(".weight")


class _Tensors:
    """A source of tensors that are there."""

    def __init__(self, tensors):
        self.tensors = tensors

    def names(self):
        return tuple(self.tensors)

    def shape(self, name):
        return self.tensors[name].shape

    def dtype(self, name):
        return self.tensors[name].dtype

    def read(self, name, index):
        return self.tensors[name][index]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


def _drop(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def _put(name, tensor):
    return lambda tensors: tensors | {name: tensor}


DAMAGES = {
    "no scale": (
        "fp8, bfloat16 scales",
        _drop(f"{NAME}_scale_inv"),
        r"Tensors that have no scale: layers\.0\.mlp\.down_proj\.weight \(float8_e4m3fn\)",
    ),
    "no codes": (
        "fp8, bfloat16 scales",
        _drop(NAME),
        r"lack what belongs to them: .*down_proj\.weight_scale_inv \(no layers\.0\.mlp\.down_proj\.weight\)",
    ),
    "scale of another name": (
        "fp8, bfloat16 scales",
        lambda tensors: {name.replace("_scale_inv", "_scale"): tensor for name, tensor in tensors.items()},
        r"have no scale: layers\.0\.mlp\.down_proj\.weight \(float8_e4m3fn\)",
    ),
    "a scale too few": (
        "fp8, bfloat16 scales",
        lambda tensors: tensors | {f"{NAME}_scale_inv": tensors[f"{NAME}_scale_inv"][:-1]},
        r"weight_scale_inv is \(4, 3\) for weights \(24, 16\); expected one for each 5 x 6 of them",
    ),
    "codes that are none": (
        "fp8, bfloat16 scales",
        lambda tensors: tensors | {NAME: tensors[NAME].astype(np.float32)},
        r"down_proj\.weight is float32, expected float8_e4m3fn",
    ),
    "scales of integers": (
        "fp8, bfloat16 scales",
        lambda tensors: tensors | {f"{NAME}_scale_inv": tensors[f"{NAME}_scale_inv"].astype(np.int32)},
        r"weight_scale_inv is int32, expected one of float32, bfloat16, float16, uint8",
    ),
    "half precision beside": (
        "fp8, bfloat16 scales",
        _put("norm.weight", np.zeros(16, np.float16)),
        r"are neither float32 nor bfloat16: norm\.weight \(float16\)",
    ),
    "act-order": (
        "gptq",
        _put(f"{MODULE}.g_idx", np.random.default_rng(0).permutation(16).astype(np.int32) // 8),
        r"g_idx orders the inputs by activation, which is not supported",
    ),
    "act-order of compressed-tensors": (
        "compressed-tensors, int4",
        _put(f"{NAME}_g_idx", np.arange(16, dtype=np.int32)[::-1] // 8),
        r"weight_g_idx orders the inputs by activation",
    ),
    "no zero points": ("awq", _drop(f"{MODULE}.qzeros"), r"lack what belongs to them: .*scales \(no .*qzeros\)"),
    "zero points of another shape": (
        "awq",
        lambda tensors: tensors | {f"{MODULE}.qzeros": tensors[f"{MODULE}.qzeros"][:1]},
        r"qzeros is int32 \(1, 3\), expected int32 \(2, 3\)",
    ),
    "stored twice": ("gptq", _put(NAME, WEIGHT), r"are stored twice: layers\.0\.mlp\.down_proj\.weight"),
    "another shape": (
        "compressed-tensors, int4",
        _put(f"{NAME}_shape", np.array([24, 17])),
        r"weight_packed is \(24, 2\), and .*weight_shape says \(24, 17\)",
    ),
    "no matrix": (
        "fp8, one scale",
        lambda tensors: tensors | {NAME: tensors[NAME].reshape(-1)},
        r"down_proj\.weight has the shape \(384,\), which is no matrix",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_does_not_fit_is_named(name):
    method, damage, message = DAMAGES[name]
    raw, write = FORMATS[method]
    tensors, _ = write(NAME, WEIGHT)
    with pytest.raises(ValueError, match=message):
        weights_of(_Tensors(damage(tensors)), read_quantization(raw))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_among_codes_is_named(code):
    raw, write = FORMATS["fp8, bfloat16 scales"]
    tensors, _ = write(NAME, WEIGHT)
    bits = tensors[NAME].view(np.uint8).copy()
    bits[20, 3] = code
    tensors[NAME] = bits.view(quantised.FLOAT8)
    source = QuantisedSource(_Tensors(tensors), read_quantization(raw))
    source.read(NAME, (slice(0, 20), slice(0, 16)))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj\.weight: a code is NaN"):
        source.read(NAME, (slice(20, 24), slice(0, 16)))


def test_scales_of_what_is_not_quantised_here_are_left_out():
    """Of activations and of cached keys and values: weights are read, and nothing else."""
    raw, write = FORMATS["compressed-tensors, FP8_DYNAMIC"]
    tensors, values = write(NAME, WEIGHT)
    beside = {f"{MODULE}.input_scale": np.ones(1, np.float32), "layers.1.self_attn.k_scale": np.ones(1, np.float32)}
    source = QuantisedSource(_Tensors(tensors | beside), read_quantization(raw))
    assert source.names() == (NAME,)
    assert source.kind(NAME) == "float8_e4m3fn"
    np.testing.assert_array_equal(read_whole(source, NAME), values)


def test_codes_without_a_configuration_are_named():
    tensors, _ = FORMATS["fp8, bfloat16 scales"][1](NAME, WEIGHT)
    with pytest.raises(
        ValueError, match=r"without a quantization_config.*: float32, bfloat16.*down_proj\.weight \(float8"
    ):
        weights_of(_Tensors(tensors), None)


@pytest.mark.parametrize("method", FORMATS)
def test_any_slice_is_that_of_the_whole(method):
    raw, write = FORMATS[method]
    tensors, values = write(NAME, WEIGHT)
    source = QuantisedSource(_Tensors(tensors), read_quantization(raw))
    numbers = np.random.default_rng(1)
    for _ in range(50):
        bounds = [sorted(numbers.choice(size + 1, 2, replace=False).tolist()) for size in WEIGHT.shape]
        index = tuple(slice(*pair) for pair in bounds)
        np.testing.assert_array_equal(source.read(NAME, index), values[index])
    # The codes are near what they were made of.
    assert np.abs(values - WEIGHT).max() < {"int4": 0.3, "int8": 0.02}.get(read_quantization(raw).codes, 0.15)


def _by_name(params):
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda leaf: isinstance(leaf, Quantized))[0]
    return {sharding.path_name(path): leaf for path, leaf in leaves}


@pytest.mark.parametrize("method", [None, "fp8, bfloat16 scales"], ids=["numbers", "blocks"])
def test_weights_are_made_fp8_by_row_as_they_are_loaded(tmp_path, method):
    """Each row's largest number is the largest code, whatever a rank has of the row, and the error is what is said."""
    cfg, how = MODELS["moe"]
    stored = tiny.stored_tensors(tiny.model_tensors(cfg), cfg, **how)
    quantization, _ = _write(tmp_path, stored, method or "fp8, bfloat16 scales")
    directory = tmp_path / ("codes" if method else "values")
    cfg = dataclasses.replace(cfg, quantization=quantization if method else None)
    one, report = _load(directory, cfg, 1, quantization="fp8_per_channel")
    many, other = _load(directory, cfg, 4, quantization="fp8_per_channel")
    plain, plain_of_four = (_by_name(_load(directory, cfg, tp)[0]) for tp in (1, 4))
    one, many = _by_name(one), _by_name(many)
    off = size = 0.0
    coded = {name for name, leaf in one.items() if isinstance(leaf, Quantized)}
    assert "layers.0.linear_attn.in_proj_z.weight" in coded
    assert not any(name.endswith(("in_proj_a.weight", "in_proj_b.weight", "norm.weight")) for name in coded)
    for name in coded:
        (numbers,) = _on_ranks(one[name], 1, name)
        expected = np.asarray(plain[name])
        codes = np.asarray(one[name].codes).astype(np.float32)
        assert np.all(np.abs(codes).max(-1) == 448), name
        # Half a unit in the last of 4 bits, or of the smallest code.
        assert np.all(
            np.abs(numbers - expected) <= np.maximum(np.abs(expected) / 16, np.asarray(one[name].scale) / 1024)
        )
        off, size = off + np.sum((numbers - expected) ** 2), size + np.sum(expected**2)
        for part, of_four in zip(_on_ranks(many[name], 4, name), _on_ranks(plain_of_four[name], 4, name), strict=True):
            rows = {row.tobytes() for row in part.reshape(-1, part.shape[-1])}
            assert len(rows) > 1
            assert np.abs(part - of_four).max() < np.abs(of_four).max() / 16
    assert report.made_fp8 is not None
    assert report.made_fp8[0] == len(coded)
    assert report.made_fp8[1] == pytest.approx(np.sqrt(off / size), rel=1e-4)
    assert 0.01 < report.made_fp8[1] < 0.04
    assert f"made float8_e4m3fn by row: {len(coded)}, of a relative error of 0.0" in str(report)
    # q, k and v of a rank stand together, so only rows that no rank's order moves are compared as they are.
    name = "layers.1.self_attn.o_proj.weight"
    np.testing.assert_array_equal(np.asarray(one[name].codes), np.asarray(many[name].codes))
    np.testing.assert_array_equal(np.asarray(many[name].scale), np.repeat(np.asarray(one[name].scale), 4, axis=1))
    assert other.made_fp8 is not None


def test_codes_of_another_grid_than_the_checkpoint_has_are_named(tmp_path):
    cfg, how = MODELS["dense"]
    quantization, _ = _write(tmp_path, tiny.stored_tensors(tiny.model_tensors(cfg), cfg, **how), "fp8, float32 scales")
    cfg = dataclasses.replace(cfg, quantization=quantization)
    name = "layers.0.mlp.up_proj.weight"
    abstract = abstract_params(cfg, 1, "float32", coded={name: CodeFormat("float8_e4m3fn", (4, 4))})
    with (
        opened(tmp_path / "codes", cfg, abstract_params(cfg, 1, "float32"), sharding.make_mesh(1)) as open_checkpoint,
        pytest.raises(ValueError, match=r"another grid; .*layers\.0\.mlp\.up_proj\.weight \(float8_e4m3fn, 4 x 4\)"),
    ):
        load_params(open_checkpoint, abstract, progress=False)
    with pytest.raises(ValueError, match=r"cannot be held as codes: norm\.weight"):
        abstract_params(cfg, 1, "float32", coded={"norm.weight": CodeFormat("int8", (1, 1))})


def test_weight_of_which_a_part_has_no_codes_is_read_as_numbers(tmp_path):
    """As one expert that was left alone: the parameter is one array."""
    cfg, how = MODELS["moe"]
    raw, write = FORMATS["fp8, float32 scales"]
    tensors = {}
    for name, tensor in tiny.stored_tensors(tiny.model_tensors(cfg), cfg, **how).items():
        left_alone = "layers.0.mlp.experts.1.down_proj" in name or not quantised.is_quantised(name, tensor)
        tensors |= {name: tensor} if left_alone else write(name, tensor)[0]
    tiny.write_sharded(tmp_path, tensors)
    cfg = dataclasses.replace(cfg, quantization=read_quantization(raw))
    params, report = _load(tmp_path, cfg, 1, quantization="auto")
    params = _by_name(params)
    assert not isinstance(params["layers.0.mlp.experts.down_proj"], Quantized)
    assert isinstance(params["layers.1.mlp.experts.down_proj"], Quantized)
    # The two others of its three.
    assert report.dequantised == 2
    assert "2 of them dequantised as they were read" in str(report)
