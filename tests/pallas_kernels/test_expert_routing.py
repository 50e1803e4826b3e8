"""Choices of experts against numpy's in float64, and the order of pairs against a stable sort."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from gdnjax.backend import INTERPRET
from gdnjax.pallas_kernels.expert_routing import Rule, choose_experts, kernels, sort_by_expert, tiles
from gdnjax.pallas_kernels.grouped_matmul import kernels as grouped
from tests.pallas_kernels.backends import once

EXPERTS = 20
RULES = {
    "softmax": Rule(top=3),
    "as they are": Rule(top=4, normalised=False),
    "all of them": Rule(top=20),
    "sigmoid": Rule(top=3, scoring="sigmoid", scaling=2.5),
    "bias": Rule(top=3, scoring="sigmoid"),
    "groups": Rule(top=5, scoring="sigmoid", groups=5, top_groups=2),
    "groups of five": Rule(top=2, groups=4, top_groups=3),
}
BIASED = ("bias", "groups")


def operands(name: str, tokens: int):
    r = np.random.default_rng(0)
    bias = r.normal(0, 0.3, EXPERTS).astype(np.float32) if name in BIASED else None
    return r.normal(0, 2, (tokens, EXPERTS)).astype(np.float32), bias, r.random(tokens) < 0.8


def choose(logits, bias, valid, rule, backend):
    bias = None if bias is None else jnp.asarray(bias)
    found = choose_experts(jnp.asarray(logits), bias, jnp.asarray(valid), rule, backend=backend)
    return [np.asarray(x) for x in found]


def by_hand(logits, bias, rule):
    """Weights and experts in float64, a token after another."""
    logits = logits.astype(np.float64)
    scores = 1 / (1 + np.exp(-logits))
    if rule.scoring == "softmax":
        scores = np.exp(logits - logits.max(1, keepdims=True))
        scores /= scores.sum(1, keepdims=True)
    choice = scores if bias is None else scores + bias
    weights, experts = [], []
    for score, chosen in zip(scores, choice, strict=True):
        groups = chosen.reshape(rule.groups, -1)
        best = np.argsort(-np.sort(groups, axis=1)[:, -2:].sum(1), kind="stable")[: rule.top_groups]
        allowed = np.isin(np.arange(EXPERTS) // groups.shape[1], best)
        expert = np.argsort(-np.where(allowed, chosen, -np.inf), kind="stable")[: rule.top]
        weight = score[expert]
        weights.append(rule.scaling * (weight / weight.sum() if rule.normalised else weight))
        experts.append(expert)
    return np.array(weights), np.array(experts)


@pytest.mark.parametrize("name", RULES)
def test_experts_and_weights_are_those_of_float64(name, backend):
    logits, bias, valid = operands(name, 7)
    rule = RULES[name]
    weight, expert = choose(logits, bias, valid, rule, backend)
    wanted_weight, wanted_expert = by_hand(logits, bias, rule)
    np.testing.assert_array_equal(expert, np.where(valid[:, None], wanted_expert, EXPERTS))
    # Exponentials and a sum of float32.
    np.testing.assert_allclose(weight, wanted_weight, rtol=2e-6)


@pytest.mark.parametrize("name", ["softmax", "groups"])
def test_of_experts_that_tie_the_lowest_are_chosen(name, backend):
    rule = RULES[name]
    logits = np.zeros((2, 20), np.float32)
    logits[1, [7, 13, 18, 19]] = 1
    bias = np.zeros(20, np.float32) if name in BIASED else None
    _, expert = choose(logits, bias, np.ones(2, bool), rule, backend)
    np.testing.assert_array_equal(expert, by_hand(logits, bias, rule)[1])
    assert expert[0].tolist() == list(range(rule.top))


def test_a_token_whose_sigmoids_are_all_zero_has_weights_of_zero(backend):
    logits = np.full((1, EXPERTS), -200, np.float32)
    weight, expert = choose(logits, None, np.ones(1, bool), RULES["sigmoid"], backend)
    np.testing.assert_array_equal(weight, np.zeros((1, 3)))
    np.testing.assert_array_equal(expert, [[0, 1, 2]])


def test_what_is_no_number_leads_to_experts_that_exist_and_touches_no_other_token(backend):
    logits, bias, _ = operands("softmax", 3)
    weight, expert = choose(logits, bias, np.ones(3, bool), RULES["softmax"], backend)
    logits[1] = np.nan
    spoiled, chosen = choose(logits, bias, np.ones(3, bool), RULES["softmax"], backend)
    assert (chosen >= 0).all()
    assert (chosen < 20).all()
    for row in (0, 2):
        np.testing.assert_array_equal(spoiled[row], weight[row])
        np.testing.assert_array_equal(chosen[row], expert[row])


def sorted_by_hand(expert, experts):
    flat = np.minimum(expert.ravel(), experts)
    order = np.argsort(flat, kind="stable")
    return order // expert.shape[1], np.argsort(order).reshape(expert.shape), np.bincount(flat, minlength=experts)


@pytest.mark.parametrize(
    ("tokens", "top", "experts"), [(1, 2, 4), (3, 5, 7), (40, 4, 33), (200, 4, 8)], ids=lambda n: str(n)
)
def test_pairs_are_in_the_order_of_their_experts_and_as_they_stand(tokens, top, experts, backend):
    """The largest are more than the interpreter's kernel takes."""
    r = np.random.default_rng(tokens)
    expert = r.integers(0, experts, (tokens, top)).astype(np.int32)
    # Of padded tokens, and of other ranks' experts.
    expert[r.random(expert.shape) < 0.2] = experts
    found = sort_by_expert(jnp.asarray(expert), experts, backend=backend)
    token, place, sizes = sorted_by_hand(expert, experts)
    for x, wanted in zip(found, (token, place, sizes[:experts]), strict=True):
        np.testing.assert_array_equal(np.asarray(x), wanted)


