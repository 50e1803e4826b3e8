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

from gdnjax.state import LAYOUT_KV


def _replace(engine, part: str, **leaves) -> None:
    """Puts new leaves into a part of the state, with the shardings of the old ones."""
    old = getattr(engine.runner.state, part)
    placed = {name: jax.device_put(leaf, getattr(old, name).sharding) for name, leaf in leaves.items()}
    engine.runner.state = dataclasses.replace(engine.runner.state, **{part: dataclasses.replace(old, **placed)})


def stale_layout_bit(engine, victim, neighbour) -> None:
    layout = engine.runner.state.gdn.layout
    _replace(engine, "gdn", layout=layout.at[victim.slot].set(1 - layout[victim.slot]))


def wrong_slot(engine, victim, neighbour) -> None:
    """Two requests work on each other's rows."""
    gdn, to, of = engine.runner.state.gdn, [victim.slot, neighbour.slot], [neighbour.slot, victim.slot]
    swapped = {"ssm": gdn.ssm.at[:, to].set(gdn.ssm[:, of]), "conv": gdn.conv.at[:, to].set(gdn.conv[:, of])}
    _replace(engine, "gdn", **swapped, layout=gdn.layout.at[jnp.array(to)].set(gdn.layout[jnp.array(of)]))


def state_of_neighbour(engine, victim, neighbour) -> None:
    """The recurrent state alone, under the right layout bit."""
    gdn = engine.runner.state.gdn
    layout = gdn.layout.at[victim.slot].set(gdn.layout[neighbour.slot])
    _replace(engine, "gdn", ssm=gdn.ssm.at[:, victim.slot].set(gdn.ssm[:, neighbour.slot]), layout=layout)


def transposed_state(engine, victim, neighbour, key_dim: int) -> None:
    """K and V change places in one layer."""
    ssm = engine.runner.state.gdn.ssm
    row = ssm[-1, victim.slot]
    turned = row.reshape(row.shape[0], key_dim, -1).swapaxes(1, 2).reshape(row.shape)
    _replace(engine, "gdn", ssm=ssm.at[-1, victim.slot].set(turned))


def dropped_conv_window(engine, victim, neighbour) -> None:
    """Of one layer."""
    _replace(engine, "gdn", conv=engine.runner.state.gdn.conv.at[-1, victim.slot].set(0))


def zeroed_first_layer(engine, victim, neighbour) -> None:
    _replace(engine, "gdn", ssm=engine.runner.state.gdn.ssm.at[0, victim.slot].set(0))


def zeroed_last_layer(engine, victim, neighbour) -> None:
    _replace(engine, "gdn", ssm=engine.runner.state.gdn.ssm.at[-1, victim.slot].set(0))


def keys_off_by_one(engine, victim, neighbour) -> None:
    """Every key stands one place later than its position."""
    k, block = engine.runner.state.kv.k, jnp.array(victim.blocks)
    moved = jnp.roll(k[:, block].reshape(k.shape[0], -1, *k.shape[3:]), 1, axis=1)
    _replace(engine, "kv", k=k.at[:, block].set(moved.reshape(k.shape[0], len(victim.blocks), *k.shape[2:])))


def block_of_neighbour(engine, victim, neighbour) -> None:
    table = engine.runner.state.slots.block_table
    _replace(engine, "slots", block_table=table.at[victim.slot, 0].set(table[neighbour.slot, 0]))


def length_off_by_one(engine, victim, neighbour) -> None:
    _replace(engine, "slots", length=engine.runner.state.slots.length.at[victim.slot].add(1))


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
    admit = engine.runner.steps.admit

    def forgetful(state, batch):
        null = np.zeros_like(batch.copy_from)
        return admit(state, dataclasses.replace(batch, copy_from=null, copy_to=null))

    engine.runner.steps = dataclasses.replace(engine.runner.steps, admit=forgetful)


def checkpoint_one_chunk_early(engine) -> None:
    """What is kept stands before the last chunk that it is taken for."""

    def change(state, batch):
        same_row = (batch.chunk_row[1:] == batch.chunk_row[:-1]) & (batch.chunk_length[1:] > 0)
        early = np.append(np.where(same_row, batch.chunk_checkpoint[1:], 0), 0)
        return state, dataclasses.replace(batch, chunk_checkpoint=early)

    _before_prefill(engine, change)


