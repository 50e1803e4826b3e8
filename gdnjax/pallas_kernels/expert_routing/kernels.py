"""A token's experts in one program, without a sort; pairs in the order of their experts by counting, all at once.

Bytes: 2 kB of logits a token of 512 experts, and 4 bytes a pair: nothing beside a launch. XLA takes some fifteen
kernels for both, of which its sorts belong to no command buffer: each layer's launches are then the host's, one by one.

The place of a pair is the number of those of lower experts, and of those of its own that stand before it: n^2
comparisons of n pairs, 1.6 million with 128 tokens of 10 experts.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gdnjax.backend import Backend
from gdnjax.pallas_kernels.expert_routing import tiles
from gdnjax.pallas_kernels.expert_routing.rule import Rule
from gdnjax.pallas_kernels.launch import bounded, launch, power_of_two, sigmoid
from gdnjax.shapes import Array


def choose_experts(
    logits: Array, bias: Array | None, valid: Array, rule: Rule, backend: Backend
) -> tuple[Array, Array]:
    tokens, experts = logits.shape
    found = launch(
        _choose,
        backend,
        name="expert_routing_choose",
        programs=tokens,
        args=(logits, *([] if bias is None else [bias]), valid.astype(jnp.int32)),
        out=[jax.ShapeDtypeStruct((tokens, rule.top), dtype) for dtype in (jnp.float32, jnp.int32)],
        warps=tiles.of(backend).choose_warps,
        experts=experts,
        biased=bias is not None,
        rule=rule,
    )
    return found[0], found[1]


def _choose(program, logits_ref, *refs, experts, biased, rule):
    bias_ref, refs = (refs[0], refs[1:]) if biased else (None, refs)
    valid_ref, weight_ref, expert_ref = refs
    of_group = experts // rule.groups
    # Groups are rows of the block.
    group = jnp.arange(power_of_two(rule.groups), dtype=jnp.int32)[:, None]
    column = jnp.arange(power_of_two(of_group), dtype=jnp.int32)[None, :]
    number = group * of_group + column
    real = (group < rule.groups) & (column < of_group)

    def load(ref, *at):
        return plgpu.load(ref.at[(*at, number)], mask=real, other=-jnp.inf)

    logits = load(logits_ref, program)
    if rule.scoring == "softmax":
        weights = jnp.exp(logits - _over_all(jnp.max, logits))
        scores = weights / _over_all(jnp.sum, weights)
    else:
        scores = sigmoid(logits)
    choice = jnp.where(real, scores if bias_ref is None else scores + load(bias_ref), -jnp.inf)
    if rule.groups > 1:
        choice = jnp.where(_best_groups(choice, group, column, rule), choice, -jnp.inf)

    rank = jnp.arange(power_of_two(rule.top), dtype=jnp.int32)

    def one(i, carry):
        choice, weight, expert = carry
        best = _over_all(jnp.max, choice)
        # What is no number is no best: the last expert then, so that nobody reads behind the weights.
        chosen = jnp.minimum(_over_all(jnp.min, jnp.where(choice == best, number, experts)), experts - 1)
        score = best if bias_ref is None else _over_all(jnp.sum, jnp.where(number == chosen, scores, 0.0))
        weight, expert = jnp.where(rank == i, score, weight), jnp.where(rank == i, chosen, expert)
        return jnp.where(number == chosen, -jnp.inf, choice), weight, expert

    start = choice, jnp.zeros(rank.shape), jnp.zeros(rank.shape, jnp.int32)
    _, weight, expert = lax.fori_loop(0, rule.top, one, start)
    if rule.normalised:
        total = jnp.sum(weight)
        weight = weight / (total + 1e-20 if rule.scoring == "sigmoid" else total)
    expert = jnp.where(valid_ref[program] > 0, expert, experts)
    stored = None if rank.size == rule.top else rank < rule.top
    plgpu.store(weight_ref.at[program, rank], weight * rule.scaling, mask=stored)
    plgpu.store(expert_ref.at[program, rank], expert, mask=stored)


def _best_groups(choice: Array, group: Array, column: Array, rule: Rule) -> Array:
    """[groups, 1] bool: those whose two best have the largest sum; of equal ones the first."""
    first = jnp.max(choice, axis=1)
    place = jnp.min(jnp.where(choice == first[:, None], column, choice.shape[1]), axis=1)
    second = jnp.max(jnp.where(column == place[:, None], -jnp.inf, choice), axis=1)
    real = group < rule.groups
    # A group that is none has no sum that could win.
    both = jnp.where(real, first[:, None] + second[:, None], -jnp.inf)

    def one(_, carry):
        both, chosen = carry
        best = jnp.min(jnp.where(real & (both == _over_all(jnp.max, both)), group, rule.groups))
        return jnp.where(group == best, -jnp.inf, both), jnp.where(group == best, 1, chosen)

    return lax.fori_loop(0, rule.top_groups, one, (both, jnp.zeros_like(group)))[1] > 0


def _over_all(reduction, x: Array) -> Array:
    return reduction(reduction(x, axis=1))


def sort_by_expert(expert: Array, experts: int, backend: Backend) -> tuple[Array, Array, Array]:
    tile, (tokens, top) = tiles.of(backend), expert.shape
    pairs = tokens * top
    found = launch(
        _sort,
        backend,
        name="expert_routing_sort",
        programs=pl.cdiv(pairs, tile.pairs) + pl.cdiv(experts, tile.pairs),
        args=(expert.reshape(-1),),
        out=[jax.ShapeDtypeStruct((size,), jnp.int32) for size in (pairs, pairs, experts)],
        warps=tile.sort_warps,
        top=top,
        size=tile.pairs,
        at_once=min(tile.at_once, power_of_two(pairs)),
    )
    return found[0], found[1].reshape(expert.shape), found[2]


def _sort(program, expert_ref, token_ref, place_ref, sizes_ref, *, top, size, at_once):
    (pairs,), (experts,) = expert_ref.shape, sizes_ref.shape
    places = -(-pairs // size)

    def count(matches) -> Array:
        """[size]: others for which `matches(their numbers, their experts)` [size, at_once] is true."""

        def some(i, total):
            other = i * at_once + jnp.arange(at_once, dtype=jnp.int32)
            # What is no pair is the last of none's.
            found = plgpu.load(expert_ref.at[other], mask=other < pairs, other=experts)
            return total + jnp.sum(matches(other[None, :], found[None, :]).astype(jnp.int32), axis=1)

        return lax.fori_loop(0, -(-pairs // at_once), some, jnp.zeros((size,), jnp.int32))

    # The last one fills up a program's numbers: it is found, and stored, several times.
    def place_pairs():
        pair = jnp.minimum(program * size + jnp.arange(size, dtype=jnp.int32), pairs - 1)
        mine = jnp.minimum(plgpu.load(expert_ref.at[pair]), experts)[:, None]

        def stands_before(other, found):
            found = jnp.minimum(found, experts)
            return (found < mine) | ((found == mine) & (other < pair[:, None]))

        place = bounded(count(stands_before), pairs)
        plgpu.store(place_ref.at[pair], place)
        plgpu.store(token_ref.at[place], pair // top)

    def count_pairs():
        expert = jnp.minimum((program - places) * size + jnp.arange(size, dtype=jnp.int32), experts - 1)
        plgpu.store(sizes_ref.at[expert], count(lambda _, found: found == expert[:, None]))

    pl.when(program < places)(place_pairs)
    pl.when(program >= places)(count_pairs)
