"""The steps: admit, fill a logit row, prefill, decode, copy rows. Pure: `(params, ServeState, batch) -> (ServeState,
Emitted)`, those without a model without params and Emitted.

Everything per-step (masks, indices, places) is made here, before the layers. No step reads a value back.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding

from gdnjax import sampling, sharding
from gdnjax.batch import AdmitBatch, CopyBatch, DecodeBatch, Emitted, LogitRowBatch, Logprobs, PrefillBatch
from gdnjax.models import Model
from gdnjax.models.context import Pools, decode_context, prefill_context
from gdnjax.sampling import Draw, Vocab
from gdnjax.shapes import Array, Params
from gdnjax.state import LAYOUT_KV, LAYOUT_VK, NO_TOKEN, NULL_SLOT, GDNState, LogitRows, ServeState, SlotTable

PROMPT_LOGPROB_ROWS = 64
"""Prompt positions whose logits are held at once: [64, V] float32 instead of the whole prompt's."""


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What is compiled into a step.

    full             top-k, top-p, logit rows and log-probabilities; the plain step has none of them.
    prompt_logprobs  prefill only: log-probabilities of the prompt's own tokens.
    max_logprobs     alternatives reported with each log-probability.
    state_layout     "kv", "vk" or "mixed"; see EngineConfig.
    """

    full: bool = False
    prompt_logprobs: bool = False
    max_logprobs: int = 0
    state_layout: str = "kv"


def admit(state: ServeState, batch: AdmitBatch, options: StepOptions) -> ServeState:
    """Hands slots to new requests: nothing of the last owner is left that a later step could read.

    A request with a cached prefix has `length` tokens behind it; its first prefill step reads their state from another
    slot. Blocks are copied as they stood before the step, all of `copy_from` before any of `copy_to`.
    """
    slot = batch.slot
    kept = ("slot", "copy_from", "copy_to")
    replaced = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name not in kept}
    replaced |= {"last_token": 0, "done": slot == NULL_SLOT, "hidden": 0}
    table = {name: getattr(state.slots, name).at[slot].set(value) for name, value in replaced.items()}
    kv = state.kv
    if batch.copy_from is not None:
        kv = jax.tree.map(lambda pool: pool.at[:, batch.copy_to].set(pool[:, batch.copy_from]), kv)
    return dataclasses.replace(
        state,
        slots=SlotTable(**table),
        gdn=dataclasses.replace(state.gdn, layout=state.gdn.layout.at[slot].set(_layout(options, LAYOUT_KV))),
        kv=kv,
    )


def fill_logit_row(state: ServeState, batch: LogitRowBatch) -> ServeState:
    """Hands a logit row to a request. `in_prompt`, `counts` and `bias` are this rank's part of the vocabulary."""
    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name != "row"}
    rows = {name: getattr(state.logit_rows, name).at[batch.row].set(value) for name, value in values.items()}
    return dataclasses.replace(state, logit_rows=LogitRows(**rows))


def prefill(
    model: Model, options: StepOptions, params: Params, state: ServeState, batch: PrefillBatch
) -> tuple[ServeState, Emitted]:
    """Folds pieces of prompts into state and KV; rows whose prompt ends here draw their first token.

    A row reads its state at `read_slot` and writes it to `slot`, so a fork costs no copy. Chunks with a checkpoint
    leave state, window, layout bit and last hidden state there, too.
    """
    if batch.block_table is not None:
        table = state.slots.block_table.at[batch.slot].set(batch.block_table)
        state = _with_slots(state, block_table=table)
    context = prefill_context(pools_of(state, options), batch)
    hidden, gdn, kv = model.forward(params, batch.tokens, context, state.gdn, state.kv)
    last = hidden[jnp.maximum(batch.start + batch.length - 1, 0)]
    length = state.slots.length[batch.slot] + batch.length
    active = batch.is_last & (batch.slot != NULL_SLOT)
    drawn = _draw(model, options, params, state, last, batch.slot, length, active)
    prompt = _prompt_logprobs(model, options, params, hidden, batch.target) if options.prompt_logprobs else None
    layout = _layout(options, LAYOUT_KV)
    # A row without tokens has no hidden state in this step: what it had stays.
    last = jnp.where((batch.length > 0)[:, None], last, state.slots.hidden[batch.slot])
    state = _written(dataclasses.replace(state, gdn=gdn, kv=kv), batch.slot, last, layout)
    if batch.chunk_checkpoint is not None:
        behind = hidden[jnp.maximum(context.chunks.end - 1, 0)]
        state = _written(state, batch.chunk_checkpoint, behind, layout)
    return _commit(state, drawn, batch.slot, length, active, prompt)


