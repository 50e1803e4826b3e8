"""Bytes to the byte: slots, blocks, plans and shortfalls."""

import dataclasses
import re
import subprocess
import sys

import pytest

from gdnjax import memory
from gdnjax.config import AttentionConfig, DeltaConfig, EngineConfig, LayerKind, MlpKind, ModelConfig, MoeConfig
from gdnjax.memory import MemoryPlan, StateGeometry
from tests.geometries import SMALL_GEOMETRY as SMALL

PATTERN = (LayerKind.DELTA,) * 3 + (LayerKind.ATTENTION,)

# Qwen3.5-397B-A17B.
LARGE = ModelConfig(
    model_type="qwen3_5_moe",
    vocab_size=248_320,
    hidden_size=4096,
    intermediate_size=0,
    layer_kinds=PATTERN * 15,
    mlp_kinds=(MlpKind.MOE,) * 60,
    delta=DeltaConfig(num_key_heads=16, num_value_heads=64, key_head_dim=128, value_head_dim=128, conv_kernel=4),
    attention=AttentionConfig(num_heads=32, num_kv_heads=2, head_dim=256, rotary_dim=64, rope_theta=1e7),
    moe=MoeConfig(
        num_experts=512,
        experts_per_token=10,
        intermediate_size=1024,
        shared_intermediate_size=1024,
        normalise_top_k=True,
    ),
)

GIB = 1 << 30


def large_geometry(**overrides):
    options = {"tp": 4, "block_size": 16, "dtype": "bfloat16", "ssm_dtype": "bfloat16", "kv_dtype": "fp8"}
    return StateGeometry.of(LARGE, **(options | overrides))


def test_slot_and_block_of_the_large_model_are_exact():
    geometry = large_geometry()
    # 45 layers * (3 conv rows * 3,072 channels * 2 B + 16 heads * 128 * 128 * 2 B).
    assert geometry.slot_bytes == 24_422_400
    # Keys and values * 15 layers * 16 tokens * 1 head * (256 bytes + a float32 scale).
    assert geometry.block_bytes == 124_800
    assert geometry.packed_block_bytes == 24_547_200
    assert geometry.packed_block_bytes / (1 << 20) == pytest.approx(23.41, abs=0.005)
    state = geometry.delta_layers * geometry.value_heads * geometry.state_size * 2
    assert state / geometry.packed_block_bytes == pytest.approx(0.961, abs=0.0005)
    assert geometry.equivalent_blocks == -(-24_422_400 // 124_800) == 196


def test_decoupled_pools_hold_180_times_the_packed_blocks():
    geometry = large_geometry()
    budget = 6_906 * geometry.packed_block_bytes
    assert budget / GIB == pytest.approx(157.88, abs=0.005)
    engine = EngineConfig(max_num_seqs=128, max_num_batched_tokens=1024)
    plan = memory.plan(geometry, engine, max_model_len=262_144, budget_bytes=budget)
    assert plan.num_slots == 128
    assert 1_300_000 < plan.num_blocks < 1_340_000
    assert plan.num_blocks > 180 * 6_906
    # Counts are rounded down to a sixteenth at most.
    assert plan.total_bytes <= budget < plan.total_bytes + plan.kv_bytes / 16 + geometry.block_bytes


def test_large_model_by_default_dtypes_is_exact():
    geometry = large_geometry(ssm_dtype="float32", kv_dtype=None)
    assert geometry.slot_bytes == 45 * (3 * 3072 * 2 + 16 * 128 * 128 * 4)
    assert geometry.block_bytes == 2 * 15 * 16 * 256 * 2


def test_small_geometry_is_exact():
    assert SMALL.slot_bytes == 3 * (3 * 208 * 2 + 6 * 16 * 24 * 4)
    assert SMALL.block_bytes == 2 * 2 * 16 * 2 * 32 * 2
    assert SMALL.logit_row_bytes == 401 * 9


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16])
def test_ranks_share_the_state_and_replicate_kv_heads_beyond_their_number(tp):
    geometry, whole = large_geometry(tp=tp), large_geometry(tp=1)
    assert geometry.slot_bytes * tp == whole.slot_bytes
    assert geometry.block_bytes * min(tp, 2) == whole.block_bytes
    assert geometry.vocab_size * tp >= LARGE.vocab_size


def test_model_without_attention_needs_no_block_bytes():
    geometry = dataclasses.replace(SMALL, attention_layers=0)
    assert geometry.block_bytes == geometry.equivalent_blocks == 0
    plan = memory.plan(geometry, EngineConfig(max_num_seqs=2), max_model_len=64, budget_bytes=1 << 20)
    assert plan.num_blocks == 2 * 4
    assert plan.kv_bytes == 0