@once
def test_numbers_of_none_stand_together_in_the_order_of_their_pairs():
    """Whatever they are: one rank's numbers of others' experts may differ."""
    expert = np.array([[9, 0], [5, 1], [7, 0]], np.int32)
    token, place, sizes = kernels.sort_by_expert(jnp.asarray(expert), 2, INTERPRET)
    np.testing.assert_array_equal(token, [0, 2, 1, 0, 1, 2])
    np.testing.assert_array_equal(place, [[3, 0], [4, 2], [5, 1]])
    np.testing.assert_array_equal(sizes, [2, 1])


@once
def test_kernels_take_the_pairs_of_every_decode_step_that_is_planned_for():
    """512 rows of a verify by 10 experts, on a device."""
    assert all(tile.most_pairs >= 5120 for platform, tile in tiles.TILES.items() if platform != "interpret")


@once
@pytest.mark.parametrize("size", [1, 4, 16])
def test_tiles_of_groups_are_those_of_a_loop(size):
    r = np.random.default_rng(size)
    for groups, rows in itertools.product((1, 5, 37), (0, 3, 120)):
        sizes = r.multinomial(rows, r.dirichlet(np.full(groups, 0.3))).astype(np.int32)
        # As many rows at most wherever that shows as much: each number of them is a program.
        most = 5 if (groups, rows) == (37, 3) else 122
        group, start, end, used = grouped.tile_table(jnp.asarray(sizes), most, size, INTERPRET)
        wanted, first = [], 0
        for number, count in enumerate(sizes):
            wanted += [(number, first + i, min(first + i + size, first + count)) for i in range(0, count, size)]
            first += count
        assert used.tolist() == [len(wanted)]
        assert list(zip(*(np.asarray(x)[: len(wanted)].tolist() for x in (group, start, end)), strict=True)) == wanted
