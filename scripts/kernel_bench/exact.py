"""Every op once more, from its formula, in float64: short, slow, and none of the package's code.

Run under jax.enable_x64(True). Each returns (outputs, the rows that the call writes), to be compared with the op's.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.random import threefry_2x32

from gdnjax.quantized import Quantized


def padded(exact, real: int):
    """`exact` of the first `real` rows, where there are no others: what padding gives is an implementation's own."""

    def function(x, pools, layer):
        return jax.tree.map(lambda rows: rows[:real], exact(x, pools, layer))

    return function


def _double(x):
    return x.astype(jnp.float64)


def _delta_inputs(qkv, gates, heads, key_dim, value_dim):
    """[..., hv, ...] of every token: q, k, v, exp(g) of heads or of their key channels, beta."""
    qkv = _double(qkv)
    keys = (qkv.shape[-1] - heads * value_dim) // 2
    repeats = heads * key_dim // keys
    q, k, v = jnp.split(qkv, [keys, 2 * keys], axis=-1)
    lead = qkv.shape[:-1]

    def normal(x):
        x = x.reshape(*lead, -1, key_dim)
        return jnp.repeat(x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6), repeats, axis=-2)

    rate = jnp.exp(_double(gates.A_log)).reshape(-1, *(1,) * (gates.dt_bias.ndim - 1))
    keep = jnp.exp(-rate * jnp.log1p(jnp.exp(_double(gates.a) + _double(gates.dt_bias))))
    beta = gates.beta_scale / (1 + jnp.exp(-_double(gates.b)))
    return normal(q) * key_dim**-0.5, normal(k), v.reshape(*lead, heads, value_dim), keep, beta


def _delta_step(state, token):
    """state [..., hv, K, V]."""
    q, k, v, keep, beta = token
    state = keep.reshape(*beta.shape, -1, 1) * state
    written = beta[..., None] * (v - jnp.einsum("...kv,...k->...v", state, k))
    state = state + k[..., :, None] * written[..., None, :]
    return state, jnp.einsum("...kv,...k->...v", state, q)


def _as_states(rows, vk, key_dim):
    """[..., hv, K * V] of the pool -> [..., hv, K, V]."""
    rows = _double(rows)
    value_dim = rows.shape[-1] // key_dim
    if vk:
        return rows.reshape(*rows.shape[:-1], value_dim, key_dim).swapaxes(-1, -2)
    return rows.reshape(*rows.shape[:-1], key_dim, value_dim)


def _as_rows(states, vk):
    states = states.swapaxes(-1, -2) if vk else states
    return states.reshape(*states.shape[:-2], -1)


def recurrent(x, ssm, layer, *, old, kind, vk, key_dim):
    heads, value_dim = ssm.shape[2], ssm.shape[3] // key_dim
    inputs = _delta_inputs(x["qkv"], x["gates"], heads, key_dim, value_dim)
    if kind == "decode":
        state, o = _delta_step(_as_states(ssm[layer, x["slot"]], vk, key_dim), inputs)
        return o, _as_rows(state, vk)
    tokens = [part.swapaxes(0, 1) for part in inputs]
    state = _as_states(ssm[layer, x["slot"]], vk, key_dim)
    stored, _ = lax.scan(_delta_step, state, [part[:old] for part in tokens])
    if kind == "fold":
        return (), _as_rows(stored, vk)
    _, o = lax.scan(_delta_step, stored, [part[old:] for part in tokens])
    return o.swapaxes(0, 1), _as_rows(stored, vk)


