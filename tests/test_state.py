"""The pytrees that outlive a step hold what the memory plan counted, and start with nothing in them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdnjax.assets import PRESETS, config_file
from gdnjax.cache import LAYOUT
from gdnjax.config import ATTENTION, DELTA, DRAFT_ACCEPTANCES, EngineConfig, ModelConfig
from gdnjax.memory import MemoryPlan, StateGeometry
from gdnjax.state import NO_TOKEN, ServeState, check_state, empty_state
from tests.geometries import small_geometry
from tests.pools import with_pools

pytestmark = pytest.mark.usefixtures("quickly_compiled")

geometry_of = functools.partial(small_geometry, vocab_size=101, block_size=8)
GEOMETRY = geometry_of()
PLAN = MemoryPlan.of_counts(GEOMETRY, num_slots=4, num_blocks=20, num_logit_rows=2, num_count_rows=4)


def empty(geometry=GEOMETRY, **options):
    return empty_state(geometry, PLAN, EngineConfig(max_num_seqs=4, block_size=8, **options), 45)


def size_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def sizes_of(state):
    """Bytes of (state and windows, hidden states, keys and values, bias, counts, masks), with speculation."""
    slots, rows = state.slots, state.logit_rows
    return (
        size_of([pool for name, pool in state.cache.slots[DELTA].items() if name != LAYOUT]),
        size_of((slots.hidden, slots.pending_hidden, slots.draft_hidden)),
        size_of(state.cache.pages[ATTENTION]),
        size_of(rows.bias),
        size_of(state.token_counts),
        size_of(state.masks),
    )


SPECULATION = ({}, *({"num_speculative_tokens": 3, "draft_acceptance": rule} for rule in DRAFT_ACCEPTANCES))


@pytest.mark.parametrize("speculation", SPECULATION, ids=lambda options: options.get("draft_acceptance", "none"))
@pytest.mark.parametrize(
    ("ssm_dtype", "kv_cache_dtype"),
    [("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float32", "fp8"), ("bfloat16", "int8")],
)
@pytest.mark.parametrize("tp", [1, 2])
def test_pools_take_exactly_the_planned_bytes(speculation, ssm_dtype, kv_cache_dtype, tp):
    """Scales of 8-bit keys and values among them."""
    speculating = EngineConfig(**speculation)
    geometry = geometry_of(ssm_dtype=ssm_dtype, kv_cache_dtype=kv_cache_dtype, speculation=speculating)
    plan = MemoryPlan.of_counts(geometry, num_slots=4, num_blocks=20, num_logit_rows=2, num_count_rows=4)
    state = jax.eval_shape(lambda: empty(geometry, tensor_parallel_size=tp, **speculation))
    # Every rank holds all of the hidden states.
    assert sizes_of(state) == (
        tp * plan.state_bytes,
        plan.hidden_bytes,
        tp * plan.kv_bytes,
        tp * plan.logit_row_bytes,
        tp * plan.count_row_bytes,
        tp * plan.mask_row_bytes,
    )


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("qwen")])
def test_state_of_a_speculating_request_is_at_most_a_twentieth_more(name):
    """With three drafts and a float32 state, by either rule; in the pools as in the plan, to the byte."""
    model = ModelConfig.from_hf(config_file(name))

    def bytes_of_a_request(**speculation):
        engine = EngineConfig(max_num_seqs=2, **speculation)
        geometry = StateGeometry.of(
            model, tp=1, block_size=16, dtype="bfloat16", ssm_dtype="float32", speculation=engine
        )
        plan = MemoryPlan.of_counts(geometry, num_slots=2, num_blocks=4, num_logit_rows=1)
        state, hidden, *_ = sizes_of(jax.eval_shape(lambda: empty_state(geometry, plan, engine, 64)))
        assert (state, hidden) == (plan.state_bytes, plan.hidden_bytes)
        return (state + hidden) // 3

    alone, *speculating = (bytes_of_a_request(**options) for options in SPECULATION)
    print([f"{size:,} B, {size / alone:.4f}" for size in (alone, *speculating)])
    assert all(alone < size <= 1.05 * alone for size in speculating)


def test_uncounted_fields_are_small():
    """What the plan leaves out is a few words a slot and a logit row, whatever the model's size."""
    engine = EngineConfig(num_speculative_tokens=7, draft_acceptance="rejection")
    state = jax.eval_shape(lambda: empty(geometry_of(speculation=engine)))
    slots = size_of((state.slots, state.cache.slots[DELTA])) - sum(sizes_of(state)[:2])
    assert slots / 5 < 256 + 4 * state.slots.block_table.shape[1]
    rows = state.logit_rows
    assert size_of((rows.bad_words, rows.recent)) / 3 < 4096


