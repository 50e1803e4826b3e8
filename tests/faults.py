"""Faults that this kind of system has had, done to a running engine: the rungs must see each of them.

A fault of BETWEEN_TURNS `(engine, victim, neighbour)` changes `engine.runner.state` between two turns; `victim` and
`neighbour` are running requests. The others `(engine)` change its steps: `missing_reset` before the victim is admitted,
those of FORKS before it goes on from a checkpoint, those of CHECKPOINTS before that one is written.

Those of speculation say what sees them: the tokens, how many drafts each step keeps (the tokens stay right), or, where
nobody has gone on from it yet, the state that the prefix cache was given.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gdnjax.cache import LAYOUT_KV
from tests.pools import pool_of, pools_of, with_pools


def replace_pools(engine, **pools) -> None:
    """Puts other pools into the cache, with the shardings of the old ones."""
    engine.runner.state = with_pools(engine.runner.state, **pools)


def replace_table(engine, **fields) -> None:
    """Puts other fields into the slot table."""
    old = engine.runner.state.slots
    placed = {name: jax.device_put(field, getattr(old, name).sharding) for name, field in fields.items()}
    engine.runner.state = dataclasses.replace(engine.runner.state, slots=dataclasses.replace(old, **placed))


def stale_layout_bit(engine, victim, neighbour) -> None:
    layout = pool_of(engine.runner.state, "layout")
    replace_pools(engine, layout=layout.at[victim.slot].set(1 - layout[victim.slot]))


def wrong_slot(engine, victim, neighbour) -> None:
    """Two requests work on each other's rows."""
    gdn, to, of = pools_of(engine.runner.state), [victim.slot, neighbour.slot], [neighbour.slot, victim.slot]
    swapped = {
        "ssm": gdn["ssm"].at[:, to].set(gdn["ssm"][:, of]),
        "conv": gdn["conv"].at[:, to].set(gdn["conv"][:, of]),
    }
    replace_pools(engine, **swapped, layout=gdn["layout"].at[jnp.array(to)].set(gdn["layout"][jnp.array(of)]))


def state_of_neighbour(engine, victim, neighbour) -> None:
    """The recurrent state alone, under the right layout bit."""
    gdn = pools_of(engine.runner.state)
    layout = gdn["layout"].at[victim.slot].set(gdn["layout"][neighbour.slot])
    replace_pools(engine, ssm=gdn["ssm"].at[:, victim.slot].set(gdn["ssm"][:, neighbour.slot]), layout=layout)


def transposed_state(engine, victim, neighbour, key_dim: int) -> None:
    """K and V change places in one layer."""
    ssm = pool_of(engine.runner.state, "ssm")
    row = ssm[-1, victim.slot]
    turned = row.reshape(row.shape[0], key_dim, -1).swapaxes(1, 2).reshape(row.shape)
    replace_pools(engine, ssm=ssm.at[-1, victim.slot].set(turned))


def dropped_conv_window(engine, victim, neighbour) -> None:
    """Of one layer."""
    replace_pools(engine, conv=pool_of(engine.runner.state, "conv").at[-1, victim.slot].set(0))


def zeroed_first_layer(engine, victim, neighbour) -> None:
    replace_pools(engine, ssm=pool_of(engine.runner.state, "ssm").at[0, victim.slot].set(0))


def zeroed_last_layer(engine, victim, neighbour) -> None:
    replace_pools(engine, ssm=pool_of(engine.runner.state, "ssm").at[-1, victim.slot].set(0))


def keys_off_by_one(engine, victim, neighbour) -> None:
    """Every key stands one place later than its position."""
    k, block = pool_of(engine.runner.state, "k"), jnp.array(victim.blocks)
    moved = jnp.roll(k[:, block].reshape(k.shape[0], -1, *k.shape[3:]), 1, axis=1)
    replace_pools(engine, k=k.at[:, block].set(moved.reshape(k.shape[0], len(victim.blocks), *k.shape[2:])))


def block_of_neighbour(engine, victim, neighbour) -> None:
    table = engine.runner.state.slots.block_table
    replace_table(engine, block_table=table.at[victim.slot, 0].set(table[neighbour.slot, 0]))