def decode(
    model: Model, options: StepOptions, params: Params, state: ServeState, batch: DecodeBatch
) -> tuple[ServeState, Emitted]:
    """Feeds each slot's last token and draws its next. Rows that are done, or null, change nothing."""
    slot = batch.slot
    active = (slot != NULL_SLOT) & ~state.slots.done[slot]
    if batch.grown_index is not None:
        table = state.slots.block_table.at[slot, batch.grown_index].set(batch.grown_block, mode="drop")
        state = _with_slots(state, block_table=table)
    context = decode_context(pools_of(state, options), slot, active)
    hidden, gdn, kv = model.forward(params, state.slots.last_token[slot], context, state.gdn, state.kv)
    length = state.slots.length[slot] + active
    drawn = _draw(model, options, params, state, hidden, slot, length, active)
    state = dataclasses.replace(state, gdn=gdn, kv=kv)
    state = _written(state, context.write_slot, hidden, _layout(options, LAYOUT_VK))
    return _commit(state, drawn, slot, length, active, None)


def copy_rows(state: ServeState, batch: CopyBatch) -> ServeState:
    """Copies rows one after another: state and window, and with them the layout bit and the last hidden state."""

    def copy_one(i, pools):
        source, target = batch.source[i], batch.target[i]

        def copy(pool, axis):
            row = lax.dynamic_slice_in_dim(pool, source, 1, axis)
            return lax.dynamic_update_slice_in_dim(pool, row, target, axis)

        ssm, conv, layout, hidden = pools
        return copy(ssm, 1), copy(conv, 1), copy(layout, 0), copy(hidden, 0)

    gdn = state.gdn
    pools = (gdn.ssm, gdn.conv, gdn.layout, state.slots.hidden)
    ssm, conv, layout, hidden = lax.fori_loop(0, batch.count, copy_one, pools)
    return _with_slots(dataclasses.replace(state, gdn=GDNState(ssm=ssm, conv=conv, layout=layout)), hidden=hidden)


def pools_of(state: ServeState, options: StepOptions) -> Pools:
    """What the context of a step is made from."""
    return Pools(
        slots=state.slots,
        layout=state.gdn.layout,
        state_layout=options.state_layout,
        block_size=state.kv.k.shape[2],
    )


def _layout(options: StepOptions, mixed: int) -> int:
    """The bit of a row that a step wrote; `mixed` is what the step writes in a mixed pool."""
    return {"kv": LAYOUT_KV, "vk": LAYOUT_VK, "mixed": mixed}[options.state_layout]


def _with_slots(state: ServeState, **fields: Array) -> ServeState:
    """The state with other fields of its SlotTable."""
    return dataclasses.replace(state, slots=dataclasses.replace(state.slots, **fields))


def _written(state: ServeState, slot: Array, hidden: Array, layout: int) -> ServeState:
    """The layout bit and last hidden state of slots whose rows the layers have written."""
    kept = state.slots.hidden
    state = _with_slots(state, hidden=kept.at[slot].set(hidden.astype(kept.dtype)))
    return dataclasses.replace(state, gdn=dataclasses.replace(state.gdn, layout=state.gdn.layout.at[slot].set(layout)))


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """The tokens a step drew [n], and what else it made on the way."""

    token: Array
    logprobs: Logprobs | None
    logit_rows: LogitRows


def _draw(model, options, params, state, hidden, slot, length, active) -> _Drawn:
    """Draws the token at absolute position `length` of each row's sequence."""
    vocab = Vocab(size=model.vocab_size, tp=model.tp)
    logits = model.logits(params, hidden)
    draw = Draw.of_slots(state.slots, slot, length)
    if not options.full:
        return _Drawn(sampling.draw_plain(logits, draw, vocab), None, state.logit_rows)
    row = state.slots.logit_row[slot]
    # Below its minimum a request may not end, so what would end it may not be drawn.
    banned = jnp.where((length < state.slots.min_length[slot])[:, None], state.slots.stop_tokens[slot], NO_TOKEN)
    token = sampling.draw_full(sampling.adjust(logits, state.logit_rows, row, banned, vocab), draw, vocab)
    return _Drawn(
        token=token,
        logprobs=sampling.logprobs(logits, token, options.max_logprobs, vocab),
        logit_rows=sampling.count_tokens(state.logit_rows, row, token, active, vocab),
    )


