"""Whole generations and scores as pure functions, for notebooks and for tests: no engine, no host loop."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax

from gdnjax import step
from gdnjax.batch import AdmitBatch, DecodeBatch, PrefillBatch
from gdnjax.config import CHUNK, EngineConfig
from gdnjax.memory import MemoryPlan
from gdnjax.models import HybridModel, Model, geometry_of
from gdnjax.models.context import decode_context, prefill_context
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


def start(
    model: Model,
    limits: Int32[Array, "n"],
    longest: int,
    *,
    sampling: SamplingParams | None = None,
    stop_token_ids: tuple[int, ...] = (),
    key: Array | None = None,
    ssm_dtype: str = "float32",
) -> ServeState:
    """A state for exactly n requests: request i owns slot 1 + i, has no tokens yet, and ends at `limits[i]` tokens.

    `longest` (static) is the most tokens that a request has room for. `sampling` and `stop_token_ids` are as in
    `batch_generate`; `key` is a PRNG key of the requests' seeds. `step.prefill` of `pack_prompts` comes next.
    Traceable; one rank only.
    """
    options = StepOptions()
    rows = limits.shape[0]
    seeds = jnp.zeros((rows, 2), jnp.uint32) if key is None else jax.random.bits(key, (rows, 2), jnp.uint32)
    state = _state_for(model, rows, longest, ssm_dtype)
    admission = _admission(state, limits, sampling or SamplingParams(temperature=0.0), stop_token_ids, seeds)
    return step.admit(state, admission, options)


def pack_prompts(tokens: Int32[Array, "n prompt"], lengths: Int32[Array, "n"]) -> PrefillBatch:
    """Every right-padded prompt whole, or its next piece, as the batch of one prefill step over the slots of `start`.

    A piece has to end at an absolute multiple of CHUNK tokens unless it is the prompt's last. Traceable.
    """
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


def batch_generate(
    model: Model,
    params: Params,
    tokens: Int32[Array, "n prompt"],
    lengths: Int32[Array, "n"] | None,
    key: Array,
    *,
    max_new_tokens: int,
    sampling: SamplingParams | None = None,
    stop_token_ids: tuple[int, ...] = (),
    ssm_dtype: str = "float32",
) -> BatchOutput:
    """Generates for a batch of right-padded prompts in one on-device loop that ends when all rows are done.

    Pure and traceable: use it inside your own `jax.jit` (`max_new_tokens`, `sampling` and `stop_token_ids` are static).
    `lengths` are the prompts' true lengths, at least 1; None: all of the width. `key` is a PRNG key; row i draws with
    noise of its own. Temperature, top_k, top_p and min_p of `sampling` apply (default: greedy); parameters that need a
    tokenizer or the host (stop strings, penalties, n, logprobs, ...) raise ValueError, and so do a seed, and max_tokens
    other than its default, None or `max_new_tokens`, whose place the arguments here take. One rank only.

    Shapes and types are always checked. Lengths from 1 to the width, and token ids within the vocabulary, are where the
    arrays are concrete; inside a jit nobody can see values, and others than these mean undefined tokens.
    """
    sampling = sampling or SamplingParams(temperature=0.0)
    _check_batch_sampling(sampling, stop_token_ids, max_new_tokens)
    counts = _checked_lengths(tokens, lengths, model.vocab_size)
    if model.tp != 1:
        raise ValueError(f"batch_generate runs on one rank, the model was built for {model.tp}; use LLM.generate")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    rows, prompt = tokens.shape
    options = StepOptions(full=sampling.needs_full_sampler)
    state = start(
        model,
        counts + max_new_tokens,
        prompt + max_new_tokens,
        sampling=sampling,
        stop_token_ids=stop_token_ids,
        key=key,
        ssm_dtype=ssm_dtype,
    )
    state, first = step.prefill(model, options, params, state, pack_prompts(tokens, counts))
    decode_batch = DecodeBatch(slot=jnp.arange(1, rows + 1, dtype=jnp.int32))
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
    """The logits at every position of one sequence, by one prefill: compiled once for a model and a number of tokens.
    Traceable; one rank only. Differentiable where the model runs no kernels.

    `length` (default: all) says how many tokens count, so that one compilation serves every length up to t; the
    logits past it mean nothing. Raises ValueError for tokens that are no one sequence of integers.
    """
    tokens = _one_sequence(tokens)
    return _full_logits(model, params, tokens, tokens.shape[0] if length is None else length)


@functools.partial(jax.jit, static_argnums=0)
def _full_logits(model: Model, params: Params, tokens: Array, length: Any) -> Array:
    count = tokens.shape[0]
    whole = jnp.full((1,), length, jnp.int32)
    state = start(model, whole + 1, count + 1)
    batch = pack_prompts(tokens[None], whole)
    context = prefill_context(step.pools_of(state, StepOptions()), batch)
    # A number that is known when this is traced: the loop over keys has no derivative else.
    context = dataclasses.replace(context, tiles=dataclasses.replace(context.tiles, longest=count))
    hidden, _ = model.forward(params, batch.tokens, context, state.cache)
    return model.logits(params, hidden)[:count]


def draft_logits(
    model: HybridModel,
    params: Params,
    tokens: Int32[Array, "t"],
    depth: int,
    length: int | Int32[Array, ""] | None = None,
) -> tuple[Float32[Array, "t V"], Float32[Array, "depth t V"]]:
    """The target's logits at every position of one sequence, and those of the MTP head `depth` drafts deep.

    Both are of the token after each position, so row i of either is compared with row i of the other. Draft d at
    position i is what speculation makes when the target has seen the tokens up to i - d and the drafts up to token i
    were all right: keys of earlier tokens come from the target's hidden states, those of drafts from the head's own
    output. Rows below d mean nothing, nor do those past `length`. Compiled once for a model, a depth and a number of
    tokens. Traceable; one rank, a model built with `mtp`. The time and memory of a draft grow with t squared.
    """
    if not model.mtp:
        raise ValueError("draft_logits needs a model with its MTP head: build_model(..., mtp=True)")
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    tokens = _one_sequence(tokens)
    return _draft_logits(model, depth, params, tokens, tokens.shape[0] if length is None else length)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draft_logits(model: HybridModel, depth: int, params: Params, tokens: Array, length: Any) -> tuple[Array, Array]:
    count = tokens.shape[0]
    options = StepOptions()
    # Blocks of one token, so that every position can have drafts of its own behind a shared past: block 1 + i holds
    # token i with the target's hidden state before it, block 1 + d count + i with the output of draft d before it.
    state = _state_for(model, 1, count, "float32", block_size=1, spare_blocks=(depth - 1) * count)
    whole = jnp.full((1,), length, jnp.int32)
    seeds = jnp.zeros((1, 2), jnp.uint32)
    state = step.admit(state, _admission(state, whole, SamplingParams(), (), seeds), options)
    batch = pack_prompts(tokens[None], whole)
    context = prefill_context(step.pools_of(state, options), batch)
    hidden, cache = model.forward(params, batch.tokens, context, state.cache)
    drafted, cache = model.draft(params, batch.tokens, jnp.roll(hidden, 1, axis=0), context, cache)
    hidden, drafted = hidden[:count], drafted[:count]
    drafts = [model.draft_logits(params, drafted)]
    index = jnp.arange(count, dtype=jnp.int32)
    table = jnp.where(index[None] <= index[:, None], 1 + index[None], 0)
    for d in range(1, depth):
        # Row i: the drafts' own blocks in place of the shared ones at the last d positions.
        own = 1 + d * count - (index[:, None] - index[None]) * count + index[None]
        table = jnp.where((index[:, None] - index[None] < d) & (index[None] <= index[:, None]), own, table)
        slots = dataclasses.replace(state.slots, length=index, block_table=table)
        pools = dataclasses.replace(step.pools_of(state, options), slots=slots)
        context = decode_context(pools, index, index, (index >= d)[:, None])
        drafted, cache = model.draft(params, tokens, jnp.roll(drafted, 1, axis=0), context, cache)
        drafts.append(model.draft_logits(params, drafted))
    return model.logits(params, hidden), jnp.stack(drafts)


def _one_sequence(tokens: Any) -> Int32[Array, "t"]:
    """Tokens as an array. Raises ValueError for what is no sequence of integers."""
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 1 or not tokens.size or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens must be one sequence of integers, [t] with t above 0, got {tokens.dtype} {list(tokens.shape)}"
        )
    return tokens.astype(jnp.int32)


def _checked_lengths(tokens: Any, lengths: Any, vocab_size: int) -> Any:
    """The lengths, all of the width where None is given. Raises ValueError for what `batch_generate` cannot take."""
    if not _are_integers(tokens) or tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(
            "tokens must be an integer array [prompts, width], padded on the right to the longest prompt, got "
            f"{_described(tokens)}"
        )
    rows, width = tokens.shape
    if lengths is None:
        lengths = jnp.full((rows,), width, jnp.int32)
    if not _are_integers(lengths) or lengths.shape != (rows,):
        raise ValueError(f"lengths must be an integer array [{rows}], one for each prompt, got {_described(lengths)}")
    if isinstance(lengths, core.Tracer):
        return lengths
    known = np.asarray(lengths)
    for row, length in enumerate(known):
        if not 1 <= length <= width:
            raise ValueError(f"lengths[{row}] must be between 1 and the width of tokens, {width}, got {length}")
    if not isinstance(tokens, core.Tracer):
        ids = np.asarray(tokens)
        counts = np.arange(width) < known[:, None]
        outside = np.argwhere(counts & ((ids < 0) | (ids >= vocab_size)))
        if len(outside):
            row, place = outside[0]
            raise ValueError(
                f"tokens[{row}, {place}] is {ids[row, place]}, outside the vocabulary; allowed: 0 to {vocab_size - 1}"
            )
    return lengths


def _are_integers(values: Any) -> bool:
    return isinstance(values, jax.Array | np.ndarray) and jnp.issubdtype(values.dtype, jnp.integer)


def _described(values: Any) -> str:
    if isinstance(values, jax.Array | np.ndarray):
        return f"{values.dtype} {list(values.shape)}"
    return f"a {type(values).__name__}"


def _check_batch_sampling(sampling: SamplingParams, stop_token_ids: tuple[int, ...], max_new_tokens: int) -> None:
    defaults = SamplingParams(
        temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p
    )
    for field in dataclasses.fields(sampling):
        if field.name == "max_tokens" and sampling.max_tokens in (None, max_new_tokens):
            continue
        if getattr(sampling, field.name) != getattr(defaults, field.name):
            raise ValueError(
                f"batch_generate does not apply {field.name}={getattr(sampling, field.name)!r}; it applies "
                "temperature, top_k, top_p and min_p (stop_token_ids, max_new_tokens and key are its own arguments)"
            )
    if len(stop_token_ids) > MAX_STOP_TOKENS:
        raise ValueError(f"at most {MAX_STOP_TOKENS} stop_token_ids are allowed, got {len(stop_token_ids)}")


def _state_for(
    model: Model, rows: int, max_len: int, ssm_dtype: str, *, block_size: int = CHUNK, spare_blocks: int = 0
) -> ServeState:
    """Pools for exactly `rows` requests of `max_len` tokens, and `spare_blocks` behind their blocks."""
    per_row = -(-max_len // block_size)
    geometry = geometry_of(model, block_size=block_size, ssm_dtype=ssm_dtype)
    engine = EngineConfig(max_num_seqs=rows, block_size=block_size)
    blocks = rows * per_row + spare_blocks
    plan = MemoryPlan.of_counts(geometry, num_slots=rows, num_blocks=blocks, num_logit_rows=0)
    return empty_state(geometry, plan, engine, max_len)


def _admission(state, max_length, sampling: SamplingParams, stop_token_ids, seeds) -> AdmitBatch:
    """Row i gets slot i + 1 and the i-th run of blocks."""
    rows = max_length.shape[0]
    width = state.slots.block_table.shape[1]
    stops = jnp.full((MAX_STOP_TOKENS,), NO_TOKEN, jnp.int32)
    if stop_token_ids:
        stops = stops.at[: len(stop_token_ids)].set(jnp.asarray(stop_token_ids, jnp.int32))

    def every_row(value, dtype):
        return jnp.full((rows,), value, dtype)

    return AdmitBatch(
        slot=jnp.arange(1, rows + 1, dtype=jnp.int32),
        length=every_row(0, jnp.int32),
        max_length=max_length.astype(jnp.int32),
        min_length=every_row(0, jnp.int32),
        stop_tokens=jnp.tile(stops, (rows, 1)),
        block_table=1 + jnp.arange(rows * width, dtype=jnp.int32).reshape(rows, width),
        temperature=every_row(sampling.temperature, jnp.float32),
        top_k=every_row(max(sampling.top_k, 0), jnp.int32),
        top_p=every_row(sampling.top_p, jnp.float32),
        min_p=every_row(sampling.min_p, jnp.float32),
        seed=seeds,
        repetition=every_row(1, jnp.float32),
        frequency=every_row(0, jnp.float32),
        presence=every_row(0, jnp.float32),
        count_row=every_row(0, jnp.int32),
        logit_row=every_row(0, jnp.int32),
    )
