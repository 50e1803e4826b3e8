"""Faults that this kind of system has had, done to a running engine: the rungs must see each of them.

A fault of BETWEEN_TURNS `(engine, victim, neighbour)` changes `engine.state` between two turns; `victim` and
`neighbour` are running requests. The others `(engine)` change its steps: `missing_reset` before the victim is admitted,
those of FORKS before it goes on from a checkpoint, those of CHECKPOINTS before that one is written.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gdnjax.state import LAYOUT_KV


def _replace(engine, part: str, **leaves) -> None:
    """Puts new leaves into a part of the state, with the shardings of the old ones."""
    old = getattr(engine.state, part)
    placed = {name: jax.device_put(leaf, getattr(old, name).sharding) for name, leaf in leaves.items()}
    engine.state = dataclasses.replace(engine.state, **{part: dataclasses.replace(old, **placed)})


def stale_layout_bit(engine, victim, neighbour) -> None:
    layout = engine.state.gdn.layout
    _replace(engine, "gdn", layout=layout.at[victim.slot].set(1 - layout[victim.slot]))


def wrong_slot(engine, victim, neighbour) -> None:
    """Two requests work on each other's rows."""
    gdn, to, of = engine.state.gdn, [victim.slot, neighbour.slot], [neighbour.slot, victim.slot]
    swapped = {"ssm": gdn.ssm.at[:, to].set(gdn.ssm[:, of]), "conv": gdn.conv.at[:, to].set(gdn.conv[:, of])}
    _replace(engine, "gdn", **swapped, layout=gdn.layout.at[jnp.array(to)].set(gdn.layout[jnp.array(of)]))


def state_of_neighbour(engine, victim, neighbour) -> None:
    """The recurrent state alone, under the right layout bit."""
    gdn = engine.state.gdn
    layout = gdn.layout.at[victim.slot].set(gdn.layout[neighbour.slot])
    _replace(engine, "gdn", ssm=gdn.ssm.at[:, victim.slot].set(gdn.ssm[:, neighbour.slot]), layout=layout)


def transposed_state(engine, victim, neighbour, key_dim: int) -> None:
    """K and V change places in one layer."""
    ssm = engine.state.gdn.ssm
    row = ssm[-1, victim.slot]
    turned = row.reshape(row.shape[0], key_dim, -1).swapaxes(1, 2).reshape(row.shape)
    _replace(engine, "gdn", ssm=ssm.at[-1, victim.slot].set(turned))


def dropped_conv_window(engine, victim, neighbour) -> None:
    """Of one layer."""
    _replace(engine, "gdn", conv=engine.state.gdn.conv.at[-1, victim.slot].set(0))


def zeroed_first_layer(engine, victim, neighbour) -> None:
    _replace(engine, "gdn", ssm=engine.state.gdn.ssm.at[0, victim.slot].set(0))


def zeroed_last_layer(engine, victim, neighbour) -> None:
    _replace(engine, "gdn", ssm=engine.state.gdn.ssm.at[-1, victim.slot].set(0))


def keys_off_by_one(engine, victim, neighbour) -> None:
    """Every key stands one place later than its position."""
    k, block = engine.state.kv.k, jnp.array(victim.blocks)
    moved = jnp.roll(k[:, block].reshape(k.shape[0], -1, *k.shape[3:]), 1, axis=1)
    _replace(engine, "kv", k=k.at[:, block].set(moved.reshape(k.shape[0], len(victim.blocks), *k.shape[2:])))


def block_of_neighbour(engine, victim, neighbour) -> None:
    table = engine.state.slots.block_table
    _replace(engine, "slots", block_table=table.at[victim.slot, 0].set(table[neighbour.slot, 0]))


def length_off_by_one(engine, victim, neighbour) -> None:
    _replace(engine, "slots", length=engine.state.slots.length.at[victim.slot].add(1))


