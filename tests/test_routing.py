"""Which experts tokens go to, by the routers alone, and how evenly."""

import dataclasses

import numpy as np
import pytest

from gdnjax import build_model, sharding
from gdnjax.config import LayerKind, MlpKind
from gdnjax.routing import ExpertBalance, expert_choices
from tests import float64
from tests.micro import MICRO, micro_model, micro_params

pytestmark = pytest.mark.usefixtures("quickly_compiled")

TOKENS = np.random.default_rng(1).integers(0, MICRO.vocab_size, 70)


@pytest.fixture(scope="module")
def exact():
    """The choices [t, top] of the one layer with experts, in float64."""
    seen, run = [], float64._moe

    def moe(mlp, x, config):
        seen.append(np.argsort(-(x @ mlp["gate"]["weight"].T), kind="stable")[:, : config.moe.experts_per_token])
        return run(mlp, x, config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(float64, "_moe", moe)
        float64.reference(MICRO, micro_params(), TOKENS)
    (choices,) = seen
    return choices


@pytest.mark.short_cases("4-True")
@pytest.mark.parametrize(("tp", "expert_parallel"), [(1, False), (4, True)])
def test_choices_are_those_of_the_routers(exact, tp, expert_parallel):
    model = micro_model(tp, expert_parallel=expert_parallel)
    params = micro_params(tp, expert_parallel=expert_parallel)
    found = expert_choices(model, params, TOKENS, sharding.make_mesh(tp))
    assert found.shape == (1, len(TOKENS), MICRO.moe.experts_per_token)
    np.testing.assert_array_equal(found[0], exact)


def test_what_has_no_choices_is_an_error():
    dense = dataclasses.replace(
        MICRO, layer_kinds=(LayerKind.DELTA,), mlp_kinds=(MlpKind.DENSE,), model_type="qwen3_5_text"
    )
    with pytest.raises(ValueError, match="needs a model with a mixture of experts; this qwen3_5_text has none"):
        expert_choices(build_model(dense, "float32"), {}, TOKENS)
    with pytest.raises(ValueError, match="tokens must be one sequence of integers, got int64 \\[2, 35\\]"):
        expert_choices(micro_model(), micro_params(), TOKENS.reshape(2, 35))
    with pytest.raises(ValueError, match="the model was built for 2 ranks, the mesh has 1"):
        expert_choices(micro_model(2), micro_params(2), TOKENS)


CHOICES = np.array(
    [
        [[0, 1], [0, 1], [0, 2], [4, 4]],
        [[3, 2], [3, 2], [3, 1], [0, 3]],
    ]
)
"""Two layers, two choices a token of four experts; a padded token chooses number 4."""


def test_balance_counts_tokens_by_expert_and_by_rank():
    found = ExpertBalance.of(CHOICES, 4, 2)
    np.testing.assert_array_equal(found.per_expert, [[3, 2, 1, 0], [1, 1, 2, 4]])
    np.testing.assert_array_equal(found.per_rank, [[5, 1], [2, 6]])
    np.testing.assert_array_equal(found.chosen_per_rank, [[2, 1], [2, 2]])
    assert found.figures == {
        "ranks": 2,
        "tokens_per_rank": [7, 7],
        "rank_imbalance": {"mean": pytest.approx((5 / 3 + 6 / 4) / 2), "worst": pytest.approx(5 / 3)},
        "chosen_experts_imbalance": {"mean": pytest.approx((4 / 3 + 1) / 2), "worst": pytest.approx(4 / 3)},
        "expert_imbalance": {"mean": 2.0, "worst": 2.0},
    }
    assert str(found) == (
        "tokens per rank 7, 7; busiest over mean: ranks 1.58 (worst layer 1.67), chosen experts of ranks 1.17 (worst "
        "layer 1.33), experts 2.00 (worst layer 2.00)"
    )
    assert str(ExpertBalance.of(CHOICES, 4, 1)) == "busiest over mean: experts 2.00 (worst layer 2.00)"


def test_ranks_divide_the_experts():
    with pytest.raises(ValueError, match="3 ranks do not divide num_experts=4"):
        ExpertBalance.of(CHOICES, 4, 3)
