"""Rows of a state's pools, as they leave for the host's memory and come back: bit for bit, layout bits among them.

A bundle is what moves together: blocks of all paged kinds, or one checkpoint, which is a slot's states of all kinds and
its last hidden state. Reading is a step of its own that leaves the state as it is, writing consumes the pools. Copies
between the two memories are no steps: the device does them when it comes to them, and nobody waits.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding

from gdnjax import sharding
from gdnjax.cache import read_blocks, read_slot, write_blocks, write_slot
from gdnjax.state import ServeState, specs_of

Rows: TypeAlias = Any
"""A bundle: the pytree of a kind's pools, with as many rows as it has entries."""


@dataclasses.dataclass(frozen=True)
class Transfers:
    """What moves bundles for one engine.

    The steps are jitted over pools, one shape for each size of a bundle: `cut` reads rows, `paste` writes them, and
    consumes the pools. Beside these it returns something small that is there when they are, and that nobody donates.
    `on_host` and `on_device` are the shardings of a bundle there, of blocks and of a checkpoint.
    """

    cut_blocks: Any
    paste_blocks: Any
    cut_slot: Any
    paste_slot: Any
    on_host: tuple[Any, Any]
    on_device: tuple[Any, Any]
    num_traces: Callable[[], int]

    def read_blocks(self, state: ServeState, blocks: Sequence[int]) -> Rows:
        return self.cut_blocks(state.cache.pages, np.asarray(blocks, np.int32))

    def write_blocks(self, state: ServeState, rows: Rows, blocks: Sequence[int]) -> tuple[ServeState, Any]:
        """The state, which is consumed, with rows in the places of blocks; 0: a row that nobody wants."""
        pages, arrived = self.paste_blocks(state.cache.pages, rows, np.asarray(blocks, np.int32))
        return dataclasses.replace(state, cache=dataclasses.replace(state.cache, pages=pages)), arrived

    def read_state(self, state: ServeState, slot: int) -> Rows:
        return self.cut_slot((state.cache.slots, state.slots.hidden), np.int32(slot))

    def write_state(self, state: ServeState, row: Rows, slot: int) -> tuple[ServeState, Any]:
        """The state, which is consumed, with a checkpoint in a slot."""
        (slots, hidden), arrived = self.paste_slot((state.cache.slots, state.slots.hidden), row, np.int32(slot))
        cache, table = dataclasses.replace(state.cache, slots=slots), dataclasses.replace(state.slots, hidden=hidden)
        return dataclasses.replace(state, cache=cache, slots=table), arrived

    def to_host(self, rows: Rows, is_state: bool) -> Rows:
        return jax.device_put(rows, self.on_host[is_state])

    def to_device(self, rows: Rows, is_state: bool) -> Rows:
        return jax.device_put(rows, self.on_device[is_state])


def build_transfers(mesh: Mesh, state: ServeState, host_memory: str) -> Transfers:
    """For a mesh and the tree of its state (arrays or shapes). `host_memory` is a kind of memory."""
    specs = specs_of(state)
    # Rows are shared among ranks as the pools are: along what stands behind layers, rows and entries.
    page_specs, slot_specs = specs.cache.pages, (specs.cache.slots, specs.slots.hidden)
    whole = sharding.P()
    traces: list[None] = []

    def places(tree, memory_kind=None):
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec, memory_kind=memory_kind), tree)

    def jitted(function, in_specs, out_specs, donate=None):
        def step(*arguments):
            traces.append(None)
            return function(*arguments)

        mapped = sharding.shard_step(step, mesh, in_specs, out_specs)
        return jax.jit(mapped, donate_argnums=donate, out_shardings=places(out_specs))

    def writing(write):
        return lambda pools, rows, where: (write(pools, rows, where), jnp.ravel(where)[:1])

    return Transfers(
        cut_blocks=jitted(read_blocks, (page_specs, whole), page_specs),
        paste_blocks=jitted(writing(write_blocks), (page_specs, page_specs, whole), (page_specs, whole), donate=0),
        cut_slot=jitted(_cut, (slot_specs, whole), slot_specs),
        paste_slot=jitted(writing(_paste), (slot_specs, slot_specs, whole), (slot_specs, whole), donate=0),
        on_host=(places(page_specs, host_memory), places(slot_specs, host_memory)),
        on_device=(places(page_specs), places(slot_specs)),
        num_traces=lambda: len(traces),
    )


def _cut(pools, slot):
    slots, hidden = pools
    return read_slot(slots, slot), lax.dynamic_slice_in_dim(hidden, slot, 1)


def _paste(pools, row, slot):
    (slots, hidden), (of_slots, of_hidden) = pools, row
    return write_slot(slots, of_slots, slot), lax.dynamic_update_slice_in_dim(hidden, of_hidden, slot, 0)
