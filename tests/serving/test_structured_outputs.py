"""The embedded model under grammars, as users ask for them: what it says is what was asked for."""

import json
import re

import jsonschema
import pytest

from gdnjax import LLM, SamplingParams, StructuredOutputsParams
from tests.compiling import IN_ONE_PIECE, WITHOUT_MLIR, compiled_with

pytestmark = pytest.mark.thorough

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Ann", "Bob", "Zoë"]},
        "pens": {"type": "integer", "minimum": 0, "maximum": 999},
        "colours": {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 1, "maxItems": 3},
        "note": {"type": "string", "maxLength": 12},
        "none": {"type": ["null", "boolean"]},
    },
    "required": ["name", "pens", "colours", "none"],
    "additionalProperties": False,
}
QUESTION = "Ann has 3 pens and buys 4 more. How many pens does Ann have?"


@pytest.fixture(scope="module")
def llm():
    options = {"prefill_buckets": (128,), "decode_buckets": (8,), "num_kv_blocks": 200, "warmup": False}
    options |= {"dtype": "float32", "max_num_seqs": 8, "max_num_batched_tokens": 128, "max_model_len": 512}
    # Compiled quickly: it draws few tokens.
    with compiled_with(IN_ONE_PIECE, WITHOUT_MLIR), LLM("tiny", **options) as llm:
        yield llm


def asking(**values) -> SamplingParams:
    sampling = {name: values.pop(name) for name in ("n", "seed", "max_tokens", "temperature") if name in values}
    return SamplingParams(**{"max_tokens": 200} | sampling, structured_outputs=StructuredOutputsParams(**values))


def test_json_is_what_its_schema_allows_whatever_is_drawn(llm):
    (output,) = llm.generate(QUESTION, asking(json=SCHEMA, n=30, disable_any_whitespace=True), use_tqdm=False)
    for sample in output.outputs:
        assert sample.finish_reason == "stop"
        found = json.loads(sample.text)
        jsonschema.validate(found, SCHEMA)
        assert sample.text == json.dumps(found, ensure_ascii=False)
    assert len({sample.text for sample in output.outputs}) > 10


def test_json_with_any_blanks_is_json(llm):
    schema = {"type": "array", "items": {"type": "integer", "maximum": 99, "minimum": 0}, "maxItems": 2}
    (output,) = llm.generate(QUESTION, asking(json=json.dumps(schema), n=8, max_tokens=250), use_tqdm=False)
    for sample in output.outputs:
        jsonschema.validate(json.loads(sample.text), schema)
        assert not re.search(r"\s{33}", sample.text)
    assert any(re.search(r"\s{2}", sample.text) for sample in output.outputs)


def test_any_object_is_an_object(llm):
    (output,) = llm.generate(QUESTION, asking(json_object=True, temperature=0.0), use_tqdm=False)
    assert isinstance(json.loads(output.outputs[0].text), dict)


@pytest.mark.parametrize(
    ("structure", "pattern"),
    [
        ({"regex": r"\d{2,3} (pens|Stifte|鉛筆)"}, r"\d{2,3} (pens|Stifte|鉛筆)"),
        ({"choice": ["seven", "eight", "I do not know", "né"]}, "seven|eight|I do not know|né"),
        ({"grammar": 'start: "sum: " NUMBER ("+" NUMBER)~1..2\nNUMBER: /[0-9]{1,2}/'}, r"sum: \d{1,2}(\+\d{1,2}){1,2}"),
        ({"grammar": 'root ::= "<" ("a" | "b")? ">"'}, "<[ab]?>"),
    ],
    ids=str,
)
def test_text_matches(llm, structure, pattern):
    (output,) = llm.generate(QUESTION, asking(n=8, **structure), use_tqdm=False)
    for sample in output.outputs:
        assert re.fullmatch(pattern, sample.text)
        assert sample.finish_reason == "stop"


def test_every_call_takes_a_structure(llm):
    """Chats, streams and submissions give what generate gives."""
    params = asking(regex="[0-9]{3}", seed=3)
    (expected,) = llm.generate(QUESTION, params, use_tqdm=False)[0].outputs
    pieces = list(llm.stream(QUESTION, params))
    assert "".join(piece.text for piece in pieces) == expected.text
    assert pieces[-1].finish_reason == "stop"
    submission = llm.submit(QUESTION, params)
    while llm.step():
        pass
    assert submission.output().outputs == (expected,)
    (answer,) = llm.chat([{"role": "user", "content": QUESTION}], params, use_tqdm=False)[0].outputs
    assert re.fullmatch("[0-9]{3}", answer.text)


def test_schema_that_is_none_is_refused_before_anything_is_queued(llm):
    number, requests = llm.frontend.num_requests, llm.engine.counters.num_requests
    with pytest.raises(ValueError, match=r"prompt 1: structured_outputs\.json is no grammar: Invalid type: objekt"):
        llm.generate([QUESTION] * 2, [asking(regex="a"), asking(json={"type": "objekt"})], use_tqdm=False)
    assert (llm.frontend.num_requests, llm.engine.counters.num_requests) == (number, requests)
