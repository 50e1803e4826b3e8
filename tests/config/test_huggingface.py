"""Checkpoint configurations as transformers writes them: what is read, and what is refused."""

import json
import math

import pytest

from gdnjax import LayerKind, ModelConfig
from gdnjax.config import (
    MTP_KEYS,
    SUPPORTED_MODEL_TYPES,
    AttentionConfig,
    DeltaConfig,
    KimiDeltaConfig,
    LatentAttentionConfig,
    MlpKind,
    MoeConfig,
)
from gdnjax.config.quantization import Quantization
from tests.config.configurations import CLASSES, HYBRIDS, KINDS, from_hf, hf_dict

DELTA, ATTENTION = LayerKind.DELTA, LayerKind.ATTENTION


def test_every_supported_model_type_is_tested():
    assert set(CLASSES) == set(SUPPORTED_MODEL_TYPES)


def test_geometry_of_kimi_linear_is_read():
    """From transformers' names, and from those of the published files, whose numbers of layers begin with 1."""
    config = from_hf("kimi_linear")
    assert (config.layer_kinds, config.zero_centred_norms) == ((DELTA, ATTENTION, DELTA), False)
    assert config.delta == KimiDeltaConfig(num_heads=6, head_dim=16, conv_kernel=5)
    attention = config.attention
    assert (attention.kv_lora_rank, attention.q_lora_rank, attention.rope_theta) == (28, None, None)
    assert config.mlp_kinds == (MlpKind.DENSE, MlpKind.MOE, MlpKind.MOE)
    assert (config.moe.num_experts, config.moe.num_groups, config.moe.scoring) == (12, 3, "sigmoid")
    given = hf_dict("kimi_linear")
    ours = {"layer_types", "mlp_layer_types", "linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim"}
    published = {name: value for name, value in given.items() if name not in ours} | {
        "linear_attn_config": {
            "kda_layers": [1, 3],
            "full_attn_layers": [2],
            "num_heads": 6,
            "head_dim": 16,
            "short_conv_kernel_size": 5,
        },
        "first_k_dense_replace": 1,
        "rope_theta": 10000.0,
        "head_dim": 72,
    }
    assert ModelConfig.from_hf(published) == config


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_geometry_is_read_from_every_hybrid(model_type):
    config = from_hf(model_type)
    assert config.model_type == model_type
    assert (config.vocab_size, config.hidden_size, config.rms_norm_eps) == (401, 48, 1e-5)
    assert config.layer_kinds == (DELTA, ATTENTION, DELTA)
    assert config.delta == DeltaConfig(
        num_key_heads=2, num_value_heads=6, key_head_dim=16, value_head_dim=24, conv_kernel=5
    )
    assert config.attention == AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=32, rotary_dim=8, rope_theta=12345.0
    )
    assert (config.max_position_embeddings, config.dtype, config.eos_token_ids) == (1024, "float32", (399,))
    assert not config.tie_word_embeddings
    assert config.interleaved_projections == (model_type == "qwen3_next")


def test_geometry_of_latent_attention_is_read():
    config = from_hf("deepseek_v3")
    assert (config.vocab_size, config.hidden_size, config.rms_norm_eps) == (401, 48, 1e-5)
    assert (config.layer_kinds, config.delta) == ((ATTENTION,) * 3, None)
    assert config.mlp_kinds == (MlpKind.DENSE, MlpKind.MOE, MlpKind.MOE)
    assert config.attention == LatentAttentionConfig(
        num_heads=4,
        q_lora_rank=20,
        kv_lora_rank=28,
        qk_nope_head_dim=14,
        qk_rope_head_dim=10,
        v_head_dim=18,
        rope_theta=12345.0,
        interleaved_rotary=True,
    )
    assert config.moe == MoeConfig(
        num_experts=12,
        experts_per_token=3,
        intermediate_size=16,
        shared_intermediate_size=32,
        normalise_top_k=True,
        scoring="sigmoid",
        routed_scaling=2.5,
        correction_bias=True,
        num_groups=3,
        top_k_groups=2,
        shared_gate=False,
    )
    assert not config.zero_centred_norms
    assert (config.intermediate_size, config.mtp_layers, config.mtp_layer_names) == (72, 1, range(3, 4))
    other = from_hf("deepseek_v3", text={"q_lora_rank": None, "rope_interleave": False, "norm_topk_prob": False})
    assert (other.attention.q_lora_rank, other.attention.interleaved_rotary) == (None, False)
    assert not other.moe.normalise_top_k


