"""Checkpoint configurations as transformers writes them, and engine settings: what is read, and what is refused."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import transformers

from gdnjax import EngineConfig, LayerKind, ModelConfig, config_keys
from gdnjax.config import MTP_KEYS, SUPPORTED_MODEL_TYPES, AttentionConfig, DeltaConfig, MlpKind, MoeConfig

DELTA, ATTENTION = LayerKind.DELTA, LayerKind.ATTENTION
KINDS = ("linear_attention", "full_attention", "linear_attention")

TEXT = {
    "vocab_size": 401,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "layer_types": list(KINDS),
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 5,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 399,
    "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0, "partial_rotary_factor": 0.25},
}
DENSE = {"intermediate_size": 72}
MOE = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}
CLASSES = {
    "qwen3_5": ("Qwen3_5Config", "Qwen3_5TextConfig", DENSE),
    "qwen3_5_text": (None, "Qwen3_5TextConfig", DENSE),
    "qwen3_5_moe": ("Qwen3_5MoeConfig", "Qwen3_5MoeTextConfig", MOE),
    "qwen3_5_moe_text": (None, "Qwen3_5MoeTextConfig", MOE),
    "qwen3_next": (None, "Qwen3NextConfig", {**DENSE, **MOE, "mlp_only_layers": [1], "norm_topk_prob": False}),
}


def hf_dict(model_type, text=None, **outside):
    """config.json of a model type, as transformers' own class writes it."""
    wrapper, inner, more = CLASSES[model_type]
    arguments = {**TEXT, **more, **(text or {})}
    if wrapper is None:
        config = getattr(transformers, inner)(**arguments, dtype="float32")
    else:
        config = getattr(transformers, wrapper)(text_config=arguments, dtype="float32")
    return json.loads(json.dumps(config.to_dict())) | outside


def from_hf(model_type, **options):
    return ModelConfig.from_hf(hf_dict(model_type, **options))


def test_every_supported_model_type_is_tested():
    assert set(CLASSES) == set(SUPPORTED_MODEL_TYPES)


@pytest.mark.parametrize("model_type", CLASSES)
def test_geometry_is_read_from_every_model_type(model_type):
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


def test_every_supported_model_type_says_where_its_mtp_head_is_configured():
    assert set(MTP_KEYS) == set(SUPPORTED_MODEL_TYPES)


@pytest.mark.parametrize("model_type", CLASSES)
@pytest.mark.parametrize("stated", [0, 1, 2])
def test_layers_of_the_mtp_head_are_read_under_the_family_s_key(model_type, stated):
    assert from_hf(model_type, text={MTP_KEYS[model_type].layers: stated}).mtp_layers == stated


@pytest.mark.parametrize("stated", [{}, {"mtp_num_hidden_layers": None, "num_nextn_predict_layers": None}])
@pytest.mark.parametrize("model_type", CLASSES)
def test_mtp_head_that_is_not_counted_is_none_and_in_qwen3_next_one_layer(model_type, stated):
    config = from_hf(model_type, text=stated)
    assert (config.mtp_layers, config.mtp_dedicated_embeddings) == (int(model_type == "qwen3_next"), False)


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


@pytest.mark.parametrize("model_type", [name for name in CLASSES if name != "qwen3_next"])
def test_mtp_head_with_an_embedding_of_its_own_is_refused_only_where_it_is_wanted(model_type):
    shared, own = (
        from_hf(model_type, text={"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": dedicated})
        for dedicated in (False, True)
    )
    assert (shared.mtp_dedicated_embeddings, own.mtp_dedicated_embeddings) == (False, True)
    shared.require_mtp()
    with pytest.raises(ValueError, match=r"mtp_use_dedicated_embeddings=true.*allowed: num_speculative_tokens=0"):
        own.require_mtp()


