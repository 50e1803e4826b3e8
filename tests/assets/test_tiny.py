"""The embedded model answers: stored references, problems it has never seen, and the same answers by every way."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation import cells as evaluation_cells

from gdnjax import LLM, SamplingParams, draft_logits, load_model
from gdnjax.assets import EMBEDDED_MODEL, model_directory
from scripts import eval as evaluation_script
from tests.checkpoints import relative_error
from tests.compiling import IN_ONE_PIECE, WITHOUT_MLIR, compiled_with
from tests.golden import make_tiny

BOUND = 2e-4
"""As in tests/models/test_parity.py, for the same reason."""

APPLES = "A box has 3 apples. 4 more are put in. How many apples are in the box?"


@pytest.fixture(scope="module")
def golden():
    with np.load(make_tiny.FILE) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def float32_llm():
    # One bucket each, since compiling is the cost here.
    options = {"prefill_buckets": (128,), "decode_buckets": (4,), "max_num_batched_tokens": 128, "max_num_seqs": 4}
    return LLM(EMBEDDED_MODEL, dtype="float32", max_model_len=512, warmup=False, use_tqdm=False, **options)


def test_model_fits_its_budget():
    """Ten megabytes of weights, and little beside them: everyone who installs the package has them."""
    directory = model_directory(EMBEDDED_MODEL)
    assert (directory / "model.safetensors").stat().st_size <= 10_000_000
    assert sum(file.stat().st_size for file in directory.iterdir()) <= 11_000_000


@pytest.mark.short_cases("0")
@pytest.mark.parametrize("prompt", range(len(make_tiny.PROMPTS)))
def test_logits_and_drafts_equal_the_stored_reference(golden, prompt):
    """transformers made the target's, numpy float64 those of the MTP head."""
    model, params = load_model(dtype="float32", mtp=True)
    tokens = golden[f"tokens_{prompt}"]
    padded = np.pad(tokens, (0, 128 - len(tokens)))
    function = jax.jit(functools.partial(draft_logits, model), static_argnums=2)
    target, drafts = (np.asarray(x) for x in function(params, jnp.asarray(padded), make_tiny.DEPTH, len(tokens)))
    last = slice(len(tokens) - make_tiny.LAST, len(tokens))
    assert relative_error(target[last], golden[f"logits_{prompt}"]) <= BOUND
    for draft, expected in zip(drafts, golden[f"draft_logits_{prompt}"], strict=True):
        assert relative_error(draft[last], expected) <= BOUND


@pytest.mark.thorough
def test_engine_continues_as_the_stored_reference(golden, float32_llm):
    prompts = [{"prompt_token_ids": golden[f"tokens_{i}"].tolist()} for i in range(len(make_tiny.PROMPTS))]
    params = SamplingParams(temperature=0.0, max_tokens=make_tiny.GREEDY_STEPS, ignore_eos=True)
    for i, output in enumerate(float32_llm.generate(prompts, params, use_tqdm=False)):
        assert list(output.outputs[0].token_ids) == golden[f"greedy_{i}"].tolist()


@pytest.mark.thorough
def test_apples_are_counted(float32_llm):
    greedy = SamplingParams(temperature=0.0, max_tokens=64)
    (plain,) = float32_llm.generate([APPLES], greedy, use_tqdm=False)
    (chat,) = float32_llm.chat([{"role": "user", "content": APPLES}], greedy)
    for output in (plain, chat):
        assert output.outputs[0].text.endswith("3 + 4 = 7 apples.\n#### 7")
        assert output.outputs[0].finish_reason == "stop"


@pytest.mark.thorough
def test_story_differs_by_seed_and_ends_by_itself(float32_llm):
    params = [SamplingParams(temperature=1.0, max_tokens=400, seed=seed) for seed in range(4)]
    outputs = float32_llm.generate(["Once upon a time"] * 4, params, use_tqdm=False)
    texts = [output.outputs[0].text for output in outputs]
    assert len(set(texts)) == 4
    for output, text in zip(outputs, texts, strict=True):
        assert output.outputs[0].finish_reason == "stop"
        assert len(text.split()) > 40


@pytest.mark.thorough
@pytest.mark.usefixtures("without_type_checks")
def test_every_way_gives_the_same_right_answers(tmp_path, capsys, monkeypatch):
    """20 held-out problems, 8 at once; scripts/eval.py --matrix runs all combinations over all 500.

    Each cell has steps of its own, and most of its time was compiling: they are compiled without optimisations.
    """
    file = tmp_path / "pairwise.json"
    prompts = ["--form", "few-shot", "--num-shots", "1", "--limit", "20", "--max-num-seqs", "8"]
    # More than the longest prompt, and little to pad where one comes alone.
    monkeypatch.setattr(evaluation_cells, "PREFILL_TOKENS", 256)
    with compiled_with(IN_ONE_PIECE, WITHOUT_MLIR):
        status = evaluation_script.main(["--pairwise", *prompts, "--floor", "0.95", "--brief", "--output", str(file)])
    assert status == 0, capsys.readouterr().out
    cells = json.loads(pathlib.Path(file).read_text())["cells"]
    assert len(cells) >= 10
    for cell in cells:
        # What a cell is there for has happened in it.
        assert not cell["scarce"] or cell["preemptions"] > 0, cell["name"]
        assert not cell["name"].startswith("f32-") or "cached" not in cell["name"] or cell["hit_rate"] > 0.3
        drafts = cell["options"].get("num_speculative_tokens", 0)
        assert not drafts or cell["accepted"] >= 0.95 * cell["drafted"] > 0, cell["name"]
    # Drafts are refused, too: what is shown is that this changes nothing.
    assert sum(cell["accepted"] for cell in cells) < sum(cell["drafted"] for cell in cells)
