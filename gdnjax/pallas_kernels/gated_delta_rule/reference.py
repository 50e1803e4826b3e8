"""The definition: the recurrence, token by token, and the chunked form that equals it. Float32 throughout."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gdnjax.backend import FLOAT32_DOT
from gdnjax.pallas_kernels.gated_delta_rule.rounding import Rounding, rounded_states
from gdnjax.pallas_kernels.pools import read_rows, write_rows
from gdnjax.pallas_kernels.rows import Chunks
from gdnjax.shapes import Array

TILE = 16
"""Rows inverted one after another; larger blocks of the inverse are merged from these."""


def split_qkv(qkv: Array, value_heads: int, key_dim: int, value_dim: int) -> tuple[Array, Array, Array]:
    """[..., x] -> q, k [..., hv, K] normalised (q scaled), v [..., hv, V]: float32, key heads repeated."""
    key_heads = (qkv.shape[-1] - value_heads * value_dim) // (2 * key_dim)
    q, k, v = jnp.split(qkv.astype(jnp.float32), [key_heads * key_dim, 2 * key_heads * key_dim], axis=-1)
    q = l2_normalise(q.reshape(*q.shape[:-1], key_heads, key_dim)) * key_dim**-0.5
    k = l2_normalise(k.reshape(*k.shape[:-1], key_heads, key_dim))
    repeats = value_heads // key_heads
    q, k = (jnp.repeat(heads, repeats, axis=-2) for heads in (q, k))
    return q, k, v.reshape(*v.shape[:-1], value_heads, value_dim)


def l2_normalise(x: Array) -> Array:
    return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def decay_and_beta(gates) -> tuple[Array, Array]:
    """g (log decay, at most 0), [..., hv] or [..., hv, K], and beta (write strength), [..., hv]: float32."""
    softplus = jax.nn.softplus(gates.a.astype(jnp.float32) + gates.dt_bias.astype(jnp.float32))
    rate = jnp.exp(gates.A_log.astype(jnp.float32))
    beta = gates.beta_scale * jax.nn.sigmoid(gates.b.astype(jnp.float32))
    return -(rate[:, None] if gates.per_channel else rate) * softplus, beta


def delta_step(state: Array, q: Array, k: Array, v: Array, g: Array, beta: Array) -> tuple[Array, Array]:
    """One token: state [..., K, V], q, k [..., K], v [..., V], g [...] or [..., K], beta [...] -> o, new state."""
    state = _over_values(jnp.exp(g), state) * state
    predicted = jnp.einsum("...kv,...k->...v", state, k, precision=FLOAT32_DOT)
    state = state + k[..., :, None] * (beta[..., None] * (v - predicted))[..., None, :]
    return jnp.einsum("...kv,...k->...v", state, q, precision=FLOAT32_DOT), state


def _over_values(keep: Array, state: Array) -> Array:
    """A decay, of a head or of its key channels, to be multiplied with states [..., K, V]."""
    return keep[..., None] if keep.ndim == state.ndim - 1 else keep[..., None, None]


def read_states(ssm: Array, layer: int, slot: Array, vk: bool | Array, key_dim: int) -> Array:
    """[n, hv, K, V] float32 of the slots, from either layout."""
    flat = read_rows(ssm, layer, slot).astype(jnp.float32)
    value_dim = flat.shape[-1] // key_dim
    as_kv = flat.reshape(*flat.shape[:-1], key_dim, value_dim)
    if vk is False:
        return as_kv
    as_vk = flat.reshape(*flat.shape[:-1], value_dim, key_dim).swapaxes(-1, -2)
    return as_vk if vk is True else jnp.where(vk[:, None, None, None], as_vk, as_kv)


def write_states(
    ssm: Array, layer: int, slot: Array, states: Array, vk: bool, rounding: Rounding | None = None
) -> Array:
    """The pool with [n, hv, K, V] stored at the slots, in the layout asked for."""
    if rounding is not None:
        states = rounded_states(states, rounding.keys, rounding.first_head, layer)
    return write_rows(ssm, layer, slot, rows=_as_rows(states, vk))


def _as_rows(states: Array, vk: bool) -> Array:
    """[..., K, V] -> [..., K * V] in the layout asked for."""
    stored = states.swapaxes(-1, -2) if vk else states
    return stored.reshape(*states.shape[:-2], -1)


def decode(qkv, gates, ssm, layer, read_slot, write_slot, order, key_dim, rounding) -> tuple[Array, Array]:
    heads, value_dim = ssm.shape[2], ssm.shape[3] // key_dim
    q, k, v = split_qkv(qkv, heads, key_dim, value_dim)
    g, beta = decay_and_beta(gates)
    o, states = delta_step(read_states(ssm, layer, read_slot, order.read, key_dim), q, k, v, g, beta)
    return o.astype(qkv.dtype), write_states(ssm, layer, write_slot, states, order.write, rounding)


def verify(
    qkv, gates, ssm, layer, read_slot, write_slot, pending, order, key_dim, new, rounding
) -> tuple[Array, Array]:
    inputs = _row_inputs(qkv, gates, ssm, key_dim)
    old = qkv.shape[1] - new
    states = read_states(ssm, layer, read_slot, order.read, key_dim)
    states = _fold(states, [x[:old] for x in inputs], pending)
    _, o = lax.scan(_one_row, states, [x[old:] for x in inputs])
    return o.swapaxes(0, 1).astype(qkv.dtype), write_states(ssm, layer, write_slot, states, order.write, rounding)


def fold(qkv, gates, ssm, layer, read_slot, write_slot, count, order, key_dim, rounding) -> Array:
    states = read_states(ssm, layer, read_slot, order.read, key_dim)
    states = _fold(states, _row_inputs(qkv, gates, ssm, key_dim), count)
    return write_states(ssm, layer, write_slot, states, order.write, rounding)


def _row_inputs(qkv, gates, ssm, key_dim) -> list[Array]:
    """q, k, v, g, beta of [n, rows, ...] as [rows, n, ...]: one row of every request after another."""
    q, k, v = split_qkv(qkv, ssm.shape[2], key_dim, ssm.shape[3] // key_dim)
    return [x.swapaxes(0, 1) for x in (q, k, v, *decay_and_beta(gates))]


def _fold(states: Array, inputs: list[Array], count: Array) -> Array:
    """The states with the first `count[i]` rows of request i folded in. Others are selected away."""

    def one_row(j, states):
        folded, _ = _one_row(states, [x[j] for x in inputs])
        return jnp.where((j < count)[:, None, None, None], folded, states)

    # Rows that no request has pending cost nothing.
    return lax.fori_loop(0, jnp.max(count), one_row, states)


def _one_row(states: Array, row: list[Array]) -> tuple[Array, Array]:
    o, states = delta_step(states, *row)
    return states, o


def prefill(qkv, gates, ssm, layer, rows, chunks, order, key_dim, rounding) -> tuple[Array, Array]:
    heads, value_dim = ssm.shape[2], ssm.shape[3] // key_dim
    q, k, v = split_qkv(qkv, heads, key_dim, value_dim)
    g, beta = decay_and_beta(gates)
    # [c, q, hv, ...] -> [c, hv, q, ...]; a padded token has k = v = beta = g = 0 and changes nothing.
    q, k, v, g, beta = (chunks.gather(x).swapaxes(1, 2) for x in (q, k, v, g, beta))
    states = read_states(ssm, layer, rows.read_slot, order.read, key_dim)
    states = jnp.where(rows.fresh[:, None, None, None], 0, states)
    terms = (channel_chunk_terms if gates.per_channel else chunk_terms)(q, k, v, g, beta)
    if chunks.checkpoint is None:
        o, states = scan_chunks(terms, chunks.row, states)
    else:
        o, states, ssm = scan_and_keep(terms, chunks, states, ssm, layer, order.write, rounding)
    o = chunks.scatter(o.swapaxes(1, 2)).astype(qkv.dtype)
    return o, write_states(ssm, layer, rows.write_slot, states, order.write, rounding)


class ChunkTerms(NamedTuple):
    """What chunks do to a state, as far as it does not depend on that state. In a scan without the first axis."""

    new_values: Array  # [c, h, i, V]
    old_keys: Array  # [c, h, i, K]
    scores: Array  # [c, h, i, i]
    q_decayed: Array  # [c, h, i, K]
    k_rest: Array  # [c, h, i, K]
    keep: Array  # [c, h] or [c, h, K]


def chunk_terms(q, k, v, g, beta) -> ChunkTerms:
    """The chunked form up to the states. q, k [c, h, i, K], v [c, h, i, V], g, beta [c, h, i].

    With G the running sum of g in a chunk and D_ij = exp(G_i - G_j) for i >= j, the new values of a chunk solve
    (I + tril(beta_i k_i.k_j D_ij, -1)) U = beta (v - exp(G) k S), a unit triangular system.
    """
    total = jnp.cumsum(g, axis=-1)
    size = g.shape[-1]
    causal = jnp.tril(jnp.ones((size, size), bool))
    # Above the diagonal the difference is positive and may overflow: selected away before exp.
    decay = jnp.exp(jnp.where(causal, total[..., :, None] - total[..., None, :], -jnp.inf))
    k_beta = k * beta[..., None]
    system = _dot("chik,chjk->chij", k_beta, k) * decay
    right = jnp.concatenate([v * beta[..., None], k_beta * jnp.exp(total)[..., None]], axis=-1)
    solved = _dot("chij,chjk->chik", unit_lower_inverse(system), right)
    return ChunkTerms(
        new_values=solved[..., : v.shape[-1]],
        old_keys=solved[..., v.shape[-1] :],
        scores=_dot("chik,chjk->chij", q, k) * decay,
        q_decayed=q * jnp.exp(total)[..., None],
        k_rest=k * jnp.exp(total[..., -1:] - total)[..., None],
        keep=jnp.exp(total[..., -1]),
    )


def channel_chunk_terms(q, k, v, g, beta) -> ChunkTerms:
    """The same of a decay per channel, g [c, h, i, K], which cannot be taken out of the products:

    (I + tril(beta_i sum_d k_i[d] k_j[d] D_ij[d], -1)) U = beta (v - (exp(G) k) S)
    """
    decayed = channel_products(q, k, g)
    right = jnp.concatenate([v * beta[..., None], k * beta[..., None] * decayed.before], axis=-1)
    solved = _dot("chij,chjk->chik", unit_lower_inverse(beta[..., None] * decayed.keys), right)
    return ChunkTerms(
        new_values=solved[..., : v.shape[-1]],
        old_keys=solved[..., v.shape[-1] :],
        scores=decayed.scores,
        q_decayed=q * decayed.before,
        k_rest=k * decayed.behind,
        keep=decayed.before[..., -1, :],
    )


class ChannelProducts(NamedTuple):
    """Products of the tokens of a chunk, D_ij = exp(G_i - G_j) between them, and the decays to its two ends."""

    keys: Array  # [c, h, i, i]: sum_d k_i k_j D_ij; above the diagonal zeros
    scores: Array  # [c, h, i, i]: sum_d q_i k_j D_ij; above the diagonal zeros
    before: Array  # [c, h, i, K]: exp(G_i)
    behind: Array  # [c, h, i, K]: exp(G_last - G_i)


def channel_products(q, k, g) -> ChannelProducts:
    """q, k, g [c, h, i, K]. exp(G_i) exp(-G_j) would overflow, and a difference of running sums loses what is small.

    So a chunk is cut into sub-chunks of TILE. Tokens of two of them are multiplied as both decay to the first token of
    the later one: from there to i, and from j to there. Within a sub-chunk the decay of each pair is summed by itself.
    All exponents are sums of g over the tokens between, at most 0.
    """
    size, width = g.shape[-2], math.gcd(g.shape[-2], TILE)
    # [..., i, K] -> [..., p, i, K], and a pair (n, m) of sub-chunks, n behind m.
    in_parts = [x.reshape(*x.shape[:-2], -1, width, x.shape[-1]) for x in (k, q, g)]
    both, k_parts, g_parts = jnp.stack(in_parts[:2]), in_parts[0], in_parts[2]
    part = jnp.arange(size // width)
    n, m, between = part[:, None, None], part[:, None], part
    whole = jnp.sum(g_parts, axis=-2)[..., None, None, :, :]
    gap = jnp.sum(jnp.where(((m < between) & (between < n))[..., None], whole, 0.0), axis=-2)
    gap = jnp.where(m < n, gap, -jnp.inf)
    entered = both * jnp.exp(jnp.cumsum(g_parts, axis=-2))
    left = k_parts[..., None, :, :, :] * jnp.exp(_sum_behind(g_parts)[..., None, :, :, :] + gap[..., None, :])
    products = _dot("xchnik,chnmjk->xchnimj", entered, left)
    same = (part[:, None] == part)[:, None, :, None]
    products = jnp.where(same, _within(both, k_parts, g_parts)[..., :, None, :], products)
    keys, scores = products.reshape(*products.shape[:3], size, size)
    return ChannelProducts(keys, scores, jnp.exp(jnp.cumsum(g, axis=-2)), jnp.exp(_sum_behind(g)))


def _sum_behind(g: Array) -> Array:
    """[..., i, K]: of each token the sum over those behind it, without its own."""
    shifted = jnp.concatenate([g[..., 1:, :], jnp.zeros_like(g[..., :1, :])], axis=-2)
    return lax.cumsum(shifted, axis=shifted.ndim - 2, reverse=True)


def _within(both: Array, k: Array, g: Array) -> Array:
    """[2, ..., i, K], k and g [..., i, K] of sub-chunks -> [2, ..., i, i], zeros above the diagonal."""
    place = jnp.arange(g.shape[-2])

    def one_row(sums, i):
        """`sums` [..., j, K]: of g over the tokens behind j, up to row i - 1; and for the next row up to i."""
        sums = jnp.where((place < i)[:, None], sums + lax.dynamic_index_in_dim(g, i, axis=-2), 0.0)
        row = lax.dynamic_index_in_dim(both, i, axis=-2, keepdims=False)
        products = _dot("x...k,...jk->x...j", row, k * jnp.exp(sums))
        return sums, jnp.where(place <= i, products, 0.0)

    _, rows = lax.scan(one_row, jnp.zeros_like(g), place)
    return jnp.moveaxis(rows, 0, -2)


def chunk_step(state: Array, terms: ChunkTerms) -> tuple[Array, Array]:
    """One chunk: state [h, K, V] -> o [h, i, V], new state."""
    written = terms.new_values - _dot("hik,hkv->hiv", terms.old_keys, state)
    o = _dot("hik,hkv->hiv", terms.q_decayed, state) + _dot("hij,hjv->hiv", terms.scores, written)
    return o, _over_values(terms.keep, state) * state + _dot("hik,hiv->hkv", terms.k_rest, written)


def scan_chunks(terms: ChunkTerms, row: Array, states: Array) -> tuple[Array, Array]:
    """All chunks one after another: row [c], states [r, h, K, V] -> o [c, h, i, V], new states."""

    def one_chunk(states, chunk):
        row, terms = chunk
        o, state = chunk_step(states[row], terms)
        return states.at[row].set(state), o

    states, o = lax.scan(one_chunk, states, (row, terms))
    return o, states


def scan_and_keep(
    terms: ChunkTerms, chunks: Chunks, states: Array, ssm: Array, layer: int, vk: bool, rounding: Rounding | None
) -> tuple[Array, Array, Array]:
    """`scan_chunks`, and the pool with the state behind each chunk at the chunk's checkpoint."""

    def one_chunk(carry, chunk):
        states, ssm = carry
        row, checkpoint, keys, terms = chunk
        o, state = chunk_step(states[row], terms)
        # One state, in place inside a loop that carries the pool.
        noise = None if rounding is None else dataclasses.replace(rounding, keys=keys[None])
        return (states.at[row].set(state), write_states(ssm, layer, checkpoint[None], state[None], vk, noise)), o

    keys = None if rounding is None else rounding.checkpoints
    (states, ssm), o = lax.scan(one_chunk, (states, ssm), (chunks.row, chunks.checkpoint, keys, terms))
    return o, states, ssm


