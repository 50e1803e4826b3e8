"""Sampling parameters are checked at construction: a bad value is named, with what is allowed."""

import dataclasses
import json
import math

import pytest

from gdnjax import SamplingParams, StructuredOutputsParams
from gdnjax.sampling_params import MAX_BAD_WORDS, MAX_STOP_STRINGS, MAX_STRUCTURE

BAD = [
    ({"n": 0}, "n must be an integer of at least 1, got 0"),
    ({"n": 1.0}, "n must be an integer"),
    ({"n": True}, "n must be an integer"),
    ({"temperature": -0.1}, "temperature must be a finite number of at least 0, got -0.1"),
    ({"temperature": math.inf}, "temperature must be a finite number"),
    ({"temperature": math.nan}, "temperature must be a finite number"),
    ({"temperature": "hot"}, "temperature must be a finite number of at least 0, got 'hot'"),
    ({"top_p": 0}, r"top_p must be a finite number in \(0, 1\], got 0"),
    ({"top_p": 1.1}, r"top_p must be a finite number in \(0, 1\], got 1.1"),
    ({"top_k": -2}, "top_k must be an integer of at least -1, got -2"),
    ({"top_k": 5.5}, "top_k must be an integer"),
    ({"min_p": -0.1}, "min_p must be a finite number"),
    ({"min_p": 2}, "min_p must be a finite number"),
    ({"presence_penalty": 2.1}, "presence_penalty must be a finite number"),
    ({"frequency_penalty": -2.1}, "frequency_penalty must be a finite number"),
    ({"repetition_penalty": 0}, "repetition_penalty must be a finite number above 0, got 0"),
    ({"repetition_penalty": -1}, "repetition_penalty must be a finite number"),
    ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ({"seed": 1 << 64}, r"seed must be below 2\*\*64"),
    ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0"),
    ({"max_tokens": -5}, "max_tokens must be an integer of at least 1, got -5"),
    ({"max_tokens": "many"}, "max_tokens must be an integer"),
    ({"n": 1025}, "n must be at most 1024, got 1025: all samples are queued at once"),
    ({"skip_special_tokens": "yes"}, "skip_special_tokens must be True or False, got 'yes'"),
    ({"include_stop_str_in_output": 1}, "include_stop_str_in_output must be True or False, got 1"),
    ({"ignore_eos": None}, "ignore_eos must be True or False, got None"),
    ({"stop_token_ids": b"ab"}, "stop_token_ids must be a list of token ids, got b'ab'"),
    ({"allowed_token_ids": {1}}, "allowed_token_ids must be a list of token ids"),
    ({"stop": "\ud83d"}, "is no valid text"),
    ({"logit_bias": {1: True}}, "logit_bias"),
    ({"min_tokens": -1}, "min_tokens must be an integer"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5 exceeds max_tokens=4"),
    ({"logprobs": -1}, "logprobs must be an integer of at least 0"),
    ({"logprobs": True}, "logprobs must be an integer"),
    ({"prompt_logprobs": -1}, "prompt_logprobs must be an integer"),
    ({"stop": ""}, "stop must hold non-empty strings, got ''"),
    ({"stop": ["ok", ""]}, "stop must hold non-empty strings"),
    ({"stop": [1]}, "stop must hold non-empty strings, got 1"),
    ({"stop": ["a"] * (MAX_STOP_STRINGS + 1)}, f"stop must be at most {MAX_STOP_STRINGS} strings"),
    ({"stop": 7}, "stop must be a list of strings, got 7"),
    ({"stop_token_ids": [-1]}, "every id in stop_token_ids must be an integer of at least 0, got -1"),
    ({"stop_token_ids": 5}, "stop_token_ids must be a list of token ids, got 5"),
    ({"stop_token_ids": "5"}, "stop_token_ids must be a list of token ids"),
    ({"bad_words": "word"}, "bad_words must be a list of strings, got 'word'"),
    ({"bad_words": [""]}, "bad_words must hold non-empty strings"),
    ({"bad_words": ["a"] * (MAX_BAD_WORDS + 1)}, f"at most {MAX_BAD_WORDS} bad_words are allowed"),
    ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
    ({"allowed_token_ids": [1.5]}, "every id in allowed_token_ids must be an integer"),
    ({"logit_bias": [1, 2]}, "logit_bias must map token ids to numbers"),
    ({"logit_bias": {-1: 1.0}}, "every id in logit_bias must be an integer of at least 0"),
    ({"logit_bias": {3: math.inf}}, r"logit_bias\[3\] must be a number of at most 1e\+30"),
    ({"logit_bias": {3: math.nan}}, r"logit_bias\[3\] must be a number"),
    ({"logit_bias": {3: "much"}}, r"logit_bias\[3\] must be a number"),
    ({"structured_outputs": {"regex": "a"}}, "structured_outputs must be a StructuredOutputsParams, got"),
    ({"speculate": 1}, "speculate must be True or False, got 1"),
    ({"speculate": None}, "speculate must be True or False, got None"),
]


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(("values", "message"), BAD, ids=[str(values)[:60] for values, _ in BAD])
def test_bad_value_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**values)


