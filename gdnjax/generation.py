"""Whole generations as pure functions, for notebooks and for tests: no engine, no host loop."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from gdnjax import step
from gdnjax.batch import AdmitBatch, DecodeBatch, PrefillBatch
from gdnjax.config import CHUNK, EngineConfig
from gdnjax.memory import MemoryPlan
from gdnjax.models import Model
from gdnjax.models.context import prefill_context
from gdnjax.sampling_params import MAX_STOP_TOKENS, SamplingParams
from gdnjax.shapes import Array, Float32, Int32, Params
from gdnjax.state import NO_TOKEN, ServeState, empty_state
from gdnjax.step import StepOptions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchOutput:
    """What `batch_generate` returns. Rows as in its `tokens`."""

    tokens: Array  # [n, max_new_tokens] int32, -1 past a row's last token
    lengths: Array  # [n] int32: tokens that count, the stop token included


def batch_generate(
    model: Model,
    params: Params,
    tokens: Int32[Array, "n prompt"],
    lengths: Int32[Array, "n"],
    key: Array,
    *,
    max_new_tokens: int,
    sampling: SamplingParams | None = None,
    stop_token_ids: tuple[int, ...] = (),
    ssm_dtype: str = "float32",
) -> BatchOutput:
    """Generates for a batch of right-padded prompts in one on-device loop that ends when all rows are done.

    Pure and traceable: use it inside your own `jax.jit` (`max_new_tokens`, `sampling` and `stop_token_ids` are static).
    `lengths` are the prompts' true lengths, at least 1. `key` is a PRNG key; row i draws with noise of its own.
    Temperature, top_k, top_p and min_p of `sampling` apply (default: greedy); parameters that need a tokenizer or the
    host (stop strings, penalties, n, logprobs, ...) raise ValueError. One rank only.
    """
    sampling = sampling or SamplingParams(temperature=0.0)
    _check_batch_sampling(sampling, stop_token_ids)
    if model.tp != 1:
        raise ValueError(f"batch_generate runs on one rank, the model was built for {model.tp}; use LLM.generate")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    rows, prompt = tokens.shape
    options = StepOptions(full=sampling.needs_full_sampler)
    state = _state_for(model, rows, prompt + max_new_tokens, ssm_dtype)
    seeds = jax.random.bits(key, (rows, 2), jnp.uint32)
    admission = _admission(state, rows, lengths + max_new_tokens, sampling, stop_token_ids, seeds)
    state = step.admit(state, admission, options)
    state, first = step.prefill(model, options, params, state, _whole_prompts(tokens, lengths))
    decode_batch = DecodeBatch(slot=admission.slot)
    produced = jnp.full((rows, max_new_tokens), NO_TOKEN, jnp.int32).at[:, 0].set(first.tokens[:, 0])

    def unfinished(carry):
        i, state, _ = carry
        return (i < max_new_tokens) & ~jnp.all(state.slots.done)

    def one_token(carry):
        i, state, produced = carry
        state, emitted = step.decode(model, options, params, state, decode_batch)
        return i + 1, state, lax.dynamic_update_slice(produced, emitted.tokens, (0, i))

    _, _, produced = lax.while_loop(unfinished, one_token, (1, state, produced))
    return BatchOutput(tokens=produced, lengths=jnp.sum(produced != NO_TOKEN, axis=1))


def full_logits(
    model: Model, params: Params, tokens: Int32[Array, "t"], length: int | Int32[Array, ""] | None = None
) -> Float32[Array, "t V"]:
    """The logits at every position of one sequence, by one prefill. Traceable; one rank only.

    `length` (default: all) says how many tokens count, so that one compilation serves every length up to t; the
    logits past it mean nothing.
    """
    prompt = tokens.shape[0]
    options = StepOptions()
    state = _state_for(model, 1, prompt + 1, "float32")
    whole = jnp.full((1,), prompt if length is None else length, jnp.int32)
    seeds = jnp.zeros((1, 2), jnp.uint32)
    state = step.admit(state, _admission(state, 1, whole + 1, SamplingParams(), (), seeds), options)
    batch = _whole_prompts(tokens[None], whole)
    context = prefill_context(step.pools_of(state, options), batch)
    hidden, _, _ = model.forward(params, batch.tokens, context, state.gdn, state.kv)
    return model.logits(params, hidden)[:prompt]


def _check_batch_sampling(sampling: SamplingParams, stop_token_ids: tuple[int, ...]) -> None:
    defaults = SamplingParams(
        temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p
    )
    for field in dataclasses.fields(sampling):
        # The loop's own arguments stand in for these two.
        if field.name not in ("max_tokens", "seed") and getattr(sampling, field.name) != getattr(defaults, field.name):
            raise ValueError(
                f"batch_generate does not apply {field.name}={getattr(sampling, field.name)!r}; it applies "
                "temperature, top_k, top_p and min_p (stop_token_ids, max_new_tokens and key are its own arguments)"
            )
    if len(stop_token_ids) > MAX_STOP_TOKENS:
        raise ValueError(f"at most {MAX_STOP_TOKENS} stop_token_ids are allowed, got {len(stop_token_ids)}")


def _state_for(model: Model, rows: int, max_len: int, ssm_dtype: str) -> ServeState:
    """Pools for exactly `rows` requests of `max_len` tokens."""
    block_size = CHUNK
    per_row = -(-max_len // block_size)
    geometry = model.geometry(block_size, ssm_dtype)
    engine = EngineConfig(max_num_seqs=rows, block_size=block_size)
    plan = MemoryPlan.of_counts(geometry, num_slots=rows, num_blocks=rows * per_row, num_logit_rows=0)
    return empty_state(geometry, plan, engine, max_len)


def _admission(state, rows, max_length, sampling: SamplingParams, stop_token_ids, seeds) -> AdmitBatch:
    """Row i gets slot i + 1 and the i-th run of blocks."""
    width = state.slots.block_table.shape[1]
    stops = jnp.full((MAX_STOP_TOKENS,), NO_TOKEN, jnp.int32)
    if stop_token_ids:
        stops = stops.at[: len(stop_token_ids)].set(jnp.asarray(stop_token_ids, jnp.int32))

    def every_row(value, dtype):
        return jnp.full((rows,), value, dtype)

    return AdmitBatch(
        slot=jnp.arange(1, rows + 1, dtype=jnp.int32),
        max_length=max_length.astype(jnp.int32),
        min_length=every_row(0, jnp.int32),
        stop_tokens=jnp.tile(stops, (rows, 1)),
        block_table=1 + jnp.arange(rows * width, dtype=jnp.int32).reshape(rows, width),
        temperature=every_row(sampling.temperature, jnp.float32),
        top_k=every_row(max(sampling.top_k, 0), jnp.int32),
        top_p=every_row(sampling.top_p, jnp.float32),
        min_p=every_row(sampling.min_p, jnp.float32),
        seed=seeds,
        logit_row=every_row(0, jnp.int32),
    )


def _whole_prompts(tokens: Array, lengths: Array) -> PrefillBatch:
    """Every prompt whole, in one step: row i's tokens at i * padded, its chunks one after another."""
    rows = tokens.shape[0]
    tokens = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % CHUNK)))
    padded = tokens.shape[1]
    chunks = padded // CHUNK
    row = jnp.arange(rows, dtype=jnp.int32)
    chunk_offset = jnp.tile(jnp.arange(chunks, dtype=jnp.int32) * CHUNK, rows)
    chunk_row = jnp.repeat(row, chunks)
    offset = jnp.arange(padded, dtype=jnp.int32)
    lengths = lengths.astype(jnp.int32)
    return PrefillBatch(
        tokens=tokens.reshape(-1).astype(jnp.int32),
        token_row=jnp.repeat(row, padded),
        token_valid=(offset < lengths[:, None]).reshape(-1),
        slot=row + 1,
        start=row * padded,
        length=lengths,
        is_last=jnp.ones((rows,), bool),
        chunk_row=chunk_row,
        chunk_start=chunk_row * padded + chunk_offset,
        chunk_length=jnp.clip(lengths[chunk_row] - chunk_offset, 0, CHUNK),
        target=jnp.full((rows * padded,), NO_TOKEN, jnp.int32),
    )