@jax.custom_jvp
def unit_lower_inverse(matrix: Array) -> Array:
    """(I + tril(matrix, -1))^-1 of [..., n, n]: substitution in tiles of TILE rows, then pairs of tiles merge.

    What stands on and above the diagonal is not read. The inverse by Neumann doubling (I - A)(I + A^2)... is all
    products but loses every digit where keys are correlated; a library's triangular solve starts threads, or leaves
    the device's own code, for systems as small as these.
    """
    size = matrix.shape[-1]
    lower = jnp.tril(matrix, -1)
    width = math.gcd(size, TILE)
    tiles = jnp.stack([lower[..., i : i + width, i : i + width] for i in range(0, size, width)], axis=-3)

    def one_row(i, inverse):
        # Row i of the inverse is e_i minus what the rows above it contribute; rows below i are still those of I.
        row = lax.dynamic_index_in_dim(tiles, i, axis=-2, keepdims=False)
        row = jax.nn.one_hot(i, width) - _dot("...j,...jk->...k", row, inverse)
        return lax.dynamic_update_index_in_dim(inverse, row, i, axis=-2)

    inverse = lax.fori_loop(1, width, one_row, jnp.broadcast_to(jnp.eye(width), tiles.shape))
    while width < size:
        # [[X, 0], [-Y B X, Y]] inverts [[x, 0], [B, y]] where X and Y invert x and y.
        below = jnp.stack([lower[..., i + width : i + 2 * width, i : i + width] for i in range(0, size, 2 * width)], -3)
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = -_dot("...ij,...jk->...ik", second, _dot("...ij,...jk->...ik", below, first))
        upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([upper, jnp.concatenate([corner, second], axis=-1)], axis=-2)
        width *= 2
    return inverse[..., 0, :, :]


@unit_lower_inverse.defjvp
def _differentiate_inverse(primals, tangents):
    """d(L^-1) = -L^-1 dL L^-1: two products, where the loop's own derivative would keep every step of it."""
    inverse = unit_lower_inverse(*primals)
    tangent = _dot("...ij,...jk->...ik", jnp.tril(tangents[0], -1), inverse)
    return inverse, -_dot("...ij,...jk->...ik", inverse, tangent)


def _dot(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, precision=FLOAT32_DOT)
