"""The pytrees that outlive a step hold what the memory plan counted, and start with nothing in them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdnjax.config import EngineConfig
from gdnjax.memory import MemoryPlan
from gdnjax.state import NO_TOKEN, ServeState, check_state, empty_state
from tests.geometries import SMALL_GEOMETRY

GEOMETRY = dataclasses.replace(SMALL_GEOMETRY, vocab_size=101, block_size=8)
PLAN = MemoryPlan.of_counts(GEOMETRY, num_slots=4, num_blocks=20, num_logit_rows=2)


def empty(geometry=GEOMETRY, **options):
    return empty_state(geometry, PLAN, EngineConfig(max_num_seqs=4, block_size=8, **options), 45)


def size_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("ssm_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tp", [1, 2])
def test_pools_take_exactly_the_planned_bytes(ssm_dtype, tp):
    geometry = dataclasses.replace(GEOMETRY, ssm_dtype=ssm_dtype)
    plan = MemoryPlan.of_counts(geometry, num_slots=4, num_blocks=20, num_logit_rows=2)
    state = jax.eval_shape(lambda: empty(geometry, tensor_parallel_size=tp))
    assert size_of((state.gdn.ssm, state.gdn.conv)) == tp * plan.state_bytes
    assert size_of(state.kv) == tp * plan.kv_bytes
    # Every rank holds all of it.
    assert size_of(state.slots.hidden) == plan.hidden_bytes
    rows = state.logit_rows
    assert size_of((rows.counts, rows.bias, rows.in_prompt)) == tp * plan.logit_row_bytes


def test_uncounted_fields_are_small():
    """What the plan leaves out is a few words a slot and a logit row, whatever the model's size."""
    state = jax.eval_shape(empty)
    slots = size_of(state.slots) - size_of(state.slots.hidden) + size_of(state.gdn.layout)
    assert slots / 5 < 256 + 4 * state.slots.block_table.shape[1]
    rows = state.logit_rows
    assert size_of((rows.bad_words, rows.recent, rows.repetition, rows.frequency, rows.presence)) / 3 < 4096


def test_block_table_covers_the_longest_request():
    assert empty().slots.block_table.shape == (5, -(-45 // 8))


def test_empty_state_produces_nothing_and_stops_nowhere():
    state = empty()
    slots = state.slots
    assert np.asarray(slots.done).all()
    assert (np.asarray(slots.stop_tokens) == NO_TOKEN).all()
    assert (np.asarray(state.logit_rows.bad_words) == NO_TOKEN).all()
    assert (np.asarray(state.logit_rows.recent) == NO_TOKEN).all()
    assert (np.asarray(state.logit_rows.repetition) == 1).all()
    assert (np.asarray(slots.top_p) == 1).all()
    neutral = {"done", "stop_tokens", "top_p"}
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


@pytest.mark.parametrize(
    ("part", "field", "shape", "named"),
    [
        ("slots", "temperature", (4,), r"SlotTable\.temperature has shape \(4,\), expected 5 rows"),
        ("slots", "block_table", (6, 6), r"SlotTable\.block_table"),
        ("slots", "hidden", (4, 40), r"SlotTable\.hidden has shape \(4, 40\), expected 5 rows"),
        ("logit_rows", "bias", (2, 101), r"LogitRows\.bias has shape \(2, 101\), expected 3 rows"),
        ("gdn", "ssm", (3, 4, 6, 384), "GDNState holds 4, 5 and 5 slots, SlotTable 5"),
        ("gdn", "conv", (3, 6, 3, 208), "GDNState holds 5, 6 and 5 slots"),
        ("gdn", "layout", (4,), "GDNState holds 5, 5 and 4 slots"),
        ("kv", "v", (2, 21, 8, 2, 16), r"KVBlocks\.k has shape .*, KVBlocks\.v"),
    ],
)
def test_check_names_the_field_that_does_not_fit(part, field, shape, named):
    state = empty()
    broken = dataclasses.replace(getattr(state, part), **{field: jnp.zeros(shape)})
    with pytest.raises(ValueError, match=named):
        check_state(dataclasses.replace(state, **{part: broken}))