def engine(**overrides):
    return EngineConfig(**({"max_num_seqs": 4, "max_num_batched_tokens": 64, "block_size": 16} | overrides))


def floor_bytes(config, weights=0, workspace=0):
    slots = (config.max_num_seqs + 1) * SMALL.slot_bytes
    return slots + (config.num_logit_rows + 1) * SMALL.logit_row_bytes + weights + workspace


def test_plan_reserves_state_first_and_gives_the_rest_to_blocks():
    config = engine()
    budget = floor_bytes(config, weights=1000, workspace=77) + 21 * SMALL.block_bytes + SMALL.block_bytes - 1
    plan = memory.plan(SMALL, config, max_model_len=256, budget_bytes=budget, weight_bytes=1000, workspace_bytes=77)
    # One of the 21 is the null block.
    assert (plan.num_slots, plan.num_blocks, plan.num_logit_rows) == (4, 20, 4)
    assert plan.state_bytes == 5 * SMALL.slot_bytes
    assert plan.kv_bytes == 21 * SMALL.block_bytes
    assert plan.logit_row_bytes == 5 * SMALL.logit_row_bytes
    assert plan.total_bytes == budget - (SMALL.block_bytes - 1)


def test_plan_stops_at_what_the_requests_can_use():
    plan = memory.plan(SMALL, engine(), max_model_len=250, budget_bytes=GIB)
    assert plan.num_blocks == 4 * 16
    asked = memory.plan(SMALL, engine(num_kv_blocks=7), max_model_len=250, budget_bytes=GIB)
    assert asked.num_blocks == 7


def test_nearly_equal_budgets_give_equal_shapes():
    """So that the compilation cache hits; at most a sixteenth of the blocks is given up for it, and none is made up."""
    config = engine(max_num_seqs=64)
    floor = floor_bytes(config)
    counts = {}
    for available in range(100, 700):
        budget = floor + (available + 1) * SMALL.block_bytes
        counts[available] = memory.plan(SMALL, config, max_model_len=1600, budget_bytes=budget).num_blocks
    assert all(available * 15 / 16 < count <= available for available, count in counts.items())
    assert list(counts.values()) == sorted(counts.values())
    assert len(set(counts.values())) < 50


@pytest.mark.parametrize("num_kv_blocks", [None, 40])
@pytest.mark.parametrize("weights", [0, 123_457])
def test_shortfall_is_exact(num_kv_blocks, weights):
    config = engine(num_kv_blocks=num_kv_blocks)
    options = {"max_model_len": 250, "weight_bytes": weights, "workspace_bytes": 11}
    budget = floor_bytes(config, weights) // 2
    with pytest.raises(MemoryError, match="bytes short") as error:
        memory.plan(SMALL, config, budget_bytes=budget, **options)
    short = int(re.match(r"([\d,]+) bytes short", str(error.value))[1].replace(",", ""))
    plan = memory.plan(SMALL, config, budget_bytes=budget + short, **options)
    assert plan.num_blocks == (num_kv_blocks or 16)
    assert plan.total_bytes == budget + short
    with pytest.raises(MemoryError, match=r"^1 bytes short"):
        memory.plan(SMALL, config, budget_bytes=budget + short - 1, **options)


def test_shortfall_names_every_part_and_every_remedy():
    with pytest.raises(MemoryError) as error:
        memory.plan(SMALL, engine(), max_model_len=250, budget_bytes=12_345, weight_bytes=777_777)
    for part in (
        "weights 777,777",
        "5 slots",
        f"{5 * SMALL.slot_bytes:,}",
        "17 KV blocks",
        "budget of 12,345 bytes",
    ):
        assert part in str(error.value)
    for setting in ("max_num_seqs", "max_model_len", "gpu_memory_utilization", "tensor_parallel_size"):
        assert setting in str(error.value)


def test_printed_plan_adds_up():
    plan = MemoryPlan.of_counts(SMALL, num_slots=4, num_blocks=20, num_logit_rows=2, weight_bytes=1 << 20)
    text = str(plan)
    assert f"4 slots of {SMALL.slot_bytes:,} B" in text
    assert f"20 blocks of {SMALL.block_bytes:,} B" in text
    assert f"total            {plan.total_bytes / (1 << 20):>10.1f} MiB" in text


def test_memory_imports_no_jax():
    program = "import sys, gdnjax.memory; print('jax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
