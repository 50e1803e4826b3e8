"""Batches as words: nothing of them is lost, and a step that is given words is the step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdnjax.batch import AdmitBatch, CountBatch, DecodeBatch, Emitted, PrefillBatch
from gdnjax.words import FlatParams, Form, WordStep

pytestmark = pytest.mark.usefixtures("quickly_compiled")

EXTREMES = {
    np.dtype(bool): [False, True],
    np.dtype(np.int32): [-(2**31), -1, 0, 2**31 - 1],
    np.dtype(np.uint32): [0, 1, 2**31, 2**32 - 1],
    np.dtype(np.uint16): [0, 1, 2**15, 2**16 - 1],
    np.dtype(np.float32): [0.0, -0.0, np.inf, np.nan, np.finfo(np.float32).tiny],
}


def batch_of(kind: type, dtypes: tuple, *, absent: tuple[str, ...] = ()):
    """A batch with extreme numbers in every field, in shapes of up to two axes."""
    rng, fields = np.random.default_rng(0), {}
    for at, field in enumerate(dataclasses.fields(kind)):
        if field.name not in absent:
            dtype = np.dtype(dtypes[at % len(dtypes)])
            shape = ((), (3,), (3, 2), (0,))[at % 4]
            fields[field.name] = rng.choice(EXTREMES[dtype], shape).astype(dtype)
    return kind(**fields)


BATCHES = (
    batch_of(AdmitBatch, (np.int32, np.uint32, np.float32)),
    batch_of(AdmitBatch, (np.float32, np.uint32), absent=("copy_from", "copy_to")),
    batch_of(PrefillBatch, (np.int32, bool), absent=("kv_start",)),
    batch_of(CountBatch, (np.uint16, np.int32)),
    batch_of(DecodeBatch, (np.int32,), absent=("max_drafts", "mask_row")),
)


def same(one, other) -> None:
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if a is None:
            assert b is None
        else:
            assert np.asarray(b).dtype == a.dtype
            assert np.asarray(b).shape == a.shape
            # Bits, so that -0 is not 0, and NaN is itself.
            assert np.asarray(b).tobytes() == a.tobytes()


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: type(batch).__name__)
def test_words_give_back_every_bit(batch):
    form = Form.of(batch)
    words = form.pack(batch)
    assert words.dtype == np.int32
    assert words.ndim == 1
    same(batch, form.views(words))
    same(batch, jax.jit(form.unpack)(words))


def test_form_tells_apart_what_a_step_is_compiled_for():
    batch = BATCHES[0]
    assert Form.of(batch) == Form.of(dataclasses.replace(batch, slot=np.copy(batch.slot)))
    for change in (np.zeros((4,), batch.slot.dtype), batch.slot.astype(np.float32), None):
        assert Form.of(dataclasses.replace(batch, slot=change)) != Form.of(batch)
    assert Form.of(BATCHES[4]) != Form.of(batch)


def test_numbers_of_64_bits_are_refused_by_name():
    batch = DecodeBatch(slot=np.zeros((2,), np.int64))
    with pytest.raises(ValueError, match=r"DecodeBatch\.slot is int64; allowed in a batch: numbers of up to 32 bits"):
        Form.of(batch)


def test_word_step_takes_trees_and_flat_params_and_jits_once_for_each_form():
    made = []

    def make(form):
        made.append(form)
        return jax.jit(lambda leaves, state, words: (state + 1, leaves[0] * form.unpack(words).slot))

    step, params = WordStep(make), {"b": {"c": jnp.float32(3)}, "d": jnp.float32(5)}
    batch = DecodeBatch(slot=np.arange(3, dtype=np.int32))
    for given in (params, FlatParams.of(params)):
        state, found = step(given, jnp.int32(1), batch)
        assert int(state) == 2
        np.testing.assert_array_equal(found, [0, 3, 6])
    assert made == [Form.of(batch)]
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    step.lower(shapes, jax.ShapeDtypeStruct((), jnp.int32), batch).compile()
    step(params, jnp.int32(1), dataclasses.replace(batch, slot=batch.slot[:2]))
    assert len(made) == 2


def test_emitted_is_one_array_that_reads_as_its_parts():
    tokens, count = np.array([[5, 7], [4, -1]], np.int32), np.array([2, 1], np.int32)
    done, drafted = np.array([True, False]), np.array([1, 0], np.int32)
    parts = {"tokens": tokens, "count": count, "done": done, "drafted": drafted}
    emitted = jax.jit(lambda parts: Emitted.of(**parts, logprobs=None, prompt_logprobs=None))(parts)
    assert len(jax.tree.leaves(emitted)) == 1
    for found in (emitted, jax.device_get(emitted)):
        for name, part in parts.items():
            np.testing.assert_array_equal(getattr(found, name), part)
            assert getattr(found, name).dtype == part.dtype