@pytest.mark.parametrize(
    ("model_type", "text", "message"),
    [
        ("qwen3_5", {}, r"num_speculative_tokens above 0.*counts none \(mtp_num_hidden_layers\)"),
        ("qwen3_5_moe_text", {"mtp_num_hidden_layers": 0}, r"counts none \(mtp_num_hidden_layers\)"),
        ("qwen3_5_text", {"mtp_num_hidden_layers": 2}, "of one layer, got mtp_num_hidden_layers=2"),
        ("qwen3_next", {"num_nextn_predict_layers": 0}, r"counts none \(num_nextn_predict_layers\)"),
        ("qwen3_next", {"num_nextn_predict_layers": 3}, "of one layer, got num_nextn_predict_layers=3"),
    ],
)
def test_model_without_an_mtp_head_to_run_says_so(model_type, text, message):
    with pytest.raises(ValueError, match=message) as raised:
        from_hf(model_type, text=text).require_mtp()
    assert str(raised.value).endswith("allowed: num_speculative_tokens=0")


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
    with pytest.raises(ValueError, match=f"unsupported model_type {model_type!r}; supported: qwen3_5, .*qwen3_next"):
        ModelConfig.from_hf(hf_dict("qwen3_5") | {"model_type": model_type})


def test_absent_model_type_is_refused():
    with pytest.raises(ValueError, match="unsupported model_type None"):
        ModelConfig.from_hf({"vocab_size": 5})


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", None])
def test_quantised_checkpoint_is_refused_by_its_method(inside, method):
    raw = hf_dict("qwen3_5")
    (raw["text_config"] if inside else raw)["quantization_config"] = (
        {"bits": 4} if method is None else {"quant_method": method}
    )
    with pytest.raises(
        ValueError, match=f"quantised checkpoints are not supported yet.*{method or 'unknown'}.*use the"
    ):
        ModelConfig.from_hf(raw)


@pytest.mark.parametrize("model_type", CLASSES)
def test_every_key_of_transformers_is_in_the_tables(model_type, caplog):
    """So none is ignored without a decision, whatever another version of transformers adds."""
    wrapper, inner, _ = CLASSES[model_type]
    tables = (config_keys.HONOURED, set(config_keys.FIXED), set(config_keys.WITHOUT_EFFECT))
    for name in (wrapper, inner):
        keys = {field.name for field in dataclasses.fields(getattr(transformers, name))} if name else set()
        assert not keys - set().union(*tables)
    assert sum(map(len, tables)) == len(set().union(*tables)), "a key is in one table"
    with caplog.at_level("WARNING", logger="gdnjax"):
        from_hf(model_type)
    assert not caplog.records


@pytest.mark.parametrize("inside", [False, True])
def test_key_that_nobody_knows_is_named_in_a_warning(inside, caplog):
    raw = hf_dict("qwen3_5")
    (raw["text_config"] if inside else raw)["frobnication"] = 3
    with caplog.at_level("WARNING", logger="gdnjax"):
        ModelConfig.from_hf(raw)
    (record,) = caplog.records
    assert record.message.endswith("without effect: text_config.frobnication" if inside else "effect: frobnication")


@pytest.mark.parametrize("name", config_keys.FIXED)
@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_next"])
def test_key_that_changes_numbers_is_refused_with_any_other_value(name, model_type):
    allowed = config_keys.FIXED[name]
    for value in (*allowed, "another", 7, allowed[0] is False):
        raw = hf_dict(model_type)
        raw.get("text_config", raw)[name] = value
        if value in allowed:
            if value is not None or allowed[0] is None:
                ModelConfig.from_hf(raw)
        else:
            with pytest.raises(ValueError, match=rf"unsupported (text_config\.)?{name} .*; supported: "):
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


@pytest.mark.parametrize("model_type", CLASSES)
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


def test_more_experts_a_token_than_there_are_is_refused():
    with pytest.raises(ValueError, match="num_experts_per_tok must be between 1 and num_experts=5, got 6"):
        from_hf("qwen3_5_moe", text={"num_experts_per_tok": 6})