@pytest.mark.parametrize(
    "values",
    [
        # What a step holds in int32 and float32 must fit there: an overflow would end the engine, or draw nonsense.
        {"top_k": 1 << 31},
        {"temperature": 1e39},
        {"temperature": 1e-39},
        {"repetition_penalty": 1e39},
        {"repetition_penalty": 1e-46},
        {"top_p": 1e-46},
        {"logit_bias": {3: 1e39}},
    ],
    ids=str,
)
def test_value_that_the_device_cannot_hold_is_refused(values):
    (name,) = values
    with pytest.raises(ValueError, match=name):
        SamplingParams(**values)


def test_unknown_field_is_answered_with_those_there_are():
    with pytest.raises(
        TypeError, match=r"SamplingParams has no max_new_tokens, foo; allowed: n, temperature, .*speculate"
    ):
        SamplingParams(max_new_tokens=3, foo=1)


def test_every_field_has_a_bad_value_tested():
    tested = {name for values, _ in BAD for name in values}
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert fields == tested


def test_defaults_are_those_users_know():
    defaults = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    assert defaults == {
        "n": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": None,
        "stop": None,
        "stop_token_ids": None,
        "include_stop_str_in_output": False,
        "ignore_eos": False,
        "max_tokens": 16,
        "min_tokens": 0,
        "logprobs": None,
        "prompt_logprobs": None,
        "skip_special_tokens": True,
        "logit_bias": None,
        "bad_words": None,
        "allowed_token_ids": None,
        "structured_outputs": None,
        "speculate": True,
    }


def test_integers_are_taken_for_numbers():
    params = SamplingParams(temperature=0, top_p=1, min_p=0, presence_penalty=1, repetition_penalty=2)
    assert params.temperature == 0
    assert params.repetition_penalty == 2


def test_sequences_become_tuples():
    stop = ["a", "b"]
    params = SamplingParams(stop=stop, stop_token_ids=[1, 2], allowed_token_ids=[3], bad_words=["w"])
    stop.append("c")
    assert (params.stop, params.stop_token_ids, params.allowed_token_ids) == (("a", "b"), (1, 2), (3,))
    assert params.bad_words == ("w",)
    assert SamplingParams(stop="word").stop == ("word",)
    assert SamplingParams().stop == SamplingParams().stop_token_ids == ()


def test_parameters_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 2.0


@pytest.mark.parametrize(
    ("values", "row", "counts", "full"),
    [
        ({}, False, False, False),
        ({"temperature": 0.0, "top_k": 5, "top_p": 0.5}, False, False, False),
        ({"temperature": 0.5, "min_p": 0.1}, False, False, False),
        ({"top_k": 5}, False, False, True),
        ({"top_k": -1}, False, False, False),
        ({"top_p": 0.5}, False, False, True),
        ({"logprobs": 0}, False, False, True),
        ({"repetition_penalty": 1.1}, False, True, True),
        ({"frequency_penalty": -0.5}, False, True, True),
        ({"presence_penalty": 0.5}, False, True, True),
        ({"logit_bias": {1: 0.5}}, True, False, True),
        ({"logit_bias": {}}, False, False, False),
        ({"bad_words": ["x"]}, True, False, True),
        ({"allowed_token_ids": [1]}, True, False, True),
        ({"min_tokens": 1}, False, False, True),
        ({"stop": ["x"], "stop_token_ids": [4], "seed": 5, "n": 3}, False, False, False),
        ({"speculate": False}, False, False, False),
        ({"structured_outputs": StructuredOutputsParams(regex="a")}, False, False, True),
    ],
)
def test_only_those_who_need_a_row_or_the_full_sampler_pay_for_it(values, row, counts, full):
    params = SamplingParams(**values)
    assert (params.needs_logit_row, params.needs_counts, params.needs_full_sampler) == (row, counts, full)


