"""The tables of config.json's keys: complete, and kept to."""

import dataclasses

import pytest
import transformers

from gdnjax import ModelConfig
from gdnjax.config import keys
from tests.config.configurations import CLASSES, from_hf, hf_dict


@pytest.mark.parametrize("model_type", CLASSES)
def test_every_key_of_transformers_is_in_the_tables(model_type, caplog):
    """So none is ignored without a decision, whatever another version of transformers adds."""
    wrapper, inner, _ = CLASSES[model_type]
    tables = (keys.honoured_by(model_type), set(keys.fixed_of(model_type)), set(keys.WITHOUT_EFFECT))
    for name in (wrapper, inner):
        fields = {field.name for field in dataclasses.fields(getattr(transformers, name))} if name else set()
        assert not fields - set().union(*tables)
    assert sum(map(len, tables)) == len(set().union(*tables)), "a key is in one table"
    with caplog.at_level("WARNING", logger="gdnjax"):
        from_hf(model_type)
    assert not caplog.records


@pytest.mark.parametrize("inside", [False, True])
def test_key_that_nobody_knows_is_named_in_a_warning(inside, caplog):
    raw = hf_dict("qwen3_5")
    (raw["text_config"] if inside else raw)["frobnication"] = 3
    with caplog.at_level("WARNING", logger="gdnjax"):
        ModelConfig.from_hf(raw)
    (record,) = caplog.records
    assert record.message.endswith("without effect: text_config.frobnication" if inside else "effect: frobnication")


@pytest.mark.parametrize(
    ("model_type", "name"),
    [(one, name) for one in ("qwen3_5", "qwen3_next", "deepseek_v3", "olmo_hybrid") for name in keys.fixed_of(one)],
)
def test_key_that_changes_numbers_is_refused_with_any_other_value(name, model_type):
    allowed = keys.fixed_of(model_type)[name]
    for value in (*allowed, "another", 7, allowed[0] is False):
        raw = hf_dict(model_type)
        raw.get("text_config", raw)[name] = value
        if value in allowed:
            if value is not None or allowed[0] is None:
                ModelConfig.from_hf(raw)
        else:
            with pytest.raises(ValueError, match=rf"unsupported (text_config\.)?{name} .*; supported: "):
                ModelConfig.from_hf(raw)
