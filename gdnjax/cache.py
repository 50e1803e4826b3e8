"""The pools of all cache kinds as one pytree, and what a step does with rows of them, whatever they hold.

What is written into a row is the layers' business; this is what happens to it as a whole: it is handed out, copied,
shared out among ranks.
"""

import dataclasses
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from gdnjax.cache_kinds import JAX_NAMES, CacheKind, CacheSpec, LeafSpec, Paged
from gdnjax.shapes import Array, Leaf
from gdnjax.sharding import AXIS, P, path_name

Leaves: TypeAlias = dict[str, Leaf]
"""The pools of one kind, by name."""

LAYOUT_KV = 0
LAYOUT_VK = 1

LAYOUT = "layout"
"""The pool [s] int8 of an ordered Slot: how each row is stored, for all layers at once (LAYOUT_KV: k outer, v inner).

It is reset when a slot is handed out, written by every step that writes the row, and goes with the row in every copy.
"""


def layout_of(state_layout: str, mixed: int) -> int:
    """The bit of rows that a step writes: that of the pool ("kv" or "vk"), and `mixed` in a "mixed" one."""
    return {"kv": LAYOUT_KV, "vk": LAYOUT_VK, "mixed": mixed}[state_layout]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What a model keeps of its requests: the pools of each kind of its `spec`, by the kind's name.

    `pages[name]` are [L, b, entries, ...], `slots[name]` [L, s, ...], a layer after another in few flat arrays. Sizes
    that ranks share are global outside a step; `spec` is always that of one rank.
    """

    pages: dict[str, Leaves]
    slots: dict[str, Leaves]
    spec: CacheSpec = dataclasses.field(metadata={"static": True})

    def with_pages(self, name: str, **leaves: Array) -> "Cache":
        """With other pools in the place of some of a paged kind's."""
        return dataclasses.replace(self, pages=_with(self.pages, name, leaves))

    def with_slots(self, name: str, **leaves: Array) -> "Cache":
        """With other pools in the place of some of a slot kind's."""
        return dataclasses.replace(self, slots=_with(self.slots, name, leaves))

    def written(self, slot: Array, layout: int) -> "Cache":
        """Rows that the layers have written in this order, or will: a row that is handed out has that of the pool."""
        slots = {
            name: leaves | {LAYOUT: leaves[LAYOUT].at[slot].set(layout)} if LAYOUT in leaves else leaves
            for name, leaves in self.slots.items()
        }
        return dataclasses.replace(self, slots=slots)

    def with_copied_slot(self, source: Array, target: Array) -> "Cache":
        """One slot's rows of all pools stand at another slot, too."""
        slots = {
            name: {leaf: copy_row(pool, source, target, axis=_slot_axis(leaf)) for leaf, pool in kind.items()}
            for name, kind in self.slots.items()
        }
        return dataclasses.replace(self, slots=slots)

    def with_copied_blocks(self, source: Array, target: Array) -> "Cache":
        """Blocks as they stood before, all of `source` read before any of `target` is written."""
        pages = jax.tree.map(lambda pool: pool.at[:, target].set(pool[:, source]), self.pages)
        return dataclasses.replace(self, pages=pages)


def read_blocks(pages: dict[str, Leaves], blocks: Array) -> dict[str, Leaves]:
    """The rows [L, r, entries, ...] of `blocks` [r] in each pool of pages."""
    return jax.tree.map(lambda pool: pool[:, blocks], pages)


def write_blocks(pages: dict[str, Leaves], rows: dict[str, Leaves], blocks: Array) -> dict[str, Leaves]:
    """The pools, which are consumed, with such rows in the places of `blocks`; 0: a row that nobody wants."""
    return jax.tree.map(lambda pool, row: pool.at[:, blocks].set(row), pages, rows)


def read_slot(slots: dict[str, Leaves], slot: Array) -> dict[str, Leaves]:
    """The row [L, 1, ...] of one slot in each pool of slots, and [1] of the layouts."""
    return {
        name: {leaf: lax.dynamic_slice_in_dim(pool, slot, 1, _slot_axis(leaf)) for leaf, pool in kind.items()}
        for name, kind in slots.items()
    }


