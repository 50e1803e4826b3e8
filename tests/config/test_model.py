"""Geometries of models: what they ask of a multi-token-prediction head, how they are split, and what is refused."""

import dataclasses

import pytest

from gdnjax import ModelConfig
from gdnjax.config import MTP_KEYS, AttentionConfig
from tests.config.configurations import CLASSES, from_hf, hf_dict


@pytest.mark.parametrize("changes", [{"rotary_dim": None}, {"rope_theta": None}])
def test_rotation_is_whole_or_not_there(changes):
    attention = AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8, rotary_dim=8, rope_theta=1e4)
    with pytest.raises(ValueError, match="without rotation rotary_dim, rope_theta and yarn are None, all three"):
        dataclasses.replace(attention, **changes)
    assert dataclasses.replace(attention, rotary_dim=None, rope_theta=None).num_heads == 2


def test_projections_are_stored_in_one_way():
    with pytest.raises(ValueError, match="projections of the checkpoint are interleaved or separate, not both"):
        dataclasses.replace(from_hf("qwen3_next"), separate_projections=True)


@pytest.mark.parametrize("model_type", [name for name in CLASSES if name in MTP_KEYS and MTP_KEYS[name].dedicated])
def test_mtp_head_with_an_embedding_of_its_own_is_refused_only_where_it_is_wanted(model_type):
    shared, own = (
        from_hf(model_type, text={"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": dedicated})
        for dedicated in (False, True)
    )
    assert (shared.mtp_dedicated_embeddings, own.mtp_dedicated_embeddings) == (False, True)
    shared.require_mtp()
    with pytest.raises(ValueError, match=r"mtp_use_dedicated_embeddings=true.*allowed: num_speculative_tokens=0"):
        own.require_mtp()


@pytest.mark.parametrize(
    ("model_type", "text", "message"),
    [
        ("qwen3_5", {}, r"num_speculative_tokens above 0.*counts none \(mtp_num_hidden_layers\)"),
        ("qwen3_5_moe_text", {"mtp_num_hidden_layers": 0}, r"counts none \(mtp_num_hidden_layers\)"),
        ("qwen3_5_text", {"mtp_num_hidden_layers": 2}, "of one layer, got mtp_num_hidden_layers=2"),
        ("qwen3_next", {"num_nextn_predict_layers": 0}, r"counts none \(num_nextn_predict_layers\)"),
        ("qwen3_next", {"num_nextn_predict_layers": 3}, "of one layer, got num_nextn_predict_layers=3"),
    ],
)
def test_model_without_an_mtp_head_to_run_says_so(model_type, text, message):
    with pytest.raises(ValueError, match=message) as raised:
        from_hf(model_type, text=text).require_mtp()
    assert str(raised.value).endswith("allowed: num_speculative_tokens=0")


def test_more_experts_a_token_than_there_are_is_refused():
    with pytest.raises(ValueError, match="num_experts_per_tok must be between 1 and num_experts=5, got 6"):
        from_hf("qwen3_5_moe", text={"num_experts_per_tok": 6})


def test_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="at least one layer"):
        dataclasses.replace(from_hf("qwen3_5"), layer_kinds=(), mlp_kinds=())


@pytest.mark.parametrize("name", ["linear_num_key_heads", "linear_value_head_dim", "num_key_value_heads"])
def test_geometry_of_nothing_is_refused(name):
    with pytest.raises(ValueError, match="must be above 0, got 0"):
        ModelConfig.from_hf(hf_dict("qwen3_5_text") | {name: 0})


def test_shard_divides_heads_widths_and_vocabulary():
    config = from_hf("qwen3_5_moe")
    rank = config.shard(2)
    assert (rank.delta.num_key_heads, rank.delta.num_value_heads) == (1, 3)
    assert (rank.attention.num_heads, rank.attention.num_kv_heads) == (2, 1)
    assert (rank.moe.intermediate_size, rank.moe.shared_intermediate_size) == (8, 12)
    assert rank.vocab_size == 201
    assert config.padded_vocab_size(2) == 402
    assert from_hf("qwen3_5").shard(2).intermediate_size == 36
    assert config.shard(1) == config


def test_shard_with_expert_parallel_divides_experts_and_none_of_their_widths():
    config = from_hf("qwen3_5_moe", text={"num_experts": 4, "moe_intermediate_size": 15}).with_expert_parallel()
    rank = config.shard(2)
    assert config.expert_parallel
    assert (rank.moe.num_experts, rank.moe.held_experts) == (4, 2)
    assert (rank.moe.intermediate_size, rank.moe.shared_intermediate_size) == (15, 12)
    assert config.shard(1).moe.held_experts == 4
    with pytest.raises(
        ValueError, match="tensor_parallel_size=2 does not divide num_experts=5; allowed: divisors of 5"
    ):
        from_hf("qwen3_5_moe").with_expert_parallel().shard(2)


def test_expert_parallel_needs_experts():
    with pytest.raises(
        ValueError, match="enable_expert_parallel=True needs a model with a mixture of experts, and this"
    ):
        from_hf("qwen3_5").with_expert_parallel()


def test_kv_heads_are_replicated_beyond_their_number():
    attention = AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=32, rotary_dim=8, rope_theta=1e4)
    assert attention.shard(8) == dataclasses.replace(attention, num_heads=1, num_kv_heads=1)


@pytest.mark.parametrize(
    ("model_type", "text", "tp", "message"),
    [
        ("qwen3_5", {}, 0, "tensor_parallel_size must be at least 1, got 0"),
        ("qwen3_5", {}, 5, "tensor_parallel_size=5 does not divide intermediate_size=72"),
        ("qwen3_5", {}, 4, "tensor_parallel_size=4 does not divide linear_num_key_heads=2; allowed: divisors of 2"),
        (
            "qwen3_5",
            {"linear_num_key_heads": 6},
            3,
            "tensor_parallel_size=3 does not divide num_attention_heads=4; allowed: divisors of 4",
        ),
        (
            "qwen3_5",
            {"linear_num_key_heads": 6, "num_attention_heads": 12, "num_key_value_heads": 4},
            6,
            "tensor_parallel_size=6 and num_key_value_heads=4: one must divide the other",
        ),
        (
            "qwen3_5_moe",
            {"moe_intermediate_size": 15},
            2,
            "tensor_parallel_size=2 does not divide moe intermediate_size=15",
        ),
        (
            "qwen3_5_moe",
            {"shared_expert_intermediate_size": 23},
            2,
            "tensor_parallel_size=2 does not divide moe shared_intermediate_size=23",
        ),
    ],
)
def test_shard_names_what_does_not_divide(model_type, text, tp, message):
    with pytest.raises(ValueError, match=message):
        from_hf(model_type, text=text).shard(tp)
