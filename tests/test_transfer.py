"""Bundles of rows go to the host's memory and come back bit for bit, and nothing else of the pools changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdnjax.backend import HOST_MEMORY, host_memory
from gdnjax.config import EngineConfig
from gdnjax.memory import HostSizes, MemoryPlan
from gdnjax.serving.host_store import HostStore
from gdnjax.serving.plan import Restore, Spill
from gdnjax.sharding import make_mesh
from gdnjax.state import empty_state, shardings_of
from gdnjax.transfer import build_transfers
from tests.geometries import small_geometry
from tests.pools import pools_of

pytestmark = pytest.mark.usefixtures("quickly_compiled")

CONFIG = EngineConfig(max_num_seqs=4, block_size=8, num_speculative_tokens=2)


def noise(leaf, seed: int):
    """Any bits that there are, as numbers of the leaf's dtype."""
    bits = np.random.default_rng(seed).integers(0, 256, (*leaf.shape, leaf.dtype.itemsize), np.uint8)
    return bits.view(leaf.dtype).reshape(leaf.shape) if leaf.dtype != bool else bits[..., 0] % 2 == 0


@functools.cache
def setup(kv_cache_dtype: str, tp: int = 1, slots: int = 6, blocks: int = 40):
    """(transfers, geometry, a state full of noise). Pools are bits: XLA on a CPU changes NaNs that it moves."""
    geometry = small_geometry(
        vocab_size=101, block_size=8, ssm_dtype="bfloat16", kv_cache_dtype=kv_cache_dtype, speculation=CONFIG
    ).as_bits()
    plan = MemoryPlan.of_counts(geometry, num_slots=slots, num_blocks=blocks, num_logit_rows=1)
    config = EngineConfig(max_num_seqs=4, block_size=8, num_speculative_tokens=2, tensor_parallel_size=tp)
    mesh = make_mesh(tp)
    shapes = jax.eval_shape(lambda: empty_state(geometry, plan, config, 64))
    leaves, tree = jax.tree.flatten(shapes)
    state = jax.tree.unflatten(tree, [noise(leaf, seed) for seed, leaf in enumerate(leaves)])
    state = jax.device_put(state, shardings_of(state, mesh))
    return build_transfers(mesh, state, HOST_MEMORY), geometry, state


def bits_of(tree):
    return [np.asarray(leaf).view(np.uint8) for leaf in jax.tree.leaves(tree)]


def equal(a, b) -> bool:
    return all(np.array_equal(*pair) for pair in zip(bits_of(a), bits_of(b), strict=True))


@pytest.mark.parametrize(("kv_cache_dtype", "tp"), [("bfloat16", 1), ("fp8", 1), ("bfloat16", 2)])
def test_bundles_come_back_bit_for_bit(kv_cache_dtype, tp):
    """Blocks of all pools, scales among them, a state with its layout bit and hidden state: in other rows than before,
    and nothing else is touched.
    """
    transfers, geometry, noisy = setup(kv_cache_dtype, tp)
    store, before = HostStore(transfers), jax.tree.map(jnp.copy, noisy)
    store.warm_up(jax.tree.map(jnp.copy, noisy))
    compiled = store.num_traces
    blocks, places = (3, 17, 5, 40), (8, 9, 0, 11)
    store.spill(before, [Spill(1, False, blocks), Spill(2, True, (4,)), Spill(3, False, (6,))])
    kept = [leaf for rows in store._bundles.values() for leaf in jax.tree.leaves(rows)]
    assert {leaf.sharding.memory_kind for leaf in kept} == {HOST_MEMORY}
    sizes = HostSizes.of(geometry, 1 << 20)
    assert store.num_bytes == 5 * sizes.block_bytes + sizes.state_bytes
    before_bits = jax.tree.map(np.asarray, before)
    after = store.restore(before, [Restore(1, False, places), Restore(2, True, (2,)), Restore(3, False, (1,))])
    moved = {8: 3, 9: 17, 11: 40, 1: 6}
    for name, pool in pools_of(after).items():
        pool, old = np.asarray(pool), pools_of(before_bits)[name]
        axis = 0 if name == "layout" else 1
        rows = {2: 4} if pool.shape[axis] == 7 else moved
        expected = np.moveaxis(old.copy(), axis, 0)
        for row, source in rows.items():
            expected[row] = np.moveaxis(old, axis, 0)[source]
        found = np.moveaxis(pool, axis, 0)
        # What nobody wants went to the null row.
        assert equal(found[1:], expected[1:]), name
    hidden = before_bits.slots.hidden.copy()
    hidden[2] = hidden[4]
    assert equal(after.slots.hidden, hidden)
    assert jax.tree.map(lambda leaf: leaf.sharding, after) == jax.tree.map(lambda leaf: leaf.sharding, noisy)
    # A bundle of each size and a state, either way.
    assert store.num_traces == compiled
    store.drop([1, 2, 3])
    assert store.num_bytes == 0


def test_what_leaves_is_what_stood_there_before_later_steps():
    """The step behind it writes the rows of the donated state; nobody has waited in between."""
    transfers, _, noisy = setup("bfloat16")
    store, state = HostStore(transfers), jax.tree.map(jnp.copy, noisy)
    overwrite = jax.jit(lambda state: jax.tree.map(jnp.zeros_like, state), donate_argnums=0)
    for bundle in range(20):
        store.spill(state, [Spill(bundle, False, (1, 2, 3, 4))])
        row = transfers.to_device(store._bundles[bundle], False)
        state, _ = transfers.write_blocks(overwrite(state), row, (1, 2, 3, 4))
    expected = transfers.read_blocks(noisy, (1, 2, 3, 4))
    assert all(equal(rows, expected) for rows in store._bundles.values())


@pytest.mark.parametrize("kind", ["blocks", "state"])
def test_what_comes_back_is_written_in_place(kind):
    transfers, _, _ = setup("bfloat16")
    _, _, state = setup("bfloat16", slots=2000, blocks=4000)
    pools = state.cache.pages if kind == "blocks" else (state.cache.slots, state.slots.hidden)
    cut, paste, where = (
        (transfers.cut_blocks, transfers.paste_blocks, np.arange(4, dtype=np.int32))
        if kind == "blocks"
        else (transfers.cut_slot, transfers.paste_slot, np.int32(3))
    )
    memory = paste.lower(pools, cut(pools, where), where).compile().memory_analysis()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(pools))
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < 0.01 * size


def test_device_without_such_memory_is_refused():
    class Device:
        def addressable_memories(self):
            return []

    with pytest.raises(ValueError, match="host_cache_gib needs a device that addresses memory of the kind pinned_host"):
        host_memory(Device())
    assert host_memory(jax.devices()[0]) == HOST_MEMORY