@pytest.mark.parametrize(
    ("all_dim", "of_scores", "of_angles"), [(1.0, 1.87385, 1.0), (0.5, 1.40291, 1.15572), (None, 1.0, 1.36889)]
)
def test_yarn_scales_the_scores_of_latent_attention(all_dim, of_scores, of_angles):
    """(0.1 mscale_all_dim ln 40 + 1)^2, beside what cos and sin are multiplied by: published sizes, and others."""
    rope = {**YARN, "factor": 40.0, "mscale": 1.0} | ({} if all_dim is None else {"mscale_all_dim": all_dim})
    attention = from_hf("deepseek_v3", text={"rope_parameters": rope}).attention
    assert attention.score_factor == pytest.approx(of_scores, rel=1e-5)
    assert attention.scale == pytest.approx(of_scores * 24**-0.5, rel=1e-5)
    assert attention.yarn.attention_factor == pytest.approx(of_angles, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads of latent attention follows from others: 4; got 2"),
        ({"head_dim": 14}, "head_dim of latent attention follows from others: 10; got 14"),
        ({"qk_head_dim": 14}, "qk_head_dim of latent attention follows from others: 24; got 14"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 of latent attention; allowed: 1"),
        ({"kv_lora_rank": 0}, "kv_lora_rank must be an integer of at least 1, got 0"),
        ({"q_lora_rank": 0}, "q_lora_rank must be an integer of at least 1, got 0"),
        ({"layer_types": ["sliding_attention"] * 3}, "unsupported layer_types .*supported: .'full_attention'."),
        ({"n_group": 5}, "n_group=5 does not divide the 12 experts"),
        ({"n_group": 12}, "a group needs two experts or more, got n_group=12 of 12"),
        ({"topk_group": 4}, "topk_group must be between 1 and n_group=3, got 4"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 of 2 groups of 4 experts: allowed: 1 to 8"),
        ({"n_shared_experts": 0}, "n_shared_experts must be an integer of at least 1, got 0"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace must be an integer of at least 0, got -1"),
        ({"num_local_experts": 8}, "n_routed_experts is 12, and num_local_experts, which is another name of it, 8"),
        ({"num_mtp_layers": 2}, "num_nextn_predict_layers is 1, and num_mtp_layers, which is another name of it, 2"),
        ({"scoring_func": "softmax"}, 'unsupported scoring_func "softmax"; supported: "sigmoid"'),
        ({"topk_method": "greedy"}, 'unsupported topk_method "greedy"; supported: "noaux_tc"'),
        ({"moe_layer_freq": 2}, "unsupported moe_layer_freq 2; supported: 1"),
        ({"attention_bias": True}, "unsupported attention_bias true"),
    ],
)
def test_what_latent_attention_and_its_router_do_not_compute_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(hf_dict("deepseek_v3") | changes)


def test_plain_attention_and_its_neighbours_are_read():
    config = from_hf("olmo_hybrid")
    assert (config.layer_kinds, config.mlp_kinds) == ((DELTA, DELTA, ATTENTION), (MlpKind.DENSE,) * 3)
    assert config.delta == DeltaConfig(
        num_key_heads=3,
        num_value_heads=6,
        key_head_dim=12,
        value_head_dim=24,
        conv_kernel=5,
        beta_scale=2.0,
        norm_eps=1e-5,
    )
    assert config.attention == AttentionConfig(
        num_heads=4,
        num_kv_heads=2,
        head_dim=12,
        rotary_dim=None,
        rope_theta=None,
        output_gate=False,
        whole_norms=True,
    )
    assert (config.post_norm_kinds, config.zero_centred_norms) == ((ATTENTION,), False)
    assert (config.separate_projections, config.interleaved_projections) == (True, False)
    assert from_hf("olmo_hybrid", text={"linear_allow_neg_eigval": False}).delta.beta_scale == 1.0
    assert from_hf("olmo_hybrid", head_dim=20).attention.head_dim == 20
    with pytest.raises(ValueError, match="head_dim must be an integer of at least 1, got 0"):
        from_hf("olmo_hybrid", head_dim=0)


@pytest.mark.parametrize(
    ("rope", "theta"),
    [
        ({}, None),
        ({"rope_parameters": None}, None),
        ({"rope_parameters": {"rope_theta": None}}, None),
        ({"rope_theta": None}, None),
        ({"rope_theta": 777.0}, 777.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}, 777.0),
    ],
)
def test_nothing_is_rotated_where_no_rotation_is_stated(rope, theta):
    """transformers fills in a rope_theta where there is none; the published models were trained without rotation."""
    raw = hf_dict("olmo_hybrid")
    del raw["rope_parameters"]
    attention = ModelConfig.from_hf(raw | rope).attention
    assert (attention.rope_theta, attention.rotary_dim) == (theta, None if theta is None else 12)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "default"}, "rope settings without a rope_theta; state it, or null where nothing is rotated"),
        ({"rope_type": "yarn", "rope_theta": None, "factor": 2.0}, "rope settings with a rope_theta of null"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "unsupported partial_rotary_factor 0.5; supported: 1.0"),
    ],
)
def test_rope_settings_that_contradict_themselves_are_refused(rope, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(hf_dict("olmo_hybrid") | {"rope_parameters": rope})


def test_other_name_of_the_count_of_mtp_layers_is_read():
    raw = hf_dict("deepseek_v3")
    del raw["num_nextn_predict_layers"]
    assert ModelConfig.from_hf(raw | {"num_mtp_layers": 2}).mtp_layers == 2


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_5_text"])
def test_dense_models_have_dense_mlps(model_type):
    config = from_hf(model_type)
    assert config.mlp_kinds == (MlpKind.DENSE,) * 3
    assert (config.intermediate_size, config.moe) == (72, None)


@pytest.mark.parametrize("model_type", ["qwen3_5_moe", "qwen3_5_moe_text"])
def test_moe_models_have_experts_in_every_layer(model_type):
    config = from_hf(model_type)
    assert config.mlp_kinds == (MlpKind.MOE,) * 3
    assert config.moe == MoeConfig(
        num_experts=5, experts_per_token=2, intermediate_size=16, shared_intermediate_size=24, normalise_top_k=True
    )


def test_qwen3_next_places_experts_by_both_rules():
    assert from_hf("qwen3_next").mlp_kinds == (MlpKind.MOE, MlpKind.DENSE, MlpKind.MOE)
    assert not from_hf("qwen3_next").moe.normalise_top_k
    sparse = from_hf("qwen3_next", text={"mlp_only_layers": [], "decoder_sparse_step": 2, "norm_topk_prob": True})
    assert sparse.mlp_kinds == (MlpKind.DENSE, MlpKind.MOE, MlpKind.DENSE)
    assert sparse.moe.normalise_top_k
    without = from_hf("qwen3_next", text={"num_experts": 0})
    assert without.mlp_kinds == (MlpKind.DENSE,) * 3
    assert without.moe is None


def test_published_qwen3_next_spelling_is_read():
    """Rope settings at the top level, and an interval in the place of the layers' list."""
    raw = hf_dict("qwen3_next", text={"num_hidden_layers": 8, "layer_types": None, "mlp_only_layers": []})
    for name in ("rope_parameters", "layer_types", "dtype", "rope_scaling"):
        raw.pop(name, None)
    raw |= {
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
        "full_attention_interval": 4,
        "torch_dtype": "bfloat16",
        "rope_scaling": None,
    }
    config = ModelConfig.from_hf(raw)
    assert config.layer_kinds == ((DELTA,) * 3 + (ATTENTION,)) * 2
    assert (config.attention.rotary_dim, config.attention.rope_theta) == (8, 1e7)
    assert config.dtype == "bfloat16"


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_5_moe"])
@pytest.mark.parametrize("outside", [False, True, None])
@pytest.mark.parametrize("inside", [False, True, None])
def test_wrapper_ties_embeddings_in_either_place(model_type, outside, inside):
    raw = hf_dict(model_type)
    for place, value in ((raw, outside), (raw["text_config"], inside)):
        place.pop("tie_word_embeddings", None)
        if value is not None:
            place["tie_word_embeddings"] = value
    assert ModelConfig.from_hf(raw).tie_word_embeddings == bool(outside or inside)


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"])
@pytest.mark.parametrize("tied", [False, True])
def test_text_models_tie_embeddings_where_they_say_so(model_type, tied):
    assert from_hf(model_type, tie_word_embeddings=tied).tie_word_embeddings == tied


@pytest.mark.parametrize(("eos", "expected"), [(7, (7,)), ([7, 9], (7, 9)), (None, ())])
def test_eos_may_be_absent_one_or_several(eos, expected):
    assert from_hf("qwen3_5_text", eos_token_id=eos).eos_token_ids == expected


def test_every_supported_model_type_but_one_without_says_where_its_mtp_head_is_configured():
    assert set(MTP_KEYS) == set(SUPPORTED_MODEL_TYPES) - {"olmo_hybrid"}
    with pytest.raises(ValueError, match="needs a model with an MTP head"):
        from_hf("olmo_hybrid").require_mtp()


@pytest.mark.parametrize("model_type", MTP_KEYS)
@pytest.mark.parametrize("stated", [0, 1, 2])
def test_layers_of_the_mtp_head_are_read_under_the_family_s_key(model_type, stated):
    assert from_hf(model_type, text={MTP_KEYS[model_type].layers: stated}).mtp_layers == stated


@pytest.mark.parametrize("stated", [{}, {"mtp_num_hidden_layers": None, "num_nextn_predict_layers": None}])
@pytest.mark.parametrize("model_type", CLASSES)
def test_mtp_head_that_is_not_counted_is_that_of_the_family(model_type, stated):
    config = from_hf(model_type, text=stated)
    layers = int(model_type in ("qwen3_next", "deepseek_v3"))
    assert (config.mtp_layers, config.mtp_dedicated_embeddings) == (layers, False)


@pytest.mark.parametrize(("model_type", "key"), [("qwen3_5", "num_nextn_predict_layers"), ("qwen3_next", "mtp_layers")])
def test_key_of_another_family_counts_no_mtp_layers(model_type, key):
    assert from_hf(model_type, text={key: 3}).mtp_layers == MTP_KEYS[model_type].default


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_5_moe"])
@pytest.mark.parametrize(("inside", "outside", "layers"), [(1, 0, 1), (0, 1, 0), (None, 1, 1), (1, None, 1)])
def test_count_of_mtp_layers_in_a_wrapper_is_that_of_its_text_config(model_type, inside, outside, layers):
    raw = hf_dict(model_type)
    for place, value in ((raw, outside), (raw["text_config"], inside)):
        if value is not None:
            place["mtp_num_hidden_layers"] = value
    assert ModelConfig.from_hf(raw).mtp_layers == layers


@pytest.mark.parametrize("value", [-1, 1.0, "1", True])
@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_5_text", "qwen3_next"])
def test_count_of_mtp_layers_that_is_none_is_refused(model_type, value):
    key = MTP_KEYS[model_type].layers
    raw = hf_dict(model_type)
    raw.get("text_config", raw)[key] = value
    with pytest.raises(ValueError, match=f"{key} must be an integer of at least 0, got {value!r}"):
        ModelConfig.from_hf(raw)


@pytest.mark.parametrize("value", [1, "yes"])
def test_dedicated_embeddings_that_are_neither_true_nor_false_are_refused(value):
    with pytest.raises(ValueError, match=f"mtp_use_dedicated_embeddings must be true or false, got {value!r}"):
        ModelConfig.from_hf(hf_dict("qwen3_5_text") | {"mtp_use_dedicated_embeddings": value})


def test_config_is_read_from_directory_file_and_dict_alike(tmp_path):
    raw = hf_dict("qwen3_5_moe")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    expected = ModelConfig.from_hf(raw)
    assert ModelConfig.from_hf(tmp_path) == expected
    assert ModelConfig.from_hf(str(tmp_path)) == expected
    assert ModelConfig.from_hf(tmp_path / "config.json") == expected


@pytest.mark.parametrize("rope", [{}, {"rope_theta": 5e5, "type": "default"}])
def test_reading_does_not_change_the_dict(rope):
    """Nor what is in it: transformers completes rope settings in place."""
    raw = hf_dict("qwen3_5")
    raw["text_config"]["rope_parameters"] = rope
    before = json.dumps(raw)
    ModelConfig.from_hf(raw)
    assert json.dumps(raw) == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
def test_dtype_is_read_in_either_spelling(dtype, spelling):
    raw = hf_dict("qwen3_5_text")
    raw.pop("dtype", None)
    raw[spelling] = dtype
    assert ModelConfig.from_hf(raw).dtype == dtype


# Refused checkpoints.


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "qwen3_5_vision", "", None])
def test_unknown_model_type_is_named_with_the_supported(model_type):
    with pytest.raises(ValueError, match=f"unsupported model_type {model_type!r}; supported: deepseek_v3, .*next"):
        ModelConfig.from_hf(hf_dict("qwen3_5") | {"model_type": model_type})