def test_params_are_hashable_and_equal_by_value():
    one = SamplingParams(logit_bias={3: 1.0, 1: -2.0}, stop=["a"])
    same = SamplingParams(logit_bias={1: -2.0, 3: 1.0}, stop=["a"])
    assert one == same
    assert hash(one) == hash(same)
    assert one != SamplingParams(logit_bias={1: -2.0}, stop=["a"])


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "exactly one of json, regex, choice, grammar, json_object, got none"),
        ({"json_object": False}, "exactly one of json, regex, choice, grammar, json_object, got none"),
        ({"regex": "a", "choice": ["b"]}, "exactly one of .*, got regex, choice"),
        ({"regex": ""}, "regex must hold non-empty strings"),
        ({"grammar": 3}, "grammar must hold non-empty strings, got 3"),
        ({"choice": []}, "choice is empty"),
        ({"choice": "yes"}, "choice must be a list of strings, got 'yes'"),
        ({"choice": [""]}, "choice must hold non-empty strings"),
        ({"choice": ["\ud800"]}, "lone surrogate"),
        ({"json": "{"}, "json is no JSON text: .*, got '{'"),
        ({"json": "[]"}, r"json must be a JSON schema, an object, got '\[\]'"),
        ({"json": {"a": {1, 2}}}, "json must be a schema that JSON holds"),
        ({"json": 3}, "json must be a JSON schema, a dictionary or its text, got 3"),
        ({"json_object": "yes"}, "json_object must be True or False, got 'yes'"),
        ({"regex": "a", "disable_any_whitespace": True}, "disable_any_whitespace is for json and json_object, got reg"),
        ({"json": {}, "disable_any_whitespace": 1}, "disable_any_whitespace must be True or False, got 1"),
    ],
    ids=str,
)
def test_structure_that_is_none_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        StructuredOutputsParams(**values)


def test_structure_has_the_names_that_users_know_and_tells_them():
    with pytest.raises(TypeError, match=r"StructuredOutputsParams has no guided_json; allowed: json, regex, choice"):
        StructuredOutputsParams(guided_json={})


def test_schema_is_the_same_as_an_object_and_as_its_text():
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    one, same = StructuredOutputsParams(json=schema), StructuredOutputsParams(json=json.dumps(schema))
    assert one == same
    assert hash(SamplingParams(structured_outputs=one)) == hash(SamplingParams(structured_outputs=same))
    # The order of its properties is that of the output.
    assert list(json.loads(one.json)["properties"]) == ["b", "a"]
    assert StructuredOutputsParams(json={}).kind == "json"


@pytest.mark.parametrize(
    ("structure", "size"),
    [
        ({"regex": "a" * (MAX_STRUCTURE + 1)}, MAX_STRUCTURE + 1),
        ({"choice": ["ab"] * MAX_STRUCTURE}, 2 * MAX_STRUCTURE),
        ({"json": '{"title": "' + "a" * MAX_STRUCTURE + '"}'}, MAX_STRUCTURE + 13),
        ({"grammar": "a" * (MAX_STRUCTURE + 1)}, MAX_STRUCTURE + 1),
    ],
    ids=["regex", "choice", "json", "grammar"],
)
def test_structures_that_would_take_long_to_compile_are_refused(structure, size):
    with pytest.raises(ValueError, match=f"{next(iter(structure))} has {size} characters; allowed: {MAX_STRUCTURE}"):
        StructuredOutputsParams(**structure)


def test_schema_that_is_too_deep_is_told():
    schema = {}
    for _ in range(10_000):
        schema = {"not": schema}
    with pytest.raises(ValueError, match="json must be a schema that JSON holds"):
        StructuredOutputsParams(json=schema)
    with pytest.raises(ValueError, match="json is no JSON text"):
        StructuredOutputsParams(json="[" * 100_000)