def length_off_by_one(engine, victim, neighbour) -> None:
    replace_table(engine, length=engine.runner.state.slots.length.at[victim.slot].add(1))


def missing_reset(engine) -> None:
    """Admission leaves the last owner's length in a slot, so the slot is not fresh."""
    admit = engine.runner.steps.admit

    def forgetful(state, batch):
        length = jnp.array(state.slots.length, copy=True)
        state = admit(state, batch)
        return dataclasses.replace(state, slots=dataclasses.replace(state.slots, length=length))

    engine.runner.steps = dataclasses.replace(engine.runner.steps, admit=forgetful)


def _before_prefill(engine, change) -> None:
    """`change(state, batch)` gives what each prefill step works on instead."""
    prefill = engine.runner.steps.prefill

    def changed(options):
        step = prefill(options)
        return lambda params, state, batch: step(params, *change(state, batch))

    engine.runner.steps = dataclasses.replace(engine.runner.steps, prefill=changed)


def _forks(batch) -> np.ndarray:
    """Rows that read another slot than they write."""
    return (batch.read_slot != batch.slot) & (batch.length > 0)


def stale_layout_bit_of_checkpoint(engine) -> None:
    """A fork takes the checkpoint for one that prefill wrote, whoever wrote it."""

    def change(state, batch):
        layout = pool_of(state, "layout").at[batch.read_slot[_forks(batch)]].set(LAYOUT_KV)
        return with_pools(state, layout=layout), batch

    _before_prefill(engine, change)


def wrong_checkpoint(engine) -> None:
    """A fork reads the slot beside its checkpoint."""

    def change(state, batch):
        beside = (batch.read_slot - 2) % (len(pool_of(state, "layout")) - 1) + 1
        return state, dataclasses.replace(batch, read_slot=np.where(_forks(batch), beside, batch.read_slot))

    _before_prefill(engine, change)


def own_slot_instead_of_checkpoint(engine) -> None:
    """A fork reads the slot that it was given, with whatever its last owner left there."""

    def change(state, batch):
        return state, dataclasses.replace(batch, read_slot=batch.slot)

    _before_prefill(engine, change)


def tail_not_copied(engine) -> None:
    """A fork within a block goes on in a block of its own that nobody has filled."""
    admit = engine.runner.steps.admit

    def forgetful(state, batch):
        null = np.zeros_like(batch.copy_from)
        return admit(state, dataclasses.replace(batch, copy_from=null, copy_to=null))

    engine.runner.steps = dataclasses.replace(engine.runner.steps, admit=forgetful)


def checkpoint_one_chunk_early(engine) -> None:
    """What is kept stands before the last chunk that it is taken for."""

    def change(state, batch):
        same_row = (batch.chunk_row[1:] == batch.chunk_row[:-1]) & (batch.chunk_length[1:] > 0)
        early = np.append(np.where(same_row, batch.chunk_checkpoint[1:], 0), np.int32(0))
        return state, dataclasses.replace(batch, chunk_checkpoint=early)

    _before_prefill(engine, change)


def _around_seal(engine, change) -> None:
    """`change(seal, params, state, batch)` takes the place of the seals."""
    seal = engine.runner.steps.seal
    engine.runner.steps = dataclasses.replace(engine.runner.steps, seal=lambda *given: change(seal, *given))


def seal_without_layout_bit(engine) -> None:
    """A checkpoint of a decode step gets the state, and keeps the bit of what stood there."""

    def change(seal, params, state, batch):
        kept = jnp.array(pool_of(state, "layout"), copy=True)
        return with_pools(seal(params, state, batch), layout=kept)

    _around_seal(engine, change)


def stale_rows_of_the_head(engine, victim, neighbour) -> None:
    """The head's keys stand one place later than their positions, as rejected drafts would leave them."""
    k, block = pool_of(engine.runner.state, "k"), jnp.array(victim.blocks)
    moved = jnp.roll(k[-1, block].reshape(-1, *k.shape[3:]), 1, axis=0)
    replace_pools(engine, k=k.at[-1, block].set(moved.reshape(len(victim.blocks), *k.shape[2:])))


def drafts_of_neighbour(engine, victim, neighbour) -> None:
    drafts = engine.runner.state.slots.drafts
    replace_table(engine, drafts=drafts.at[victim.slot].set(drafts[neighbour.slot]))


