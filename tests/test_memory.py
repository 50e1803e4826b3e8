"""Bytes to the byte: slots, blocks, plans and shortfalls; and the command that prints them."""

import dataclasses
import functools
import json
import re
import subprocess
import sys

import pytest

from gdnjax import abstract_params, memory
from gdnjax.assets import EMBEDDED_MODEL, PRESETS, SAME_AS, config_file, model_directory
from gdnjax.checkpoint.coded import usual_formats
from gdnjax.config import AttentionConfig, DeltaConfig, EngineConfig, LayerKind, MlpKind, ModelConfig, MoeConfig
from gdnjax.memory import HostSizes, MemoryPlan, StateGeometry
from gdnjax.memory.__main__ import build_parser, main
from gdnjax.memory.weights import weight_bytes, workspace_estimate
from gdnjax.serving import planning
from tests.geometries import SMALL_GEOMETRY as SMALL
from tests.geometries import small_geometry

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

STORED_PLAIN = [name for name in PRESETS if not name.endswith("-fp8")]


def large_geometry(**overrides):
    options = {"tp": 4, "block_size": 16, "dtype": "bfloat16", "ssm_dtype": "bfloat16", "kv_cache_dtype": "fp8"}
    return StateGeometry.of(LARGE, **(options | overrides))


def test_slot_and_block_of_the_large_model_are_exact():
    geometry = large_geometry()
    # 45 layers * (3 conv rows * 3,072 channels * 2 B + 16 heads * 128 * 128 * 2 B).
    assert geometry.slot_bytes == 24_422_400
    # Keys and values * 15 layers * 16 tokens * 1 head * (256 bytes + a float32 scale).
    assert geometry.block_bytes == 124_800
    assert geometry.packed_block_bytes == 24_547_200
    assert geometry.packed_block_bytes / (1 << 20) == pytest.approx(23.41, abs=0.005)
    state = next(leaf for _, leaf in geometry.cache.leaves() if leaf.name == "ssm")
    assert state.bytes / geometry.packed_block_bytes == pytest.approx(0.961, abs=0.0005)
    assert geometry.equivalent_blocks == -(-24_422_400 // 124_800) == 196


def test_decoupled_pools_hold_180_times_the_packed_blocks():
    geometry = large_geometry()
    budget = 6_906 * geometry.packed_block_bytes
    assert budget / GIB == pytest.approx(157.88, abs=0.005)
    assert memory.packed_blocks(geometry, budget) == 6_906
    blocks = memory.decoupled_blocks(geometry, budget, 128)
    assert blocks == (budget - 128 * 24_422_400) // 124_800 == 1_333_308
    assert blocks > 180 * 6_906
    engine = EngineConfig(max_num_seqs=128, max_num_batched_tokens=1024, enable_prefix_caching=False)
    plan = memory.plan(geometry, engine, max_model_len=262_144, budget_bytes=budget)
    assert plan.num_slots == 128
    assert 1_300_000 < plan.num_blocks < 1_340_000
    assert plan.num_blocks > 180 * 6_906
    # Counts are rounded down to a sixteenth at most.
    assert plan.total_bytes <= budget < plan.total_bytes + plan.kv_bytes / 16 + geometry.block_bytes


def test_large_model_by_default_dtypes_is_exact():
    geometry = large_geometry(ssm_dtype="float32", kv_cache_dtype="auto")
    assert geometry.slot_bytes == 45 * (3 * 3072 * 2 + 16 * 128 * 128 * 4)
    assert geometry.block_bytes == 2 * 15 * 16 * 256 * 2


def test_small_geometry_is_exact():
    assert SMALL.slot_bytes == 3 * (3 * 208 * 2 + 6 * 16 * 24 * 4)
    assert SMALL.block_bytes == 2 * 2 * 16 * 2 * 32 * 2
    assert SMALL.logit_row_bytes == 401 * 4
    assert SMALL.count_row_bytes == 401 * 2
    assert SMALL.mask_row_bytes == 13 * 4
    assert SMALL.hidden_bytes == 40 * 2


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16])
def test_ranks_share_the_state_and_replicate_kv_heads_beyond_their_number(tp):
    geometry, whole = large_geometry(tp=tp), large_geometry(tp=1)
    assert geometry.slot_bytes * tp == whole.slot_bytes
    assert geometry.block_bytes * min(tp, 2) == whole.block_bytes
    assert geometry.vocab_size * tp >= LARGE.vocab_size
    # Every rank holds the last hidden state whole.
    assert geometry.hidden_bytes == whole.hidden_bytes == 2 * 4096