def test_absent_model_type_is_refused():
    with pytest.raises(ValueError, match="unsupported model_type None"):
        ModelConfig.from_hf({"vocab_size": 5})


@pytest.mark.parametrize("inside", [False, True])
def test_quantization_is_read_wherever_a_wrapper_has_it(inside):
    """What is read of it: tests/config/test_quantization.py."""
    raw = hf_dict("qwen3_5")
    section = raw["text_config"] if inside else raw
    section["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [64, 32]}
    found = ModelConfig.from_hf(raw).quantization
    assert found == Quantization(method="fp8", codes="float8_e4m3fn", grids=((64, 32),))
    section["quantization_config"] = {"quant_method": "mxfp4"}
    with pytest.raises(ValueError, match="quant_method 'mxfp4' is not supported"):
        ModelConfig.from_hf(raw)
    section["quantization_config"] = "int8"
    with pytest.raises(ValueError, match="quantization_config must be a JSON object, got 'int8'"):
        ModelConfig.from_hf(raw)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "linear", "factor": 4.0}, "unsupported rope_type 'linear'; supported: default, yarn"),
        ({"rope_type": "dynamic", "factor": 4.0}, "unsupported rope_type 'dynamic'"),
        ({"type": "mrope", "mrope_section": [1, 1, 2]}, "unsupported rope_type 'mrope'"),
        ({"factor": 4.0}, "rope_type 'default' does not take 'factor'; allowed: finetuned, mrope_interleaved, "),
        ({"rope_type": "yarn", "factor": 4.0, "attn_factor": 1.0}, "rope_type 'yarn' does not take 'attn_factor'"),
        ({"rope_type": "yarn"}, "transformers refuses this configuration: .*factor"),
        ({"rope_type": "yarn", "factor": 0.5}, "factor must be a finite number of at least 1, got 0.5"),
        (
            {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 4096},
            "factor must be a finite number of at least 1, got 0.25",
        ),
        ({"rope_type": "yarn", "factor": "4"}, "factor must be a finite number of at least 1, got '4'"),
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 0}, "beta_fast must be above 0, got 0"),
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 1, "beta_slow": 2}, "beta_fast must be at least beta_slow"),
        ({"rope_type": "yarn", "factor": 4.0, "truncate": 1}, "truncate must be true or false, got 1"),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0}, "transformers|original_max"),
        ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1}, "YaRN needs a rope_theta above 1"),
        ({"rope_theta": 0}, "rope_theta must be above 0, got 0"),
        ({"rope_theta": math.inf}, "rope_theta must be a finite number"),
        ({"full_attention": {"rope_theta": 1e4}}, "rope settings by layer type are not supported"),
    ],
    ids=str,
)  # fmt: skip
def test_rope_settings_that_are_not_computed_are_refused(rope, message):
    raw = hf_dict("qwen3_5_text")
    raw["rope_parameters"] = {"rope_theta": 1e4, "partial_rotary_factor": 0.25} | rope
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(raw)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 777.0}


