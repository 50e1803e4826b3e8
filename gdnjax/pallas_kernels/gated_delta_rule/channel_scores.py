"""What chunks do without the state where each key channel decays by itself: one kernel of the chunked form.

With G the running sum of g in a chunk, [i, K], and r the reciprocal norms of q and k:

    A_ij = beta_i r_i r_j sum_d k_i[d] k_j[d] exp(G_i[d] - G_j[d])    P_ij = s r_i r_j sum_d q_i[d] k_j[d] exp(...)

exp(G_i) exp(-G_j) overflows within a chunk. So two tokens are multiplied as both decay to a place between them, by sums
of g over the tokens from there to i and from j to there: exponents are at most 0, and nothing large is subtracted. For
tokens of two sub-chunks of TILE that place is the beginning of the later one; within a sub-chunk it is the middle of
the smallest aligned group of 2, 4, 8 or 16 that has both. All of it are products of matrices, the sums of g too.

Beside A and P the kernel makes exp(G) k and exp(G) q, by which the state is read, and exp(G_last - G) k, by which it is
written.

Bytes at 32 heads of 128 x 128 and T tokens in bfloat16: 24 kB a token of q, k and a in; A and P 24 kB a chunk and head,
the decayed 48. Operations: 5.6 MFLOP a chunk and head.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gdnjax.pallas_kernels.launch import LEAST, bounded, dot, power_of_two, scaled, sigmoid, softplus
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
    precision,
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
    channel = jnp.arange(power_of_two(key_dim, LEAST), dtype=jnp.int32)
    real = None if channel.size == key_dim else channel < key_dim

    def masked(valid) -> Array:
        """[places, K]: those of tokens and channels that there are."""
        return valid[:, None] if real is None else valid[:, None] & real[None, :]

    def sums(which, g) -> Array:
        """[i, K]: of each token the sum of g over those that `which` [i, l] names."""
        return dot(jnp.where(which, 1.0, 0.0), g, precision=precision)

    def pairs(x, y) -> Array:
        return dot(x, y, contract=(1, 1), precision=precision)

    def store(ref, place, x) -> None:
        at = ref.at[number, head, place[:, None], channel[None, :]]
        plgpu.store(at, x.astype(ref.dtype), mask=None if real is None else masked(place >= 0))

    def run():
        rate = jnp.exp(A_log_ref[head].astype(jnp.float32))
        bias = plgpu.load(dt_ref.at[head, channel], mask=real, other=None if real is None else 0).astype(jnp.float32)

        def one_part(n, carry):
            """`left` [places, K]: the keys so far, decayed to the end of the last sub-chunk; `total` [K]: G there."""
            left, total = carry
            place = n * TILE + step
            valid = place < length
            token, here = first_token + place, masked(valid)

            def normalised(first) -> Array:
                at = qkv_ref.at[token[:, None], (first + first_channel + channel)[None, :]]
                x = plgpu.load(at, mask=here, other=0).astype(jnp.float32)
                return x * lax.rsqrt(jnp.sum(x * x, axis=1) + 1e-6)[:, None]

            q, k = normalised(0) * key_dim**-0.5, normalised(keys)
            a = plgpu.load(a_ref.at[token[:, None], head, channel[None, :]], mask=here, other=0).astype(jnp.float32)
            b = plgpu.load(b_ref.at[token, head], mask=valid, other=0).astype(jnp.float32)
            # What is no token neither decays nor writes.
            g = jnp.where(here, -rate * softplus(a + bias[None, :]), 0.0)
            beta = jnp.where(valid, scaled(sigmoid(b), beta_scale), 0.0)

            k_products, q_products = _within(q, k, g, sums, pairs)
            into = sums(step[:, None] >= step[None, :], g)
            entered_k, entered_q = k * jnp.exp(into), q * jnp.exp(into)
            # Later tokens are zeros in `left`, and so are the products above the diagonal.
            outer = n * TILE > everywhere
            beside = ~outer & (everywhere >= (n + 1) * TILE)
            at = (number, head, place[:, None])
            system = beta[:, None] * pairs(entered_k, left)
            plgpu.store(system_ref.at[(*at, everywhere[None, :])], system, mask=jnp.broadcast_to(outer, system.shape))
            scores = pairs(entered_q, left).astype(scores_ref.dtype)
            plgpu.store(
                scores_ref.at[(*at, everywhere[None, :])], scores, mask=jnp.broadcast_to(outer | beside, scores.shape)
            )
            plgpu.store(system_ref.at[(*at, place[None, :])], beta[:, None] * k_products)
            plgpu.store(scores_ref.at[(*at, place[None, :])], q_products.astype(scores_ref.dtype))
            plgpu.store(beta_ref.at[number, head, 0, place], beta)

            before = jnp.exp(total)[None, :]
            store(read_k_ref, place, entered_k * before)
            store(read_q_ref, place, entered_q * before)
            behind = k * jnp.exp(sums(step[:, None] < step[None, :], g))
            of_part = jnp.sum(g, axis=0)
            moved = dot(jnp.where(everywhere[:, None] == place[None, :], 1.0, 0.0), behind, precision=precision)
            return left * jnp.exp(of_part)[None, :] + moved, total + of_part

        nothing = jnp.zeros((size, channel.size), jnp.float32), jnp.zeros((channel.size,), jnp.float32)
        left, total = lax.fori_loop(0, size // TILE, one_part, nothing)
        store(write_k_ref, everywhere, left)
        plgpu.store(keep_ref.at[number, head, channel], jnp.exp(total), mask=real)

    pl.when(length > 0)(run)


def _within(q, k, g, sums, pairs) -> tuple[Array, Array]:
    """Products of the keys of a sub-chunk, below its diagonal, and of queries and keys, with it; zeros above."""
    step = jnp.arange(TILE, dtype=jnp.int32)
    row, column = step[:, None], step[None, :]
    k_products = jnp.zeros((TILE, TILE), jnp.float32)
    q_products = jnp.where(row == column, jnp.sum(q * k, axis=1)[:, None], 0.0)
    width = TILE // 2
    while width:
        # Of each group of twice the width: later tokens decay from its middle on, earlier ones up to it.
        later = row & width != 0
        decay = jnp.exp(sums((row ^ column < width) & (later & (column <= row) | ~later & (column > row)), g))
        decayed = k * decay
        met = later & ((row ^ column) & -width == width)
        k_products += jnp.where(met, pairs(decayed, decayed), 0.0)
        q_products += jnp.where(met, pairs(q * decay, decayed), 0.0)
        width //= 2
    return k_products, q_products