def test_rows_of_a_speculating_slot_are_exact():
    """The window keeps the inputs of 1 + 3 tokens more, and there are their gates; hidden states count apart."""
    for rule, drafts in (("shared_noise", 0), ("rejection", 3)):
        speculation = EngineConfig(num_speculative_tokens=3, draft_acceptance=rule)
        geometry = large_geometry(ssm_dtype="float32", speculation=speculation)
        assert geometry.slot_bytes == 45 * ((3 + 4) * 3072 * 2 + 16 * 128 * 128 * 4 + 4 * 2 * 16 * 2)
        assert geometry.hidden_bytes == (1 + 4 + drafts) * 4096 * 2
        assert geometry.block_bytes == large_geometry(ssm_dtype="float32").block_bytes
    assert large_geometry(speculation=EngineConfig()) == large_geometry()


@pytest.mark.parametrize("num_drafts", [1, 3, 7])
def test_plan_divides_a_budget_by_what_speculating_slots_take(num_drafts):
    config = uncached(num_speculative_tokens=num_drafts, draft_acceptance="rejection")
    geometry = small_geometry(speculation=config)
    slot = geometry.slot_bytes + geometry.hidden_bytes
    rows = 5 * (SMALL.logit_row_bytes + SMALL.count_row_bytes + SMALL.mask_row_bytes)
    budget = 5 * slot + rows + (16 + 1) * SMALL.block_bytes
    plan = memory.plan(geometry, config, max_model_len=250, budget_bytes=budget)
    assert (plan.num_slots, plan.num_blocks, plan.total_bytes) == (4, 16, budget)
    with pytest.raises(MemoryError, match=rf"^1 bytes short: 5 slots {5 * slot:,}"):
        memory.plan(geometry, config, max_model_len=250, budget_bytes=budget - 1)


def test_model_without_attention_needs_no_block_bytes():
    geometry = small_geometry(attention_layers=0)
    assert geometry.block_bytes == geometry.equivalent_blocks == 0
    plan = memory.plan(geometry, EngineConfig(max_num_seqs=2), max_model_len=64, budget_bytes=8 << 20)
    assert plan.num_blocks == (2 + 4) * 4
    assert plan.kv_bytes == 0
    with pytest.raises(ValueError, match="no KV blocks"):
        memory.decoupled_blocks(geometry, 1 << 20, 2)


SLOT = SMALL.slot_bytes + SMALL.hidden_bytes
"""What one more slot takes of a budget."""


def engine(**overrides):
    return EngineConfig(**({"max_num_seqs": 4, "max_num_batched_tokens": 64, "block_size": 16} | overrides))


def uncached(**overrides):
    return engine(enable_prefix_caching=False, **overrides)


def floor_bytes(config, weights=0, workspace=0):
    slots = (config.max_num_seqs + 1) * SLOT
    rows = (config.num_logit_rows + 1) * SMALL.logit_row_bytes
    rows += (config.max_num_seqs + 1) * (SMALL.count_row_bytes + SMALL.mask_row_bytes)
    return slots + rows + weights + workspace


def test_plan_reserves_state_first_and_gives_the_rest_to_blocks():
    config = uncached()
    budget = floor_bytes(config, weights=1000, workspace=77) + 21 * SMALL.block_bytes + SMALL.block_bytes - 1
    plan = memory.plan(SMALL, config, max_model_len=256, budget_bytes=budget, weight_bytes=1000, workspace_bytes=77)
    # One of the 21 is the null block.
    assert (plan.num_slots, plan.num_blocks, plan.num_logit_rows) == (4, 20, 4)
    assert plan.num_checkpoint_slots == 0
    assert plan.state_bytes == 5 * SMALL.slot_bytes
    assert plan.hidden_bytes == 5 * SMALL.hidden_bytes
    assert plan.kv_bytes == 21 * SMALL.block_bytes
    assert plan.logit_row_bytes == 5 * SMALL.logit_row_bytes
    assert plan.count_row_bytes == 5 * SMALL.count_row_bytes
    assert plan.mask_row_bytes == 5 * SMALL.mask_row_bytes
    assert plan.total_bytes == budget - (SMALL.block_bytes - 1)


def test_plan_stops_at_what_the_requests_can_use():
    """As many of the full length as there are slots, so that checkpoints have blocks to go with them."""
    plan = memory.plan(SMALL, uncached(), max_model_len=250, budget_bytes=GIB)
    assert (plan.num_slots, plan.num_checkpoint_slots, plan.num_blocks) == (4, 0, 4 * 16)
    cached = memory.plan(SMALL, engine(), max_model_len=250, budget_bytes=GIB)
    assert (cached.num_slots, cached.num_checkpoint_slots, cached.num_blocks) == (12, 8, 12 * 16)
    asked = memory.plan(SMALL, engine(num_kv_blocks=7, num_checkpoint_slots=3), max_model_len=250, budget_bytes=GIB)
    assert (asked.num_slots, asked.num_checkpoint_slots, asked.num_blocks) == (7, 3, 7)


