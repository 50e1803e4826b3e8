"""The mixture of experts against a loop over tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gdnjax import sharding
from gdnjax.backend import INTERPRET, REFERENCE
from gdnjax.config import AttentionConfig, DeltaConfig, LayerKind, MlpKind, ModelConfig, MoeConfig
from gdnjax.models import partition, random_codes
from gdnjax.models.layers import RMSNorm, Stream
from gdnjax.models.moe import MoeMLP
from gdnjax.pallas_kernels import launch
from gdnjax.quantized import CodeFormat

pytestmark = pytest.mark.usefixtures("quickly_compiled")

MOE = MoeConfig(
    num_experts=5, experts_per_token=2, intermediate_size=12, shared_intermediate_size=20, normalise_top_k=True
)
CONFIG = ModelConfig(
    model_type="qwen3_5_moe",
    vocab_size=37,
    hidden_size=16,
    intermediate_size=0,
    layer_kinds=(LayerKind.DELTA,),
    mlp_kinds=(MlpKind.MOE,),
    delta=DeltaConfig(num_key_heads=4, num_value_heads=4, key_head_dim=4, value_head_dim=4, conv_kernel=4),
    attention=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=8, rotary_dim=4, rope_theta=1e4),
    moe=MOE,
)
# No softmax, a shared expert without a gate, and a choice by biased scores among two of three groups.
GROUPS = MoeConfig(
    num_experts=12,
    experts_per_token=3,
    intermediate_size=12,
    shared_intermediate_size=20,
    normalise_top_k=True,
    scoring="sigmoid",
    routed_scaling=1.7,
    correction_bias=True,
    num_groups=3,
    top_k_groups=2,
    shared_gate=False,
)
TOKENS = 11

RTOL, ATOL = 1e-5, 2e-5
"""Float32 against float64: three products in a row, of 12 to 20 terms of order one."""


def build(moe, seed=0):
    """(jitted layer of x and valid, its weights in numpy)."""
    graphdef, state = nnx.split(MoeMLP(dataclasses.replace(CONFIG, moe=moe), moe, "float32", 1, REFERENCE))
    rng = np.random.default_rng(seed)
    weights = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), nnx.to_pure_dict(state))

    def run(x, valid):
        (term,) = nnx.merge(graphdef, jax.tree.map(jnp.asarray, weights))(x, valid)
        return term

    return jax.jit(run), jax.tree.map(np.float64, weights)


def silu(x):
    return x / (1 + np.exp(-x))


def swiglu(x, gate, up, down):
    return down @ (silu(gate @ x) * (up @ x))


def one_token(x, weights, moe):
    """softmax over all experts, the best few of them, renormalised or not, and the gated shared expert."""
    x = np.float64(x)
    scores = weights["gate"]["weight"] @ x
    scores = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    chosen = np.argsort(-scores)[: moe.experts_per_token]
    norm = scores[chosen].sum() if moe.normalise_top_k else 1.0
    out = np.zeros(len(x))
    for expert in chosen:
        gate, up = np.split(weights["experts"]["gate_up_proj"][expert], 2)
        out += scores[expert] / norm * swiglu(x, gate, up, weights["experts"]["down_proj"][expert])
    shared = weights["shared_expert"]
    gate = 1 / (1 + np.exp(-weights["shared_expert_gate"]["weight"] @ x))
    parts = (shared[name]["weight"] for name in ("gate_proj", "up_proj", "down_proj"))
    return out + gate * swiglu(x, *parts)


def one_token_of_groups(x, weights, moe):
    """Sigmoids; the bias decides the groups, by the sum of their two best, and the experts within, and nothing else."""
    x = np.float64(x)
    scores = 1 / (1 + np.exp(-weights["gate"]["weight"] @ x))
    biased = scores + weights["gate"].get("e_score_correction_bias", 0)
    groups = np.split(np.arange(len(scores)), moe.num_groups)
    groups = sorted(groups, key=lambda group: -np.sort(biased[group])[-2:].sum())[: moe.top_k_groups]
    chosen = sorted(np.concatenate(groups), key=lambda expert: -biased[expert])[: moe.experts_per_token]
    norm = scores[chosen].sum() if moe.normalise_top_k else 1.0
    out = np.zeros(len(x))
    for expert in chosen:
        gate, up = np.split(weights["experts"]["gate_up_proj"][expert], 2)
        weight = moe.routed_scaling * scores[expert] / norm
        out += weight * swiglu(x, gate, up, weights["experts"]["down_proj"][expert])
    parts = (weights["shared_experts"][name]["weight"] for name in ("gate_proj", "up_proj", "down_proj"))
    return out + swiglu(x, *parts)


def inputs(seed=1):
    return np.random.default_rng(seed).standard_normal((TOKENS, 16)).astype(np.float32)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=ATOL * np.abs(expected).max())


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("top", [1, 2, 5])
def test_layer_equals_a_loop_over_tokens(top, normalise):
    moe = dataclasses.replace(MOE, experts_per_token=top, normalise_top_k=normalise)
    layer, weights = build(moe)
    x = inputs()
    actual = np.asarray(layer(jnp.asarray(x), jnp.ones((TOKENS,), bool)))
    close(actual, np.stack([one_token(row, weights, moe) for row in x]))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalise_top_k": False},
        {"correction_bias": False},
        {"num_groups": 1, "top_k_groups": 1},
        {"top_k_groups": 1},
    ],
)
def test_layer_of_groups_equals_a_loop_over_tokens(changes):
    moe = dataclasses.replace(GROUPS, **changes)
    layer, weights = build(moe)
    x = inputs()
    actual = np.asarray(layer(jnp.asarray(x), jnp.ones((TOKENS,), bool)))
    close(actual, np.stack([one_token_of_groups(row, weights, moe) for row in x]))
    # Each of the settings changes what is computed for some token.
    other = dataclasses.replace(GROUPS, normalise_top_k=False, num_groups=4, top_k_groups=1, experts_per_token=2)
    assert np.abs(actual - np.stack([one_token_of_groups(row, weights, other) for row in x])).max() > 0.1


def test_padded_tokens_go_to_no_expert():
    """They are NaN: a padded token that reached an expert's product or shifted another token's row would show."""
    layer, weights = build(MOE)
    x = inputs()
    valid = np.arange(TOKENS) % 3 != 1
    poisoned = np.where(valid[:, None], x, np.nan)
    actual = np.asarray(layer(jnp.asarray(poisoned), jnp.asarray(valid)))
    close(actual[valid], np.stack([one_token(row, weights, MOE) for row in x[valid]]))


def test_only_padding_is_computed_without_fault():
    layer, _ = build(MOE)
    actual = layer(jnp.zeros((TOKENS, 16)), jnp.zeros((TOKENS,), bool))
    np.testing.assert_array_equal(np.asarray(actual), 0)


def test_every_token_at_one_expert_equals_the_loop():
    """The most uneven load: one full group, the others empty."""
    layer, weights = build(dataclasses.replace(MOE, experts_per_token=1))
    x = np.repeat(inputs()[:1], TOKENS, axis=0)
    x *= np.linspace(0.5, 1.5, TOKENS, dtype=np.float32)[:, None]
    expected = np.stack([one_token(row, weights, dataclasses.replace(MOE, experts_per_token=1)) for row in x])
    close(np.asarray(layer(jnp.asarray(x), jnp.ones((TOKENS,), bool))), expected)


def test_token_ignores_its_neighbours_bit_for_bit():
    layer, _ = build(MOE)
    x, others = inputs(), inputs(seed=2)
    valid = np.ones((TOKENS,), bool)
    expected = np.asarray(layer(jnp.asarray(x), jnp.asarray(valid)))
    others[4] = x[4]
    np.testing.assert_array_equal(np.asarray(layer(jnp.asarray(others), jnp.asarray(valid)))[4], expected[4])
    valid[:4] = False
    np.testing.assert_array_equal(np.asarray(layer(jnp.asarray(x), jnp.asarray(valid)))[4], expected[4])


EIGHT = dataclasses.replace(MOE, num_experts=8, experts_per_token=3)
GRID = (8, 8)
"""Of codes: it divides gate and up, and not what four ranks would cut of them."""


def weights_of(moe, dtype, coded):
    """Random global weights of a layer, alike for any number of ranks with whole experts; of experts float8 codes."""
    state = nnx.to_pure_dict(nnx.split(MoeMLP(CONFIG, moe, dtype, 1, REFERENCE))[1])
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    made = []
    for i, (path, leaf) in enumerate(leaves):
        key = jax.random.key(i)
        if coded and ".experts." in f".{sharding.path_name(path)}":
            made.append(random_codes(CodeFormat("float8_e4m3fn", GRID).abstract(leaf.shape), key))
        else:
            made.append((jax.random.normal(key, leaf.shape) * leaf.shape[-1] ** -0.5).astype(dtype))
    return jax.tree_util.tree_unflatten(tree, made)


@functools.cache
def on_ranks(tp, dtype="float32", coded=False, backend=REFERENCE):
    """(jitted layer summed over ranks that hold whole experts, its global weights)."""
    moe = dataclasses.replace(EIGHT, expert_parallel=True)
    graphdef = nnx.split(MoeMLP(CONFIG, moe.shard(tp), dtype, tp, backend))[0]
    weights = weights_of(EIGHT, dtype, coded)
    specs = jax.tree_util.tree_map_with_path(
        lambda path, _: partition.spec_of(f"mlp.{sharding.path_name(path)}", expert_parallel=True), weights
    )

    def run(weights, x, valid):
        (term,) = nnx.merge(graphdef, weights)(x, valid)
        return sharding.psum(term, tp)

    whole = sharding.P()
    return jax.jit(sharding.shard_step(run, sharding.make_mesh(tp), (specs, whole, whole), whole)), weights


@pytest.mark.short_cases
@pytest.mark.parametrize(
    ("dtype", "coded", "backend"),
    [
        ("float32", False, REFERENCE),
        ("float32", True, REFERENCE),
        ("float32", True, INTERPRET),
        ("bfloat16", False, INTERPRET),
        ("bfloat16", True, INTERPRET),
    ],
    ids=["float32", "codes", "codes, kernels", "bfloat16, kernels", "bfloat16 and codes, kernels"],
)
@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_of_whole_experts_add_up_to_one_rank(tp, dtype, coded, backend):
    """Padded tokens, NaN here, are no rank's."""
    x = np.where(np.arange(TOKENS)[:, None] % 4 == 1, np.nan, inputs())
    valid = np.isfinite(x[:, 0])
    (alone, weights), (shared, _) = on_ranks(1, dtype, coded, backend), on_ranks(tp, dtype, coded, backend)
    expected, actual = (
        np.asarray(layer(weights, jnp.asarray(x, dtype), jnp.asarray(valid)), np.float32)[valid]
        for layer in (alone, shared)
    )
    assert np.abs(expected).max() > 0.1
    # Each rank rounds its term to the dtype before the sum, which one rank does once.
    bound = 1e-6 if dtype == "float32" else (1 + tp) * 2.0**-8
    assert np.abs(actual - expected).max() <= bound * np.abs(expected).max()


