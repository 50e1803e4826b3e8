"""What is read of a quantization_config, and what is refused by name with what can be read instead."""

import pytest

from gdnjax.config.quantization import WHOLE, Quantization, read_quantization

CHANNEL = {"dtype": "fp8_e4m3", "qscheme": "per_channel", "ch_axis": 0, "is_dynamic": False, "symmetric": True}


def _quark(weight, **layers):
    return {
        "quant_method": "quark",
        "global_quant_config": {"weight": weight, "input_tensors": {"dtype": "fp8_e4m3", "is_dynamic": True}},
        "layer_quant_config": {name: {"weight": weight} for name, weight in layers.items()},
    }


def _compressed(form, *groups, **weights):
    groups = groups or (weights,)
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {f"group_{i}": {"targets": ["Linear"], "weights": group} for i, group in enumerate(groups)},
    }


FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}

READ = {
    "blocks unless said otherwise": (
        {"quant_method": "fp8"},
        Quantization(method="fp8", codes="float8_e4m3fn", grids=((128, 128),)),
    ),
    "one scale": (
        {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
        Quantization(method="fp8", codes="float8_e4m3fn", grids=((WHOLE, WHOLE),)),
    ),
    "layers of another scheme": (
        _quark(CHANNEL, **{"*q_proj": CHANNEL | {"qscheme": "per_block"}, "*k_proj": CHANNEL}),
        Quantization(method="quark", codes="float8_e4m3fn", grids=((1, WHOLE), (128, 128))),
    ),
    "int4 with zero points": (
        _compressed("pack-quantized", **INT4 | {"symmetric": False, "actorder": "static"}),
        Quantization(method="compressed-tensors", codes="int4", grids=((1, 128),), symmetric=False),
    ),
    "groups of two strategies": (
        _compressed("float-quantized", FLOAT8, FLOAT8 | {"strategy": "tensor"}),
        Quantization(method="compressed-tensors", codes="float8_e4m3fn", grids=((1, WHOLE), (WHOLE, WHOLE))),
    ),
    "zero points less one": (
        {"quant_method": "gptq", "bits": 4, "group_size": -1, "desc_act": False, "dynamic": {"-:.*mlp.gate$": {}}},
        Quantization(method="gptq", codes="int4", grids=((1, WHOLE),), symmetric=False, zero_shift=1),
    ),
    "zero points as they are": (
        {"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "gptq_v2"},
        Quantization(method="gptq", codes="int4", grids=((1, 64),), symmetric=False),
    ),
    "older names": (
        {"quant_method": "awq", "w_bit": 4, "group_size": 128, "version": "GEMM"},
        Quantization(method="awq", codes="int4", grids=((1, 128),), symmetric=False),
    ),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_read(name):
    raw, expected = READ[name]
    assert read_quantization(raw) == expected


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}

REFUSED = {
    "no method": ({"bits": 4}, "quant_method None is not supported; use a checkpoint in bfloat16, FP8"),
    "method": ({"quant_method": "modelopt"}, "quant_method 'modelopt' is not supported"),
    "method of no word": ({"quant_method": ["fp8"]}, r"quant_method \['fp8'\] is not supported"),
    "other codes": ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt='e5m2' .*allowed: 'e4m3', 'float8_e4m3fn'"),
    "block": (
        {"quant_method": "fp8", "weight_block_size": [128]},
        r"weight_block_size must be two integers, got \[128\]",
    ),
    "empty block": (
        {"quant_method": "fp8", "weight_block_size": [128, 0]},
        "weight_block_size must be an integer above 0, got 0",
    ),
    "MXFP4": (_quark({"dtype": "fp4", "qscheme": "per_group"}), "global_quant_config.weight.dtype='fp4'"),
    "MXFP4 in some layers": (_quark(CHANNEL, **{"*experts*": {"dtype": "fp4"}}), r"\*experts\*.weight.dtype='fp4'"),
    "columns": (_quark(CHANNEL | {"ch_axis": 1}), "ch_axis=1"),
    "asymmetric FP8": (_quark(CHANNEL | {"symmetric": False}), "symmetric=False"),
    "no weights": ({"quant_method": "quark"}, "global_quant_config must be a JSON object, got None"),
    "no groups": ({"quant_method": "compressed-tensors", "config_groups": {}}, "config_groups is empty"),
    "NVFP4": (
        _compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        r"config_groups.group_0.weights of 4 bits of the type 'float' \(nvfp4-pack-quantized\)",
    ),
    "format": (_compressed("marlin-24", **INT4), "format='marlin-24' .*allowed: 'pack-quantized'"),
    "act-order": (_compressed("pack-quantized", **INT4 | {"actorder": "group"}), "actorder='group'"),
    "strategy": (_compressed("float-quantized", **FLOAT8 | {"strategy": "token"}), "strategy='token'"),
    "group size": (
        _compressed("pack-quantized", **INT4 | {"group_size": None}),
        "group_size must be an integer above 0",
    ),
    "asymmetric int8": (
        _compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False),
        "symmetric=False",
    ),
    "mixture": (
        {
            **_compressed("float-quantized", FLOAT8, INT4),
            "config_groups": {
                "a": {"weights": FLOAT8, "format": "float-quantized"},
                "b": {"weights": INT4, "format": "pack-quantized"},
            },
        },
        r"config_groups of several kinds of weights \(float8_e4m3fn, int4\)",
    ),
    "gptq bits": (GPTQ | {"bits": 8}, "bits=8 .*allowed: 4"),
    "desc_act": (GPTQ | {"desc_act": True}, "desc_act=True"),
    "bits by module": (GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}}, r"dynamic=\+:\.\*down"),
    "marlin": (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
    "no group": ({"quant_method": "gptq", "bits": 4}, "group_size must be an integer above 0, got None"),
    "gemv": (AWQ | {"version": "gemv"}, "version='gemv'"),
    "no zero points": (AWQ | {"zero_point": False}, "zero_point=False"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_named(name):
    raw, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"quantization_config: .*{message}"):
        read_quantization(raw)
