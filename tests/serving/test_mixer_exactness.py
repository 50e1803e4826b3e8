"""Other mixers in random interleavings: within the float64 bound, and a fault of theirs is not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from gdnjax import LLM, EngineConfig, build_model
from gdnjax.config import AttentionConfig, DeltaConfig, KimiDeltaConfig, LayerKind, MlpKind, ModelConfig
from tests.micro import made
from tests.serving.exactness import ALL, CACHED, MAX_MODEL_LEN, Exact, Tally, interleave, micro_arrivals

pytestmark = [pytest.mark.usefixtures("quickly_compiled"), pytest.mark.thorough]

D, A = LayerKind.DELTA, LayerKind.ATTENTION

# Norms behind plain attention, and writes up to twice; a state of 8 x 16 read as 16 x 8 shows. With such writes a state
# need not shrink, and rounding grows from layer to layer: a fourth one took half of the bound, or nearly all of it.
PLAIN = ModelConfig(
    model_type="olmo_hybrid",
    vocab_size=ALL,
    hidden_size=36,
    intermediate_size=48,
    layer_kinds=(D, A, D),
    mlp_kinds=(MlpKind.DENSE,) * 3,
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

# A decay for each key channel. Latents have tests of their own: attention is that of PLAIN.
CHANNELS = dataclasses.replace(
    PLAIN,
    model_type="kimi_linear",
    delta=KimiDeltaConfig(num_heads=3, head_dim=12, conv_kernel=4),
    separate_projections=False,
    post_norm_kinds=(),
)
MIXERS = {"plain attention": PLAIN, "a decay per channel": CHANNELS}

NUM_INTERLEAVINGS = 5
"""Of 2 to 4 requests each."""


@functools.cache
def params_of(name: str) -> dict:
    return made(MIXERS[name], 3)


def tally_of(name: str, params: dict, interleavings: int) -> Tally:
    """Random interleavings with these parameters, held to the right ones. In a pool of both layouts."""
    config = EngineConfig(
        max_num_seqs=4,
        max_num_batched_tokens=64,
        prefill_buckets=(64,),
        decode_buckets=(4,),
        block_size=16,
        state_layout="mixed",
        max_logprobs=ALL,
        warmup=False,
        **CACHED,
    )
    llm = LLM.from_model(build_model(MIXERS[name], "float32"), params, config, max_model_len=MAX_MODEL_LEN)
    tally, exact = Tally(), Exact(MIXERS[name], params_of(name))
    for seed in range(interleavings):
        tally.add(llm, exact, interleave(llm, seed, functools.partial(micro_arrivals, speculating=False)))
    llm.close()
    print(tally)
    return tally


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.usefixtures("without_type_checks")
def test_random_interleavings_are_within_the_float64_bound(name):
    """Hits, pieces, preemption and checkpoints."""
    tally = tally_of(name, params_of(name), NUM_INTERLEAVINGS)
    assert tally.within_bounds(), tally
    assert tally.hits >= 8
    assert tally.preempted >= 2
    assert tally.checkpoints >= 30


@pytest.mark.usefixtures("without_type_checks")
def test_decay_of_the_channel_beside_is_seen():
    """In one layer each channel decays as its neighbour should."""
    wrong = jax.tree.map(lambda leaf: leaf, params_of("a decay per channel"))
    gate = wrong["layers"][0]["linear_attn"]["forget_gate"]
    gate["dt_bias"] = jnp.roll(gate["dt_bias"], 1)
    assert not tally_of("a decay per channel", wrong, 1).within_bounds()
