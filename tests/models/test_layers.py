"""Norms, rotary embedding, embedding and head against their formulas in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from gdnjax import sharding
from gdnjax.backend import REFERENCE
from gdnjax.config import AttentionConfig, DeltaConfig, LayerKind, MlpKind, ModelConfig
from gdnjax.models.layers import (
    DenseMLP,
    Embedding,
    GatedRMSNorm,
    Linear,
    RMSNorm,
    mask_padded_vocab,
    rotary_angles,
)
from gdnjax.pallas_kernels import matmul
from gdnjax.pallas_kernels.rotary import rotate

pytestmark = pytest.mark.usefixtures("quickly_compiled")

CONFIG = ModelConfig(
    model_type="qwen3_5",
    vocab_size=37,
    hidden_size=16,
    intermediate_size=24,
    layer_kinds=(LayerKind.DELTA,),
    mlp_kinds=(MlpKind.DENSE,),
    delta=DeltaConfig(num_key_heads=4, num_value_heads=4, key_head_dim=4, value_head_dim=4, conv_kernel=4),
    attention=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=8, rotary_dim=4, rope_theta=1e4),
)

RTOL, ATOL = 1e-5, 1e-6
"""Float32 against float64, a few dozen operations on values of order one."""


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def with_weights(module, **weights):
    """The module with parameters set, by dotted name with underscores for dots."""
    for name, value in weights.items():
        target = module
        *path, last = name.split("__")
        for part in path:
            target = getattr(target, part)
        parameter = getattr(target, last)
        assert parameter.shape == value.shape
        parameter[...] = jnp.asarray(value, parameter.dtype)
    return module


def close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=RTOL, atol=ATOL)


def silu(x):
    return x / (1 + np.exp(-x))


def rms(x, eps):
    return x / np.sqrt(np.mean(np.float64(x) ** 2, axis=-1, keepdims=True) + eps)


def test_rms_norm_is_zero_centred():
    x, weight = 3 * draw(5, 16), draw(16, seed=1)
    norm = with_weights(RMSNorm(16, 1e-3, "float32"), weight=weight)
    close(norm(jnp.asarray(x)), rms(x, 1e-3) * (1 + weight))


def test_gated_norm_is_plain_and_gated():
    x, gate, weight = 3 * draw(5, 4, 16), draw(5, 4, 16, seed=1), draw(16, seed=2)
    norm = with_weights(GatedRMSNorm(16, 1e-3, "float32"), weight=weight)
    close(norm(jnp.asarray(x), jnp.asarray(gate)), rms(x, 1e-3) * weight * silu(np.float64(gate)))


def test_new_norms_start_from_zero_weights():
    """Zero-centred norms are then the identity on normal rows, the gated norm gives nothing: they cannot be swapped."""
    x = jnp.asarray(draw(3, 16))
    close(RMSNorm(16, 1e-6, "float32")(x), rms(np.asarray(x), 1e-6))
    np.testing.assert_array_equal(np.asarray(GatedRMSNorm(16, 1e-6, "float32")(x, x)), 0)


def test_norm_eps_keeps_zero_rows_finite():
    np.testing.assert_array_equal(np.asarray(RMSNorm(16, 1e-6, "float32")(jnp.zeros((2, 16)))), 0)


def test_norms_compute_in_float32_and_round_once():
    """Half an ulp of bfloat16 is 2^-8."""
    x = (1000 * draw(5, 16)).astype(ml_dtypes.bfloat16)
    weight = draw(16, seed=1).astype(ml_dtypes.bfloat16)
    norm = with_weights(RMSNorm(16, 1e-6, "bfloat16"), weight=weight)
    actual = norm(jnp.asarray(x))
    assert actual.dtype == jnp.bfloat16
    expected = rms(x.astype(np.float64), 1e-6) * (1 + weight.astype(np.float64))
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=2**-8 + RTOL)
    gated = with_weights(GatedRMSNorm(16, 1e-6, "bfloat16"), weight=weight)
    assert gated(jnp.asarray(x, jnp.float32), jnp.asarray(x)).dtype == jnp.bfloat16


def heads_of(width, rotary_dim, theta, yarn=None):
    return AttentionConfig(
        num_heads=1, num_kv_heads=1, head_dim=width, rotary_dim=rotary_dim, rope_theta=theta, yarn=yarn
    )


@pytest.mark.parametrize(("width", "rotary_dim", "theta"), [(16, 4, 1e4), (16, 16, 1e7), (256, 64, 1e7)])
def test_rotary_turns_pairs_by_position_times_frequency(width, rotary_dim, theta):
    """Pair (i, i + rotary_dim / 2) turns by position * theta^(-2 i / rotary_dim); the rest of the head passes."""
    x, position = draw(6, 3, width), np.array([0, 1, 2, 63, 64, 1000])
    attention = heads_of(width, rotary_dim, theta)
    actual = np.asarray(rotate(jnp.asarray(x), rotary_angles(jnp.asarray(position, jnp.int32), attention)))
    half = rotary_dim // 2
    expected = x.astype(np.float64)
    for i in range(half):
        angle = (position * theta ** (-2 * i / rotary_dim))[:, None]
        a, b = x[..., i].astype(np.float64), x[..., i + half].astype(np.float64)
        expected[..., i] = a * np.cos(angle) - b * np.sin(angle)
        expected[..., i + half] = b * np.cos(angle) + a * np.sin(angle)
    # A float32 angle of 1000 is rounded to 3e-5.
    np.testing.assert_allclose(actual, expected, atol=2e-4)
    np.testing.assert_array_equal(actual[..., rotary_dim:], x[..., rotary_dim:])
    np.testing.assert_array_equal(actual[0], x[0])


def test_rotated_products_depend_on_the_distance_alone():
    q, k = draw(1, 1, 16), draw(1, 1, 16, seed=1)

    def product(i, j):
        turned = [
            np.asarray(
                rotate(jnp.asarray(x), rotary_angles(jnp.array([p], jnp.int32), heads_of(16, 8, 1e4))), np.float64
            )
            for x, p in ((q, i), (k, j))
        ]
        return float(np.vdot(*turned))

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
    assert abs(product(7, 3) - product(7, 4)) > 1e-3


def test_product_is_x_times_transposed_weight():
    x, weight = draw(5, 16), draw(7, 16, seed=1)
    layer = with_weights(Linear(16, 7, "float32"), weight=weight)
    close(layer(jnp.asarray(x)), np.float64(x) @ np.float64(weight).T)
    assert (
        matmul.product(jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16), jnp.float32).dtype
        == jnp.float32
    )


def test_dense_mlp_is_swiglu():
    x, gate, up, down = draw(5, 16), draw(24, 16, seed=1), draw(24, 16, seed=2), draw(16, 24, seed=3)
    mlp = with_weights(
        DenseMLP(16, 24, "float32", REFERENCE), gate_proj__weight=gate, up_proj__weight=up, down_proj__weight=down
    )
    wide = np.float64(x)
    expected = (silu(wide @ gate.T) * (wide @ up.T)) @ np.float64(down).T
    np.testing.assert_allclose(np.asarray(mlp(jnp.asarray(x), jnp.ones((5,), bool)))[0], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tp", [2, 4])
def test_embedding_over_ranks_equals_one_rank(tp):
    weight = draw(37, 16)
    tokens = jnp.arange(37, dtype=jnp.int32)
    width = CONFIG.padded_vocab_size(tp) // tp
    graphdef, _ = nnx.split(Embedding(width, 16, "float32", tp))

    def run(weight, tokens):
        return nnx.merge(graphdef, {"weight": weight})(tokens)[None]

    mapped = sharding.shard_step(
        run, sharding.make_mesh(tp), (sharding.P(sharding.AXIS), sharding.P()), sharding.P(sharding.AXIS)
    )
    padded = np.pad(weight, ((0, width * tp - 37), (0, 0)))
    for rank in np.asarray(jax.jit(mapped)(jnp.asarray(padded), tokens)):
        np.testing.assert_array_equal(rank, weight)


@pytest.mark.short_cases
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("vocab", [36, 37, 39])
def test_padded_vocabulary_is_minus_infinity(vocab, tp):
    config = dataclasses.replace(CONFIG, vocab_size=vocab)
    width = config.padded_vocab_size(tp)
    logits = draw(3, width)
    mapped = sharding.shard_step(
        lambda x: mask_padded_vocab(x, config, tp),
        sharding.make_mesh(tp),
        (sharding.P(None, sharding.AXIS),),
        sharding.P(None, sharding.AXIS),
    )
    actual = np.asarray(mapped(jnp.asarray(logits)))
    np.testing.assert_array_equal(actual[:, :vocab], logits[:, :vocab])
    assert (actual[:, vocab:] == -np.inf).all()
    assert actual.shape[1] - vocab == -vocab % tp