def write_slot(slots: dict[str, Leaves], row: dict[str, Leaves], slot: Array) -> dict[str, Leaves]:
    """The pools, which are consumed, with such a row in the place of a slot."""
    return {
        name: {
            leaf: lax.dynamic_update_slice_in_dim(pool, row[name][leaf], slot, _slot_axis(leaf))
            for leaf, pool in kind.items()
        }
        for name, kind in slots.items()
    }


def _slot_axis(leaf: str) -> int:
    return 0 if leaf == LAYOUT else 1


def copy_row(pool: Array, source: Array, target: Array, axis: int) -> Array:
    """One row of a pool along `axis` stands at another place, too."""
    row = lax.dynamic_slice_in_dim(pool, source, 1, axis)
    return lax.dynamic_update_slice_in_dim(pool, row, target, axis)


def _with(kinds: dict[str, Leaves], name: str, leaves: Leaves) -> dict[str, Leaves]:
    unknown = leaves.keys() - kinds[name].keys()
    if unknown:
        raise KeyError(f"{name} has no pool {', '.join(sorted(unknown))}; it has {', '.join(sorted(kinds[name]))}")
    return kinds | {name: kinds[name] | leaves}


def empty_cache(spec: CacheSpec, *, slots: int, blocks: int, ranks: int) -> Cache:
    """Pools of zeros for all ranks together; `slots` and `blocks` count the null ones."""
    shapes = pool_shapes(spec, slots=slots, blocks=blocks, ranks=ranks)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def pool_shapes(spec: CacheSpec, *, slots: int, blocks: int, ranks: int) -> Cache:
    """The shapes and dtypes of `empty_cache`."""

    def pools(leaves, *middle):
        return {
            leaf.name: jax.ShapeDtypeStruct(
                (leaf.layers, *middle, *leaf.global_shape(ranks)), jnp.dtype(JAX_NAMES.get(leaf.dtype, leaf.dtype))
            )
            for leaf in leaves
        }

    bits = {LAYOUT: jax.ShapeDtypeStruct((slots,), jnp.dtype("int8"))}
    return Cache(
        pages={kind.name: pools(kind.leaves, blocks, kind.entries(spec.block_size)) for kind in spec.paged},
        slots={kind.name: pools(kind.leaves, slots) | (bits if kind.ordered else {}) for kind in spec.slots},
        spec=spec,
    )


def check_cache(cache: Cache, slots: int) -> None:
    """Raises ValueError where the pools do not fit together, `spec`, or a table of so many slots. Looks at shapes."""
    blocks = next((pool.shape[1] for kind in cache.pages.values() for pool in kind.values()), 0)
    split = (
        (_pools_of(cache, kind)[leaf.name].shape[leaf.split - len(leaf.shape)], leaf.shape[leaf.split])
        for kind, leaf in cache.spec.leaves()
        if leaf.split is not None and leaf.shape[leaf.split]
    )
    whole, part = next(split, (1, 1))
    expected = pool_shapes(cache.spec, slots=slots, blocks=blocks, ranks=max(1, whole // part))
    if jax.tree.structure(cache) != jax.tree.structure(expected):
        raise ValueError(f"the cache is {jax.tree.structure(cache)}, its spec is {jax.tree.structure(expected)}")
    for (path, pool), (_, wanted) in zip(*map(jax.tree_util.tree_leaves_with_path, (cache, expected)), strict=True):
        if pool.shape != wanted.shape:
            raise ValueError(
                f"{path_name(path)} has shape {pool.shape}, expected {wanted.shape}: {slots} slots, {blocks} blocks"
            )


def _pools_of(cache: Cache, kind: CacheKind) -> Leaves:
    return (cache.pages if isinstance(kind, Paged) else cache.slots)[kind.name]


def partition_specs(spec: CacheSpec) -> Cache:
    """How ranks share the pools: a tree of partition specs."""

    def place(leaf: LeafSpec, axes_before: int):
        return P() if leaf.split is None else P(*[None] * (axes_before + leaf.split), AXIS)

    def places(kind):
        return {leaf.name: place(leaf, 3 if isinstance(kind, Paged) else 2) for leaf in kind.leaves}

    return Cache(
        pages={kind.name: places(kind) for kind in spec.paged},
        slots={kind.name: places(kind) | ({LAYOUT: P()} if kind.ordered else {}) for kind in spec.slots},
        spec=spec,
    )