def missing_reset(engine) -> None:
    """Admission leaves the last owner's length in a slot, so the slot is not fresh."""
    admit = engine.steps.admit

    def forgetful(state, batch):
        length = jnp.array(state.slots.length, copy=True)
        state = admit(state, batch)
        return dataclasses.replace(state, slots=dataclasses.replace(state.slots, length=length))

    engine.steps = dataclasses.replace(engine.steps, admit=forgetful)


def _before_prefill(engine, change) -> None:
    """`change(state, batch)` gives what each prefill step works on instead."""
    prefill = engine.steps.prefill

    def changed(options):
        step = prefill(options)
        return lambda params, state, batch: step(params, *change(state, batch))

    engine.steps = dataclasses.replace(engine.steps, prefill=changed)


def _forks(batch) -> np.ndarray:
    """Rows that read another slot than they write."""
    return (batch.read_slot != batch.slot) & (batch.length > 0)


def stale_layout_bit_of_checkpoint(engine) -> None:
    """A fork takes the checkpoint for one that prefill wrote, whoever wrote it."""

    def change(state, batch):
        layout = state.gdn.layout.at[batch.read_slot[_forks(batch)]].set(LAYOUT_KV)
        return dataclasses.replace(state, gdn=dataclasses.replace(state.gdn, layout=layout)), batch

    _before_prefill(engine, change)


def wrong_checkpoint(engine) -> None:
    """A fork reads the slot beside its checkpoint."""

    def change(state, batch):
        beside = (batch.read_slot - 2) % (len(state.gdn.layout) - 1) + 1
        return state, dataclasses.replace(batch, read_slot=np.where(_forks(batch), beside, batch.read_slot))

    _before_prefill(engine, change)


def own_slot_instead_of_checkpoint(engine) -> None:
    """A fork reads the slot that it was given, with whatever its last owner left there."""

    def change(state, batch):
        return state, dataclasses.replace(batch, read_slot=batch.slot)

    _before_prefill(engine, change)


def tail_not_copied(engine) -> None:
    """A fork within a block goes on in a block of its own that nobody has filled."""
    admit = engine.steps.admit

    def forgetful(state, batch):
        null = np.zeros_like(batch.copy_from)
        return admit(state, dataclasses.replace(batch, copy_from=null, copy_to=null))

    engine.steps = dataclasses.replace(engine.steps, admit=forgetful)


def checkpoint_one_chunk_early(engine) -> None:
    """What is kept stands before the last chunk that it is taken for."""

    def change(state, batch):
        same_row = (batch.chunk_row[1:] == batch.chunk_row[:-1]) & (batch.chunk_length[1:] > 0)
        early = np.append(np.where(same_row, batch.chunk_checkpoint[1:], 0), 0)
        return state, dataclasses.replace(batch, chunk_checkpoint=early)

    _before_prefill(engine, change)


def copy_without_layout_bit(engine) -> None:
    """A checkpoint of a decode step gets the state, and keeps the bit of what stood there."""
    copy_rows = engine.steps.copy_rows

    def forgetful(state, batch):
        layout = jnp.array(state.gdn.layout, copy=True)
        state = copy_rows(state, batch)
        return dataclasses.replace(state, gdn=dataclasses.replace(state.gdn, layout=layout))

    engine.steps = dataclasses.replace(engine.steps, copy_rows=forgetful)


FORKS = (
    stale_layout_bit_of_checkpoint,
    wrong_checkpoint,
    own_slot_instead_of_checkpoint,
    tail_not_copied,
)

CHECKPOINTS = (
    checkpoint_one_chunk_early,
    copy_without_layout_bit,
)

BETWEEN_TURNS = (
    stale_layout_bit,
    wrong_slot,
    state_of_neighbour,
    transposed_state,
    dropped_conv_window,
    zeroed_first_layer,
    zeroed_last_layer,
    keys_off_by_one,
    block_of_neighbour,
    length_off_by_one,
)
