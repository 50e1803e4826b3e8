"""The pools of a state by their own names, whichever kind of cache they belong to."""

import dataclasses

import jax

from gdnjax.cache import Leaves
from gdnjax.shapes import Array
from gdnjax.state import ServeState


def pools_of(state: ServeState) -> Leaves:
    """All pools of the cache."""
    return {
        name: pool
        for kinds in (state.cache.pages, state.cache.slots)
        for kind in kinds.values()
        for name, pool in kind.items()
    }


def pool_of(state: ServeState, name: str) -> Array:
    return pools_of(state)[name]


def with_pools(state: ServeState, **pools: Array) -> ServeState:
    """The state with other pools of these names, in the places of the old ones."""
    cache = state.cache
    for name, pool in pools.items():
        pool = jax.device_put(pool, pool_of(state, name).sharding)
        for kind in cache.pages:
            cache = cache.with_pages(kind, **{name: pool}) if name in cache.pages[kind] else cache
        for kind in cache.slots:
            cache = cache.with_slots(kind, **{name: pool}) if name in cache.slots[kind] else cache
    return dataclasses.replace(state, cache=cache)
