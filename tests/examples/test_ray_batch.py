"""A data set over two engines of the embedded model, each in an actor of Ray's; and what is said where Ray is not."""

import importlib.util
import json
import os

import pytest

from examples import ray_batch
from gdnjax import LLM, SamplingParams
from gdnjax.assets import model_directory

NUM_PROMPTS = 12
MAX_TOKENS = 48


@pytest.fixture(scope="module")
def prompts():
    problems = (model_directory("tiny") / "problems.jsonl").read_text().splitlines()
    return [json.loads(line)["question"] for line in problems[:NUM_PROMPTS]]


@pytest.fixture(scope="module")
def cluster():
    """One of this machine alone. Ray is imported here, as other test runs do without it."""
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Workers are otherwise of low priority, and stand still where others have the cores.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    # More than the two actors take: files are read and written by tasks.
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="warning")
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.mark.optional
def test_answers_of_two_actors_are_those_of_one_engine(cluster, prompts, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    arguments = [str(tmp_path / "prompts.jsonl"), str(tmp_path / "answers"), "--actors", "2"]
    arguments += ["--batch-size", "3", "--max-num-seqs", "3", "--max-tokens", str(MAX_TOKENS)]
    assert ray_batch.main(arguments) == 0
    rows = [json.loads(line) for file in (tmp_path / "answers").iterdir() for line in file.read_text().splitlines()]
    with LLM("tiny", max_num_seqs=3, warmup=False, use_tqdm=False) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS))
    expected = {
        prompt: (output.outputs[0].text, output.outputs[0].finish_reason, len(output.outputs[0].token_ids))
        for prompt, output in zip(prompts, outputs, strict=True)
    }
    assert {row["prompt"]: (row["text"], row["finish_reason"], row["num_tokens"]) for row in rows} == expected
    assert len(rows) == NUM_PROMPTS


def test_without_ray_its_extra_is_named_and_nothing_is_written(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Once upon a time"}\n')
    with pytest.raises(SystemExit) as end:
        ray_batch.main([str(tmp_path / "prompts.jsonl"), str(tmp_path / "answers")])
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith('error: Ray is not installed: pip install "gdnjax[ray]"\n')
    assert [file.name for file in tmp_path.iterdir()] == ["prompts.jsonl"]