def pending_rows_of_neighbour(engine, victim, neighbour) -> None:
    """Raw inputs and gates of the tokens that are to be folded."""
    gdn, rows = pools_of(engine.runner.state), pool_of(engine.runner.state, "pending_ab").shape[2]
    conv = gdn["conv"].at[:, victim.slot, -rows:].set(gdn["conv"][:, neighbour.slot, -rows:])
    pending_ab = gdn["pending_ab"].at[:, victim.slot].set(gdn["pending_ab"][:, neighbour.slot])
    replace_pools(engine, conv=conv, pending_ab=pending_ab)


def pending_off_by_one(engine, victim, neighbour) -> None:
    """One row fewer is folded than was accepted."""
    pending = engine.runner.state.slots.pending
    replace_table(engine, pending=pending.at[victim.slot].add(-1))


def pending_gates_zeroed(engine, victim, neighbour) -> None:
    pending_ab = pool_of(engine.runner.state, "pending_ab")
    replace_pools(engine, pending_ab=pending_ab.at[:, victim.slot].set(0))


def _after_decode(engine, change) -> None:
    """`change(before, state)` gives what each decode step leaves instead; `before` is a copy of the pools before it."""
    decode = engine.runner.steps.decode

    def changed(options):
        step = decode(options)

        def wrong(params, state, batch):
            before = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), pools_of(state))
            state, emitted = step(params, state, batch)
            return change(before, state), emitted

        return wrong

    engine.runner.steps = dataclasses.replace(engine.runner.steps, decode=changed)


def stale_ring_row(engine) -> None:
    """What decode steps feed first is not written: its row of a ring keeps the token that was last there."""

    def change(before, state):
        seen, fed = pool_of(state, "seen"), state.slots.length - 1
        if state.slots.pending is not None:
            fed -= state.slots.pending - 1
        slot, row = jnp.arange(fed.shape[0]), fed % seen.shape[2]
        return with_pools(state, seen=seen.at[:, slot, row].set(before["seen"][:, slot, row]))

    _after_decode(engine, change)


def window_not_shifted(engine) -> None:
    """Decode steps fold pending rows into the state, and leave the window where it was."""

    def change(before, state):
        width = before["conv"].shape[2] - before["pending_ab"].shape[2]
        conv = pool_of(state, "conv").at[:, :, :width].set(before["conv"][:, :, :width])
        return with_pools(state, conv=conv)

    _after_decode(engine, change)


def hidden_of_the_row_before(engine) -> None:
    """The hidden state of a pending row is that of the one before it, and a checkpoint takes it over."""

    def change(_, state):
        hidden = jnp.roll(state.slots.pending_hidden, 1, axis=1)
        return dataclasses.replace(state, slots=dataclasses.replace(state.slots, pending_hidden=hidden))

    _after_decode(engine, change)


def seal_without_hidden_state(engine) -> None:
    """A checkpoint of a decode step keeps the last hidden state that stood in its slot."""

    def change(seal, params, state, batch):
        kept = jnp.array(state.slots.hidden, copy=True)
        state = seal(params, state, batch)
        return dataclasses.replace(state, slots=dataclasses.replace(state.slots, hidden=kept))

    _around_seal(engine, change)


def seal_one_row_early(engine) -> None:
    """A checkpoint of a decode step lacks the last of the tokens that it is taken for."""

    def change(seal, params, state, batch):
        return seal(params, state, dataclasses.replace(batch, position=batch.position - 1))

    _around_seal(engine, change)


FORKS = (
    stale_layout_bit_of_checkpoint,
    wrong_checkpoint,
    own_slot_instead_of_checkpoint,
    tail_not_copied,
)

CHECKPOINTS = (
    checkpoint_one_chunk_early,
    seal_without_layout_bit,
)

SPECULATING = {
    stale_rows_of_the_head: "drafts",
    drafts_of_neighbour: "drafts",
    pending_rows_of_neighbour: "tokens",
    pending_off_by_one: "tokens",
    pending_gates_zeroed: "tokens",
    window_not_shifted: "tokens",
    hidden_of_the_row_before: "cache",
    seal_without_hidden_state: "cache",
    seal_without_layout_bit: "cache",
    seal_one_row_early: "cache",
}

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