def chunked(x, ssm, layer, *, lengths, vk, key_dim):
    heads, value_dim = ssm.shape[2], ssm.shape[3] // key_dim
    inputs = _delta_inputs(x["qkv"], x["gates"], heads, key_dim, value_dim)
    # Rows side by side, padded at their ends with tokens that neither decay nor write.
    longest = max(lengths)
    padded, at = [], 0
    for length in lengths:
        padded.append([part[at : at + length] for part in inputs])
        at += length

    def pad(part, fill):
        width = [(0, longest - part.shape[0])] + [(0, 0)] * (part.ndim - 1)
        return jnp.pad(part, width, constant_values=fill)

    fills = (0, 0, 0, 1, 0)
    tokens = [jnp.stack([pad(row[i], fills[i]) for row in padded], axis=1) for i in range(5)]
    state = jnp.zeros((len(lengths), heads, key_dim, value_dim), jnp.float64)
    state, o = lax.scan(_delta_step, state, tokens)
    return jnp.concatenate([o[:length, i] for i, length in enumerate(lengths)]), _as_rows(state, vk)


def _silu(x):
    return x / (1 + jnp.exp(-x))


def _convolve(inputs, weight):
    """[..., w + i, x] -> [..., i, x]."""
    taps = weight.shape[1]
    count = inputs.shape[-2] - taps + 1
    return _silu(sum(inputs[..., tap : tap + count, :] * _double(weight)[:, tap] for tap in range(taps)))


def conv_prefill(x, conv, layer, *, lengths):
    width = x["weight"].shape[1] - 1
    outputs, windows, at = [], [], 0
    for length in lengths:
        inputs = jnp.pad(_double(x["x"][at : at + length]), ((width, 0), (0, 0)))
        outputs.append(_convolve(inputs, x["weight"]))
        windows.append(inputs[-width:])
        at += length
    return jnp.concatenate(outputs), jnp.stack(windows)


def conv_update(x, conv, layer, *, pending):
    width = x["weight"].shape[1] - 1
    stored = _double(conv[layer, x["slot"]])
    new = _double(x["x"] if pending else x["x"][:, None])
    inputs = jnp.concatenate([stored, new], axis=1)
    y = _convolve(inputs, x["weight"])
    if not pending:
        return y[:, 0], inputs[:, -width:]
    return y, inputs[:, pending:]


def attention(x, pools, layer):
    """Tile by tile, every head."""
    group = x["q"].shape[2] // x["k"].shape[3]

    def one_tile(tile):
        q, position, table = tile
        k, v = (_double(part[layer, table].reshape(-1, *part.shape[3:])) for part in (x["k"], x["v"]))
        if x["scales"] is not None:
            k, v = (
                part * _double(scale[layer, table].reshape(-1, scale.shape[3], 1))
                for part, scale in zip((k, v), x["scales"], strict=True)
            )
        k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
        scores = jnp.einsum("qhd,khd->hqk", _double(q), k) * q.shape[-1] ** -0.5
        return jnp.einsum("hqk,khd->qhd", _weights(scores, position), v)

    return lax.map(one_tile, (x["q"], x["position"], x["table"])), ()


def _weights(scores, position):
    """Softmax of [h, q, k] over the keys up to each query's own."""
    seen = jnp.arange(scores.shape[-1])[None, :] <= position[:, None]
    return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)


def latent(x, pools, layer, *, value_dim, scale):
    """Tile by tile, every head over the same latents."""

    def one_tile(tile):
        q, position, table = tile
        c = _double(x["c"][layer, table].reshape(-1, x["c"].shape[-1]))
        scores = jnp.einsum("qhd,kd->hqk", _double(q), c) * scale
        return jnp.einsum("hqk,kd->qhd", _weights(scores, position), c[:, :value_dim])

    return lax.map(one_tile, (x["q"], x["position"], x["table"])), ()


def kv_write(x, pools, layer):
    return (), (_double(x["k"]), _double(x["v"]))


def enter(x, pools, layer):
    def turned(heads, weight):
        wide = _double(heads)
        wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6) * (1 + _double(weight))
        half = x["cos"].shape[1] // 2
        cos, sin = (_double(part)[:, None, :half] for part in (x["cos"], x["sin"]))
        first, second, rest = jnp.split(wide, [half, 2 * half], axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)

    return turned(x["q"][:, ::2], x["q_weight"]), (turned(x["k"], x["k_weight"]), _double(x["v"]))


