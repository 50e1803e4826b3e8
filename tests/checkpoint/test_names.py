"""Sorting a checkpoint's names."""

import pytest

from gdnjax.checkpoint.names import renaming, sort_names
from tests.config.configurations import from_hf


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "model.", ""])
def test_published_prefixes_lead_to_module_names(prefix):
    names = [prefix + "layers.0.mlp.up_proj.weight", prefix + "norm.weight", "lm_head.weight"]
    language = sort_names(names, tied_lm_head=False).language
    assert language == dict(zip(["layers.0.mlp.up_proj.weight", "norm.weight", "lm_head.weight"], names, strict=True))


def test_every_name_is_sorted_into_one_place():
    names = [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.visual.patch_embed.bias",
        "visual.merger.weight",
        "mtp.layers.0.mlp.up_proj.weight",
        "mtp.norm.weight",
        "model.surprise.weight",
    ]
    found = sort_names(names, tied_lm_head=True)
    assert found.language == {"embed_tokens.weight": "model.embed_tokens.weight"}
    assert found.tied == ("lm_head.weight",)
    assert found.vision == ("model.visual.patch_embed.bias", "visual.merger.weight")
    assert found.mtp == ("mtp.layers.0.mlp.up_proj.weight", "mtp.norm.weight")
    assert found.unknown == ("model.surprise.weight",)
    assert found.mtp_tables == ()


def test_names_of_a_wanted_head_are_its_modules_but_for_tables_of_its_own():
    modules = ["mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight", "mtp.norm.weight"]
    tables = ["mtp.embed_tokens.weight", "mtp.lm_head.weight", "mtp.layers.0.shared_head.head.weight"]
    found = sort_names([*modules, *tables], tied_lm_head=False, mtp_wanted=True)
    assert found.language == {name: name for name in modules}
    assert (found.mtp_tables, found.mtp, found.unknown) == (tuple(tables), (), ())
    assert sort_names(tables, tied_lm_head=False).mtp == tuple(tables)


def test_head_that_is_stored_as_a_layer_is_told_from_the_target_by_its_number():
    target = {"layers.60.mlp.up_proj.weight": "model.layers.60.mlp.up_proj.weight"}
    head = {
        "mtp.pre_fc_norm_embedding.weight": "model.layers.61.enorm.weight",
        "mtp.pre_fc_norm_hidden.weight": "model.layers.61.hnorm.weight",
        "mtp.fc.weight": "model.layers.61.eh_proj.weight",
        "mtp.norm.weight": "model.layers.61.shared_head.norm.weight",
        "mtp.layers.0.self_attn.o_proj.weight": "model.layers.61.self_attn.o_proj.weight",
        "mtp.layers.0.mlp.gate.e_score_correction_bias": "model.layers.61.mlp.gate.e_score_correction_bias",
    }
    tables = ("model.layers.61.embed_tokens.weight", "model.layers.61.shared_head.head.weight")
    names = [*target.values(), *head.values(), *tables]
    found = sort_names(names, tied_lm_head=False, mtp_wanted=True, mtp_layers=range(61, 62))
    assert found.language == target | head
    assert found.copies == dict(zip(tables, ("embed_tokens.weight", "lm_head.weight"), strict=True))
    without = sort_names(names, tied_lm_head=False, mtp_layers=range(61, 62))
    assert (without.language, without.mtp, without.copies) == (target, (*head.values(), *tables), {})
    tied = sort_names(tables, tied_lm_head=True, mtp_wanted=True, mtp_layers=range(61, 62))
    assert set(tied.copies.values()) == {"embed_tokens.weight"}


def test_norms_in_another_spelling_are_the_same_norms():
    names = {
        "layers.0.input_layernorm.weight": "model.layers.0.attention_layer_norm.weight",
        "layers.0.post_attention_layernorm.weight": "model.layers.0.feedforward_layer_norm.weight",
    }
    rename = renaming(from_hf("olmo_hybrid"))
    assert sort_names(names.values(), tied_lm_head=False, rename=rename).language == names
    with pytest.raises(ValueError, match=r"layers\.0\.attention_layer_norm\.weight and model\.layers\.0\.input_layer"):
        sort_names([*names.values(), "model.layers.0.input_layernorm.weight"], tied_lm_head=False, rename=rename)


def test_layers_of_the_delta_rule_are_told_from_attention_by_their_numbers():
    """Kimi-Linear calls either self_attn, and has experts in a spelling of its own."""
    rename = renaming(from_hf("kimi_linear"))
    names = {
        "layers.0.linear_attn.forget_gate.A_log": "layers.0.self_attn.A_log",
        "layers.2.linear_attn.norm.weight": "layers.2.self_attn.o_norm.weight",
        "layers.1.self_attn.o_proj.weight": "layers.1.self_attn.o_proj.weight",
        "layers.1.mlp.experts.11.gate_proj.weight": "layers.1.block_sparse_moe.experts.11.w1.weight",
        "layers.1.mlp.gate.e_score_correction_bias": "layers.1.block_sparse_moe.gate.e_score_correction_bias",
    }
    assert {rename(name): name for name in names.values()} == names


def test_one_parameter_named_twice_is_an_error():
    with pytest.raises(ValueError, match=r"model\.norm\.weight and model\.language_model\.norm\.weight"):
        sort_names(["model.norm.weight", "model.language_model.norm.weight"], tied_lm_head=False)
