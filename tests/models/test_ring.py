"""Rings hold the last tokens of each request, to the bit, whatever pieces and drafts they came in.

tests/serving/test_interleavings.py has them in the engine: forks, preemption, checkpoints, rejected drafts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdnjax.cache_kinds import LeafSpec, Ring
from gdnjax.models import ring
from gdnjax.models.context import DecodeContext, FoldContext, Places, PrefillContext
from gdnjax.pallas_kernels.paged_attention import Tiles
from gdnjax.pallas_kernels.rows import Chunks, Rows
from tests.pallas_kernels.packed import TOKENS, pack_rows

pytestmark = pytest.mark.usefixtures("quickly_compiled")

WINDOW, DRAFTS, SLOTS = 7, 3, 9
ENTRY = LeafSpec(name="near", layers=2, shape=(2, 3), dtype="bfloat16")
KIND = Ring.of(name="near", entries=(ENTRY,), window=WINDOW, pending_rows=DRAFTS + 1)
LAYER = 1


def _pool(*, bits):
    """Poisoned: what no token has written must not be seen."""
    (leaf,) = KIND.leaves
    pool = jnp.full((leaf.layers, SLOTS, *leaf.shape), jnp.nan, leaf.dtype)
    return pool.view(jnp.uint16) if bits else pool


def _entries(rng, count):
    return np.asarray(jnp.asarray(rng.normal(size=(count, *ENTRY.shape)), jnp.bfloat16), np.float32)


def _decode(slots, first, count):
    """Steps of `count` tokens of each slot, from positions `first` on."""
    slot, size = jnp.asarray(slots, jnp.int32), len(slots) * count
    position = jnp.asarray(first, jnp.int32)[:, None] + jnp.arange(count, dtype=jnp.int32)
    unused = jnp.zeros((size,), jnp.int32)
    tiles = Tiles(position=position, block_table=jnp.zeros((len(slots), 1), jnp.int32), longest=jnp.max(position) + 1)
    return DecodeContext(
        read_slot=slot, write_slot=slot, tiles=tiles, places=Places(block=unused, offset=unused), orders={},
        position=position.reshape(-1), valid=jnp.ones((size,), bool),
    )  # fmt: skip


@jax.jit
def _decoded(pool, entries, slots, first):
    """What the tokens of a step see, which of it there is, and the pool behind the step."""
    context = _decode(slots, first, len(entries) // len(slots))
    return *ring.read(pool, LAYER, entries, context, WINDOW), ring.write(pool, LAYER, entries, context)


@jax.jit
def _copied(pool, read, write):
    return ring.copy(pool, LAYER, FoldContext(read, write, jnp.zeros_like(read), {}))


@jax.jit
def _prefilled(pool, entries, rows, chunks, before):
    rows, chunks = Rows(**rows), Chunks(**chunks)
    unused = jnp.zeros((TOKENS,), jnp.int32)
    tiles = Tiles(
        position=jnp.zeros(chunks.valid.shape, jnp.int32), block_table=jnp.zeros((chunks.row.shape[0], 1), jnp.int32),
        longest=jnp.int32(1),
    )  # fmt: skip
    context = PrefillContext(
        rows=rows, chunks=chunks, tiles=tiles, places=Places(block=unused, offset=unused), orders={},
        position=before[rows.token_row] + rows.token_offset, valid=rows.token_valid,
    )  # fmt: skip
    return *ring.read(pool, LAYER, entries, context, WINDOW), ring.write(pool, LAYER, entries, context)


def _pieces(pool, values, behind, read, write, cuts):
    """One step of pieces: where they stand, what their tokens see, which of it there is, and the pool behind it."""
    packed = pack_rows(
        [len(x) for x in values], read=read, write=write, fresh=[not b for b in behind], cuts=cuts, behind=behind
    )
    rows, chunks = vars(packed.rows), vars(packed.chunks)
    before = np.pad(np.array(behind, np.int32), (0, len(rows["start"]) - len(behind)))
    seen, valid, pool = _prefilled(pool, packed.pack(values), rows, chunks, before)
    return packed.slices, *_seen(seen, valid), pool


def _seen(seen, valid):
    return np.asarray(seen).astype(np.float32), np.asarray(valid)


def _check(seen, valid, past):
    """What a token sees, newest first, against all tokens of its request so far."""
    count = min(len(past), WINDOW)
    assert valid.tolist() == [True] * count + [False] * (WINDOW - count)
    np.testing.assert_array_equal(seen[:count], np.stack(past[::-1][:count]))


@pytest.mark.parametrize("bits", [False, True])
def test_tokens_see_the_last_ones_of_their_request(bits):
    """Pieces of two requests, a checkpoint among them, and steps of drafts of which some are rejected."""
    rng, pool = np.random.default_rng(0), _pool(bits=bits)
    past, kept = {1: [], 2: []}, {}
    for lengths, cuts in (((3, 70), ({}, {64: 5})), ((1, 5), ({}, {})), ((90, 2), ({40: 6}, {}))):
        behind = [len(past[1]), len(past[2])]
        values = [_entries(rng, length) for length in lengths]
        slices, seen, valid, pool = _pieces(pool, values, behind, [1, 2], [1, 2], cuts)
        for slot, here, given, cut in zip((1, 2), slices, values, cuts, strict=True):
            for place, value in zip(range(here.start, here.stop), given, strict=True):
                past[slot].append(value)
                _check(seen[place], valid[place], past[slot])
                for at, to in cut.items():
                    if place - here.start + 1 == at:
                        kept[to] = list(past[slot])
    # A fork goes on from each checkpoint in a slot of its own.
    values = [_entries(rng, length) for length in (2, 4)]
    slices, seen, valid, pool = _pieces(pool, values, [len(kept[5]), len(kept[6])], [5, 6], [3, 4], ({}, {}))
    for slot, source, here, given in zip((3, 4), (5, 6), slices, values, strict=True):
        past[slot] = list(kept[source])
        for place, value in zip(range(here.start, here.stop), given, strict=True):
            past[slot].append(value)
            _check(seen[place], valid[place], past[slot])
    slots = np.array([1, 2, 3, 4], np.int32)
    for _ in range(12):
        values = _entries(rng, len(slots) * (DRAFTS + 1))
        *found, pool = _decoded(pool, values, slots, np.array([len(past[slot]) for slot in slots], np.int32))
        seen, valid = _seen(*found)
        # What is sealed meanwhile stands anywhere behind the first of the step's tokens, and goes on from there.
        pool, sealed = _copied(pool, np.array([1], np.int32), np.array([7], np.int32)), list(past[1])
        again = _entries(rng, 1)
        one, its, _ = _decoded(pool, again, np.array([7], np.int32), np.array([len(sealed)], np.int32))
        one, its = _seen(one, its)
        _check(one[0], its[0], [*sealed, again[0]])
        for row, slot in enumerate(slots):
            mine = [*past[slot]]
            for place in range(row * (DRAFTS + 1), (row + 1) * (DRAFTS + 1)):
                mine.append(values[place])
                _check(seen[place], valid[place], mine)
            past[slot] = mine[: len(past[slot]) + int(rng.integers(1, DRAFTS + 2))]
    assert jnp.isnan((pool.view(jnp.bfloat16) if bits else pool)[0]).all()


def test_ring_without_rows_for_its_drafts_is_refused():
    entries = jnp.zeros((DRAFTS + 2, *ENTRY.shape))
    with pytest.raises(ValueError, match="a ring of 10 rows for a window of 7 and 5 tokens: 11 needed"):
        ring.read(_pool(bits=False), LAYER, entries, _decode([1], [9], DRAFTS + 2), WINDOW)
