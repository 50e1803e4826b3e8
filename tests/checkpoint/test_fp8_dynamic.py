"""Checkpoints written anew in FP8 by row: what is loaded of them is what loading makes of the old ones, to the bit."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from gdnjax import ModelConfig, abstract_params, full_logits, load_model, sharding
from gdnjax.assets import model_directory
from gdnjax.checkpoint import Format, coded_formats, load_params, open_source, opened, quantise
from gdnjax.checkpoint.sources import read_whole
from tests import checkpoints

TINY = model_directory("tiny")


def _load(directory, quantization, *, mtp=False):
    """Every array of the parameters by its path, codes and scales apart, and the report."""
    cfg = ModelConfig.from_hf(directory)
    abstract = abstract_params(cfg, 1, cfg.dtype, mtp=mtp)
    with opened(directory, cfg, abstract, sharding.make_mesh(1)) as stored:
        coded = coded_formats(stored, quantization)
        abstract = abstract_params(cfg, 1, cfg.dtype, mtp=mtp, coded=coded)
        params, report = load_params(stored, abstract, progress=False)
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {sharding.path_name(path): np.asarray(leaf) for path, leaf in leaves}, report


def _assert_loads_as_made(old, new, report, *, mtp=False):
    expected, made = _load(old, "fp8_per_channel", mtp=mtp)
    found, loaded = _load(new, "auto", mtp=mtp)
    assert list(found) == list(expected)
    for name, array in found.items():
        assert array.dtype == expected[name].dtype, name
        assert array.tobytes() == expected[name].tobytes(), name
    assert loaded.made_fp8 is None
    assert loaded.dequantised == 0
    assert loaded.quantised == {"float8_e4m3fn": report.made}
    assert made.made_fp8 is not None
    assert report.relative_error == pytest.approx(made.made_fp8[1], rel=1e-6)


@pytest.mark.short_cases("qwen3_5_moe_text")
@pytest.mark.parametrize("family", checkpoints.PARITY_FAMILIES)
def test_codes_and_scales_are_those_that_loading_makes(family, tmp_path):
    pytest.importorskip("torch")
    checkpoints.write_checkpoint(family, tmp_path / "old")
    report = quantise(tmp_path / "old", tmp_path / "new", progress=False)
    _assert_loads_as_made(tmp_path / "old", tmp_path / "new", report)
    assert report.format is Format.HUGGING_FACE
    assert 0.02 < report.relative_error < 0.03
    assert report.dequantised == 0


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["qwen3_5_moe_text", "deepseek_v3", "kimi_linear"])
def test_blocks_become_rows_as_loading_makes_them(family, tmp_path):
    """And what is never codes on the devices becomes the model's dtype."""
    pytest.importorskip("torch")
    checkpoints.write_checkpoint(family, tmp_path / "old")
    stored = checkpoints.quantise_in_place(tmp_path / "old", (8, 8))
    report = quantise(tmp_path / "old", tmp_path / "new", progress=False)
    _assert_loads_as_made(tmp_path / "old", tmp_path / "new", report)
    assert report.made + report.dequantised == stored
    # kv_b_proj of every layer with latents, and what is of another use than the names of Qwen's tensors say.
    assert (report.dequantised > 0) == (family != "qwen3_5_moe_text")
    assert "weight_block_size" not in (tmp_path / "new/config.json").read_text()


def test_head_that_is_stored_as_a_layer_is_made_too(tmp_path):
    pytest.importorskip("torch")
    checkpoints.write_checkpoint_with_head("deepseek_v3", tmp_path / "old")
    report = quantise(tmp_path / "old", tmp_path / "new", progress=False)
    _assert_loads_as_made(tmp_path / "old", tmp_path / "new", report, mtp=True)


@pytest.mark.thorough
@pytest.mark.parametrize("to", Format)
def test_embedded_model_with_its_head_in_either_kind(to, tmp_path):
    """From bfloat16, in shards."""
    report = quantise(TINY, tmp_path / "new", to=to, shard_bytes=1 << 20, progress=False)
    _assert_loads_as_made(TINY, tmp_path / "new", report, mtp=True)
    assert (tmp_path / "new/model.safetensors.index.json").is_file() == (to is Format.HUGGING_FACE)
    # Six delta layers of 3 projections, two attention layers and the head's of 4, 3 of each of the nine MLPs.
    assert report.made == 6 * 3 + 3 * 4 + 9 * 3
    assert f"{report.made} weights made float8_e4m3fn by row, of a relative error of 0.026" in str(report)


def test_head_that_the_engine_does_not_run_stays_numbers(tmp_path):
    shutil.copytree(TINY, tmp_path / "old")
    config = json.loads((TINY / "config.json").read_text())
    (tmp_path / "old/config.json").write_text(json.dumps(config | {"mtp_use_dedicated_embeddings": True}))
    report = quantise(tmp_path / "old", tmp_path / "new", progress=False)
    assert report.made == 6 * 3 + 2 * 4 + 8 * 3
    ignored = json.loads((tmp_path / "new/config.json").read_text())["quantization_config"]["ignore"]
    assert "mtp.layers.0.self_attn.q_proj" in ignored
    _assert_loads_as_made(tmp_path / "old", tmp_path / "new", report)