def _around_seal(engine, change) -> None:
    """`change(seal, params, state, batch)` takes the place of the seals."""
    seal = engine.runner.steps.seal
    engine.runner.steps = dataclasses.replace(engine.runner.steps, seal=lambda *given: change(seal, *given))


def _seal_without(engine, pool: str, field: str) -> None:
    """Seals leave one field of a pool as it stood."""

    def change(seal, params, state, batch):
        kept = jnp.array(getattr(getattr(state, pool), field), copy=True)
        state = seal(params, state, batch)
        return dataclasses.replace(state, **{pool: dataclasses.replace(getattr(state, pool), **{field: kept})})

    _around_seal(engine, change)


def seal_without_layout_bit(engine) -> None:
    """A checkpoint of a decode step gets the state, and keeps the bit of what stood there."""
    _seal_without(engine, "gdn", "layout")


def stale_rows_of_the_head(engine, victim, neighbour) -> None:
    """The head's keys stand one place later than their positions, as rejected drafts would leave them."""
    k, block = engine.runner.state.kv.k, jnp.array(victim.blocks)
    moved = jnp.roll(k[-1, block].reshape(-1, *k.shape[3:]), 1, axis=0)
    _replace(engine, "kv", k=k.at[-1, block].set(moved.reshape(len(victim.blocks), *k.shape[2:])))


def drafts_of_neighbour(engine, victim, neighbour) -> None:
    drafts = engine.runner.state.slots.drafts
    _replace(engine, "slots", drafts=drafts.at[victim.slot].set(drafts[neighbour.slot]))


def pending_rows_of_neighbour(engine, victim, neighbour) -> None:
    """Raw inputs and gates of the tokens that are to be folded."""
    gdn, rows = engine.runner.state.gdn, engine.runner.state.gdn.pending_ab.shape[2]
    conv = gdn.conv.at[:, victim.slot, -rows:].set(gdn.conv[:, neighbour.slot, -rows:])
    pending_ab = gdn.pending_ab.at[:, victim.slot].set(gdn.pending_ab[:, neighbour.slot])
    _replace(engine, "gdn", conv=conv, pending_ab=pending_ab)


def pending_off_by_one(engine, victim, neighbour) -> None:
    """One row fewer is folded than was accepted."""
    pending = engine.runner.state.gdn.pending
    _replace(engine, "gdn", pending=pending.at[victim.slot].add(-1))


def pending_gates_zeroed(engine, victim, neighbour) -> None:
    pending_ab = engine.runner.state.gdn.pending_ab
    _replace(engine, "gdn", pending_ab=pending_ab.at[:, victim.slot].set(0))


def _after_decode(engine, change) -> None:
    """`change(before, state)` gives what each decode step leaves instead; `before` is a copy of the pools before it."""
    decode = engine.runner.steps.decode

    def changed(options):
        step = decode(options)

        def wrong(params, state, batch):
            before = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state.gdn)
            state, emitted = step(params, state, batch)
            return change(before, state), emitted

        return wrong

    engine.runner.steps = dataclasses.replace(engine.runner.steps, decode=changed)


def window_not_shifted(engine) -> None:
    """Decode steps fold pending rows into the state, and leave the window where it was."""

    def change(before, state):
        width = before.conv.shape[2] - before.pending_ab.shape[2]
        conv = state.gdn.conv.at[:, :, :width].set(before.conv[:, :, :width])
        return dataclasses.replace(state, gdn=dataclasses.replace(state.gdn, conv=conv))

    _after_decode(engine, change)


def hidden_of_the_row_before(engine) -> None:
    """The hidden state of a pending row is that of the one before it, and a checkpoint takes it over."""

    def change(_, state):
        hidden = jnp.roll(state.slots.pending_hidden, 1, axis=1)
        return dataclasses.replace(state, slots=dataclasses.replace(state.slots, pending_hidden=hidden))

    _after_decode(engine, change)


def seal_without_hidden_state(engine) -> None:
    """A checkpoint of a decode step keeps the last hidden state that stood in its slot."""
    _seal_without(engine, "slots", "hidden")


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
