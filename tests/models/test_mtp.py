"""The multi-token-prediction head against numpy float64, and what its place in the cache rests on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdnjax import abstract_params, build_model, draft_logits, full_logits, generation, random_params, sharding, step
from gdnjax.config import ATTENTION, MlpKind
from gdnjax.models import partition
from gdnjax.models.context import prefill_context
from gdnjax.step import StepOptions
from tests import float64
from tests.micro import MICRO, A, D, spread

pytestmark = pytest.mark.usefixtures("quickly_compiled")

DENSE = dataclasses.replace(
    MICRO, layer_kinds=(D, A), mlp_kinds=(MlpKind.DENSE, MlpKind.DENSE), mtp_layers=1, tie_word_embeddings=True
)
EXPERTS = dataclasses.replace(MICRO, layer_kinds=(D, A), mlp_kinds=(MlpKind.DENSE, MlpKind.MOE), mtp_layers=1)
CONFIGS = {"dense": DENSE, "experts": EXPERTS}

TOKENS = np.random.default_rng(5).integers(0, MICRO.vocab_size, 70).astype(np.int32)
DEPTH = 3

BOUND = 2e-5
"""Of the largest logit: two orders of float32 summation over these widths differ by a few 1e-6."""


@functools.cache
def built(name):
    config = CONFIGS[name]
    params = jax.jit(lambda key: random_params(config, 1, "float32", key, mtp=True))(jax.random.key(11))
    return build_model(config, "float32", mtp=True), params


@functools.cache
def draft_function(name):
    """Jitted, of parameters, tokens and how many of them there are."""
    model, _ = built(name)
    return jax.jit(lambda params, tokens, length: draft_logits(model, params, tokens, DEPTH, length))


@functools.cache
def drafted(name):
    """(target logits, draft logits) of the tokens."""
    return [np.asarray(x) for x in draft_function(name)(built(name)[1], TOKENS, len(TOKENS))]


@pytest.mark.short_cases("experts")
@pytest.mark.parametrize("name", CONFIGS)
def test_drafts_equal_float64(name):
    """Every depth at every position, past the edge of a chunk: the independent form makes one draft after another."""
    _, params = built(name)
    expected = float64.drafts(CONFIGS[name], params, TOKENS, DEPTH)
    _, found = drafted(name)
    for draft in range(DEPTH):
        valid = slice(draft + 1, None)
        difference = np.abs(found[draft, valid] - expected[draft, valid]).max()
        assert difference <= BOUND * np.abs(expected).max()


def test_drafts_of_each_depth_differ():
    """Else the test above would pass with a head that ignores its own output."""
    _, params = built("experts")
    first, second, third = float64.drafts(EXPERTS, params, TOKENS[:20], DEPTH)
    assert np.abs(first[3:] - second[3:]).max() > 0.1
    assert np.abs(second[3:] - third[3:]).max() > 0.1


@pytest.mark.short_cases("experts")
@pytest.mark.parametrize("name", CONFIGS)
def test_target_of_draft_logits_equals_full_logits(name):
    """Up to rounding: the two page their keys differently."""
    model, params = built(name)
    expected = full_logits(model, params, jnp.asarray(TOKENS))
    assert np.abs(drafted(name)[0] - expected).max() <= BOUND * np.abs(expected).max()


def test_length_cuts_the_sequence():
    """One compilation serves all lengths: what stands past the length changes nothing before it."""
    cut = TOKENS.copy()
    cut[40:] = 7
    target, drafts = draft_function("experts")(built("experts")[1], cut, 40)
    expected = drafted("experts")
    bound = BOUND * np.abs(expected[0]).max()
    assert np.abs(target[:40] - expected[0][:40]).max() <= bound
    for draft in range(DEPTH):
        assert np.abs(drafts[draft, draft + 1 : 40] - expected[1][draft, draft + 1 : 40]).max() <= bound


@functools.cache
def head_function(name):
    model, _ = built(name)

    def head(params, tokens, previous):
        count = len(tokens)
        state = generation.start(model, jnp.full((1,), count), count)
        batch = generation.pack_prompts(tokens[None], jnp.full((1,), count, jnp.int32))
        context = prefill_context(step.pools_of(state, StepOptions()), batch)
        padded = jnp.pad(previous, ((0, len(batch.tokens) - count), (0, 0)))
        hidden, cache = model.draft(params, batch.tokens, padded, context, state.cache)
        keys = cache.pages[ATTENTION]["k"]
        # The head's row of the pool stands behind those of the target's layers; block 0 is null.
        return hidden[:count], keys[-1, 1:].reshape(-1, *keys.shape[3:])[:count]

    return jax.jit(head)


def head_over(name, tokens, previous):
    """One prefill of the head over given hidden states: its outputs, and its keys."""
    return [np.asarray(x) for x in head_function(name)(built(name)[1], tokens, previous)]


@pytest.fixture(scope="module")
def previous():
    return jnp.asarray(np.random.default_rng(6).normal(size=(len(TOKENS), MICRO.hidden_size)), jnp.float32)


def test_index_zero_is_never_looked_at(previous):
    """It has no hidden state before it, so what stands there must not matter, NaN included."""
    hidden, _ = head_over("experts", TOKENS, previous)
    poisoned, _ = head_over("experts", TOKENS, previous.at[0].set(jnp.nan))
    np.testing.assert_array_equal(hidden[1:], poisoned[1:])
    moved, _ = head_over("experts", TOKENS, previous.at[1].add(1.0))
    assert np.abs(hidden[2:] - moved[2:]).max() > 1e-3


def test_keys_depend_on_their_own_prefix_alone(previous):
    """So that a block of them can be shared by all requests with the same tokens up to its end."""
    _, keys = head_over("experts", TOKENS, previous)
    other = TOKENS.copy()
    other[32:] = (other[32:] + 1) % MICRO.vocab_size
    _, others = head_over("experts", other, previous.at[32:].add(1.0))
    np.testing.assert_array_equal(keys[:32], others[:32])
    assert (np.abs(keys[32:] - others[32:]).max(axis=(1, 2)) > 1e-3).all()


@pytest.mark.thorough
@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_draft_what_one_rank_drafts(name):
    """`abstract_params` gives the global shapes, `sharding.TABLE` the parts of each rank."""
    config, tp = CONFIGS[name], 2
    model, mesh = build_model(config, "float32", tp, mtp=True), sharding.make_mesh(tp)
    single = abstract_params(config, 1, "float32", mtp=True)
    assert jax.tree.structure(abstract_params(config, tp, "float32", mtp=True)) == jax.tree.structure(single)
    params = jax.device_put(spread(built(name)[1], tp), partition.shardings_of(single, mesh))
    function = sharding.shard_step(
        lambda params, tokens: draft_logits(model, params, tokens, DEPTH),
        mesh,
        (partition.specs_of(params), sharding.P()),
        (sharding.P(None, sharding.AXIS), sharding.P(None, None, sharding.AXIS)),
    )
    target, drafts = jax.jit(function)(params, jnp.asarray(TOKENS))
    expected = drafted(name)
    bound = BOUND * np.abs(expected[0]).max()
    vocab = config.vocab_size
    assert np.abs(target[:, :vocab] - expected[0]).max() <= bound
    for draft in range(DEPTH):
        assert np.abs(drafts[draft, draft + 1 :, :vocab] - expected[1][draft, draft + 1 :]).max() <= bound


def test_head_of_a_model_without_one_is_an_error():
    with pytest.raises(ValueError, match="needs a configuration with 1 MTP layer, got 0"):
        build_model(dataclasses.replace(DENSE, mtp_layers=0), "float32", mtp=True)


def test_drafts_of_a_model_built_without_its_head_are_an_error():
    with pytest.raises(ValueError, match=r"build_model\(\.\.\., mtp=True\)"):
        draft_logits(build_model(DENSE, "float32"), {}, jnp.asarray(TOKENS), DEPTH)


@pytest.mark.parametrize("depth", [0, -1])
def test_no_draft_is_an_error(depth):
    with pytest.raises(ValueError, match="depth must be at least 1"):
        draft_logits(built("experts")[0], built("experts")[1], jnp.asarray(TOKENS), depth)


def test_head_costs_one_more_layer_of_keys_and_values():
    with_head, without = (
        build_model(DENSE, "float32", mtp=mtp).cache_spec(block_size=16, ssm_dtype="float32") for mtp in (True, False)
    )
    assert with_head.paged[0].leaves[0].layers == without.paged[0].leaves[0].layers + 1
    assert with_head.slot_bytes == without.slot_bytes
