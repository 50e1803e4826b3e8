"""Presets: they load, have the shapes of the models that they are named for, and ship with the package."""

import json
import math
import pathlib

import jax
import pytest

from gdnjax import assets
from gdnjax.assets import EMBEDDED_MODEL, PRESETS, SAME_AS, config_file
from gdnjax.config import AttentionConfig, DeltaConfig, LayerKind, MlpKind, ModelConfig, MoeConfig
from gdnjax.config.quantization import Quantization
from gdnjax.models import abstract_params

BILLION = 1e9

FP8 = "-fp8"

SIZES = {
    "qwen3.5-0.8b": 0.8,
    "qwen3.5-2b": 2,
    "qwen3.5-4b": 4,
    "qwen3.5-9b": 9,
    "qwen3.5-27b": 27,
    "qwen3.5-35b-a3b": 35,
    "qwen3.5-122b-a10b": 122,
    "qwen3.5-397b-a17b": 397,
    "qwen3-next-80b-a3b": 80,
    "deepseek-v3": 671,
    "kimi-linear-48b-a3b": 49,
    "olmo-hybrid-7b": 7,
}
SIZES |= {name: SIZES[name.removesuffix(FP8)] for name in PRESETS if name.endswith(FP8)}

HYBRIDS = tuple(name for name in PRESETS if name.startswith("qwen"))

PUBLISHED_TOTALS = {"qwen3.5-0.8b": 0.87, "qwen3.5-2b": 2.27, "qwen3.5-4b": 4.66, "qwen3.5-9b": 9.65}
"""Billions of parameters in the published files: with the MTP head and the vision encoder."""


def num_parameters(config, *, mtp=False):
    leaves = jax.tree.leaves(abstract_params(config, 1, config.dtype, mtp=mtp))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def test_every_file_is_a_preset():
    files = (pathlib.Path(assets.__file__).parent / "presets").glob("*.json")
    assert {file.stem for file in files} == set(PRESETS) == set(SIZES)


