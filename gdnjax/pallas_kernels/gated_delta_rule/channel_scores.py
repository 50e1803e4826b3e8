"""What chunks do without the state where each key channel decays by itself: one kernel of the chunked form.

With G the running sum of g in a chunk, [i, K], and r the reciprocal norms of q and k:

    A_ij = beta_i r_i r_j sum_d k_i[d] k_j[d] exp(G_i[d] - G_j[d])    P_ij = s r_i r_j sum_d q_i[d] k_j[d] exp(...)

exp(G_i) exp(-G_j) overflows within a chunk. So two tokens are multiplied as both decay to a place between them, by sums
of g over the tokens from there to i and from j to there: exponents are at most 0, and nothing large is subtracted. For
tokens of two sub-chunks of TILE that place is the beginning of the later one; within a sub-chunk it is the middle of
the smallest aligned group of 2, 4, 8 or 16 that has both. All of it are products of matrices, the sums of g too.

Beside A and P the kernel makes exp(G) k and exp(G) q, by which the state is read, and exp(G_last - G) k, by which it is
written: the keys wait there, in float32, for the sub-chunks behind theirs. Channels are taken some at a time, so that
little is held in registers.

Bytes at 32 heads of 128 x 128 in bfloat16: 24 kB a token of q, k and a in; of each chunk and head 24 kB of A and P and
64 of the decayed out. Operations: 4.2 MFLOP of pairs a chunk and head.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gdnjax.pallas_kernels.launch import LEAST, barrier, bounded, dot, power_of_two, scaled, sigmoid, softplus
from gdnjax.shapes import Array

TILE = LEAST
"""Tokens of a sub-chunk."""


def channel_scores(
    program,
    start_ref,
    length_ref,
    qkv_ref,
    a_ref,
    b_ref,
    A_log_ref,
    dt_ref,
    *outputs,
    key_dim,
    value_dim,
    beta_scale,
    width,
    sum_precision,
    pair_precision,
    interpret,
):
    """Of one chunk and head: P, A, beta, what is kept of the state, and k, q and k decayed."""
    scores_ref, system_ref, beta_ref, keep_ref, read_k_ref, read_q_ref, write_k_ref = outputs
    heads, size = scores_ref.shape[1:3]
    keys = (qkv_ref.shape[1] - heads * value_dim) // 2
    number, head = program // heads, program % heads
    first_channel = head // (heads * key_dim // keys) * key_dim
    length = length_ref[number]
    first_token = bounded(start_ref[number], qkv_ref.shape[0])
    step = jnp.arange(TILE, dtype=jnp.int32)
    everywhere = jnp.arange(size, dtype=jnp.int32)
    width = min(width, power_of_two(key_dim, LEAST))
    parts, blocks = size // TILE, -(-key_dim // width)

    def sums(which, g) -> Array:
        """[i, K]: of each token the sum of g over those that `which` [i, l] names."""
        return dot(jnp.where(which, 1.0, 0.0), g, precision=sum_precision)

    def pairs(x, y) -> Array:
        return dot(x, y, contract=(1, 1), precision=pair_precision)

    def channels(i) -> tuple[Array, Array]:
        """Of a block: their numbers, and whether there are such."""
        channel = i * width + jnp.arange(width, dtype=jnp.int32)
        return channel, channel < key_dim

    def run():
        rate = jnp.exp(A_log_ref[head].astype(jnp.float32))

        def one_part(n, carry):
            place = n * TILE + step
            valid = place < length
            token = first_token + place
            at = (number, head, place[:, None])
            earlier = everywhere < n * TILE

            def load(ref, index, mask) -> Array:
                return plgpu.load(ref.at[index], mask=mask, other=0).astype(jnp.float32)

            def load_row(first, i) -> Array:
                channel, real = channels(i)
                there = valid[:, None] & real[None, :]
                return load(qkv_ref, (token[:, None], (first + first_channel + channel)[None, :]), there)

            def squares(i, found):
                q, k = load_row(0, i), load_row(keys, i)
                return found[0] + jnp.sum(q * q, axis=1), found[1] + jnp.sum(k * k, axis=1)

            nothing = jnp.zeros((TILE,), jnp.float32)
            q_norm, k_norm = (lax.rsqrt(x + 1e-6) for x in lax.fori_loop(0, blocks, squares, (nothing, nothing)))
            b = load(b_ref, (token, head), valid)
            beta = jnp.where(valid, scaled(sigmoid(b), beta_scale), 0.0)

            def one_block(i, products):
                inner, outer = products
                channel, real = channels(i)
                real_row = real[None, :]
                there = valid[:, None] & real_row
                here = (*at, channel[None, :])
                q, k = load_row(0, i) * (q_norm * key_dim**-0.5)[:, None], load_row(keys, i) * k_norm[:, None]
                a = load(a_ref, (token[:, None], head, channel[None, :]), there)
                bias = load(dt_ref, (head, channel), real)
                # What is no token neither decays nor writes.
                g = jnp.where(there, -rate * softplus(a + bias[None, :]), 0.0)
                inner = _within(q, k, g, inner, sums, pairs)

                # The keys of earlier sub-chunks, decayed to the beginning of this one, and G there, wait in memory.
                before = (number, head, everywhere[:, None], channel[None, :])
                left = load(write_k_ref, before, earlier[:, None] & real_row)
                total = load(keep_ref, (number, head, channel), real & (n > 0))
                into = jnp.exp(sums(step[:, None] >= step[None, :], g))
                entered_k, entered_q = k * into, q * into
                outer = outer[0] + pairs(entered_k, left), outer[1] + pairs(entered_q, left)
                of_chunk = jnp.exp(total)[None, :]
                stored = jnp.broadcast_to(real_row, k.shape)
                for ref, x in ((read_k_ref, entered_k), (read_q_ref, entered_q)):
                    plgpu.store(ref.at[here], (x * of_chunk).astype(ref.dtype), mask=stored)
                behind = k * jnp.exp(sums(step[:, None] < step[None, :], g))
                of_part = jnp.sum(g, axis=0)
                total = total + of_part
                barrier(interpret)
                left = left * jnp.exp(of_part)[None, :]
                plgpu.store(write_k_ref.at[before], left, mask=earlier[:, None] & real_row)
                plgpu.store(write_k_ref.at[here], behind, mask=stored)
                total = jnp.where(n == parts - 1, jnp.exp(total), total)
                plgpu.store(keep_ref.at[number, head, channel], total, mask=real)
                return inner, outer

            square, beside = jnp.zeros((TILE, TILE), jnp.float32), jnp.zeros((TILE, size), jnp.float32)
            inner, outer = lax.fori_loop(0, blocks, one_block, ((square, square), (beside, beside)))
            # Later tokens are zeros in `left`, and so are the products above the diagonal.
            earlier = jnp.broadcast_to(earlier[None, :], (TILE, size))
            others = earlier | (everywhere >= (n + 1) * TILE)[None, :]
            plgpu.store(system_ref.at[(*at, everywhere[None, :])], beta[:, None] * outer[0], mask=earlier)
            plgpu.store(scores_ref.at[(*at, everywhere[None, :])], outer[1].astype(scores_ref.dtype), mask=others)
            plgpu.store(system_ref.at[(*at, place[None, :])], beta[:, None] * inner[0])
            plgpu.store(scores_ref.at[(*at, place[None, :])], inner[1].astype(scores_ref.dtype))
            plgpu.store(beta_ref.at[number, head, 0, place], beta)
            barrier(interpret)
            return carry

        lax.fori_loop(0, parts, one_part, 0)

    pl.when(length > 0)(run)


def _within(q, k, g, products, sums, pairs) -> tuple[Array, Array]:
    """Two sums of products of a sub-chunk, and this block of channels' share: of keys, below the diagonal, and of
    queries and keys, with it.
    """
    step = jnp.arange(TILE, dtype=jnp.int32)
    row, column = step[:, None], step[None, :]

    def one_width(i, products):
        """Of each group of twice the width: later tokens decay from its middle on, earlier ones up to it."""
        k_products, q_products = products
        width = TILE >> i + 1
        later, apart = row & width != 0, row ^ column
        decay = jnp.exp(sums((apart < width) & (later & (column <= row) | ~later & (column > row)), g))
        decayed = k * decay
        met = later & (apart & -width == width)
        k_products += jnp.where(met, pairs(decayed, decayed), 0.0)
        q_products += jnp.where(met, pairs(q * decay, decayed), 0.0)
        return k_products, q_products

    k_products, q_products = products
    q_products += jnp.where(row == column, jnp.sum(q * k, axis=1)[:, None], 0.0)
    # A loop, so that no width waits in registers for another.
    return lax.fori_loop(0, TILE.bit_length() - 1, one_width, (k_products, q_products))
