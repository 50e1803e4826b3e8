"""The random checkpoint is complete, and is what transformers reads too."""

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
    "flags", [("--layers", "0"), ("--hidden-size", "50"), ("--hidden-size", "32"), ("--seed", "-1")]
)
def test_bad_size_is_one_line(tmp_path, capsys, flags):
    assert make_random_checkpoint.main([str(tmp_path / "new"), *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("make_random_checkpoint.py: error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()