def test_block_table_covers_the_longest_request():
    assert empty().slots.block_table.shape == (5, -(-45 // 8))


def test_empty_state_produces_nothing_and_stops_nowhere():
    state = empty()
    slots = state.slots
    assert np.asarray(slots.done).all()
    assert (np.asarray(slots.stop_tokens) == NO_TOKEN).all()
    assert (np.asarray(state.logit_rows.bad_words) == NO_TOKEN).all()
    assert (np.asarray(state.logit_rows.recent) == NO_TOKEN).all()
    assert (np.asarray(slots.repetition) == 1).all()
    assert (np.asarray(slots.top_p) == 1).all()
    neutral = {"done", "stop_tokens", "top_p", "repetition"}
    for field in dataclasses.fields(slots):
        if field.name not in neutral:
            assert not np.asarray(getattr(slots, field.name)).any(), field.name


def test_state_survives_flattening():
    state = empty()
    leaves, tree = jax.tree.flatten(state)
    rebuilt = jax.tree.unflatten(tree, leaves)
    assert isinstance(rebuilt, ServeState)
    assert all(a is b for a, b in zip(leaves, jax.tree.leaves(rebuilt), strict=True))


def test_check_accepts_an_empty_state():
    check_state(empty())
    check_state(jax.eval_shape(empty))
    engine = EngineConfig(num_speculative_tokens=2, draft_acceptance="rejection")
    check_state(empty(geometry_of(speculation=engine)))
    check_state(empty(geometry_of(speculation=engine), tensor_parallel_size=2))


@pytest.mark.parametrize(
    ("part", "field", "shape", "named"),
    [
        ("slots", "temperature", (4,), r"SlotTable\.temperature has shape \(4,\), expected 5 rows"),
        ("slots", "block_table", (6, 6), r"SlotTable\.block_table"),
        ("slots", "hidden", (4, 40), r"SlotTable\.hidden has shape \(4, 40\), expected 5 rows"),
        ("logit_rows", "bias", (2, 101), r"LogitRows\.bias has shape \(2, 101\), expected 3 rows"),
    ],
)
def test_check_names_the_field_that_does_not_fit(part, field, shape, named):
    state = empty()
    broken = dataclasses.replace(getattr(state, part), **{field: jnp.zeros(shape)})
    with pytest.raises(ValueError, match=named):
        check_state(dataclasses.replace(state, **{part: broken}))


@pytest.mark.parametrize(
    ("pool", "shape", "named"),
    [
        ("ssm", (3, 4, 6, 384), r"slots\.delta\.ssm has shape \(3, 4, 6, 384\), expected \(3, 5, 6, 384\): 5 slots"),
        ("conv", (3, 6, 3, 208), r"slots\.delta\.conv"),
        ("layout", (4,), r"slots\.delta\.layout has shape \(4,\), expected \(5,\)"),
        ("v", (2, 21, 8, 2, 16), r"pages\.attention\.v has shape .*, expected \(2, 21, 8, 2, 32\): 5 slots, 21 blocks"),
    ],
)
def test_check_names_the_pool_that_does_not_fit(pool, shape, named):
    with pytest.raises(ValueError, match=named):
        check_state(with_pools(empty(), **{pool: jnp.zeros(shape)}))


def test_check_refuses_a_cache_without_one_of_its_pools():
    state = empty()
    slots = {DELTA: {name: pool for name, pool in state.cache.slots[DELTA].items() if name != "conv"}}
    with pytest.raises(ValueError, match="its spec is"):
        check_state(dataclasses.replace(state, cache=dataclasses.replace(state.cache, slots=slots)))


def test_check_refuses_counts_of_another_vocabulary():
    with pytest.raises(
        ValueError, match=r"ServeState\.token_counts has shape \(5, 100\), LogitRows\.bias has \(3, 101\)"
    ):
        check_state(dataclasses.replace(empty(), token_counts=jnp.zeros((5, 100), jnp.uint16)))


def test_masks_have_as_many_rows_as_counts():
    with pytest.raises(ValueError, match=r"ServeState\.masks has shape \(4, 4\), expected 5 rows"):
        check_state(dataclasses.replace(empty(), masks=jnp.zeros((4, 4), jnp.uint32)))
