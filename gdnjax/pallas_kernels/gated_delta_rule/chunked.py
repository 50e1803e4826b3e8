"""The chunked (WY) form in three kernels: two for what chunks do without the state, and a walk over each row's chunks.

With G the running sum of g in a chunk, r the reciprocal norms of q and k, and D_ij = exp(G_i - G_j) for i >= j:

    T = (I + tril(beta_i r_i r_j k_i.k_j D_ij, -1))^-1 diag(beta)        P = tril(s r_i r_j q_i.k_j D_ij)
    U = T (v - exp(G) r k S)     o = s exp(G) r q S + P U     S <- exp(G_last) S + k^T (r exp(G_last - G) U)

T, P and the row factors are made for all chunks and heads at once; `walk` holds the state. The factors multiply
float32 sums, so the operands of the products are q, k and v as they came, unrounded.

With a decay per key channel exp(G) is a factor of no sum, but of k and q: `channel_scores.py` makes T's system and P,
and k, q and k again, decayed, which `walk` then multiplies in place of k, q and k.

Bytes at 48 heads of 128 x 128 and T tokens in bfloat16: T and P are 16 kB a chunk and head each way; q, k and v 20 kB
a token once in, o 12 kB a token out. Operations: 6.3 MFLOP a chunk and head.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gdnjax.backend import Backend
from gdnjax.pallas_kernels.gated_delta_rule import tiles
from gdnjax.pallas_kernels.gated_delta_rule.channel_scores import channel_scores
from gdnjax.pallas_kernels.gated_delta_rule.rounding import head_keys
from gdnjax.pallas_kernels.gated_delta_rule.state_tile import StateTile, heads_and_blocks
from gdnjax.pallas_kernels.launch import (
    LEAST,
    barrier,
    bounded,
    dot,
    launch,
    layer_number,
    power_of_two,
    scaled,
    sigmoid,
    softplus,
)
from gdnjax.pallas_kernels.rows import Chunks, Rows
from gdnjax.shapes import Array

TILE = LEAST
"""Rows and columns of the blocks that are solved by substitution."""

READ_K, READ_Q, WRITE_K, BETA = range(4)
"""The row factors of a chunk: of k S, of q S, of U in the new state, and of T's columns. The last is there always."""