def latent_write(x, pools, layer):
    return (), _double(x["c"])


def _matrix(weight):
    """Numbers as they are, codes times their scales."""
    if not isinstance(weight, Quantized):
        return _double(weight)
    at = [jnp.arange(size) // cell for size, cell in zip(weight.shape, weight.grid, strict=True)]
    return _double(weight.codes.astype(jnp.float32)) * _double(weight.scale)[at[0]][:, at[1]]


def products(x, pools, layer, *, gated):
    found = [_double(x["x"]) @ _matrix(weight).T for weight in x["weights"][layer]]
    if gated:
        return jax.nn.silu(found[0]) * found[1], ()
    return tuple(found), ()


def gated(x, pools, layer):
    heads, gate = _double(x["x"]), _double(x["gate"])
    heads = heads * lax.rsqrt(jnp.mean(heads * heads, axis=-1, keepdims=True) + 1e-6) * _double(x["weight"])
    return heads.reshape(gate.shape) * _silu(gate), ()


def activated(x, pools, layer):
    gate, up = jnp.split(_double(x["both"]), 2, axis=1)
    return _silu(gate) * up, ()


def normed(x, pools, layer):
    row = _double(x["x"]) + (jnp.sum(_double(x["added"]), axis=0) if "added" in x else 0)
    found = row * lax.rsqrt(jnp.mean(row * row, axis=-1, keepdims=True) + 1e-6) * (1 + _double(x["weight"]))
    return (row, found) if "added" in x else found, ()


def draws(x, pools, layer):
    """The best sum and the top of each row, noise from Threefry's bits rounded to float32."""
    token = jnp.arange(x["logits"].shape[1], dtype=jnp.uint32)

    def one_row(row):
        logits, temperature, seed, position = row
        key = threefry_2x32(seed, jnp.stack([position.astype(jnp.uint32), jnp.uint32(0)]))
        bits = threefry_2x32(key, jnp.concatenate([token, jnp.zeros_like(token)]))[: token.size]
        uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
        noise = jnp.where(temperature > 0, -jnp.log(-jnp.log1p(-_double(uniform))), 0.0)
        scaled = _double(logits) / jnp.where(temperature > 0, temperature, 1.0)
        return jnp.max(scaled + noise), jnp.max(scaled)

    return lax.map(one_row, (x["logits"], x["temperature"], x["seed"], x["position"])), ()


def choices(x, pools, layer, *, top: int):
    """The weights of the best of a softmax."""
    weight = jnp.sort(jax.nn.softmax(_double(x["logits"]), axis=-1), axis=-1)[:, : -top - 1 : -1]
    return (weight / jnp.sum(weight, axis=-1, keepdims=True),), ()


def order(x, pools, layer, *, experts: int):
    flat = x["expert"].reshape(-1)
    found = jnp.argsort(flat, stable=True)
    place = jnp.argsort(found).reshape(x["expert"].shape)
    return (found // x["expert"].shape[1], place, jnp.bincount(flat, length=experts)), ()


def every(rows: int) -> int:
    """Of so many rows of a product, each of these is compared: some 2,000 in all."""
    return -(-rows // 2048)


def grouped(x, pools, layer, *, own: int):
    """Expert by expert, over some of the first `own` rows."""
    step = every(own)
    expert = jnp.repeat(jnp.arange(x["sizes"].size), x["sizes"], total_repeat_length=own)[::step]
    rows = _double(x["x"][x["rows"][:own:step]])

    def one_expert(total, part):
        number, weight = part
        return total + jnp.where((expert == number)[:, None], rows, 0) @ _matrix(weight).T, None

    start = jnp.zeros((rows.shape[0], x["weight"].shape[1]), jnp.float64)
    total, _ = lax.scan(one_expert, start, (jnp.arange(x["sizes"].size), x["weight"]))
    return total, ()
