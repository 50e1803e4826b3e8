"""Plain attention with norms behind it, and writes up to twice, in random interleavings: within the float64 bound."""

import functools

import jax
import pytest

from gdnjax import LLM, EngineConfig, build_model, random_params
from gdnjax.config import AttentionConfig, DeltaConfig, LayerKind, MlpKind, ModelConfig
from tests.serving.exactness import ALL, CACHED, MAX_MODEL_LEN, Exact, Tally, interleave, micro_arrivals

D, A = LayerKind.DELTA, LayerKind.ATTENTION

PLAIN = ModelConfig(
    model_type="olmo_hybrid",
    vocab_size=ALL,
    hidden_size=36,
    intermediate_size=48,
    layer_kinds=(D, D, A, D),
    mlp_kinds=(MlpKind.DENSE,) * 4,
    delta=DeltaConfig(
        num_key_heads=3,
        num_value_heads=3,
        key_head_dim=8,
        value_head_dim=16,
        conv_kernel=4,
        beta_scale=2.0,
        norm_eps=1e-5,
    ),
    attention=AttentionConfig(
        num_heads=3,
        num_kv_heads=3,
        head_dim=12,
        rotary_dim=None,
        rope_theta=None,
        output_gate=False,
        whole_norms=True,
    ),
    zero_centred_norms=False,
    separate_projections=True,
    post_norm_kinds=(A,),
    dtype="float32",
)

NUM_INTERLEAVINGS = 5
"""Of 2 to 4 requests each."""


@functools.cache
def params() -> dict:
    return random_params(PLAIN, 1, "float32", jax.random.key(3))


@pytest.mark.usefixtures("without_type_checks")
def test_random_interleavings_are_within_the_float64_bound():
    """Hits, pieces, preemption and checkpoints, in a pool of both layouts: a state of 8 x 16 read as 16 x 8 shows."""
    config = EngineConfig(
        max_num_seqs=4,
        max_num_batched_tokens=64,
        prefill_buckets=(64,),
        decode_buckets=(4,),
        block_size=16,
        state_layout="mixed",
        max_logprobs=ALL,
        warmup=False,
        compilation_cache_dir="",
        **CACHED,
    )
    llm = LLM.from_model(build_model(PLAIN, "float32"), params(), config, max_model_len=MAX_MODEL_LEN)
    tally, exact = Tally(), Exact(PLAIN, params())
    for seed in range(NUM_INTERLEAVINGS):
        tally.add(llm, exact, interleave(llm, seed, functools.partial(micro_arrivals, speculating=False)))
    llm.close()
    print(tally)
    assert tally.within_bounds(), tally
    assert tally.hits >= 8
    assert tally.preempted >= 2
    assert tally.checkpoints >= 30