def test_rows_are_prepared_once_for_the_shared_expert_and_the_others(monkeypatch):
    """With the norm, in the form that codes meet, and as they are for the router."""
    config = dataclasses.replace(CONFIG, hidden_size=64)
    state = nnx.to_pure_dict(nnx.split(MoeMLP(config, MOE, "bfloat16", 1, REFERENCE))[1])

    def made(path, leaf):
        key = jax.random.key(len(sharding.path_name(path)))
        if "expert" in sharding.path_name(path) and "gate.weight" not in sharding.path_name(path):
            return random_codes(CodeFormat("float8_e4m3fn", (1, leaf.shape[-1])).abstract(leaf.shape), key)
        return jax.random.normal(key, leaf.shape, "bfloat16") / 8

    weights = jax.tree_util.tree_map_with_path(made, state)
    x = jnp.asarray(np.random.default_rng(5).standard_normal((3, 64)), jnp.bfloat16)

    def run(backend):
        graphdef = nnx.split(MoeMLP(config, MOE, "bfloat16", 1, backend))[0]

        def layer(weights, x):
            mlp, norm = nnx.merge(graphdef, weights), RMSNorm(64, 1e-6, "bfloat16")
            _, rows = norm.prepare(Stream(x), mlp.inputs, backend, gated=True, wide=mlp.takes_numbers)
            return mlp(rows, jnp.ones((3,), bool))[0]

        # One program in place of a hundred.
        return jax.jit(layer)(weights, x)

    launched, run_of_launch = [], launch.run
    monkeypatch.setattr(launch, "run", lambda one, args: launched.append(one.name) or run_of_launch(one, args))
    expected, found = (np.asarray(run(backend), np.float32) for backend in (REFERENCE, INTERPRET))
    assert np.abs(found - expected).max() <= 2.0**-6 * np.abs(expected).max()
    # Of the norm, and of what the shared expert and the others make of it.
    made = [name for name in launched if name.startswith("matmul_rows")]
    assert made == ["matmul_rows", "matmul_rows_activated", "matmul_rows_activated"]


