"""The chunked (WY) form in three kernels: two for what chunks do without the state, and a walk over each row's chunks.

With G the running sum of g in a chunk, r the reciprocal norms of q and k, and D_ij = exp(G_i - G_j) for i >= j:

    T = (I + tril(beta_i r_i r_j k_i.k_j D_ij, -1))^-1 diag(beta)        P = tril(s r_i r_j q_i.k_j D_ij)
    U = T (v - exp(G) r k S)     o = s exp(G) r q S + P U     S <- exp(G_last) S + k^T (r exp(G_last - G) U)

T, P and the row factors are made for all chunks and heads at once; `walk` holds the state. The factors multiply
float32 sums, so the operands of the products are q, k and v as they came, unrounded.

Bytes at 48 heads of 128 x 128 and T tokens in bfloat16: T and P are 16 kB a chunk and head each way; q, k and v 20 kB
a token once in, o 12 kB a token out. Operations: 6.3 MFLOP a chunk and head.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gdnjax.backend import Backend
from gdnjax.pallas_kernels.gated_delta_rule import tiles
from gdnjax.pallas_kernels.gated_delta_rule.state_tile import StateTile, heads_and_blocks
from gdnjax.pallas_kernels.launch import dot, launch, layer_number, power_of_two, sigmoid, softplus
from gdnjax.pallas_kernels.rows import Chunks, Rows
from gdnjax.shapes import Array, Leaf

TILE = 16
"""Rows and columns of the blocks in which the triangular system is inverted."""

READ_K, READ_Q, WRITE_K = range(3)
"""The row factors of a chunk: of k S, of q S, and of U in the new state."""


def prefill(qkv, gates, ssm, layer, rows: Rows, chunks: Chunks, order, key_dim, backend: Backend):
    heads, value_dim = ssm.shape[2], ssm.shape[3] // key_dim
    count, size = chunks.token.shape
    start = chunks.token[:, 0]
    tile = tiles.chunked(backend, qkv.dtype, key_dim, value_dim)
    shape = (count, heads, size, size)
    args = (start, chunks.length, qkv, gates.a, gates.b, gates.A_log, gates.dt_bias)
    static = {"programs": count * heads, "args": args, "key_dim": key_dim, "value_dim": value_dim}
    scores, factors, keep = launch(
        _scores,
        backend,
        name="gated_delta_rule_scores",
        out=[
            jax.ShapeDtypeStruct(shape, qkv.dtype),
            jax.ShapeDtypeStruct((count, heads, 3, size), jnp.float32),
            jax.ShapeDtypeStruct((count, heads), jnp.float32),
        ],
        warps=tile.scores_warps,
        **static,
    )
    (inverse,) = launch(
        _inverse,
        backend,
        name="gated_delta_rule_inverse",
        out=[jax.ShapeDtypeStruct(shape, qkv.dtype)],
        warps=tile.inverse_warps,
        precision=tile.inverse_precision,
        **static,
    )
    first, number = chunks.of_rows(rows.length.shape[0])
    mixed = not isinstance(order.read, bool)
    stored = (order.read.astype(jnp.int32),) if mixed else ()
    kept = () if chunks.checkpoint is None else (chunks.checkpoint,)
    args = (
        layer_number(layer),
        *(rows.read_slot, rows.write_slot, rows.fresh.astype(jnp.int32), first, number),
        *(*stored, *kept, start, chunks.length, inverse, scores, factors, keep, qkv, ssm),
    )
    columns = min(tile.columns, power_of_two(value_dim, 16))
    blocks = -(-value_dim // columns)
    o, ssm = launch(
        _walk,
        backend,
        name="gated_delta_rule_walk",
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
    )
    return o, ssm


def _scores(start_ref, length_ref, qkv_ref, a_ref, b_ref, A_log_ref, dt_ref, *outputs, key_dim, value_dim):
    """P and the row factors of one chunk and head."""
    scores_ref, factors_ref, keep_ref = outputs
    heads, size = scores_ref.shape[1:3]
    chunk = Chunk.of(start_ref, length_ref, qkv_ref, heads, key_dim, value_dim)
    place = jnp.arange(size, dtype=jnp.int32)

    def run():
        g, _ = chunk.gates(a_ref, b_ref, A_log_ref, dt_ref, place)
        total = jnp.cumsum(g)
        last = _last(total, place)
        q, q_norm = chunk.rows(qkv_ref, 0, place)
        k, k_norm = chunk.rows(qkv_ref, chunk.keys, place)
        q_norm = q_norm * key_dim**-0.5
        scores = _scaled(dot(q, k, contract=(1, 1)), q_norm, k_norm, total, total, place[:, None] >= place[None, :])
        at = (chunk.number, chunk.head)
        scores_ref[at] = scores.astype(scores_ref.dtype)
        factors_ref[(*at, READ_K)] = jnp.exp(total) * k_norm
        factors_ref[(*at, READ_Q)] = jnp.exp(total) * q_norm
        factors_ref[(*at, WRITE_K)] = jnp.exp(last - total) * k_norm
        keep_ref[at] = jnp.exp(last)

    pl.when(chunk.length > 0)(run)


def _inverse(
    start_ref, length_ref, qkv_ref, a_ref, b_ref, A_log_ref, dt_ref, inverse_ref, *, key_dim, value_dim, precision
):
    """T of one chunk and head, in blocks of TILE rows and columns."""
    heads, size = inverse_ref.shape[1:3]
    chunk = Chunk.of(start_ref, length_ref, qkv_ref, heads, key_dim, value_dim)
    blocks = range(size // TILE)
    step = jnp.arange(TILE, dtype=jnp.int32)
    place = [i * TILE + step for i in blocks]
    product = functools.partial(dot, precision=precision)

    def store(i, j, block):
        at = inverse_ref.at[chunk.number, chunk.head, place[i][:, None], place[j][None, :]]
        plgpu.store(at, block.astype(inverse_ref.dtype))

    def run():
        total, beta, norm, last = [], [], [], 0.0
        inverse = {}
        for i in blocks:
            g, beta_i = chunk.gates(a_ref, b_ref, A_log_ref, dt_ref, place[i])
            total.append(jnp.cumsum(g) + last)
            beta.append(beta_i)
            last = _last(total[i], step)
            k, norm_i = chunk.rows(qkv_ref, chunk.keys, place[i])
            norm.append(norm_i)
            system = []
            for j in range(i + 1):
                # Loaded anew, row by row of blocks: all keys of a chunk at once do not fit the registers.
                k_j = k if j == i else chunk.rows(qkv_ref, chunk.keys, place[j])[0]
                below = place[i][:, None] > place[j][None, :]
                products = dot(k, k_j, contract=(1, 1))
                system.append(_scaled(products, beta[i] * norm[i], norm[j], total[i], total[j], below))
            inverse[i, i] = _invert(system[i], step, product)
            for j in range(i):
                # -(I + A_ii)^-1 sum_m A_im inverse_mj, m from j to i - 1.
                terms = [product(system[m], inverse[m, j]) for m in range(j, i)]
                inverse[i, j] = -product(inverse[i, i], sum(terms[1:], terms[0]))
            for j in blocks:
                store(i, j, inverse[i, j] * beta[j][None, :] if j <= i else jnp.zeros((TILE, TILE)))

    pl.when(chunk.length > 0)(run)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The chunk and head of a program that works on one of each."""

    number: Leaf  # [] int32
    head: Leaf  # [] int32
    start: Leaf  # [] int32: place of its first token
    length: Leaf  # [] int32
    keys: int  # channels before the first key
    key_start: Leaf  # [] int32: first channel of the head's key head, among the keys
    key_dim: int

    @classmethod
    def of(cls, start_ref, length_ref, qkv_ref, heads: int, key_dim: int, value_dim: int) -> "Chunk":
        number, head = pl.program_id(0) // heads, pl.program_id(0) % heads
        keys = (qkv_ref.shape[1] - heads * value_dim) // 2
        key_start = head // (heads * key_dim // keys) * key_dim
        return cls(number, head, start_ref[number], length_ref[number], keys, key_start, key_dim)

    def rows(self, qkv_ref, first, place) -> tuple[Array, Array]:
        """[places, K] of the head, zero where there is no token, and the reciprocal norms of its rows."""
        channel = jnp.arange(power_of_two(self.key_dim, TILE), dtype=jnp.int32)
        mask = (place < self.length)[:, None]
        if channel.size != self.key_dim:
            mask = mask & (channel < self.key_dim)[None, :]
        at = qkv_ref.at[(self.start + place)[:, None], (first + self.key_start + channel)[None, :]]
        x = plgpu.load(at, mask=mask, other=0)
        square = x.astype(jnp.float32)
        return x, lax.rsqrt(jnp.sum(square * square, axis=1) + 1e-6)

    def gates(self, a_ref, b_ref, A_log_ref, dt_ref, place) -> tuple[Array, Array]:
        """g and beta of the tokens; what is none neither decays nor writes."""
        valid = place < self.length
        a = plgpu.load(a_ref.at[self.start + place, self.head], mask=valid, other=0).astype(jnp.float32)
        b = plgpu.load(b_ref.at[self.start + place, self.head], mask=valid, other=0).astype(jnp.float32)
        rate, bias = jnp.exp(A_log_ref[self.head].astype(jnp.float32)), dt_ref[self.head].astype(jnp.float32)
        return jnp.where(valid, -rate * softplus(a + bias), 0.0), jnp.where(valid, sigmoid(b), 0.0)


