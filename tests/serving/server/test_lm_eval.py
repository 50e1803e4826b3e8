"""lm-eval's own clients of a server: what they are told is what the engine says.

Skipped where lm-eval is not installed (pip install -e ".[eval]").
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdnjax import SamplingParams, full_logits
from gdnjax.assets import model_directory
from scripts import lm_eval_gdnjax as script

lm_eval = pytest.importorskip("lm_eval")

NUM_PROBLEMS = 6
MAX_TOKENS = 96
LONGEST = 32
STOPS = ("Question:", "</s>", "<|im_end|>")


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """Problems of the embedded model's, and their file."""
    lines = (model_directory("tiny") / "problems.jsonl").read_text().splitlines()[:NUM_PROBLEMS]
    file = tmp_path_factory.mktemp("lm_eval") / "problems.jsonl"
    file.write_text("\n".join(lines))
    return [json.loads(line) for line in lines], file


def client_of(name, url, path, **options):
    from lm_eval.api.registry import get_model

    return get_model(name).create_from_arg_obj(
        {
            "model": "tiny",
            "base_url": f"{url}{path}",
            "tokenizer": str(model_directory("tiny")),
            "num_concurrent": 4,
            "max_length": 256,
            **options,
        }
    )


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["local-completions", "local-chat-completions"])
def test_scores_are_those_of_the_engines_answers(url, llm, problems, kind):
    from lm_eval.tasks import TaskManager

    items, file = problems
    is_chat = kind == "local-chat-completions"
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    client = client_of(kind, url, path, max_gen_toks=MAX_TOKENS)
    manager = TaskManager(include_path=str(script.TASKS), metadata={"data": str(file), "shots": str(file)})
    found = lm_eval.simple_evaluate(
        client, tasks=["gsm8k_local_plain"], task_manager=manager, log_samples=True, apply_chat_template=is_chat
    )
    samples = {sample["doc_id"]: sample for sample in found["samples"]["gsm8k_local_plain"]}
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, stop=STOPS)
    questions = [item["question"] for item in items]
    if is_chat:
        outputs = llm.chat([[{"role": "user", "content": question}] for question in questions], params, use_tqdm=False)
    else:
        prompts = [samples[index]["arguments"][0][0] for index in range(NUM_PROBLEMS)]
        outputs = llm.generate(prompts, params, use_tqdm=False)
    texts = [output.outputs[0].text for output in outputs]
    assert [samples[index]["resps"][0][0] for index in range(NUM_PROBLEMS)] == texts
    right = [
        item["answer"].rsplit("#### ", 1)[1] == text.rsplit("#### ", 1)[-1]
        for item, text in zip(items, texts, strict=True)
    ]
    assert found["results"]["gsm8k_local_plain"]["exact_match,strict-match"] == pytest.approx(np.mean(right))
    assert any(right)


@pytest.mark.thorough
def test_loglikelihoods_are_those_of_the_logits(url, llm):
    from lm_eval.api.instance import Instance

    client = client_of("local-completions", url, "/v1/completions")
    (best,) = llm.generate(["Once upon a time"], SamplingParams(temperature=0.0, max_tokens=6), use_tqdm=False)
    asked = [("A box has 3", " apples. 4 more are put in."), ("What is 31", " + 46?")]
    asked += [("Once upon a time", best.outputs[0].text)]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(asked)]
    greedy = []
    for (context, continuation), (value, is_greedy) in zip(asked, client.loglikelihood(requests), strict=True):
        whole = llm.tokenizer.encode(context + continuation)
        split = len(llm.tokenizer.encode(context.rstrip()))
        # What follows changes nothing, and one length compiles once.
        padded = jnp.asarray([*whole, *[0] * (LONGEST - len(whole))], jnp.int32)
        logits = full_logits(llm.model, llm.params, padded)[split - 1 : len(whole) - 1]
        rows = np.asarray(jax.nn.log_softmax(logits))
        expected = sum(row[token] for row, token in zip(rows, whole[split:], strict=True))
        # Sums of a few log-probabilities, each within 2e-5 of float64.
        assert value == pytest.approx(float(expected), abs=1e-3)
        assert is_greedy == (rows.argmax(axis=1).tolist() == whole[split:])
        greedy.append(is_greedy)
    assert set(greedy) == {True, False}