def _prompt_logprobs(model, options, params, hidden, target) -> Logprobs:
    """Log-probabilities of each packed token's successor, a few positions at a time."""
    vocab = Vocab(size=model.vocab_size, tp=model.tp)

    def some_rows(rows):
        hidden, target = rows
        return sampling.logprobs(model.logits(params, hidden), jnp.maximum(target, 0), options.max_logprobs, vocab)

    def split(x):
        return x.reshape(-1, min(PROMPT_LOGPROB_ROWS, x.shape[0]), *x.shape[1:])

    found = lax.map(some_rows, (split(hidden), split(target)))
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), found)


def _commit(state, drawn: _Drawn, slot, length, active, prompt_logprobs) -> tuple[ServeState, Emitted]:
    """Writes progress back to the slots and packs what the host is told."""
    slots = state.slots
    stopped = jnp.any(slots.stop_tokens[slot] == drawn.token[:, None], axis=1)
    done = active & (stopped | (length + 1 >= slots.max_length[slot]))
    # Rows of a prompt that goes on have no token yet, but their length counts.
    table = dataclasses.replace(
        slots,
        length=slots.length.at[slot].set(jnp.where(slot == NULL_SLOT, 0, length)),
        last_token=slots.last_token.at[slot].set(jnp.where(active, drawn.token, slots.last_token[slot])),
        done=slots.done.at[slot].set(jnp.where(active, done, slots.done[slot])),
    )
    emitted = Emitted(
        tokens=jnp.where(active, drawn.token, NO_TOKEN)[:, None],
        count=active.astype(jnp.int32),
        done=done,
        logprobs=drawn.logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    return dataclasses.replace(state, slots=table, logit_rows=drawn.logit_rows), emitted


@dataclasses.dataclass(frozen=True)
class Steps:
    """The jitted steps of one engine. Each donates the state it is given."""

    admit: Callable[[ServeState, AdmitBatch], ServeState]
    fill_logit_row: Callable[[ServeState, LogitRowBatch], ServeState]
    prefill: Callable[[StepOptions], Any]  # jitted (params, state, PrefillBatch) -> (state, Emitted)
    decode: Callable[[StepOptions], Any]  # jitted (params, state, DecodeBatch) -> (state, Emitted)
    copy_rows: Callable[[ServeState, CopyBatch], ServeState]
    num_traces: Callable[[], int]


def build_steps(model: Model, mesh: Mesh, options: StepOptions, params: Any, state: Any) -> Steps:
    """Jits the steps for a mesh. `params` and `state` give the trees (arrays or shapes), `options` the layout.

    The state is donated and leaves with the shardings it came with, so that its buffers stay where they are.
    """
    param_specs, state_specs = sharding.specs_of(params), sharding.specs_of(state)
    replicated = sharding.P()
    state_out = jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_specs)
    whole = NamedSharding(mesh, replicated)
    row_specs = LogitRowBatch(
        **{f.name: replicated for f in dataclasses.fields(LogitRowBatch)}
        | {name: sharding.P(sharding.AXIS) for name in ("in_prompt", "counts", "bias")}
    )

    traces: list[None] = []

    def counted(function):
        """A step is traced once for each compilation, so counting traces counts compilations."""

        def step(*arguments):
            traces.append(None)
            return function(*arguments)

        return step

    def over_state(function, batch_specs):
        mapped = sharding.shard_step(counted(function), mesh, (state_specs, batch_specs), state_specs)
        return jax.jit(mapped, donate_argnums=0, out_shardings=state_out)

    @functools.cache
    def over_model(function, options):
        mapped = sharding.shard_step(
            counted(functools.partial(function, model, options)),
            mesh,
            (param_specs, state_specs, replicated),
            (state_specs, replicated),
        )
        return jax.jit(mapped, donate_argnums=1, out_shardings=(state_out, whole))

    return Steps(
        admit=over_state(functools.partial(admit, options=options), replicated),
        fill_logit_row=over_state(fill_logit_row, row_specs),
        prefill=functools.partial(over_model, prefill),
        decode=functools.partial(over_model, decode),
        copy_rows=over_state(copy_rows, replicated),
        num_traces=lambda: len(traces),
    )
