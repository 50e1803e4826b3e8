"""The random checkpoint is complete, and is what transformers reads too."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from gdnjax import LLM, full_logits
from scripts import make_random_checkpoint


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