def test_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="at least one layer"):
        dataclasses.replace(from_hf("qwen3_5"), layer_kinds=(), mlp_kinds=())


def test_unknown_layer_type_is_refused():
    with pytest.raises(ValueError, match="sliding_attention"):
        ModelConfig.from_hf(hf_dict("qwen3_5_text") | {"layer_types": ["sliding_attention"] * 3})


@pytest.mark.parametrize("name", ["linear_num_key_heads", "linear_value_head_dim", "num_key_value_heads"])
def test_geometry_of_nothing_is_refused(name):
    with pytest.raises(ValueError, match="must be above 0, got 0"):
        ModelConfig.from_hf(hf_dict("qwen3_5_text") | {name: 0})


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


# Ranks.


def test_shard_divides_heads_widths_and_vocabulary():
    config = from_hf("qwen3_5_moe")
    rank = config.shard(2)
    assert (rank.delta.num_key_heads, rank.delta.num_value_heads) == (1, 3)
    assert (rank.attention.num_heads, rank.attention.num_kv_heads) == (2, 1)
    assert (rank.moe.intermediate_size, rank.moe.shared_intermediate_size) == (8, 12)
    assert rank.vocab_size == 201
    assert config.padded_vocab_size(2) == 402
    assert from_hf("qwen3_5").shard(2).intermediate_size == 36
    assert config.shard(1) == config


def test_kv_heads_are_replicated_beyond_their_number():
    attention = AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=32, rotary_dim=8, rope_theta=1e4)
    assert attention.shard(8) == dataclasses.replace(attention, num_heads=1, num_kv_heads=1)


@pytest.mark.parametrize(
    ("model_type", "text", "tp", "message"),
    [
        ("qwen3_5", {}, 0, "tensor_parallel_size must be at least 1, got 0"),
        ("qwen3_5", {}, 5, "tensor_parallel_size=5 does not divide intermediate_size=72"),
        ("qwen3_5", {}, 4, "tensor_parallel_size=4 does not divide linear_num_key_heads=2; allowed: divisors of 2"),
        (
            "qwen3_5",
            {"linear_num_key_heads": 6},
            3,
            "tensor_parallel_size=3 does not divide num_attention_heads=4; allowed: divisors of 4",
        ),
        (
            "qwen3_5",
            {"linear_num_key_heads": 6, "num_attention_heads": 12, "num_key_value_heads": 4},
            6,
            "tensor_parallel_size=6 and num_key_value_heads=4: one must divide the other",
        ),
        (
            "qwen3_5_moe",
            {"moe_intermediate_size": 15},
            2,
            "tensor_parallel_size=2 does not divide moe intermediate_size=15",
        ),
        (
            "qwen3_5_moe",
            {"shared_expert_intermediate_size": 23},
            2,
            "tensor_parallel_size=2 does not divide moe shared_intermediate_size=23",
        ),
    ],
)
def test_shard_names_what_does_not_divide(model_type, text, tp, message):
    with pytest.raises(ValueError, match=message):
        from_hf(model_type, text=text).shard(tp)


# Engine settings.

