"""Sorting a checkpoint's names."""

import pytest

from gdnjax.checkpoint.names import sort_names


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


def test_one_parameter_named_twice_is_an_error():
    with pytest.raises(ValueError, match=r"model\.norm\.weight and model\.language_model\.norm\.weight"):
        sort_names(["model.norm.weight", "model.language_model.norm.weight"], tied_lm_head=False)