@pytest.mark.parametrize("name", HYBRIDS)
def test_preset_has_the_hybrid_pattern(name):
    config = ModelConfig.from_hf(config_file(name))
    assert config.num_layers % 4 == 0
    period = (LayerKind.DELTA,) * 3 + (LayerKind.ATTENTION,)
    assert config.layer_kinds == period * (config.num_layers // 4)
    mlp = MlpKind.MOE if config.moe else MlpKind.DENSE
    assert set(config.mlp_kinds) == {mlp}
    assert bool(config.moe) == ("-a" in name)
    assert config.delta.key_head_dim == config.delta.value_head_dim == 128
    assert config.max_position_embeddings == 262_144
    assert config.dtype == "bfloat16"
    assert config.mtp_layers == 1


@pytest.mark.short_cases("qwen3.5-9b", "qwen3.5-35b-a3b")
@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_as_many_parameters_as_its_name_says(name):
    """Names are rounded, by 6% at most."""
    count = num_parameters(ModelConfig.from_hf(config_file(name)))
    assert count / BILLION == pytest.approx(SIZES[name], rel=0.065)


@pytest.mark.parametrize("name", PUBLISHED_TOTALS)
def test_rest_of_the_published_parameters_is_a_vision_encoder(name):
    """An MTP head of another number of layers, or an untied head, would leave a rest that no encoder has."""
    count = num_parameters(ModelConfig.from_hf(config_file(name)), mtp=True)
    assert 0.09 < PUBLISHED_TOTALS[name] - count / BILLION < 0.47


def test_largest_preset_is_exact():
    config = ModelConfig.from_hf(config_file("qwen3.5-397b-a17b"))
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (60, 4096, 248_320)
    assert (config.num_delta_layers, config.num_attention_layers) == (45, 15)
    assert config.delta == DeltaConfig(
        num_key_heads=16, num_value_heads=64, key_head_dim=128, value_head_dim=128, conv_kernel=4
    )
    assert config.attention == AttentionConfig(
        num_heads=32, num_kv_heads=2, head_dim=256, rotary_dim=64, rope_theta=1e7
    )
    assert config.moe == MoeConfig(
        num_experts=512,
        experts_per_token=10,
        intermediate_size=1024,
        shared_intermediate_size=1024,
        normalise_top_k=True,
    )
    assert not config.tie_word_embeddings


def test_deepseek_v3_is_exact():
    """671.03 billion parameters, as its card and its files have them, and 11.6 more in the MTP head, beside its copies
    of embedding and head."""
    config = ModelConfig.from_hf(config_file("deepseek-v3"))
    assert (config.num_layers, config.hidden_size, config.vocab_size, config.intermediate_size) == (
        61,
        7168,
        129_280,
        18_432,
    )
    assert (config.num_attention_layers, config.num_delta_layers, config.mtp_layers) == (61, 0, 1)
    assert config.mlp_kinds == (MlpKind.DENSE,) * 3 + (MlpKind.MOE,) * 58
    assert config.max_position_embeddings == 163_840
    attention = config.attention
    widths = (attention.q_lora_rank, attention.kv_lora_rank, attention.qk_nope_head_dim, attention.qk_rope_head_dim)
    assert (attention.num_heads, *widths, attention.v_head_dim) == (128, 1536, 512, 128, 64, 128)
    assert attention.scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert (attention.yarn.factor, attention.yarn.original_context, attention.yarn.attention_factor) == (40, 4096, 1)
    assert config.moe == MoeConfig(
        num_experts=256,
        experts_per_token=8,
        intermediate_size=2048,
        shared_intermediate_size=2048,
        normalise_top_k=True,
        scoring="sigmoid",
        routed_scaling=2.5,
        correction_bias=True,
        num_groups=8,
        top_k_groups=4,
        shared_gate=False,
    )
    assert num_parameters(config) == 671_026_419_200
    assert num_parameters(config, mtp=True) - num_parameters(config) == 11_610_068_224


def test_olmo_hybrid_is_exact():
    """As many parameters as its publisher's tests count: 7,430,870,688."""
    config = ModelConfig.from_hf(config_file("olmo-hybrid-7b"))
    assert config.layer_kinds == ((LayerKind.DELTA,) * 3 + (LayerKind.ATTENTION,)) * 8
    assert (config.delta.key_head_dim, config.delta.value_head_dim, config.delta.beta_scale) == (96, 192, 2.0)
    assert (config.attention.num_heads, config.attention.num_kv_heads, config.attention.head_dim) == (30, 30, 128)
    assert (config.attention.rope_theta, config.max_position_embeddings, config.mtp_layers) == (None, 65_536, 0)
    assert num_parameters(config) == 7_430_870_688


@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith(FP8)])
def test_preset_of_fp8_files_differs_in_how_weights_are_stored_alone(name):
    stored, plain = (json.loads(config_file(file).read_text()) for file in (name, name.removesuffix(FP8)))
    assert stored.pop("quantization_config")["quant_method"] == "fp8"
    assert stored == plain
    found = ModelConfig.from_hf(config_file(name)).quantization
    assert found == Quantization(method="fp8", codes="float8_e4m3fn", grids=((128, 128),))


@pytest.mark.parametrize("name", SAME_AS)
def test_name_of_a_later_model_stands_for_its_preset(name):
    assert SAME_AS[name] in PRESETS
    assert name.split("-", 1)[1] == SAME_AS[name].split("-", 1)[1], "the sizes are the same"
    assert config_file(name) == config_file(SAME_AS[name])


def test_config_file_takes_names_files_and_directories(tmp_path):
    assert config_file(EMBEDDED_MODEL).name == "config.json"
    file = tmp_path / "config.json"
    file.write_text("{}")
    assert config_file(file) == config_file(tmp_path) == config_file(str(tmp_path)) == file


def test_unknown_configuration_is_an_error_that_names_the_presets(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file.*tiny.*qwen3\.5-9b"):
        config_file("qwen3.5-10b")
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        config_file(tmp_path)