BAD_ENGINE = [
    ({"max_num_seqs": 0}, "max_num_seqs must be an integer of at least 1, got 0"),
    ({"max_num_seqs": 2.0}, "max_num_seqs must be an integer"),
    ({"max_num_batched_tokens": 100}, "max_num_batched_tokens must be a multiple of 64.*got 100"),
    ({"max_num_batched_tokens": -64}, "max_num_batched_tokens must be an integer of at least 1"),
    ({"max_model_len": 0}, "max_model_len must be an integer of at least 1"),
    ({"block_size": 24}, "block_size must be a power of two, got 24"),
    ({"block_size": True}, "block_size must be an integer"),
    ({"num_kv_blocks": 0}, "num_kv_blocks must be an integer of at least 1"),
    ({"gpu_memory_utilization": 0}, r"gpu_memory_utilization must be in \(0, 1\], got 0"),
    ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization must be in"),
    ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization must be in"),
    ({"gpu_memory_utilization": "half"}, "gpu_memory_utilization must be"),
    ({"max_logit_rows": -1}, "max_logit_rows must be an integer"),
    ({"max_num_prefill_seqs": 0}, "max_num_prefill_seqs must be an integer of at least 1, got 0"),
    ({"dtype": "float16"}, "dtype must be one of 'auto', 'float32', 'bfloat16', got 'float16'"),
    ({"ssm_dtype": "auto"}, "ssm_dtype must be one of 'float32', 'bfloat16', got 'auto'"),
    ({"state_layout": "KV"}, "state_layout must be one of 'kv', 'vk', 'mixed', got 'KV'"),
    ({"seed": -1}, "seed must be an integer of at least 0"),
    ({"tensor_parallel_size": 0}, "tensor_parallel_size must be an integer of at least 1"),
    ({"kernels": "triton"}, "kernels must be one of 'auto', 'pallas', 'interpret', 'reference', got 'triton'"),
    ({"prefill_buckets": (64,)}, "prefill_buckets must ascend and end with 1024"),
    ({"prefill_buckets": (128, 64, 1024)}, "prefill_buckets must ascend"),
    ({"prefill_buckets": (64, 64, 1024)}, "prefill_buckets must ascend"),
    ({"prefill_buckets": (0, 1024)}, "prefill_buckets must be an integer of at least 1, got 0"),
    ({"decode_buckets": (1, 4)}, "decode_buckets must ascend and end with 8"),
    ({"max_logprobs": -1}, "max_logprobs must be an integer of at least 0"),
    ({"enable_prefix_caching": "no"}, "enable_prefix_caching must be True or False, got 'no'"),
    ({"batch_invariant": 1}, "batch_invariant must be True or False, got 1"),
    ({"batch_invariant": True, "decode_buckets": (1, 8)}, "batch_invariant=True needs one prefill bucket and one"),
    ({"warmup": None}, "warmup must be True or False, got None"),
    ({"num_checkpoint_slots": -1}, "num_checkpoint_slots must be an integer of at least 0"),
    (
        {"num_checkpoint_slots": 2, "enable_prefix_caching": False},
        "num_checkpoint_slots=2 are of no use with enable_prefix_caching=False; allowed: None or 0",
    ),
    ({"state_checkpoint_interval": 0}, "state_checkpoint_interval must be an integer of at least 1"),
    ({"state_checkpoint_interval": 40}, "state_checkpoint_interval must be a multiple of block_size=16, got 40"),
    ({"num_speculative_tokens": -1}, "num_speculative_tokens must be an integer of at least 0, got -1"),
    ({"num_speculative_tokens": True}, "num_speculative_tokens must be an integer of at least 0, got True"),
    ({"num_speculative_tokens": 8}, "num_speculative_tokens must be at most 7, got 8"),
    ({"draft_acceptance": "greedy"}, "draft_acceptance must be one of 'shared_noise', 'rejection', got 'greedy'"),
    ({"adaptive_speculation": 1}, "adaptive_speculation must be True or False, got 1"),
    ({"adaptive_speculation": True}, "adaptive_speculation=True needs num_speculative_tokens above 0"),
    (
        {"adaptive_speculation": True, "num_speculative_tokens": 2, "batch_invariant": True},
        "adaptive_speculation=True needs num_speculative_tokens above 0 and batch_invariant=False, got 2 and True",
    ),
    ({"spec_acceptance_length": 2}, r"between 1 and 1 \+ num_speculative_tokens=1, and needs speculation, got 2"),
    ({"spec_acceptance_length": 0.5, "num_speculative_tokens": 2}, r"between 1 and 1 \+ num_speculative_tokens=3"),
    ({"spec_acceptance_length": 3.5, "num_speculative_tokens": 2}, r"spec_acceptance_length must be between 1 and 1 "),
    ({"spec_acceptance_length": "3", "num_speculative_tokens": 2}, "spec_acceptance_length must be between 1 and 1 "),
    (
        {"state_checkpoint_interval": 2, "block_size": 2, "num_speculative_tokens": 2},
        "state_checkpoint_interval must be at least the 3 tokens that a step may produce, got 2",
    ),
]


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(("values", "message"), BAD_ENGINE, ids=[str(values) for values, _ in BAD_ENGINE])
def test_bad_engine_setting_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**values)


