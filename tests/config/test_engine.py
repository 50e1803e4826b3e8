"""Engine settings: what is derived from them, and what is refused."""

import dataclasses
import itertools

import numpy as np
import pytest

from gdnjax import EngineConfig

BAD_ENGINE = [
    ({"max_num_seqs": 0}, "max_num_seqs must be an integer of at least 1, got 0"),
    ({"max_num_seqs": 2.0}, "max_num_seqs must be an integer"),
    ({"max_num_batched_tokens": 100}, "max_num_batched_tokens must be a multiple of 64.*got 100"),
    ({"max_num_batched_tokens": -64}, "max_num_batched_tokens must be an integer of at least 1"),
    ({"max_model_len": 0}, "max_model_len must be an integer of at least 1"),
    ({"block_size": 24}, "block_size must be a power of two, got 24"),
    ({"block_size": True}, "block_size must be an integer"),
    ({"num_kv_blocks": 0}, "num_kv_blocks must be an integer of at least 1"),
    ({"gpu_memory_utilization": 0}, r"gpu_memory_utilization must be in \(0, 1\], got 0"),
    ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization must be in"),
    ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization must be in"),
    ({"gpu_memory_utilization": "half"}, "gpu_memory_utilization must be"),
    ({"max_logit_rows": -1}, "max_logit_rows must be an integer"),
    ({"max_num_prefill_seqs": 0}, "max_num_prefill_seqs must be an integer of at least 1, got 0"),
    ({"dtype": "float16"}, "dtype must be one of 'auto', 'float32', 'bfloat16', got 'float16'"),
    (
        {"kv_cache_dtype": "fp8_e5m2"},
        "kv_cache_dtype must be one of 'auto', 'float32', 'bfloat16', 'fp8', 'int8', got 'fp8_e5m2'",
    ),
    ({"quantization": "fp8"}, "quantization must be one of 'auto', 'fp8_per_channel', 'dequantized', got 'fp8'"),
    ({"quantize_activations": 1}, "quantize_activations must be True or False, got 1"),
    ({"ssm_dtype": "auto"}, "ssm_dtype must be one of 'float32', 'bfloat16', got 'auto'"),
    ({"ssm_rounding": "up"}, "ssm_rounding must be one of 'nearest', 'stochastic', got 'up'"),
    (
        {"ssm_rounding": "stochastic"},
        "ssm_rounding='stochastic' needs ssm_dtype='bfloat16', got ssm_dtype='float32'",
    ),
    ({"state_layout": "KV"}, "state_layout must be one of 'kv', 'vk', 'mixed', got 'KV'"),
    ({"seed": -1}, "seed must be an integer of at least 0"),
    ({"tensor_parallel_size": 0}, "tensor_parallel_size must be an integer of at least 1"),
    ({"enable_expert_parallel": 1}, "enable_expert_parallel must be True or False, got 1"),
    ({"kernels": "triton"}, "kernels must be one of 'auto', 'pallas', 'interpret', 'reference', got 'triton'"),
    ({"prefill_buckets": (64,)}, "prefill_buckets must ascend and end with 1024"),
    ({"prefill_buckets": (128, 64, 1024)}, "prefill_buckets must ascend"),
    ({"prefill_buckets": (64, 64, 1024)}, "prefill_buckets must ascend"),
    ({"prefill_buckets": (0, 1024)}, "prefill_buckets must be an integer of at least 1, got 0"),
    ({"decode_buckets": 3}, "decode_buckets must be a list of sizes, got 3"),
    ({"prefill_buckets": "64"}, "prefill_buckets must be a list of sizes, got '64'"),
    ({"compilation_cache_dir": 5}, "compilation_cache_dir must be a path, None or"),
    ({"gpu_memory_utilization": True}, "gpu_memory_utilization must be in"),
    ({"decode_buckets": (1, 4)}, "decode_buckets must ascend and end with 8"),
    ({"max_logprobs": -1}, "max_logprobs must be an integer of at least 0"),
    ({"enable_prefix_caching": "no"}, "enable_prefix_caching must be True or False, got 'no'"),
    ({"batch_invariant": 1}, "batch_invariant must be True or False, got 1"),
    ({"batch_invariant": True, "decode_buckets": (1, 8)}, "batch_invariant=True needs one prefill bucket and one"),
    ({"warmup": None}, "warmup must be True or False, got None"),
    ({"num_checkpoint_slots": -1}, "num_checkpoint_slots must be an integer of at least 0"),
    (
        {"num_checkpoint_slots": 2, "enable_prefix_caching": False},
        "num_checkpoint_slots=2 are of no use with enable_prefix_caching=False; allowed: None or 0",
    ),
    ({"host_cache_gib": -1}, "host_cache_gib must be a number of GiB, 0 or more, got -1"),
    ({"host_cache_gib": float("inf")}, "host_cache_gib must be a number of GiB, 0 or more, got inf"),
    ({"host_cache_gib": float("nan")}, "host_cache_gib must be a number of GiB, 0 or more, got nan"),
    ({"host_cache_gib": True}, "host_cache_gib must be a number of GiB, 0 or more, got True"),
    (
        {"host_cache_gib": 2, "enable_prefix_caching": False},
        "host_cache_gib=2 is of no use with enable_prefix_caching=False; allowed: 0",
    ),
    ({"state_checkpoint_interval": 0}, "state_checkpoint_interval must be an integer of at least 1"),
    ({"state_checkpoint_interval": 40}, "state_checkpoint_interval must be a multiple of block_size=16, got 40"),
    ({"num_speculative_tokens": -1}, "num_speculative_tokens must be an integer of at least 0, got -1"),
    ({"num_speculative_tokens": True}, "num_speculative_tokens must be an integer of at least 0, got True"),
    ({"num_speculative_tokens": 8}, "num_speculative_tokens must be at most 7, got 8"),
    ({"draft_head": "fp8"}, "draft_head='fp8' needs num_speculative_tokens above 0"),
    ({"draft_head": "int8", "num_speculative_tokens": 1}, "draft_head must be one of 'target', 'fp8', got 'int8'"),
    ({"draft_acceptance": "greedy"}, "draft_acceptance must be one of 'shared_noise', 'rejection', got 'greedy'"),
    ({"adaptive_speculation": 1}, "adaptive_speculation must be True or False, got 1"),
    ({"adaptive_speculation": True}, "adaptive_speculation=True needs num_speculative_tokens above 0"),
    (
        {"adaptive_speculation": True, "num_speculative_tokens": 2, "batch_invariant": True},
        "adaptive_speculation=True needs num_speculative_tokens above 0 and batch_invariant=False, got 2 and True",
    ),
    ({"spec_acceptance_length": 2}, r"between 1 and 1 \+ num_speculative_tokens=1, and needs speculation, got 2"),
    ({"spec_acceptance_length": 0.5, "num_speculative_tokens": 2}, r"between 1 and 1 \+ num_speculative_tokens=3"),
    ({"spec_acceptance_length": 3.5, "num_speculative_tokens": 2}, r"spec_acceptance_length must be between 1 and 1 "),
    ({"spec_acceptance_length": "3", "num_speculative_tokens": 2}, "spec_acceptance_length must be between 1 and 1 "),
    (
        {"state_checkpoint_interval": 2, "block_size": 2, "num_speculative_tokens": 2},
        "state_checkpoint_interval must be at least the 3 tokens that a step may produce, got 2",
    ),
]


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(("values", "message"), BAD_ENGINE, ids=[str(values) for values, _ in BAD_ENGINE])
def test_bad_engine_setting_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**values)