def test_everything_else_is_kept_bit_for_bit(tmp_path):
    """The vision tower, and files beside the weights; experts of one tensor are written one by one."""
    pytest.importorskip("torch")
    checkpoints.write_checkpoint("qwen3_5_moe", tmp_path / "old")
    (tmp_path / "old/chat_template.jinja").write_text("{{ messages }}\n")
    report = quantise(tmp_path / "old", tmp_path / "new", progress=False)
    with open_source(tmp_path / "old") as old, open_source(tmp_path / "new") as new:
        codes = {name for name in new.names() if new.dtype(name).name == "float8_e4m3fn"}
        kept = set(new.names()) - codes - {f"{name}_scale" for name in codes}
        assert (len(codes), len(kept)) == (report.made, report.kept)
        assert any(".visual." in name for name in kept)
        for name in kept:
            assert new.dtype(name) == old.dtype(name), name
            assert read_whole(new, name).tobytes() == read_whole(old, name).tobytes(), name
        for name in codes:
            assert (new.shape(f"{name}_scale"), new.dtype(f"{name}_scale").name) == (
                (new.shape(name)[0], 1),
                "float32",
            )
        path = "model.language_model.layers.0.mlp.experts"
        experts = {name.removeprefix(f"{path}.") for name in codes if name.startswith(path)}
        assert experts == {f"{i}.{part}_proj.weight" for i in range(5) for part in ("gate", "up", "down")}
        linear = {name for name in kept if name.endswith(".weight") and len(new.shape(name)) == 2}
    before, after = (json.loads((tmp_path / part / "config.json").read_text()) for part in ("old", "new"))
    stored_as = after.pop("quantization_config")
    assert after == before
    assert {f"{name}.weight" for name in stored_as["ignore"]} == {name for name in linear if "embed_tokens" not in name}
    assert (tmp_path / "new/chat_template.jinja").read_text() == "{{ messages }}\n"


def _as_numbers(directory, target):
    """The same checkpoint with code times scale in place of both, in float32."""
    target.mkdir()
    # Not safetensors.numpy, of which some versions read no FP8.
    with open_source(directory) as stored:
        tensors = {name: read_whole(stored, name) for name in stored.names()}
    numbers = {}
    for name, tensor in tensors.items():
        if not name.endswith("_scale"):
            scale = tensors.get(f"{name}_scale")
            numbers[name] = tensor if scale is None else tensor.astype(np.float32) * scale
    safetensors.numpy.save_file(numbers, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))


@pytest.mark.thorough
def test_logits_are_those_of_transformers(tmp_path):
    pytest.importorskip("torch")
    checkpoints.write_checkpoint("qwen3_5_moe_text", tmp_path / "old")
    quantise(tmp_path / "old", tmp_path / "new", progress=False)
    _as_numbers(tmp_path / "new", tmp_path / "numbers")
    tokens = checkpoints.prompt_tokens(65)
    model, params = load_model(tmp_path / "new")
    logits = np.asarray(full_logits(model, params, jnp.array(tokens, jnp.int32)))
    # Rounding moves them by about 1e-5, FP8 by more than 1e-2.
    assert checkpoints.relative_error(logits, checkpoints.reference_logits(tmp_path / "numbers", tokens)) < 1e-4
    assert checkpoints.relative_error(logits, checkpoints.reference_logits(tmp_path / "old", tokens)) > 1e-2


def test_transformers_reads_the_directory_itself(tmp_path):
    """Through compressed-tensors, which few have: every tensor is found, and stands for the same number."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    import transformers

    checkpoints.write_checkpoint("qwen3_5_text", tmp_path / "old")
    quantise(tmp_path / "old", tmp_path / "new", progress=False)
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "new",
        dtype=torch.float32,
        quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
        output_loading_info=True,
    )
    assert not any(found.values()), found
    _as_numbers(tmp_path / "new", tmp_path / "numbers")
    numbers = safetensors.numpy.load_file(tmp_path / "numbers/model.safetensors")
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(parameter.detach().numpy(), numbers[name], err_msg=name)


def _write_config(directory, quantization):
    directory.mkdir()
    config = json.loads((TINY / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 8}, r"int4 \(gptq\), .* convert the bfloat16 or FP8"),
        (
            {
                "quant_method": "quark",
                "global_quant_config": {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_channel", "ch_axis": 0}},
            },
            r"a scale for each row already \(quark\); load it as it is",
        ),
    ],
)
def test_weights_that_are_rounded_otherwise_are_named(stored, message, tmp_path):
    _write_config(tmp_path / "old", stored)
    with pytest.raises(ValueError, match=message):
        quantise(tmp_path / "old", tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()


def test_second_conversion_is_refused(tmp_path):
    quantise(TINY, tmp_path / "new", progress=False)
    with pytest.raises(ValueError, match=r"row already \(compressed-tensors\)"):
        quantise(tmp_path / "new", tmp_path / "again", progress=False)
    with pytest.raises(FileExistsError, match="not an empty directory"):
        quantise(TINY, tmp_path / "new", progress=False)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_number_that_is_not_finite_is_named(number, tmp_path):
    """By loading, too. What has been written is no checkpoint."""
    shutil.copytree(TINY, tmp_path / "old")
    tensors = safetensors.numpy.load_file(tmp_path / "old/model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    tensors[name][5, 7] = number
    safetensors.numpy.save_file(tensors, tmp_path / "old/model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.3\.mlp\.up_proj\.weight: a number is NaN or infinite"):
        quantise(tmp_path / "old", tmp_path / "new", progress=False)
    assert not (tmp_path / "new/config.json").exists()
    with pytest.raises(ValueError, match=r"layers\.3\.mlp\.up_proj\.weight: a number is NaN or infinite"):
        _load(tmp_path / "old", "fp8_per_channel")


def test_tensor_that_does_not_fit_the_model_is_named(tmp_path):
    shutil.copytree(TINY, tmp_path / "old")
    tensors = safetensors.numpy.load_file(tmp_path / "old/model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    safetensors.numpy.save_file(tensors, tmp_path / "old/model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing: layers\.3\.mlp\.up_proj\.weight"):
        quantise(tmp_path / "old", tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()
