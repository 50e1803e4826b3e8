"""The engine behind lm-eval: its scores are those of scripts/eval.py, its log-likelihoods those of the model.

What needs lm-eval itself is skipped where it is not installed (pip install -e ".[eval]").
"""

import dataclasses
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation import problems, scoring
from evaluation.problems import Problem
from hypothesis import given, settings
from hypothesis import strategies as st

from gdnjax import SamplingParams, full_logits
from scripts import eval as eval_script
from scripts import lm_eval_gdnjax as script

pytestmark = pytest.mark.usefixtures("quickly_compiled")

NUM_PROBLEMS = 6
MAX_TOKENS = 64


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def model(lm_eval, random_model):
    from evaluation.lm_eval_model import GdnjaxLM

    return GdnjaxLM(str(random_model), max_num_seqs=2, max_model_len=512, max_gen_toks=MAX_TOKENS)


def _instances(lm_eval, kind: str, *arguments: tuple) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, item, index) for index, item in enumerate(arguments)]


# The command, which needs no lm-eval to explain itself.


def test_help_explains_by_examples(capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for word in ("examples:", "--model_args", "gsm8k_local", "Exit status: 0", 'pip install -e ".[eval]"'):
        assert word in text


def test_model_and_tasks_are_added_where_none_are_named():
    tasks = str(script.TASKS)
    assert script.completed(["--tasks", "x"]) == ["run", "--tasks", "x", "--model", "gdnjax", "--include_path", tasks]
    named = ["run", "--model=hf", "--include_path", "y"]
    assert script.completed(named) == named
    assert script.completed(["run", "-M", "hf"]) == ["run", "-M", "hf", "--include_path", tasks]
    assert script.completed(["ls", "tasks"]) == ["ls", "tasks", "--include_path", tasks]


def test_missing_lm_eval_is_one_line_and_status_2(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    assert script.main(["--tasks", "gsm8k_local"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lm_eval_gdnjax.py: error: ")
    assert 'this script needs lm-eval: pip install -e ".[eval]"' in err
    assert err.count("\n") == 1


# The protocol: nothing of it is remembered, all of it is compared with lm-eval's.


def test_local_task_is_lm_evals_gsm8k_over_other_files(lm_eval):
    import yaml

    theirs = yaml.safe_load((pathlib.Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml").read_text())
    text = (script.TASKS / "gsm8k_local.yaml").read_text().replace("!function ", "")
    ours = yaml.safe_load(text)
    for source in ("dataset_path", "dataset_name", "training_split", "tag"):
        del theirs[source]
    assert ours.pop("custom_dataset") == "local_data.load"
    assert ours.pop("fewshot_config") == {"sampler": "first_n"}
    assert ours.pop("task") == "gsm8k_local"
    assert theirs.pop("task") == "gsm8k"
    assert ours == theirs
    assert tuple(ours["generation_kwargs"]["until"]) == ("Question:", "</s>", "<|im_end|>")
    assert set(ours["generation_kwargs"]["until"]) == set(problems.STOPS["few-shot"])


@given(st.text(alphabet="#0123456789$-.,: \nabQ٣", max_size=40) | st.from_regex(r"#### -?[0-9.,]{1,6}\.?"))
@settings(max_examples=300, deadline=None)
def test_answers_are_those_of_lm_evals_filters(completion):
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    strict = extraction.RegexFilter(r"#### (\-?[0-9\.\,]+)")
    flexible = extraction.RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)
    for ours, theirs in ((scoring.strict_answer, strict), (scoring.flexible_answer, flexible)):
        ((expected,),) = theirs.apply([[completion]], [{}])
        assert ours(completion) == (None if expected == "[invalid]" else expected)


@given(*[st.text(alphabet="#0123456789$-., \na", max_size=12) for _ in range(2)])
@settings(max_examples=300, deadline=None)
def test_matches_are_those_of_lm_evals_metric(answer, reference):
    metrics = pytest.importorskip("lm_eval.api.metrics")
    for text in (reference, f"a = b\n#### {answer}"):
        found = metrics.exact_match_hf_evaluate(
            predictions=[answer], references=[text], regexes_to_ignore=list(scoring.IGNORED), ignore_case=True
        )
        assert scoring.is_match(answer, text) == bool(found["exact_match"])


# Scores, end to end.

SHOTS = [Problem(f"What is {i} + {i}?", f"{i} + {i} = {2 * i}\n#### {2 * i}") for i in range(1, 6)]

RUNS = {
    "few-shot": (["--form", "few-shot", "--num-shots", "3"], "gsm8k_local", {"num_fewshot": 3}),
    "plain": (["--form", "plain"], "gsm8k_local_plain", {}),
    "chat": (
        ["--form", "chat", "--num-shots", "2"],
        "gsm8k_local_plain",
        {"num_fewshot": 2, "apply_chat_template": True, "fewshot_as_multiturn": True},
    ),
}


def _write(file, items: list[Problem]) -> str:
    file.write_text("".join(json.dumps(dataclasses.asdict(item)) + "\n" for item in items))
    return str(file)


@pytest.mark.thorough
@pytest.mark.parametrize("form", RUNS)
def test_scores_are_those_of_eval(lm_eval, model, random_model, tmp_path, capsys, form):
    flags, task, options = RUNS[form]
    questions = [f"Ann has {i} pears. How many has Ann?" for i in range(NUM_PROBLEMS)]
    shots = _write(tmp_path / "shots.jsonl", SHOTS)
    output = tmp_path / "result.json"

    def evaluate(answers: list[str]) -> dict:
        solve = [Problem(*pair) for pair in zip(questions, answers, strict=True)]
        data = _write(tmp_path / "data.jsonl", solve)
        given = ["--model", str(random_model), "--data", data, "--shots", shots, *flags, "--output", str(output)]
        assert eval_script.main([*given, "--max-tokens", str(MAX_TOKENS), "--max-num-seqs", "2"]) == 0
        return json.loads(output.read_text())

    # What the model writes is noise. So that there is something to score, every other answer is made to fit it.
    noise = evaluate(["#### 1"] * NUM_PROBLEMS)["cells"][0]["outputs"]
    fitting = [item["flexible"] if index % 2 == 0 else None for index, item in enumerate(noise)]
    result = evaluate([f"#### {number if (number or '').isdigit() else 1}" for number in fitting])
    (cell,) = result["cells"]

    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=str(script.TASKS), metadata={"data": str(tmp_path / "data.jsonl"), "shots": shots}
    )
    found = lm_eval.simple_evaluate(model, tasks=[task], task_manager=manager, log_samples=True, **options)
    assert found["results"][task]["exact_match,strict-match"] == cell["strict_match"]["share"]
    assert found["results"][task]["exact_match,flexible-extract"] == cell["flexible_extract"]["share"]
    samples = [sample for sample in found["samples"][task] if sample["filter"] == "flexible-extract"]
    assert len(samples) == NUM_PROBLEMS
    for sample in samples:
        index = sample["doc_id"]
        assert sample["arguments"][0][0] == result["problems"][index]["prompt"]
        assert sample["resps"][0][0] == cell["outputs"][index]["text"]
        assert sample["exact_match"] == cell["outputs"][index]["flexible_match"]


@pytest.mark.thorough
def test_command_runs_lm_eval_on_local_files(lm_eval, random_model, tmp_path, capsys, monkeypatch):
    # lm-eval sets it for the process.
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    data, shots = _write(tmp_path / "d.jsonl", SHOTS[:2]), _write(tmp_path / "s.jsonl", SHOTS)
    arguments = [f"model={random_model}", "max_num_seqs=2", "max_model_len=512", "max_gen_toks=4"]
    given = ["--model_args", *arguments, "--tasks", "gsm8k_local", "--num_fewshot", "1"]
    assert script.main([*given, "--metadata", f"data={data}", f"shots={shots}"]) == 0
    out = capsys.readouterr().out
    assert "|gsm8k_local|" in out
    assert "strict-match" in out


# Log-likelihoods, against the logits of the model itself.


def _log_probs(model, token_ids: list[int]) -> np.ndarray:
    logits = full_logits(model.llm.model, model.llm.params, jnp.asarray(token_ids, jnp.int32))
    return np.asarray(jax.nn.log_softmax(logits))


def _score(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    rows = _log_probs(model, [*context, *continuation])[len(context) - 1 : -1]
    greedy = rows.argmax(axis=1).tolist() == continuation
    return float(sum(row[token] for row, token in zip(rows, continuation, strict=True))), greedy


@pytest.mark.thorough
def test_loglikelihood_is_that_of_the_logits(lm_eval, model):
    encode = model.tok_encode
    context = "One request has one"
    (best,) = model.llm.generate(context, SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
    greedy_text = best.outputs[0].text
    asked = [(context, " slot, and one slot"), (context + " ", "slot"), ("", "The state"), (context, greedy_text)]
    found = model.loglikelihood(_instances(lm_eval, "loglikelihood", *asked), disable_tqdm=True)
    for (before, after), (value, greedy) in zip(asked, found, strict=True):
        whole = encode(before + after)
        split = len(encode(before.rstrip())) if before else 0
        expected, is_greedy = _score(
            model, whole[:split] if before else [model.prefix_token_id], whole[split:] if before else encode(after)
        )
        # Sums of a few log-probabilities, each within 2e-5 of float64.
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == is_greedy
    assert [greedy for _, greedy in found].count(False) >= 1


@pytest.mark.thorough
def test_greedy_continuation_is_recognised(model):
    context = model.tok_encode("One request has one slot")
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    (output,) = model.llm.generate([context], params, use_tqdm=False)
    greedy = list(output.outputs[0].token_ids)
    other = [*greedy[:-1], (greedy[-1] + 1) % 256]
    asked = [(("a", "b"), context, continuation) for continuation in (greedy, other)]
    found = model._loglikelihood_tokens(asked, disable_tqdm=True)
    assert [flag for _, flag in found] == [True, False]
    assert found[0][0] > found[1][0]


@pytest.mark.thorough
def test_rolling_loglikelihood_is_that_of_the_logits_in_windows(lm_eval, model, monkeypatch, caplog):
    text = "What the state forgets, attention may remember, and what attention cannot afford, the state keeps."
    tokens = model.tok_encode(text)
    requests = _instances(lm_eval, "loglikelihood_rolling", (text,), ("",))
    whole, empty = model.loglikelihood_rolling(requests, disable_tqdm=True)
    assert whole == pytest.approx(_score(model, [model.prefix_token_id], tokens)[0], abs=1e-3)
    assert empty == 0.0
    # Windows of 6: every token is predicted once, the later windows begin with the last token before them, and the
    # last one is filled up with as much context as it holds.
    size = 6
    assert size < len(tokens)
    monkeypatch.setattr(type(model), "max_length", property(lambda _: size + 2))
    expected = _score(model, [model.prefix_token_id], tokens[:size])[0]
    for start in range(size, len(tokens), size):
        end = min(start + size, len(tokens))
        expected += _score(model, tokens[end - size - 1 : start], tokens[start:end])[0]
    (found, _) = model.loglikelihood_rolling(requests, disable_tqdm=True)
    assert found == pytest.approx(expected, abs=1e-3)
    assert "is cut" not in caplog.text


# Generation options.


@pytest.mark.thorough
def test_generation_follows_the_tasks_options(lm_eval, model, caplog):
    context = "One request has one slot"

    def complete(context: str, **options) -> str:
        (text,) = model.generate_until(_instances(lm_eval, "generate_until", (context, options)), disable_tqdm=True)
        return text

    whole = complete(context, until=[], max_gen_toks=24)
    mark = whole[len(whole) // 2 :][:2]
    assert complete(context, until=mark, max_gen_toks=24) == whole[: whole.index(mark)]
    assert complete(context, until=[mark, ""], max_new_tokens=24) == whole[: whole.index(mark)]
    assert whole.startswith(complete(context, until=[], max_gen_toks=4))
    # do_sample=False is greedy whatever the temperature.
    assert complete(context, until=[], max_gen_toks=24, do_sample=False, temperature=2.0) == whole
    drawn = complete(context, until=[], max_gen_toks=24, do_sample=True, temperature=2.0, seed=3)
    assert drawn == complete(context, until=[], max_gen_toks=24, temperature=2.0, seed=3)
    assert drawn != whole
    with pytest.raises(ValueError, match="unknown generation options: num_beams; allowed"):
        complete(context, num_beams=4)
    # A prompt that is too long loses its beginning, as with lm-eval's other models, and not in silence.
    long = "A prompt is cut into chunks. " * 200
    ids = model.tok_encode(long)[-(model.max_length - 4) :]
    (expected,) = model.llm.generate([ids], SamplingParams(temperature=0.0, max_tokens=4), use_tqdm=False)
    assert complete(long, until=[], max_gen_toks=4) == expected.outputs[0].text
    assert "is cut to its last 508" in caplog.text


def test_chat_template_is_the_tokenizers(model):
    chat = [{"role": "user", "content": "Hello"}]
    assert model.apply_chat_template(chat) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert model.chat_template(True) == model.tokenizer.chat_template
    assert model.tokenizer_name
    assert "/" not in model.tokenizer_name
    assert model.tok_encode(model.apply_chat_template(chat)) == model.llm.tokenizer.apply_chat_template(chat)
    assert math.isfinite(model.prefix_token_id)