def prefill(qkv, gates, ssm, layer, rows: Rows, chunks: Chunks, order, key_dim, rounding, backend: Backend):
    heads, value_dim = ssm.shape[2], ssm.shape[3] // key_dim
    count, size = chunks.token.shape
    start = chunks.token[:, 0]
    tile = tiles.chunked(backend, qkv.dtype, key_dim, value_dim)
    shape = (count, heads, size, size)
    arrays = (start, chunks.length, qkv, gates.a, gates.b, gates.A_log, gates.dt_bias)
    static = {"key_dim": key_dim, "value_dim": value_dim, "beta_scale": gates.beta_scale}
    # What no chunk writes is not read either.
    products = [jax.ShapeDtypeStruct(shape, qkv.dtype), jax.ShapeDtypeStruct(shape, jnp.float32)]
    if gates.per_channel:
        decayed = (count, heads, size, key_dim)
        scores, system, factors, keep, *decayed = launch(
            channel_scores,
            backend,
            name="gated_delta_rule_scores_kda",
            programs=count * heads,
            args=arrays,
            out=[
                *products,
                jax.ShapeDtypeStruct((count, heads, 1, size), jnp.float32),
                jax.ShapeDtypeStruct((count, heads, key_dim), jnp.float32),
                *(jax.ShapeDtypeStruct(decayed, dtype) for dtype in (qkv.dtype, qkv.dtype, jnp.float32)),
            ],
            warps=tile.channel_warps,
            width=tile.channels,
            sum_precision=tile.inverse_precision,
            pair_precision=tile.channel_precision,
            interpret=backend.interpret,
            **static,
        )
    else:
        scores, system, factors, keep = launch(
            _scores,
            backend,
            name="gated_delta_rule_scores",
            programs=count * (qkv.shape[1] - heads * value_dim) // (2 * key_dim),
            args=arrays,
            out=[
                *products,
                jax.ShapeDtypeStruct((count, heads, 4, size), jnp.float32),
                jax.ShapeDtypeStruct((count, heads), jnp.float32),
            ],
            warps=tile.scores_warps,
            **static,
        )
        decayed = [factors]
    _, inverse = launch(
        _inverse,
        backend,
        name="gated_delta_rule_inverse",
        programs=count * heads,
        args=(chunks.length, factors, system),
        out=[jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, qkv.dtype)],
        warps=tile.inverse_warps,
        aliases={2: 0},
        precision=tile.inverse_precision,
        interpret=backend.interpret,
    )
    first, number = chunks.of_rows(rows.length.shape[0])
    mixed = not isinstance(order.read, bool)
    stored = (order.read.astype(jnp.int32),) if mixed else ()
    kept = () if chunks.checkpoint is None else (chunks.checkpoint,)
    noise = ()
    if rounding is not None:
        noise = (rounding.keys, jnp.asarray(rounding.first_head, jnp.int32).reshape(1))
        noise += (rounding.checkpoints,) if kept else ()
    args = (
        layer_number(layer),
        *(rows.read_slot, rows.write_slot, rows.fresh.astype(jnp.int32), first, number),
        *(*stored, *kept, *noise, start, chunks.length, inverse, scores, *decayed, keep, qkv, ssm),
    )
    columns = min(tile.columns, power_of_two(value_dim, LEAST))
    blocks = -(-value_dim // columns)
    o, ssm = launch(
        _walk,
        backend,
        name="gated_delta_rule_walk" + "_kda" * gates.per_channel,
        programs=rows.length.shape[0] * heads * blocks,
        args=args,
        out=[
            jax.ShapeDtypeStruct((qkv.shape[0], heads, value_dim), qkv.dtype),
            jax.ShapeDtypeStruct(ssm.shape, ssm.dtype),
        ],
        warps=tile.walk_warps,
        stages=tile.walk_stages,
        aliases={len(args) - 1: 1},
        key_dim=key_dim,
        columns=columns,
        read_vk=None if mixed else order.read,
        write_vk=order.write,
        checkpoints=bool(kept),
        stochastic=rounding is not None,
        per_channel=gates.per_channel,
    )
    return o, ssm


def _scores(
    program, start_ref, length_ref, qkv_ref, a_ref, b_ref, A_log_ref, dt_ref, *outputs, key_dim, value_dim, beta_scale
):
    """P, the strictly lower part of T's system, and the row factors of one chunk, for all value heads of a key head."""
    scores_ref, system_ref, factors_ref, keep_ref = outputs
    heads, size = scores_ref.shape[1:3]
    keys = (qkv_ref.shape[1] - heads * value_dim) // 2
    key_heads = keys // key_dim
    number, key_head = program // key_heads, program % key_heads
    length = length_ref[number]
    place = jnp.arange(size, dtype=jnp.int32)
    token, valid = bounded(start_ref[number], qkv_ref.shape[0]) + place, place < length
    row, column = place[:, None], place[None, :]

    def load_rows(first) -> tuple[Array, Array]:
        """[places, K], zero where there is no token, and the reciprocal norms of its rows."""
        channel = jnp.arange(power_of_two(key_dim, LEAST), dtype=jnp.int32)
        mask = valid[:, None] if channel.size == key_dim else valid[:, None] & (channel < key_dim)[None, :]
        at = qkv_ref.at[token[:, None], (first + key_head * key_dim + channel)[None, :]]
        x = plgpu.load(at, mask=mask, other=0)
        square = x.astype(jnp.float32)
        return x, lax.rsqrt(jnp.sum(square * square, axis=1) + 1e-6)

    def gates(head) -> tuple[Array, Array]:
        """g and beta of the tokens; what is none neither decays nor writes."""
        a, b = (plgpu.load(ref.at[token, head], mask=valid, other=0).astype(jnp.float32) for ref in (a_ref, b_ref))
        rate, bias = jnp.exp(A_log_ref[head].astype(jnp.float32)), dt_ref[head].astype(jnp.float32)
        return jnp.where(valid, -rate * softplus(a + bias), 0.0), jnp.where(valid, scaled(sigmoid(b), beta_scale), 0.0)

    def run():
        q, q_norm = load_rows(0)
        k, k_norm = load_rows(keys)
        q_norm = q_norm * key_dim**-0.5
        q_products = dot(q, k, contract=(1, 1)) * (q_norm[:, None] * k_norm[None, :])
        k_products = dot(k, k, contract=(1, 1)) * (k_norm[:, None] * k_norm[None, :])
        ratio = heads // key_heads

        def one_head(i, carry):
            head = key_head * ratio + i
            at = (number, head)
            g, beta = gates(head)
            total = jnp.cumsum(g)
            # To the bit: sums that were summed apart would differ by their rounding.
            last = jnp.sum(jnp.where(place == size - 1, total, 0.0))
            # D may overflow above the diagonal.
            decay = jnp.exp(jnp.where(row >= column, total[:, None] - total[None, :], 0.0))
            scores_ref[at] = jnp.where(row >= column, q_products * decay, 0.0).astype(scores_ref.dtype)
            # By whole lines of 64 bytes; nobody reads the diagonal or what is above.
            system = beta[:, None] * k_products * decay
            plgpu.store(system_ref.at[(*at, row, column)], system, mask=row | 15 >= column)
            factors_ref[(*at, READ_K)] = jnp.exp(total) * k_norm
            factors_ref[(*at, READ_Q)] = jnp.exp(total) * q_norm
            factors_ref[(*at, WRITE_K)] = jnp.exp(last - total) * k_norm
            factors_ref[(*at, BETA)] = beta
            keep_ref[at] = jnp.exp(last)
            return carry

        lax.fori_loop(0, ratio, one_head, 0)

    pl.when(length > 0)(run)


def _inverse(program, length_ref, factors_ref, _, system_ref, inverse_ref, *, precision, interpret):
    """T of one chunk and head: blocks of TILE on the diagonal by substitution, then pairs joined to larger ones.

    X replaces the system in place, in float32. The blocks of the diagonal are solved side by side, a thread a column of
    one, by products of scalars with rows; -X_BB A_BA X_AA joins two.
    """
    heads, size = inverse_ref.shape[1:3]
    at = (program // heads, program % heads)

    def square(first_row, first_column, width):
        step = jnp.arange(width, dtype=jnp.int32)
        return system_ref.at[(*at, first_row + step[:, None], first_column + step[None, :])]

    def triangle(first, width):
        """X of a block that is done; above its diagonal there are still the system's values."""
        step = jnp.arange(width, dtype=jnp.int32)
        return plgpu.load(square(first, first, width), mask=step[:, None] >= step[None, :], other=0)

    def run():
        lane = jnp.arange(size, dtype=jnp.int32)
        block, column = lane // TILE * TILE, lane % TILE
        # The interpreter is slow to compile loads by address.
        diagonal = jnp.repeat(_diagonal(system_ref[at]), TILE, axis=0) if interpret else None

        def entries(i, j):
            """Of every block on the diagonal its entry (i, j), for all threads of the block."""
            if diagonal is not None:
                return diagonal[:, i, j]
            return plgpu.load(system_ref.at[(*at, block + i, block + j)])

        rows = []
        for i in range(TILE):
            x = jnp.where(column == i, 1.0, 0.0)
            for j in range(i):
                x = x - entries(i, j) * rows[j]
            # XLA's CPU compiler would compute a row again in each of those that follow.
            rows.append(lax.optimization_barrier(x) if interpret else x)
        barrier(interpret)
        for i, x in enumerate(rows):
            plgpu.store(system_ref.at[(*at, block + i, lane)], x)
        width = TILE
        while width < size:
            barrier(interpret)
            for a in range(0, size, 2 * width):
                b = a + width
                product = dot(plgpu.load(square(b, a, width)), triangle(a, width), precision=precision)
                joined = -dot(triangle(b, width), product, precision=precision)
                plgpu.store(square(b, a, width), joined)
            width *= 2
        barrier(interpret)
        beta = factors_ref[(*at, factors_ref.shape[2] - 1)]
        for first in range(0, size, TILE):
            row = first + jnp.arange(TILE, dtype=jnp.int32)
            places = (*at, row[:, None], lane[None, :])
            x = plgpu.load(system_ref.at[places], mask=row[:, None] >= lane[None, :], other=0)
            plgpu.store(inverse_ref.at[places], (x * beta[None, :]).astype(inverse_ref.dtype))

    pl.when(length_ref[at[0]] > 0)(run)


def _diagonal(x: Array) -> Array:
    """The blocks on the diagonal of a square: [n, TILE, TILE]."""
    return jnp.stack([x[i : i + TILE, i : i + TILE] for i in range(0, x.shape[0], TILE)])


def _walk(
    program,
    layer_ref,
    read_ref,
    write_ref,
    fresh_ref,
    first_ref,
    number_ref,
    *refs,
    key_dim,
    columns,
    read_vk,
    write_vk,
    checkpoints,
    stochastic,
    per_channel,
):
    stored_ref, refs = (None, refs) if read_vk is not None else (refs[0], refs[1:])
    checkpoint_ref, refs = (refs[0], refs[1:]) if checkpoints else (None, refs)
    keys_ref = first_head_ref = kept_keys_ref = None
    if stochastic:
        keys_ref, first_head_ref, *refs = refs
        kept_keys_ref, refs = (refs[0], refs[1:]) if checkpoints else (None, refs)
    start_ref, length_ref, inverse_ref, scores_ref, *decayed_refs, keep_ref, qkv_ref, ssm_ref, o_ref, out_ref = refs
    heads, size = inverse_ref.shape[1:3]
    value_dim = ssm_ref.shape[3] // key_dim
    keys = (qkv_ref.shape[1] - heads * value_dim) // 2
    # Tiles of one head share what they read of q, k, T and P.
    blocks = -(-value_dim // columns)
    row, head, block = heads_and_blocks(heads, blocks, program)
    tile = StateTile.of(layer_ref[0], head, block, columns=columns, key_dim=key_dim, value_dim=value_dim, least=LEAST)
    read_vk = bool(read_vk) if stored_ref is None else stored_ref[row] != 0
    # A fresh row reads nothing of its slot.
    state = tile.load(ssm_ref, read_ref[row], read_vk, wanted=fresh_ref[row] == 0).T

    key_start = head // (heads * key_dim // keys) * key_dim
    v_channel = 2 * keys + head * value_dim + tile.v
    place = jnp.arange(size, dtype=jnp.int32)

    def noise_of(ref, number):
        """The head's keys of a state that is stored, from those of rows or of chunks."""
        return None if first_head_ref is None else head_keys(ref[number], layer_ref[0], first_head_ref[0] + head)

    def keep_of(chunk):
        """What a chunk leaves of the state: a number, or one of each key channel."""
        if not per_channel:
            return keep_ref[chunk, head]
        other = None if tile.k_mask is None else 0.0
        return plgpu.load(keep_ref.at[chunk, head, tile.k], mask=tile.k_mask, other=other)[:, None]

    def one_chunk(i, carry):
        state, start, length = carry
        chunk = bounded(first_ref[row] + i, start_ref.shape[0])
        # Read a turn ahead: what a load needs that is itself loaded in its turn is not pipelined.
        following = jnp.minimum(chunk + 1, start_ref.shape[0] - 1)
        start_of_next, length_of_next = start_ref[following], length_ref[following]
        token, valid = bounded(start, qkv_ref.shape[0]) + place, place < length
        keys_valid = valid[:, None] if tile.k_mask is None else valid[:, None] & tile.k_mask[None, :]
        values_valid = valid[:, None] if tile.v_mask is None else valid[:, None] & tile.v_mask[None, :]

        def load_rows(first):
            return plgpu.load(
                qkv_ref.at[token[:, None], (first + key_start + tile.k)[None, :]], mask=keys_valid, other=0
            )

        def load_decayed(ref):
            mask = None if tile.k_mask is None else jnp.broadcast_to(tile.k_mask[None, :], (size, tile.k.size))
            at = ref.at[chunk, head, place[:, None], tile.k[None, :]]
            return plgpu.load(at, mask=mask, other=None if mask is None else 0).astype(qkv_ref.dtype)

        if per_channel:
            # k and q as the state is read by them, and k as it is written by: no sum over k has a factor left.
            k, q, last_k = map(load_decayed, decayed_refs)
        else:
            q, k = load_rows(0), load_rows(keys)
            last_k = k
        v = plgpu.load(qkv_ref.at[token[:, None], v_channel[None, :]], mask=values_valid, other=0)
        inverse, scores = inverse_ref[chunk, head], scores_ref[chunk, head]
        read_k = read_q = write_k = None
        if not per_channel:
            (factors_ref,) = decayed_refs
            read_k, read_q, write_k = (factors_ref[chunk, head, factor] for factor in (READ_K, READ_Q, WRITE_K))

        def times(x, factor):
            return x if factor is None else x * factor[:, None]

        rounded = state.astype(qkv_ref.dtype)
        error = v.astype(jnp.float32) - times(dot(k, rounded), read_k)
        written = dot(inverse, error.astype(qkv_ref.dtype))
        o = times(dot(q, rounded), read_q)
        o = o + dot(scores, written.astype(qkv_ref.dtype))
        plgpu.store(o_ref.at[token[:, None], head, tile.v[None, :]], o.astype(o_ref.dtype), mask=values_valid)
        written = times(written, write_k).astype(qkv_ref.dtype)
        keep = keep_of(chunk)
        state = keep * state + dot(last_k, written, contract=(0, 0))
        if checkpoint_ref is not None:
            slot = checkpoint_ref[chunk]
            tile.store(out_ref, slot, state.T, write_vk, when=slot > 0, keys=noise_of(kept_keys_ref, chunk))
        return state, start_of_next, length_of_next

    begin = bounded(first_ref[row], start_ref.shape[0])
    state, *_ = lax.fori_loop(0, number_ref[row], one_chunk, (state, start_ref[begin], length_ref[begin]))
    # A padded row is fresh, has no chunks, and is not stored: it moves nothing.
    tile.store(out_ref, write_ref[row], state.T, write_vk, when=write_ref[row] > 0, keys=noise_of(keys_ref, row))