def _last(total: Array, place: Array) -> Array:
    """The last of running sums, to the bit: sums that were summed apart would differ by their rounding."""
    return jnp.sum(jnp.where(place == place.size - 1, total, 0.0))


def _scaled(products, left, right, row_total, column_total, keep) -> Array:
    """left_i right_j x_i.k_j D_ij where `keep`, else 0: D may overflow there."""
    difference = row_total[:, None] - column_total[None, :]
    decay = jnp.exp(jnp.where(keep, difference, 0.0))
    return jnp.where(keep, products * (left[:, None] * right[None, :]) * decay, 0.0)


def _invert(system: Array, place: Array, product: Callable[[Array, Array], Array]) -> Array:
    """(I + tril(system, -1))^-1 of one [TILE, TILE] block.

    The two halves of the diagonal by products, (I - B)(I + B^2)(I + B^4), where powers stay small (B^4 of eight fully
    correlated keys has entries of 20; those of all sixteen would have 3,432); then what couples them.
    """
    row, column = place[:, None], place[None, :]
    below = jnp.where(row > column, system, 0.0)
    same_half = (row < TILE // 2) == (column < TILE // 2)
    b = jnp.where(same_half, below, 0.0)
    identity = jnp.where(row == column, 1.0, 0.0)
    b2 = product(b, b)
    halves = identity - b
    halves = halves + product(halves, b2)
    halves = halves + product(halves, product(b2, b2))
    return halves - product(product(halves, below - b), halves)


def _walk(
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
):
    stored_ref, refs = (None, refs) if read_vk is not None else (refs[0], refs[1:])
    checkpoint_ref, refs = (refs[0], refs[1:]) if checkpoints else (None, refs)
    start_ref, length_ref, inverse_ref, scores_ref, factors_ref, keep_ref, qkv_ref, ssm_ref, o_ref, out_ref = refs
    heads, size = inverse_ref.shape[1:3]
    value_dim = ssm_ref.shape[3] // key_dim
    keys = (qkv_ref.shape[1] - heads * value_dim) // 2
    # Tiles of one head share what they read of q, k, T and P.
    blocks = -(-value_dim // columns)
    row, head, block = heads_and_blocks(heads, blocks, pl.program_id(0))
    tile = StateTile.of(layer_ref[0], head, block, columns=columns, key_dim=key_dim, value_dim=value_dim, least=TILE)
    read_vk = read_vk if stored_ref is None else stored_ref[row] != 0
    # A fresh row reads nothing of its slot.
    state = tile.load(ssm_ref, read_ref[row], read_vk, wanted=fresh_ref[row] == 0).T

    key_start = head // (heads * key_dim // keys) * key_dim
    v_channel = 2 * keys + head * value_dim + tile.v
    place = jnp.arange(size, dtype=jnp.int32)

    def one_chunk(i, carry):
        state, start, length = carry
        chunk = first_ref[row] + i
        # Read a turn ahead: what a load needs that is itself loaded in its turn is not pipelined.
        following = jnp.minimum(chunk + 1, start_ref.shape[0] - 1)
        start_of_next, length_of_next = start_ref[following], length_ref[following]
        token, valid = start + place, place < length
        keys_valid = valid[:, None] if tile.k_mask is None else valid[:, None] & tile.k_mask[None, :]
        values_valid = valid[:, None] if tile.v_mask is None else valid[:, None] & tile.v_mask[None, :]

        def load_rows(first):
            return plgpu.load(
                qkv_ref.at[token[:, None], (first + key_start + tile.k)[None, :]], mask=keys_valid, other=0
            )

        q, k = load_rows(0), load_rows(keys)
        v = plgpu.load(qkv_ref.at[token[:, None], v_channel[None, :]], mask=values_valid, other=0)
        inverse, scores = inverse_ref[chunk, head], scores_ref[chunk, head]
        read_k, read_q, write_k = (factors_ref[chunk, head, factor] for factor in (READ_K, READ_Q, WRITE_K))

        rounded = state.astype(qkv_ref.dtype)
        error = v.astype(jnp.float32) - dot(k, rounded) * read_k[:, None]
        written = dot(inverse, error.astype(qkv_ref.dtype))
        o = dot(q, rounded) * read_q[:, None]
        o = o + dot(scores, written.astype(qkv_ref.dtype))
        plgpu.store(o_ref.at[token[:, None], head, tile.v[None, :]], o.astype(o_ref.dtype), mask=values_valid)
        written = (written * write_k[:, None]).astype(qkv_ref.dtype)
        state = keep_ref[chunk, head] * state + dot(k, written, contract=(0, 0))
        if checkpoints:
            slot = checkpoint_ref[chunk]
            tile.store(out_ref, slot, state.T, write_vk, when=slot > 0)
        return state, start_of_next, length_of_next

    begin = jnp.minimum(first_ref[row], start_ref.shape[0] - 1)
    state, *_ = lax.fori_loop(0, number_ref[row], one_chunk, (state, start_ref[begin], length_ref[begin]))
    tile.store(out_ref, write_ref[row], state.T, write_vk)
