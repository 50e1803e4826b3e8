"""A model whose weights are codes and scales is the model of the numbers that they stand for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdnjax import abstract_params, build_model, full_logits, random_params, sharding
from gdnjax.backend import INTERPRET
from gdnjax.checkpoint.coded import usual_formats
from gdnjax.config import MlpKind
from gdnjax.models import partition
from gdnjax.pallas_kernels import matmul
from gdnjax.pallas_kernels.matmul import fp8
from gdnjax.quantized import CodeFormat, Quantized, dequantized
from tests.micro import MICRO, A, D, spread

pytestmark = pytest.mark.usefixtures("quickly_compiled")

CONFIG = dataclasses.replace(MICRO, layer_kinds=(D, A), mlp_kinds=(MlpKind.DENSE, MlpKind.MOE))
"""A layer of each kind, one MLP of each kind."""


ONE_LAYER = dataclasses.replace(MICRO, layer_kinds=(A,), mlp_kinds=(MlpKind.MOE,))

TOKENS = np.random.default_rng(0).integers(0, MICRO.vocab_size, 70).astype(np.int32)


def _coded(grid, config=CONFIG):
    """Formats of all projections of the model; `grid` None: a scale for each row."""
    usual = usual_formats(abstract_params(config, 1, "float32"), 1, "fp8_per_channel")
    return usual if grid is None else {name: CodeFormat(form.codes, grid) for name, form in usual.items()}


def _is_coded(leaf):
    return isinstance(leaf, Quantized)


def _params(coded, config=CONFIG):
    """Random ones, as one program."""
    return jax.jit(lambda key: random_params(config, 1, "float32", key, coded=coded))(jax.random.key(0))


@jax.jit
def _numbers(params):
    return jax.tree.map(lambda leaf: dequantized(leaf, jnp.float32), params, is_leaf=_is_coded)


@pytest.mark.short_cases("(16, 16)")
@pytest.mark.parametrize("grid", [None, (16, 16), (5, 32)], ids=str)
def test_logits_are_those_of_the_numbers(grid):
    """The definition makes the same numbers of the codes."""
    coded = _coded(grid)
    params = _params(coded)
    held = [leaf for leaf in jax.tree.leaves(params, is_leaf=_is_coded) if _is_coded(leaf)]
    assert len(held) == len(coded) > 10
    assert {leaf.codes.dtype for leaf in held} == {jnp.dtype(jnp.float8_e4m3fn)}
    model = build_model(CONFIG, "float32")
    expected = np.asarray(full_logits(model, _numbers(params), jnp.asarray(TOKENS)))
    np.testing.assert_array_equal(np.asarray(full_logits(model, params, jnp.asarray(TOKENS))), expected)
    assert len(np.unique(expected.argmax(-1))) > 5


@pytest.mark.thorough
@pytest.mark.parametrize("grid", [None, (16, 16), (5, 32)], ids=str)
def test_kernels_give_the_logits_of_the_numbers(grid):
    """They sum in another order; the bound is that of the parity tests."""
    params, model = _params(_coded(grid)), build_model(CONFIG, "float32")
    expected = np.asarray(full_logits(model, _numbers(params), jnp.asarray(TOKENS)))
    actual = np.asarray(full_logits(model.on(INTERPRET), params, jnp.asarray(TOKENS)))
    assert np.abs(actual - expected).max() < 2e-4 * np.abs(expected).max()
    assert len(np.unique(expected.argmax(-1))) > 5


@pytest.mark.thorough
@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_with_whole_experts_in_codes_are_one_rank(tp):
    """Cells of an expert's codes that four ranks would cut."""
    names = [name for name in _coded(None) if ".experts." in name]
    coded = dict.fromkeys(names, CodeFormat("float8_e4m3fn", (16, 16)))
    params = _params(coded)
    expected = np.asarray(full_logits(build_model(CONFIG, "float32"), params, jnp.asarray(TOKENS)))
    whole = CONFIG.with_expert_parallel()
    assert jax.tree.structure(abstract_params(whole, tp, "float32", coded=coded)) == jax.tree.structure(params)
    model, mesh = build_model(whole, "float32", tp), sharding.make_mesh(tp)
    function = sharding.shard_step(
        lambda params, tokens: full_logits(model, params, tokens),
        mesh,
        (partition.specs_of(params, expert_parallel=True), sharding.P()),
        sharding.P(None, sharding.AXIS),
    )
    found = np.asarray(jax.jit(function)(spread(params, tp, expert_parallel=True), jnp.asarray(TOKENS)))[
        :, : CONFIG.vocab_size
    ]
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


def test_rows_are_rounded_in_large_steps_only_and_where_it_is_asked_for():
    """W8A8: another model, a little, and the same one in steps of few rows."""
    params = _params(_coded(None, ONE_LAYER), ONE_LAYER)
    exactly = build_model(ONE_LAYER, "float32").backend
    rounded = dataclasses.replace(exactly, quantize_activations=True)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, ONE_LAYER.vocab_size, 200), jnp.int32)
    expected, actual = (
        np.asarray(full_logits(build_model(ONE_LAYER, "float32", backend=backend), params, tokens))
        for backend in (exactly, rounded)
    )
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert 1e-3 < error < 0.2
    weight = params["layers"][0]["self_attn"]["q_proj"]["weight"]
    x = jnp.asarray(np.random.default_rng(1).standard_normal((fp8.FEW + 1, 32)), jnp.float32)
    for rows, same in ((fp8.FEW, True), (fp8.FEW + 1, False)):
        one, other = (matmul.project(x[:rows], weight, backend=backend)[0] for backend in (exactly, rounded))
        assert np.array_equal(np.asarray(one), np.asarray(other)) == same
