"""The kinds of cache say what is wrong with them at construction, and their pools and bytes follow from them."""

import jax
import pytest

from gdnjax.cache import empty_cache, partition_specs
from gdnjax.cache_kinds import CacheSpec, LeafSpec, Paged, Ring, Slot
from gdnjax.sharding import AXIS, P

KEYS = LeafSpec(name="k", layers=2, shape=(3, 5), dtype="bfloat16", split=0)
INDEX = LeafSpec(name="index", layers=4, shape=(6,), dtype="int8")
PAGED = Paged(name="attention", leaves=(KEYS,))
SPARSE = Paged(name="index", leaves=(INDEX,), tokens_per_entry=4)
RING = Ring.of(name="near", entries=(KEYS,), window=7, pending_rows=4)
SPEC = CacheSpec((PAGED, SPARSE, RING), 16)


def _rows(count, **options):
    return LeafSpec(**({"name": "near", "layers": 1, "shape": (count, 2), "dtype": "float32"} | options))


def test_bytes_follow_from_the_leaves():
    assert PAGED.block_bytes(16) == 16 * 2 * 15 * 2
    assert SPARSE.block_bytes(16) == 4 * 4 * 6
    assert RING.slot_bytes == 2 * (7 + 3) * 15 * 2
    assert (SPEC.block_bytes, SPEC.slot_bytes) == (PAGED.block_bytes(16) + SPARSE.block_bytes(16), RING.slot_bytes)


@pytest.mark.parametrize("ranks", [1, 2])
def test_pools_are_those_of_all_ranks(ranks):
    cache = jax.eval_shape(lambda: empty_cache(SPEC, slots=5, blocks=9, ranks=ranks))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), (cache.pages, cache.slots))
    assert shapes == (
        {"attention": {"k": ((2, 9, 16, 3 * ranks, 5), "bfloat16")}, "index": {"index": ((4, 9, 4, 6), "int8")}},
        {"near": {"k": ((2, 5, 10, 3 * ranks, 5), "bfloat16")}},
    )
    specs = partition_specs(SPEC)
    heads = P(None, None, None, AXIS)
    assert (specs.pages, specs.slots) == ({"attention": {"k": heads}, "index": {"index": P()}}, {"near": {"k": heads}})


def test_ring_is_a_state_that_a_hit_needs():
    assert SPEC.needs_state
    assert not CacheSpec((PAGED, SPARSE), 16).needs_state


@pytest.mark.parametrize(("drafts", "rows"), [(0, 7), (1, 8), (4, 11)])
def test_ring_has_a_row_more_for_each_draft(drafts, rows):
    """A step without drafts feeds one token, and none is pending then."""
    pending = drafts + 1 if drafts else 0
    (leaf,) = Ring.of(name="near", entries=(KEYS,), window=7, pending_rows=pending).leaves
    assert (leaf.shape, leaf.split) == ((rows, 3, 5), 1)


BAD = {
    "window": (lambda: Ring(name="near", leaves=(), window=0), "the window of near is 0 tokens; allowed: 1 or more"),
    "too few rows": (lambda: Ring(name="near", leaves=(_rows(6),), window=7), r"near.*\(6, 2\).*for 7 tokens or more"),
    "no rows": (lambda: Ring(name="near", leaves=(_rows(0, shape=()),), window=7), r"near.*\(\).*for 7 tokens or more"),
    "unequal": (lambda: Ring(name="near", leaves=(_rows(8), _rows(9)), window=7), r"\(9, 2\).*equally many"),
    "split rows": (lambda: Ring(name="near", leaves=(_rows(8, split=0),), window=7), "rows of the pool near cannot be"),
    "order": (lambda: Ring(name="near", leaves=(_rows(8),), window=7, ordered=True), "the ring near have one order"),
    "dtype": (lambda: _rows(8, dtype="float16"), "the pool near has the dtype 'float16'; allowed: float32, "),
    "axis": (lambda: _rows(8, split=2), r"the pool near is split along axis 2 of \(8, 2\)"),
    "names": (lambda: CacheSpec((PAGED, Slot(name="attention", leaves=())), 16), "two kinds of cache have one name"),
    "entries": (lambda: SPARSE.entries(6), "block_size=6 is no multiple of 4, the tokens of an entry of index"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_kind_is_named(name):
    build, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        build()