@pytest.mark.parametrize("model_type", HYBRIDS)
@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_rope_settings_are_read_where_transformers_reads_them(model_type, name):
    raw = hf_dict(model_type)
    text = raw.get("text_config", raw)
    del text["rope_parameters"]
    text |= {name: YARN, "partial_rotary_factor": 0.5}
    config = ModelConfig.from_hf(raw)
    assert (config.attention.rope_theta, config.attention.rotary_dim) == (777.0, 16)
    assert (config.attention.yarn.factor, config.attention.yarn.original_context) == (4.0, 512)
    assert config.max_position_embeddings == 2048


def test_rope_settings_in_two_places_are_refused():
    """transformers would take the second and drop the first, rope_theta included."""
    raw = hf_dict("qwen3_5")
    raw["text_config"]["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0}
    with pytest.raises(ValueError, match=r"both text_config\.rope_parameters and text_config\.rope_scaling are given"):
        ModelConfig.from_hf(raw)


@pytest.mark.parametrize("name", ["rope_theta", "partial_rotary_factor", "original_max_position_embeddings"])
@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
def test_rope_setting_that_contradicts_itself_is_refused(name, place):
    rope = YARN | {"partial_rotary_factor": 0.25}
    raw = hf_dict("qwen3_next") | {"rope_parameters": None, place: rope}
    assert ModelConfig.from_hf(raw | {name: rope[name]}) == ModelConfig.from_hf(raw)
    with pytest.raises(ValueError, match=f"^{name} is 768, and {rope[name]} among the rope settings"):
        ModelConfig.from_hf(raw | {name: 768})


@pytest.mark.parametrize(
    "beside",
    [
        {"rope_parameters": YARN},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_theta": 5e5},
        {"partial_rotary_factor": 0.5},
        {"hidden_size": 64},
        {"rms_norm_eps": 1e-6},
        {"max_position_embeddings": 4096},
    ],
    ids=str,
)
def test_setting_that_a_wrapper_states_beside_its_text_config_must_be_the_same(beside):
    """transformers reads it there for nothing."""
    raw = hf_dict("qwen3_5")
    (name,) = beside
    with pytest.raises(ValueError, match=f"{name} stands beside text_config, which says otherwise or nothing; put it"):
        ModelConfig.from_hf(raw | beside)
    text = raw["text_config"]
    same = {key: text[key] for key in ("hidden_size", "rms_norm_eps", "rope_parameters")} | {"rope_theta": 12345.0}
    assert ModelConfig.from_hf(raw | same) == ModelConfig.from_hf(raw)


def test_wrapper_of_another_model_is_refused():
    raw = hf_dict("qwen3_5")
    raw["text_config"]["model_type"] = "llama"
    with pytest.raises(ValueError, match="text_config of model_type 'qwen3_5' must be of 'qwen3_5_text', got 'llama'"):
        ModelConfig.from_hf(raw)


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_next"])
@pytest.mark.parametrize(
    "change",
    [{"layer_types": list(KINDS[:2])}, {"hidden_size": "48"}, {"layer_types": None, "full_attention_interval": 0}],
    ids=str,
)
def test_what_transformers_refuses_is_one_line(change, model_type):
    raw = hf_dict(model_type)
    raw.get("text_config", raw).update(change)
    with pytest.raises(ValueError, match="transformers refuses this configuration: ") as caught:
        ModelConfig.from_hf(raw)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("eps", [math.nan, math.inf, 0.0, -1e-6])
def test_eps_that_is_none_is_refused(eps):
    with pytest.raises(ValueError, match="rms_norm_eps must be"):
        from_hf("qwen3_5_text", rms_norm_eps=eps)


@pytest.mark.parametrize("eos", [401, [399, -1], 999999])
def test_eos_outside_the_vocabulary_is_refused(eos, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf_dict("qwen3_5", text={"eos_token_id": 3})))
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["text_config"]["eos_token_id"] = eos
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"config\.json: eos_token_id must be of ids from 0 to 400, .*got (401|-1|9)"):
        ModelConfig.from_hf(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "unsupported attention_bias true; supported: false"),
        ({"hidden_act": "gelu"}, 'unsupported hidden_act "gelu"; supported: "silu"'),
        ({"output_gate_type": "sigmoid"}, 'unsupported output_gate_type "sigmoid"; supported: "swish", "silu", null'),
        ({"num_experts": 4}, "model_type 'qwen3_5_text' has no experts, got num_experts=4"),
        ({"dtype": "float16"}, "unsupported checkpoint dtype 'float16'; supported: float32, bfloat16"),
        ({"dtype": None, "torch_dtype": "float8_e4m3fn"}, "unsupported checkpoint dtype"),
        (
            {"linear_num_value_heads": 5},
            "linear_num_value_heads must be a multiple of linear_num_key_heads, got 5 and 2",
        ),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim must be at least 2, got 1"),
        ({"num_attention_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads, got 3 and 2"),
        ({"head_dim": 20}, "the rotary part of a head must be even and at most head_dim=20, got 5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_engine_does_not_compute_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(hf_dict("qwen3_5_text") | change)


def test_unknown_layer_type_is_refused():
    with pytest.raises(ValueError, match="sliding_attention"):
        ModelConfig.from_hf(hf_dict("qwen3_5_text") | {"layer_types": ["sliding_attention"] * 3})


@pytest.mark.parametrize("name", ["text_config", "quantization_config"])
def test_section_of_another_type_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be a JSON object, got 'int8'"):
        ModelConfig.from_hf(hf_dict("qwen3_5_text") | {name: "int8"})


def test_directory_without_config_says_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json here; expected a Hugging Face checkpoint directory"):
        ModelConfig.from_hf(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        ModelConfig.from_hf(tmp_path / "absent")


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[1]", "expected a JSON object, got list")])
def test_damaged_config_names_the_file(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        ModelConfig.from_hf(tmp_path)