def test_every_engine_setting_has_a_bad_value_tested():
    tested = {name for values, _ in BAD_ENGINE for name in values}
    fields = {field.name for field in dataclasses.fields(EngineConfig)}
    assert fields == tested


def test_default_buckets_cover_every_step():
    for seqs in (1, 2, 8, 9, 100):
        for tokens in (64, 128, 1024, 8192):
            config = EngineConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens)
            for buckets, largest in ((config.prefill_buckets, tokens), (config.decode_buckets, seqs)):
                assert buckets[-1] == largest
                assert list(buckets) == sorted(set(buckets))
            # Few: each is compiled at start, decode steps plain and full.
            assert len(config.prefill_buckets) + len(config.decode_buckets) <= 8
            assert config.decode_buckets[0] == 1


def test_decode_step_is_at_most_four_times_its_rows_and_twice_where_rows_cost():
    for seqs in (8, 9, 32, 33, 100, 128, 256, 1000):
        buckets = EngineConfig(max_num_seqs=seqs).decode_buckets
        for smaller, larger in itertools.pairwise(buckets):
            assert larger <= (2 if smaller >= 32 else 8 if smaller == 1 else 4) * smaller
    assert EngineConfig(max_num_seqs=128).decode_buckets == (1, 8, 32, 64, 128)
    assert EngineConfig(max_num_seqs=8).decode_buckets == (1, 8)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, [8, 8, 8]),
        ({"max_num_seqs": 3}, [3, 3, 3]),
        ({"max_num_seqs": 256}, [9, 12, 24]),
        ({"max_num_seqs": 256, "max_num_batched_tokens": 8192}, [9, 12, 136]),
        ({"max_num_seqs": 256, "max_num_prefill_seqs": 100}, [9, 12, 100]),
        ({"max_num_seqs": 64, "max_num_prefill_seqs": 4}, [4, 4, 4]),
        ({"max_num_seqs": 64, "max_num_prefill_seqs": 100}, [9, 12, 64]),
        ({"max_num_seqs": 256, "batch_invariant": True}, [24]),
    ],
)
def test_prefill_steps_have_rows_for_short_prompts(options, rows):
    config = EngineConfig(**options)
    assert [config.prefill_rows_of(bucket) for bucket in config.prefill_buckets] == rows
    assert config.prefill_rows == rows[-1]


@pytest.mark.usefixtures("without_type_checks")
def test_given_buckets_are_kept_as_tuples():
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=256, prefill_buckets=[128, 256], decode_buckets=[2, 4])
    assert (config.prefill_buckets, config.decode_buckets) == ((128, 256), (2, 4))


def test_logit_rows_are_as_many_as_requests_up_to_16():
    assert [EngineConfig(max_num_seqs=n).num_logit_rows for n in (1, 8, 16, 100)] == [1, 8, 16, 16]
    assert EngineConfig(max_num_seqs=4, max_logit_rows=2).num_logit_rows == 2


def test_settings_can_be_replaced():
    """Derived values are derived again: nothing of the first construction sticks."""
    config = dataclasses.replace(EngineConfig(max_num_seqs=4), seed=1)
    assert config == EngineConfig(max_num_seqs=4, seed=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 2


@pytest.mark.usefixtures("without_type_checks")
def test_numpy_integers_are_refused_by_name():
    with pytest.raises(ValueError, match="max_num_seqs must be an integer"):
        EngineConfig(max_num_seqs=np.int64(4))
