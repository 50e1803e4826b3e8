"""The random checkpoint is complete, and is what transformers reads too."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdnjax import LLM, full_logits, load_model
from gdnjax.checkpoint import open_source
from gdnjax.quantized import Quantized
from scripts import make_random_checkpoint

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.mark.thorough
def test_transformers_computes_the_same_from_it(random_model):
    torch = pytest.importorskip("torch")
    import transformers

    model, report = transformers.AutoModelForCausalLM.from_pretrained(random_model, output_loading_info=True)
    assert not any(report.values()), report
    tokens = np.arange(3, 90)
    with torch.inference_mode():
        reference = model.eval()(input_ids=torch.tensor(tokens[None]), use_cache=False).logits[0].numpy()
    with LLM(random_model, max_num_seqs=1, max_model_len=128, warmup=False, use_tqdm=False) as llm:
        logits = np.asarray(full_logits(llm.model, llm.params, jnp.asarray(tokens)))
    # Rounding moves these by about 1e-6; another tensor in any place by more than 1e-2.
    assert np.abs(logits - reference).max() < 1e-4 * np.abs(reference).max()


def test_directory_that_holds_something_is_refused(random_model, capsys):
    assert make_random_checkpoint.main([str(random_model)]) == 2
    assert "not an empty directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ("--layers", "0"),
        ("--hidden-size", "50"),
        ("--hidden-size", "32"),
        ("--seed", "-1"),
        ("--config", "none.json"),
        ("--config", "qwen3.5-9b", "--layers", "33"),
        ("--config", "qwen3.5-9b", "--hidden-size", "64"),
        ("--config", "qwen3.5-9b", "--dtype", "float32"),
    ],
)
def test_bad_size_is_one_line(tmp_path, capsys, flags):
    assert make_random_checkpoint.main([str(tmp_path / "new"), *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("make_random_checkpoint.py: error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.thorough
def test_published_sizes_load_with_their_mtp_head(tmp_path):
    """A configuration inside another, as published: the layers asked for, every tensor finite, no two rows alike."""
    text = make_random_checkpoint.model_config(vocab_size=600, layers=8, hidden_size=64, dtype="bfloat16")
    text |= {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": text}))
    flags = ["--config", str(tmp_path / "config.json"), "--layers", "4"]
    assert make_random_checkpoint.main([str(tmp_path / "new"), *flags]) == 0
    with LLM(tmp_path / "new", max_model_len=64, warmup=False, use_tqdm=False, num_speculative_tokens=1) as llm:
        assert llm.model.config.num_layers == 4
        assert llm.load_report.mtp_loaded > 0
        embedding = np.asarray(llm.params["embed_tokens"]["weight"], np.float32)
        assert len(np.unique(embedding[:600], axis=0)) == 600
        (output,) = llm.generate("One request", use_tqdm=False)
        assert output.outputs[0].token_ids


EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 160,
    "shared_expert_intermediate_size": 64,
    "model_type": "qwen3_5_moe_text",
}


@pytest.mark.thorough
@pytest.mark.parametrize("quantization", ["fp8", "fp8_per_channel"])
@pytest.mark.parametrize("moe", [False, True])
def test_fp8_is_stored_as_published_and_loads(tmp_path, quantization, moe):
    """Experts one by one, each with its scale; with the MTP head; blocks at the edges partial."""
    text = make_random_checkpoint.model_config(vocab_size=600, layers=4, hidden_size=192, dtype="bfloat16")
    text |= {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False} | (EXPERTS if moe else {})
    raw = {"model_type": "qwen3_5_moe" if moe else "qwen3_5", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    directory = tmp_path / "new"
    flags = ["--config", str(tmp_path / "config.json"), "--quantization", quantization]
    assert make_random_checkpoint.main([str(directory), *flags]) == 0

    suffix, dtype = {"fp8": ("_scale_inv", "bfloat16"), "fp8_per_channel": ("_scale", "float32")}[quantization]
    with open_source(directory) as stored:
        scales = [name for name in stored.names() if name.endswith(suffix)]
        codes = [name for name in stored.names() if stored.dtype(name).name == "float8_e4m3fn"]
        assert sorted(name + suffix for name in codes) == sorted(scales)
        for name in codes:
            rows, columns = stored.shape(name)
            cells = (-(-rows // 128), -(-columns // 128)) if quantization == "fp8" else (rows, 1)
            assert (stored.shape(name + suffix), stored.dtype(name + suffix).name) == (cells, dtype)
    # Three delta layers of 3 projections and one attention layer of 4, as the head has.
    mlp = 3 * (EXPERTS["num_experts"] + 1) if moe else 3
    in_head = 4 + mlp
    assert len(codes) == 3 * 3 + 4 + 4 * mlp + in_head
    assert not any(".linear_attn.in_proj_a." in name or "gate.weight" in name for name in codes)

    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    left_alone = config["modules_to_not_convert" if quantization == "fp8" else "ignore"]
    assert {"lm_head", "mtp.fc", "model.layers.0.linear_attn.in_proj_b"} <= set(left_alone)
    assert not {f"{name}.weight" for name in left_alone} & set(codes)

    model, params = load_model(directory, mtp=True)
    held = [leaf for leaf in jax.tree.leaves(params, is_leaf=_is_coded) if _is_coded(leaf)]
    assert {leaf.codes.dtype.name for leaf in held} == {"float8_e4m3fn"}
    # The experts of a layer are two parameters.
    assert len(held) == 3 * 3 + 4 + 4 + 5 * (2 + 3 if moe else 3)
    assert np.isfinite(np.asarray(full_logits(model, params, jnp.arange(3, 40)))).all()


def _is_coded(leaf):
    return isinstance(leaf, Quantized)


@pytest.mark.thorough
@pytest.mark.parametrize("quantization", ["fp8", "fp8_per_channel"])
def test_tiny_model_is_stored_as_fp8_too(tmp_path, quantization):
    assert make_random_checkpoint.main([str(tmp_path / "new"), "--quantization", quantization]) == 0
    model, params = load_model(tmp_path / "new")
    held = [leaf for leaf in jax.tree.leaves(params, is_leaf=_is_coded) if _is_coded(leaf)]
    assert len(held) == 3 * 3 + 4 + 4 * 3
    logits = np.asarray(full_logits(model, params, jnp.arange(3, 40)))
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1


def test_quantization_of_a_configuration_is_kept_or_named(tmp_path, capsys):
    text = make_random_checkpoint.model_config(vocab_size=600, layers=1, hidden_size=64, dtype="bfloat16")
    file = tmp_path / "config.json"
    stored = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    file.write_text(json.dumps(text | {"quantization_config": stored}))
    assert make_random_checkpoint.main([str(tmp_path / "new"), "--config", str(file)]) == 0
    with open_source(tmp_path / "new") as source:
        assert any(name.endswith("_scale_inv") for name in source.names())
    file.write_text(json.dumps(text | {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}))
    capsys.readouterr()
    assert make_random_checkpoint.main([str(tmp_path / "other"), "--config", str(file)]) == 2
    assert re.search(r"\(gptq\) .*allowed: --quantization fp8 or fp8_per_channel", capsys.readouterr().err)