def test_every_engine_setting_has_a_bad_value_tested():
    tested = {name for values, _ in BAD_ENGINE for name in values}
    fields = {field.name for field in dataclasses.fields(EngineConfig)}
    assert fields - tested == {"compilation_cache_dir"}


def test_default_buckets_cover_every_step():
    for seqs in (1, 2, 8, 9, 100):
        for tokens in (64, 128, 1024, 8192):
            config = EngineConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens)
            for buckets, largest in ((config.prefill_buckets, tokens), (config.decode_buckets, seqs)):
                assert buckets[-1] == largest
                assert list(buckets) == sorted(set(buckets))
            # Few: each is compiled at start, decode steps plain and full.
            assert len(config.prefill_buckets) + len(config.decode_buckets) <= 8
            assert config.decode_buckets[0] == 1


def test_decode_step_is_at_most_four_times_its_rows_and_twice_where_rows_cost():
    for seqs in (8, 9, 32, 33, 100, 128, 256, 1000):
        buckets = EngineConfig(max_num_seqs=seqs).decode_buckets
        for smaller, larger in itertools.pairwise(buckets):
            assert larger <= (2 if smaller >= 32 else 8 if smaller == 1 else 4) * smaller
    assert EngineConfig(max_num_seqs=128).decode_buckets == (1, 8, 32, 64, 128)
    assert EngineConfig(max_num_seqs=8).decode_buckets == (1, 8)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, [8, 8, 8]),
        ({"max_num_seqs": 3}, [3, 3, 3]),
        ({"max_num_seqs": 256}, [9, 12, 24]),
        ({"max_num_seqs": 256, "max_num_batched_tokens": 8192}, [9, 12, 136]),
        ({"max_num_seqs": 256, "max_num_prefill_seqs": 100}, [9, 12, 100]),
        ({"max_num_seqs": 64, "max_num_prefill_seqs": 4}, [4, 4, 4]),
        ({"max_num_seqs": 64, "max_num_prefill_seqs": 100}, [9, 12, 64]),
        ({"max_num_seqs": 256, "batch_invariant": True}, [24]),
    ],
)
def test_prefill_steps_have_rows_for_short_prompts(options, rows):
    config = EngineConfig(**options)
    assert [config.prefill_rows_of(bucket) for bucket in config.prefill_buckets] == rows
    assert config.prefill_rows == rows[-1]


@pytest.mark.usefixtures("without_type_checks")
def test_given_buckets_are_kept_as_tuples():
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=256, prefill_buckets=[128, 256], decode_buckets=[2, 4])
    assert (config.prefill_buckets, config.decode_buckets) == ((128, 256), (2, 4))


def test_logit_rows_are_as_many_as_requests_up_to_16():
    assert [EngineConfig(max_num_seqs=n).num_logit_rows for n in (1, 8, 16, 100)] == [1, 8, 16, 16]
    assert EngineConfig(max_num_seqs=4, max_logit_rows=2).num_logit_rows == 2


def test_settings_can_be_replaced():
    """Derived values are derived again: nothing of the first construction sticks."""
    config = dataclasses.replace(EngineConfig(max_num_seqs=4), seed=1)
    assert config == EngineConfig(max_num_seqs=4, seed=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 2


@pytest.mark.usefixtures("without_type_checks")
def test_numpy_integers_are_refused_by_name():
    with pytest.raises(ValueError, match="max_num_seqs must be an integer"):
        EngineConfig(max_num_seqs=np.int64(4))