@pytest.mark.parametrize("extra", [0, 1, 4 * SLOT - 1, 4 * SLOT, 9 * SLOT, 31 * SLOT, 32 * SLOT, 1000 * SLOT])
def test_checkpoint_slots_take_at_most_a_quarter_of_what_is_left(extra):
    config = engine()
    least = floor_bytes(config) + (16 + 1) * SMALL.block_bytes
    plan = memory.plan(SMALL, config, max_model_len=250, budget_bytes=least + extra)
    assert plan.num_checkpoint_slots == min(2 * 4, extra // 4 // SLOT)
    assert plan.num_slots == 4 + plan.num_checkpoint_slots
    assert plan.num_blocks >= 16
    assert plan.total_bytes <= least + extra


def test_cache_never_makes_a_plan_fail():
    """What fits without a prefix cache fits with one, though it may get no checkpoint slot."""
    config = engine()
    budget = floor_bytes(config) + (16 + 1) * SMALL.block_bytes
    for each in (config, uncached()):
        plan = memory.plan(SMALL, each, max_model_len=250, budget_bytes=budget)
        assert (plan.num_slots, plan.num_checkpoint_slots, plan.num_blocks) == (4, 0, 16)


@pytest.mark.parametrize("count", [0, 5, 40])
def test_checkpoint_slots_that_were_asked_for_are_granted_or_an_error(count):
    config = engine(num_checkpoint_slots=count)
    budget = floor_bytes(config) + count * SLOT + (16 + 1) * SMALL.block_bytes
    plan = memory.plan(SMALL, config, max_model_len=250, budget_bytes=budget)
    assert (plan.num_slots, plan.num_checkpoint_slots, plan.num_blocks) == (4 + count, count, 16)
    assert plan.total_bytes == budget
    with pytest.raises(MemoryError, match=r"^7 bytes short") as error:
        memory.plan(SMALL, config, max_model_len=250, budget_bytes=budget - 7)
    assert ("checkpoint" in str(error.value)) == (count > 0)


def test_nearly_equal_budgets_give_equal_shapes():
    """So that the compilation cache hits; at most a sixteenth of the blocks is given up for it, and none is made up."""
    config = uncached(max_num_seqs=64)
    floor = floor_bytes(config)
    counts = {}
    for available in range(100, 700):
        budget = floor + (available + 1) * SMALL.block_bytes
        counts[available] = memory.plan(SMALL, config, max_model_len=1600, budget_bytes=budget).num_blocks
    assert all(available * 15 / 16 < count <= available for available, count in counts.items())
    assert list(counts.values()) == sorted(counts.values())
    assert len(set(counts.values())) < 50


def test_nearly_equal_budgets_give_equal_checkpoint_slots():
    config = engine(max_num_seqs=512)
    least = floor_bytes(config) + (16 + 1) * SMALL.block_bytes
    counts = {}
    for available in range(100, 700):
        plan = memory.plan(SMALL, config, max_model_len=256, budget_bytes=least + 4 * available * SLOT)
        counts[available] = plan.num_checkpoint_slots
    assert all(available * 15 / 16 < count <= available for available, count in counts.items())
    assert len(set(counts.values())) < 50


@pytest.mark.parametrize("num_checkpoint_slots", [None, 0, 6])
@pytest.mark.parametrize("num_kv_blocks", [None, 40])
@pytest.mark.parametrize("weights", [0, 123_457])
def test_shortfall_is_exact(num_checkpoint_slots, num_kv_blocks, weights):
    config = engine(num_checkpoint_slots=num_checkpoint_slots, num_kv_blocks=num_kv_blocks)
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
        memory.plan(SMALL, engine(num_checkpoint_slots=9), max_model_len=250, budget_bytes=12_345, weight_bytes=777_777)
    for part in (
        "weights 777,777",
        f"5 slots {5 * SLOT:,}",
        f"9 checkpoint slots {9 * SLOT:,}",
        f"5 logit rows {5 * SMALL.logit_row_bytes:,}",
        f"5 rows of token counts {5 * SMALL.count_row_bytes:,}",
        f"5 rows of masks {5 * SMALL.mask_row_bytes:,}",
        f"17 KV blocks {17 * SMALL.block_bytes:,}",
        "budget of 12,345 bytes",
        "max_num_seqs (now 4)",
        "num_checkpoint_slots (now 9)",
        "max_model_len (now 250)",
        "gpu_memory_utilization",
        "tensor_parallel_size",
    ):
        assert part in str(error.value)


def test_shortfall_names_no_setting_that_would_not_help():
    with pytest.raises(MemoryError) as error:
        memory.plan(SMALL, engine(num_kv_blocks=40), max_model_len=250, budget_bytes=12_345)
    assert "num_kv_blocks (now 40)" in str(error.value)
    assert "max_model_len" not in str(error.value)
    assert "checkpoint" not in str(error.value)


@pytest.mark.parametrize("over", [-1, 0, 1])
@pytest.mark.parametrize("edge", [1 << 31, (1 << 32) + 1])
def test_plan_refuses_8_bit_keys_that_kernels_cannot_number(edge, over):
    """2^31 to 2^32 numbers, the null block among them; what the message allows is allowed, and next to what is not."""
    geometry = large_geometry(kv_cache_dtype="fp8")
    keys = geometry.cache.paged[0].leaves[0]
    of_block = keys.bytes * geometry.block_size
    # The first whole blocks from the edge on.
    blocks = -(-edge // of_block) - 1 + over

    def planned(blocks, geometry=geometry):
        config = uncached(num_kv_blocks=blocks, block_size=geometry.block_size)
        return memory.plan(geometry, config, max_model_len=64, budget_bytes=1 << 40)

    assert planned(blocks, large_geometry(kv_cache_dtype="bfloat16")).num_blocks == blocks
    if (blocks + 1) * of_block not in range(1 << 31, (1 << 32) + 1):
        assert planned(blocks).num_blocks == blocks
        return
    with pytest.raises(ValueError, match=rf"num_kv_blocks \(now {blocks}\) to at most \d+ or at least \d+$") as said:
        planned(blocks)
    most, least = (int(number) for number in re.findall(r"at (?:most|least) (\d+)(?= or|$)", str(said.value)))
    assert planned(most).num_blocks == most
    assert planned(least).num_blocks == least
    for refused in (most + 1, least - 1):
        with pytest.raises(ValueError, match="one-byte numbers"):
            planned(refused)


def test_plan_of_what_memory_allows_stays_where_kernels_can_number_8_bit_keys():
    """Blocks that nobody counted: as many as bfloat16 gets, or the most that the message of one more allows."""
    wide, geometry = large_geometry(kv_cache_dtype="bfloat16"), large_geometry(kv_cache_dtype="int8")
    keys = geometry.cache.paged[0].leaves[0].bytes * geometry.block_size

    def planned(geometry, requests):
        config = uncached(max_num_seqs=requests, block_size=geometry.block_size)
        return memory.plan(geometry, config, max_model_len=32768, budget_bytes=1 << 42).num_blocks

    few, between, many = 8, 24, 64
    assert planned(geometry, few) == planned(wide, few) == 2048 * few
    assert (2048 * between + 1) * keys in memory.UNNUMBERED
    assert planned(geometry, between) == (2**31 - 1) // keys - 1 < planned(wide, between)
    assert planned(geometry, many) == planned(wide, many) == 2048 * many


def test_8_bit_keys_take_their_scales_to_the_byte():
    """Of the embedded model, with and without the layer of its MTP head: 2 kv heads of 64 in 3 layers."""
    model = ModelConfig.from_hf(model_directory(EMBEDDED_MODEL))
    of = functools.partial(StateGeometry.of, model, tp=1, block_size=16, dtype="float32", ssm_dtype="float32")
    for speculation, layers in ((None, 2), (EngineConfig(num_speculative_tokens=2), 3)):
        for kv_cache_dtype, of_head in (("int8", 64 + 4), ("fp8", 64 + 4), ("bfloat16", 128), ("auto", 256)):
            geometry = of(kv_cache_dtype=kv_cache_dtype, speculation=speculation)
            assert geometry.block_bytes == 2 * layers * 16 * 2 * of_head


def test_printed_plan_adds_up():
    plan = MemoryPlan.of_counts(
        SMALL,
        num_slots=6,
        num_checkpoint_slots=2,
        num_blocks=20,
        num_logit_rows=2,
        num_count_rows=4,
        weight_bytes=1 << 20,
    )
    text = str(plan)
    assert "4 rows, for penalties" in text
    assert "4 rows, for structured output" in text
    assert f"6 slots of {SMALL.slot_bytes:,} B: 4 live, 2 checkpoints" in text
    assert f"20 blocks of {SMALL.block_bytes:,} B" in text
    assert f"a slot is worth {SMALL.equivalent_blocks} blocks" in text
    *parts, total = (float(row.split(" MiB")[0].split()[-1]) for row in text.splitlines())
    assert total == pytest.approx(plan.total_bytes / (1 << 20), abs=0.05)
    assert sum(parts) == pytest.approx(total, abs=0.05 * (len(parts) + 1))


def test_plan_takes_what_is_on_its_way_to_the_host_from_the_device():
    """The host's part is a rank's, and no part of the total."""
    config = engine(host_cache_gib=1, tensor_parallel_size=2)
    staging = 8 * max(16 * SMALL.block_bytes, SMALL.checkpoint_bytes)
    options = {"max_model_len": 256, "budget_bytes": floor_bytes(config) + staging + 40 * SMALL.block_bytes}
    plan, without = (memory.plan(SMALL, each, **options) for each in (config, engine(tensor_parallel_size=2)))
    assert plan.host is not None
    assert plan.host.capacity_bytes == GIB // 2
    # A state, its layout bit, and a hidden state of 40 numbers of two bytes.
    assert plan.host.state_bytes == SMALL.slot_bytes + 1 + 80 == SMALL.checkpoint_bytes
    assert plan.host.block_bytes == SMALL.block_bytes
    assert plan.staging_bytes == staging
    assert plan.num_blocks < without.num_blocks
    assert plan.total_bytes <= options["budget_bytes"]
    assert (without.host, without.staging_bytes) == (None, 0)
    text = str(plan)
    assert "host staging" in text
    assert f"{GIB // 2 // SMALL.block_bytes:,} blocks, or {GIB // 2 // SMALL.checkpoint_bytes:,} states" in text
    assert "host" not in str(without)


def test_host_tier_that_holds_nothing_is_refused():
    least = SMALL.block_bytes + SMALL.checkpoint_bytes
    assert HostSizes.of(SMALL, least).capacity_bytes == least
    with pytest.raises(ValueError, match=rf"host_cache_gib leaves {least - 1:,} bytes a rank, fewer than a block"):
        HostSizes.of(SMALL, least - 1)
    states_alone = HostSizes.of(small_geometry(attention_layers=0), GIB)
    assert (states_alone.block_bytes, states_alone.staging_bytes) == (1024, 8 * states_alone.state_bytes)


def test_command_says_what_the_host_holds(capsys):
    assert main(["--config", "qwen3.5-9b", "--host-cache-gib", "100", "--tp", "2"]) == 0
    assert "50.00 GiB of the host hold" in capsys.readouterr().out
    assert main(["--config", "qwen3.5-9b", "--host-cache-gib", "-1"]) == 2
    assert "host_cache_gib must be a number of GiB" in capsys.readouterr().err


def test_accountings_count_requests_by_their_blocks():
    """Packed, a request of n tokens holds as many whole states as it has blocks; decoupled, one."""
    budget = 100 * SMALL.packed_block_bytes + 1
    packed, decoupled = memory.accountings(SMALL, budget, max_num_seqs=20, max_model_len=100, num_checkpoint_slots=5)
    assert (packed.num_blocks, packed.num_tokens, packed.num_requests) == (100, 1600, 100 // 7)
    blocks = (budget - 25 * SMALL.slot_bytes) // SMALL.block_bytes
    assert (decoupled.num_blocks, decoupled.num_tokens) == (blocks, 16 * blocks)
    assert decoupled.num_requests == 20


def test_slots_beyond_the_pools_are_an_error_with_the_shortfall():
    with pytest.raises(MemoryError, match=r"^3 bytes short: 4 slots"):
        memory.decoupled_blocks(SMALL, 4 * SMALL.slot_bytes - 3, 4)
    assert memory.decoupled_blocks(SMALL, 4 * SMALL.slot_bytes, 4) == 0


def test_memory_imports_no_jax():
    program = "import sys, gdnjax.memory; print('jax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


PUBLISHED = ["--config", "qwen3.5-397b-a17b", "--tp", "4", "--kv-cache-dtype", "fp8", "--ssm-dtype", "bfloat16"]


def test_command_prints_the_published_arithmetic(capsys):
    # 157.88 GiB, the budget as published, is rounded: 6,906 packed blocks are 600 kB more.
    assert main([*PUBLISHED, "--budget-gib", "157.8806", "--max-num-seqs", "128"]) == 0
    text = capsys.readouterr().out
    for part in ("24,422,400 B", "124,800 B", "24,547,200 B", "96.1%", " 6,906 ", "196 blocks", "193.1x"):
        assert part in text
    assert "neither weights nor workspace are in it" in text


def test_command_prints_the_same_as_json(capsys):
    assert main([*PUBLISHED, "--budget-gib", "157.8806", "--max-num-seqs", "128", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["bytes"]["slot_bytes"], report["bytes"]["block_bytes"]) == (24_422_400, 124_800)
    assert report["packed"]["num_blocks"] == 6_906
    assert report["packed"]["num_requests"] == 6_906 // 512
    assert report["decoupled"]["num_requests"] == 128
    assert report["ratio"] == report["decoupled"]["num_blocks"] / 6_906 > 180


def test_command_counts_what_speculation_costs(capsys):
    """Pending rows in the slots, and the layer of the MTP head in the blocks."""
    assert main([*PUBLISHED, "--num-speculative-tokens", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    slot, block = 45 * (7 * 3072 * 2 + 16 * 128 * 128 * 2 + 4 * 2 * 16 * 2), 124_800 // 15 * 16
    assert (report["bytes"]["slot_bytes"], report["bytes"]["block_bytes"]) == (slot, block)
    assert (report["row_bytes"]["delta.pending_ab"], report["num_drafts"]) == (4 * 2 * 16 * 2, 3)
    assert report["slot_growth"] == slot / 24_422_400
    layers = {name: report[name]["cache"]["kinds"][1]["leaves"][0]["layers"] for name in ("plain", "geometry")}
    assert layers == {"plain": 15, "geometry": 16}
    assert main([*PUBLISHED, "--num-speculative-tokens", "3"]) == 0
    text = capsys.readouterr().out
    for part in (
        f"{slot:,} B",
        f"{block:,} B",
        "+ 256 pending_ab in bfloat16)",
        "16 layers",
        "one of them the MTP head's",
        "4.58% more",
    ):
        assert part in text
    assert "24,422,400 B" in text
    assert "124,800 B" in text


def test_command_has_the_latents_of_a_model_without_states(capsys):
    """DeepSeek-V3: 512 + 64 numbers of two bytes a token and layer, on every rank; with drafts one layer more."""
    assert main(["--config", "deepseek-v3", "--tp", "8", "--num-speculative-tokens", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    leaf = {"name": "latent", "layers": 61, "shape": [576], "dtype": "bfloat16", "split": None}
    plain, geometry = (report[name]["cache"]["kinds"] for name in ("plain", "geometry"))
    assert [kind["leaves"] for kind in (*plain, *geometry)] == [[leaf], [leaf | {"layers": 62}]]
    assert (report["bytes"]["slot_bytes"], report["bytes"]["block_bytes"]) == (0, 16 * 62 * 1152)
    assert main(["--config", "deepseek-v3"]) == 0
    text = capsys.readouterr().out
    assert "a slot                     0 B  no state to keep" in text
    assert f"{16 * 61 * 1152:,} B  16 x 61 layers x (1,152 latent in bfloat16)" in text


def test_command_has_the_wide_states_of_a_model_with_many_kv_heads(capsys):
    """Olmo-Hybrid: 30 states of 96 x 192 and 11,520 channels a delta layer, 30 kv heads of 128 a layer of attention."""
    assert main(["--config", "olmo-hybrid-7b", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    state, window = 30 * 96 * 192 * 4, 3 * 11_520 * 2
    assert report["bytes"]["slot_bytes"] == 24 * (state + window) == 54_743_040
    assert report["bytes"]["block_bytes"] == 16 * 8 * 2 * 30 * 128 * 2 == 1_966_080
    assert main(["--config", "olmo-hybrid-7b", "--tp", "2", "--json"]) == 0
    half = json.loads(capsys.readouterr().out)["bytes"]
    assert (half["slot_bytes"], half["block_bytes"]) == (27_371_520, 983_040)


def test_latents_are_not_planned_in_8_bits():
    model = ModelConfig.from_hf(config_file("deepseek-v3"))
    with pytest.raises(ValueError, match="latents are not stored in 8 bits, got kv_cache_dtype='fp8'; allowed: 'auto'"):
        StateGeometry.of(model, tp=1, block_size=16, dtype="bfloat16", ssm_dtype="float32", kv_cache_dtype="fp8")


def test_command_without_drafts_says_nothing_of_them(capsys):
    assert main(PUBLISHED) == 0
    text = capsys.readouterr().out
    assert not re.search("draft|gates|MTP", text)


@pytest.mark.parametrize(
    ("name", "tp", "expert_parallel"),
    [
        *((name, 1, False) for name in STORED_PLAIN),
        ("qwen3.5-9b", 4, False),
        *(("qwen3.5-35b-a3b", 2, expert_parallel) for expert_parallel in (False, True)),
    ],
)
def test_weights_are_what_the_modules_hold(name, tp, expert_parallel):
    """To the byte, of one rank: what `abstract_params` has, divided as the sharding table says. One period of layers
    stands for all."""
    config = ModelConfig.from_hf(config_file(name)).with_layers(range(4))
    config = config.with_expert_parallel() if expert_parallel else config
    for mtp in {False, config.mtp_layers > 0}:
        params = abstract_params(config, tp, "bfloat16", mtp=mtp)
        held = planning.weight_bytes(params, tp, expert_parallel=expert_parallel)
        assert weight_bytes(config, tp=tp, dtype="bfloat16", mtp=mtp) == held


@pytest.mark.short_cases("qwen3.5-35b-a3b-2-fp8", "kimi-linear-48b-a3b-1-fp8_per_channel")
@pytest.mark.parametrize("quantization", ["fp8", "fp8_per_channel"])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", STORED_PLAIN)
def test_eight_bit_weights_are_what_the_modules_hold(name, tp, quantization):
    """Codes and scales, to the byte; at some of these ranks cut blocks of 128."""
    config = ModelConfig.from_hf(config_file(name)).with_layers(range(4))
    try:
        config.shard(tp)
    except ValueError:
        assert (name, tp) == ("olmo-hybrid-7b", 4), "its 30 heads"
        return
    for mtp in {False, config.mtp_layers > 0}:
        coded = usual_formats(abstract_params(config, tp, "bfloat16", mtp=mtp), tp, quantization)
        held = planning.weight_bytes(abstract_params(config, tp, "bfloat16", mtp=mtp, coded=coded), tp)
        assert weight_bytes(config, tp=tp, dtype="bfloat16", mtp=mtp, quantization=quantization) == held


@pytest.mark.parametrize("quantization", ["fp8", "fp8_per_channel"])
@pytest.mark.parametrize("tp", [2, 4])
def test_whole_experts_are_planned_to_the_byte_and_their_blocks_not_cut(tp, quantization):
    """Experts 200 wide, which two ranks cut within blocks and eight do not divide."""
    config = ModelConfig.from_hf(config_file("qwen3.5-35b-a3b")).with_layers(range(4))
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, intermediate_size=200))
    config = config.with_expert_parallel()
    coded = usual_formats(abstract_params(config, tp, "bfloat16"), tp, quantization, expert_parallel=True)
    one_rank = usual_formats(abstract_params(config, 1, "bfloat16"), 1, quantization)
    experts = [name for name in coded if ".experts." in name]
    assert experts
    assert {name: coded[name] for name in experts} == {name: one_rank[name] for name in experts}
    held = planning.weight_bytes(abstract_params(config, tp, "bfloat16", coded=coded), tp, expert_parallel=True)
    assert weight_bytes(config, tp=tp, dtype="bfloat16", quantization=quantization) == held


def test_command_plans_whole_experts(capsys):
    given = ["--config", "qwen3.5-397b-a17b", "--tp", "4", "--quantization", "fp8", "--json"]
    bytes_of = {}
    for flags in ([], ["--enable-expert-parallel"]):
        assert main([*given, *flags]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["expert_parallel"] == bool(flags)
        bytes_of[bool(flags)] = report["weight_bytes"]
    # As many codes; the scales of blocks that ranks cut are no more.
    assert 0 <= bytes_of[False] - bytes_of[True] < 0.01 * bytes_of[True]
    assert main([*given[:4], "--enable-expert-parallel"]) == 0
    assert "one of 4 ranks, experts whole, by geometry alone" in capsys.readouterr().out
    assert main(["--config", "qwen3.5-9b", "--tp", "4", "--enable-expert-parallel"]) == 2
    assert "needs a model with a mixture of experts" in capsys.readouterr().err


def test_unknown_quantization_is_refused():
    with pytest.raises(ValueError, match="quantization must be one of 'fp8', 'fp8_per_channel', got 'fp4'"):
        weight_bytes(LARGE, tp=1, dtype="bfloat16", quantization="fp4")


NINE = ["--config", "qwen3.5-9b"]


def test_command_counts_weights_as_a_config_json_has_them(tmp_path, capsys):
    """9B: of 17.9 GB the embedding and the head, 2.03 GB each, stay bfloat16."""

    def report(*flags, quantization=None):
        config = json.loads(config_file("qwen3.5-9b").read_text())
        if quantization is not None:
            config["quantization_config"] = quantization
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert main(["--config", str(tmp_path), *flags, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    groups = {"config_groups": {"a": {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"}}}}
    channels = {"quant_method": "compressed-tensors", "format": "float-quantized", **groups}
    blocks = report("--quantization", "fp8")
    assert 10.9e9 < blocks["weight_bytes"] < 11.1e9
    assert blocks["weight_codes"] == "float8_e4m3fn"
    assert report(quantization={"quant_method": "fp8"})["weight_bytes"] == blocks["weight_bytes"]
    rows = report("--quantization", "fp8_per_channel")["weight_bytes"]
    assert report(quantization=channels)["weight_bytes"] == rows != blocks["weight_bytes"]
    four = report(quantization={"quant_method": "gptq", "bits": 4, "group_size": 128})
    assert four["weight_codes"] == "int8"
    plain = report()
    assert plain == report("--quantization", "dequantized", quantization=channels)
    assert (plain["weight_codes"], plain["weight_bytes"]) == (None, 17_907_609_600)
    assert main(["--config", "qwen3.5-9b-fp8"]) == 0
    assert "GiB in float8_e4m3fn and bfloat16" in capsys.readouterr().out


def test_command_names_what_is_allowed_where_weights_are_on_several_grids(tmp_path, capsys):
    config = json.loads(config_file("qwen3.5-9b").read_text())
    kinds = ({"strategy": "channel"}, {"strategy": "tensor"})
    groups = {str(i): {"weights": {"type": "float", "num_bits": 8, **kind}} for i, kind in enumerate(kinds)}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": groups,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["--config", str(tmp_path)]) == 2
    assert "of 2 grids" in (problem := capsys.readouterr().err)
    assert "allowed: fp8, fp8_per_channel, dequantized" in problem
    assert main(["--config", str(tmp_path), "--quantization", "fp8"]) == 0


def test_command_says_whether_a_model_fits(capsys):
    """9B in 24 GB: where JAX may have enough of them."""
    assert main([*NINE, "--gpu-memory", "24", "--json"]) == 0
    fit = json.loads(capsys.readouterr().out)["fit"]
    assert fit["budget_bytes"] == int(24 * GIB * 0.9 * 0.9)
    assert fit["plan"]["weight_bytes"] == 17_907_609_600
    assert (fit["plan"]["num_slots"], fit["plan"]["num_checkpoint_slots"]) > (8, 0)
    assert main([*NINE, "--gpu-memory", "24"]) == 0
    text = capsys.readouterr().out
    assert "Fits in 24 GiB" in text
    assert "16.68 GiB in bfloat16" in text
    assert main([*NINE, "--gpu-memory", "24", "--memory-fraction", "0.75"]) == 1
    assert re.search(r"Does not fit in 24 GiB .*: [\d,]+ bytes short: weights 17,907,609,600", capsys.readouterr().out)
    assert main([*NINE, "--gpu-memory", "24", "--dtype", "float32", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["fit"]["plan"] is None
    assert report["weight_bytes"] > 1.99 * 17_907_609_600
    assert main([*NINE, "--gpu-memory", "24", "--tp", "4", "--memory-fraction", "0.75"]) == 0


def test_command_speaks_of_a_model_where_none_is_named(capsys):
    """As docs/memory.md has it."""
    assert main(["--num-speculative-tokens", "3"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("qwen3.5-9b, one rank")
    assert "the MTP head among them" in text


def test_every_flag_is_explained(capsys):
    for action in build_parser()._actions:
        assert action.help, action.option_strings
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "Exit status: 0, 1 where the model does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "drafts", "tokens", "compiled"),
    # MiB of the largest step of four layers of 9B, as scripts/measure_workspace.py --arch gfx942 has them.
    [(8, 0, 1024, 206), (8, 0, 8192, 774), (256, 0, 1024, 294), (256, 3, 1024, 1233)],
)
def test_estimated_workspace_is_enough(rows, drafts, tokens, compiled):
    engine = EngineConfig(max_num_seqs=rows, num_speculative_tokens=drafts, max_num_batched_tokens=tokens)
    estimate = workspace_estimate(ModelConfig.from_hf(config_file("qwen3.5-9b")), engine, "bfloat16") / (1 << 20)
    assert compiled <= estimate <= 1.2 * compiled


def test_command_without_a_budget_prints_costs_alone(capsys):
    assert main(["--config", EMBEDDED_MODEL]) == 0
    text = capsys.readouterr().out
    assert "a slot" in text
    assert not re.search("accounting|Fits|Does not fit", text)


def test_command_refuses_drafts_of_a_model_without_a_head(tmp_path, capsys):
    config = json.loads(config_file(EMBEDDED_MODEL).read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"mtp_num_hidden_layers": 0}))
    assert main(["--config", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["--config", str(tmp_path), "--num-speculative-tokens", "1"]) == 2
    assert "needs a model with an MTP head" in capsys.readouterr().err


def test_command_lists_the_presets(capsys):
    assert main(["--list"]) == 0
    assert capsys.readouterr().out.split() == [*PRESETS, *SAME_AS]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--config", "qwen3.5"], "no such file; a configuration is .*qwen3.5-9b"),
        (["--config", EMBEDDED_MODEL, "--tp", "5"], "tensor_parallel_size=5 does not divide"),
        (["--config", EMBEDDED_MODEL, "--block-size", "12"], "block_size must be a power of two, got 12"),
        (
            ["--config", EMBEDDED_MODEL, "--num-speculative-tokens", "8"],
            "num_speculative_tokens must be at most 7, got 8",
        ),
        (["--config", EMBEDDED_MODEL, "--num-speculative-tokens", "-1"], "num_speculative_tokens must be an integer"),
        (["--config", EMBEDDED_MODEL, "--max-num-seqs", "0"], "max_num_seqs must be an integer of at least 1"),
        (["--config", EMBEDDED_MODEL, "--max-model-len", "9999999"], "exceeds the model's context"),
        (["--config", EMBEDDED_MODEL, "--budget-gib", "0.0001"], r"bytes short: 8 slots"),
        (["--gpu-memory", "24", "--memory-fraction", "1.5"], r"--memory-fraction must be in \(0, 1\], got 1.5"),
        (["--gpu-memory", "24", "--gpu-memory-utilization", "0"], r"gpu_memory_utilization must be in \(0, 1\], got 0"),
    ],
)
def test_bad_input_is_one_line_and_status_two(capsys, arguments, problem):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(rf"gdnjax memory: error: .*{problem}.*\n", printed.err)


@pytest.mark.parametrize("given", ["x", "0", "-1", "nan", "1/0"])
def test_budget_that_is_no_size_is_refused(capsys, given):
    with pytest.raises(SystemExit) as exit_:
        main(["--config", EMBEDDED_MODEL, f"--budget-gib={given}"])
    assert exit_.value.code == 2
    assert "--budget-gib" in capsys.readouterr().err


def test_command_runs_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "gdnjax.memory", "--list"], capture_output=True, text=True, check=True
    )
    assert "qwen3.5-9b" in result.stdout