@pytest.mark.short_cases("reference")
@pytest.mark.parametrize("backend", [REFERENCE, INTERPRET], ids=["reference", "kernels"])
def test_one_rank_may_have_all_tokens(backend):
    """The router sends every choice to three of the four experts of the second one."""
    x = np.abs(inputs())
    (alone, weights), (shared, _) = on_ranks(1, backend=backend), on_ranks(2, backend=backend)
    scores = np.full((8, 16), -1.0, np.float32)
    scores[[6, 7, 4]] = [[0.3], [0.2], [0.1]]
    weights = weights | {"gate": {"weight": jnp.asarray(scores)}}
    given = weights, jnp.asarray(x), jnp.ones((TOKENS,), bool)
    np.testing.assert_allclose(shared(*given), alone(*given), rtol=1e-5, atol=1e-6)


def test_experts_that_are_split_otherwise_are_refused():
    moe = dataclasses.replace(EIGHT, expert_parallel=True).shard(4)
    graphdef = nnx.split(MoeMLP(CONFIG, moe, "float32", 4, REFERENCE))[0]
    sliced = nnx.to_pure_dict(nnx.split(MoeMLP(CONFIG, EIGHT.shard(4), "float32", 4, REFERENCE))[1])
    with pytest.raises(
        ValueError, match="one of 4 ranks got 8 experts of gate and up 6 wide, and the model has 2 of 24"
    ):
        nnx.merge(graphdef, sliced)(jnp.zeros((3, 16)), jnp.ones((3,), bool))
