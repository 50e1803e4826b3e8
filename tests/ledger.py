"""A model of exact integers in the seats of the real layers, and what it must produce, in plain Python.

Everything is modulo 2^32. A delta layer convolves its input with the last three (the window), folds the result into a
state of K x V numbers, S <- a S + b u, and reads all of S; an attention layer stores its input in the paged cache and
adds up a hash of every (key, value, position) up to its own. So a wrong slot, block, window, position, layout bit or
length changes the hidden number, and with it the next token and every one after it.

The numbers go through the real step, pools, contexts and sampler. `Oracle` computes the same with Python integers, one
sequence at a time, and knows nothing of slots, blocks, chunks or batches.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdnjax import sharding
from gdnjax.config import CHUNK
from gdnjax.memory import StateGeometry
from gdnjax.models.context import DecodeContext, PrefillContext
from gdnjax.pallas_kernels import paged_attention
from gdnjax.state import GDNState, KVBlocks

PATTERN = "DAD"
HEADS = 2
KEY_DIM, VALUE_DIM = 2, 3
"""Different, so that a state read in the wrong layout is another state."""
TAPS = 4
KV_HEADS, HEAD_DIM = 2, 2
BITS = 24
"""Integers below 2^24 are exact in float32, the dtype of the paged cache and of logits."""
LOGIT_BITS = 20
MASK = (1 << 32) - 1


@dataclasses.dataclass(frozen=True)
class LedgerModel:
    """A `gdnjax.models.Model` of one of `tp` ranks."""

    vocab_size: int = 61
    tp: int = 1

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.tp) * self.tp

    def geometry(self, block_size: int, ssm_dtype: str) -> StateGeometry:
        """Integers whatever `ssm_dtype` says."""
        return StateGeometry(
            delta_layers=PATTERN.count("D"),
            value_heads=HEADS // self.tp,
            state_size=KEY_DIM * VALUE_DIM,
            conv_rows=TAPS - 1,
            conv_dim=HEADS // self.tp,
            attention_layers=PATTERN.count("A"),
            kv_heads=KV_HEADS // self.tp,
            head_dim=HEAD_DIM,
            vocab_size=self.padded_vocab_size // self.tp,
            block_size=block_size,
            ssm_dtype="uint32",
            conv_dtype="uint32",
            kv_dtype="float32",
            hidden_size=1,
            hidden_dtype="uint32",
        )

    def params(self) -> dict:
        """Multipliers under the names that the sharding table knows; global shapes, all odd."""
        numbers = np.random.default_rng(7)

        def odd(*shape):
            return {"weight": numbers.integers(0, 1 << 32, shape, np.uint32) | np.uint32(1)}

        # Drawn before what depends on the ranks, so that all ranks' models are one.
        head, embedding = odd(1 << 12)["weight"], odd(1 << 12)["weight"]
        layers = {}
        for i, kind in enumerate(PATTERN):
            if kind == "D":
                layers[i] = {
                    "linear_attn": {
                        "in_proj_qkv": odd(HEADS),
                        "conv1d": odd(HEADS, TAPS),
                        "A_log": odd(HEADS, KEY_DIM * VALUE_DIM)["weight"],
                        "in_proj_b": odd(HEADS, KEY_DIM * VALUE_DIM),
                        "out_proj": odd(KEY_DIM * VALUE_DIM, HEADS),
                    }
                }
            else:
                layers[i] = {"self_attn": {"k_proj": odd(KV_HEADS), "v_proj": odd(KV_HEADS)}}
        return {
            "embed_tokens": {"weight": embedding[: self.padded_vocab_size]},
            "layers": layers,
            "lm_head": {"weight": head[: self.padded_vocab_size]},
        }

    def forward(self, params, tokens, context, gdn, kv):
        x = self._embed(params["embed_tokens"]["weight"], tokens)
        rows = {"D": 0, "A": 0}
        for i, kind in enumerate(PATTERN):
            weights, row = params["layers"][i], rows[kind]
            if kind == "D":
                out, gdn = _delta_layer(weights["linear_attn"], x, context, gdn, row)
            else:
                out, kv = _attention_layer(weights["self_attn"], x, context, kv, row)
            x = _mix(x + sharding.psum(out, self.tp))
            rows[kind] += 1
        return x[:, None], gdn, kv

    def _embed(self, weight, tokens):
        local = tokens - sharding.rank(self.tp) * weight.shape[0]
        mine = (local >= 0) & (local < weight.shape[0])
        return sharding.psum(jnp.where(mine, weight[jnp.clip(local, 0, weight.shape[0] - 1)], 0), self.tp)

    def logits(self, params, hidden):
        weight = params["lm_head"]["weight"]
        token = jnp.arange(weight.shape[0]) + sharding.rank(self.tp) * weight.shape[0]
        bits = _mix(hidden ^ weight) >> (32 - LOGIT_BITS)
        # 0 to 16, exact: wide enough that sampling has favourites, narrow enough that it has choices.
        logits = bits.astype(jnp.float32) * 2.0 ** (4 - LOGIT_BITS)
        return jnp.where(token < self.vocab_size, logits, -jnp.inf)


def _mix(x):
    """A bijection of 32-bit numbers in which every input bit reaches every output bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _delta_layer(weights, x, context, gdn, layer):
    channels = x[:, None] * weights["in_proj_qkv"]["weight"]
    multipliers = weights["A_log"], weights["in_proj_b"]["weight"]
    taps = weights["conv1d"]["weight"]
    match context:
        case PrefillContext():
            u, conv = _conv_prefill(channels, taps, gdn.conv, layer, context)
            states, ssm = _delta_prefill(u, *multipliers, gdn.ssm, layer, context)
        case DecodeContext():
            u, conv = _conv_decode(channels, taps, gdn.conv, layer, context)
            states, ssm = _delta_decode(u, *multipliers, gdn.ssm, layer, context)
    out = jnp.sum(states * weights["out_proj"]["weight"].T, axis=(1, 2), dtype=jnp.uint32)
    return out, GDNState(ssm=ssm, conv=conv, layout=gdn.layout)


def _conv_prefill(x, taps, conv, layer, context):
    rows, chunks = context.rows, context.chunks
    width = taps.shape[1] - 1
    window = jnp.where(rows.fresh[:, None, None], 0, conv[layer, rows.read_slot])

    def back(offset, place, row, steps):
        """The input `steps` before `offset` of a row's piece, whose place in the packed batch is `place`."""
        packed = x[jnp.clip(place - steps, 0, x.shape[0] - 1)]
        stored = window[row, jnp.clip(width + offset - steps, 0, width - 1)]
        return jnp.where((offset >= steps)[:, None], packed, stored)

    place = jnp.arange(x.shape[0])
    inputs = [back(rows.token_offset, place, rows.token_row, width - tap) for tap in range(width + 1)]
    u = sum(inputs[tap] * taps[:, tap] for tap in range(width + 1))

    def window_at(offset, place, row):
        return jnp.stack([back(offset, place, row, width - i) for i in range(width)], axis=1)

    row = jnp.arange(rows.length.shape[0])
    conv = conv.at[layer, rows.write_slot].set(window_at(rows.length, rows.start + rows.length, row))
    if chunks.checkpoint is not None:
        kept = window_at(chunks.end - rows.start[chunks.row], chunks.end, chunks.row)
        conv = conv.at[layer, chunks.checkpoint].set(kept)
    return u, conv


def _conv_decode(x, taps, conv, layer, context):
    inputs = jnp.concatenate([conv[layer, context.read_slot], x[:, None]], axis=1)
    u = jnp.sum(inputs * taps.T, axis=1, dtype=jnp.uint32)
    return u, conv.at[layer, context.write_slot].set(inputs[:, 1:])


def _read_states(ssm, layer, slot, vk):
    flat = ssm[layer, slot]
    as_vk = flat.reshape(*flat.shape[:-1], VALUE_DIM, KEY_DIM).swapaxes(-1, -2).reshape(flat.shape)
    if isinstance(vk, bool):
        return as_vk if vk else flat
    return jnp.where(vk[:, None, None], as_vk, flat)


def _write_states(ssm, layer, slot, states, vk):
    if vk:
        states = states.reshape(*states.shape[:-1], KEY_DIM, VALUE_DIM).swapaxes(-1, -2).reshape(states.shape)
    return ssm.at[layer, slot].set(states)


def _delta_decode(u, a, b, ssm, layer, context):
    states = a * _read_states(ssm, layer, context.read_slot, context.order.read) + b * u[:, :, None]
    return states, _write_states(ssm, layer, context.write_slot, states, context.order.write)


def _delta_prefill(u, a, b, ssm, layer, context):
    """Chunk by chunk, as the real op: within a chunk S_i = a^(i+1) (S + sum_(j <= i) a^-(j+1) b u_j)."""
    rows, chunks = context.rows, context.chunks
    states = _read_states(ssm, layer, rows.read_slot, context.order.read)
    states = jnp.where(rows.fresh[:, None, None], 0, states)
    powers = jnp.cumprod(jnp.tile(a, (CHUNK, 1, 1)), axis=0, dtype=jnp.uint32)
    inverses = jnp.cumprod(jnp.tile(_inverse(a), (CHUNK, 1, 1)), axis=0, dtype=jnp.uint32)
    inputs = chunks.gather(u)[..., None] * b * inverses
    count = jnp.sum(chunks.valid, axis=1)

    def one_chunk(states, chunk):
        row, inputs, count = chunk
        after = powers * (states[row] + jnp.cumsum(inputs, axis=0, dtype=jnp.uint32))
        last = jnp.where(count > 0, after[jnp.maximum(count - 1, 0)], states[row])
        return states.at[row].set(last), (after, last)

    states, (after, last) = lax.scan(one_chunk, states, (chunks.row, inputs, count))
    ssm = _write_states(ssm, layer, rows.write_slot, states, context.order.write)
    if chunks.checkpoint is not None:
        ssm = _write_states(ssm, layer, chunks.checkpoint, last, context.order.write)
    return chunks.scatter(after), ssm


def _inverse(a):
    """1 / a modulo 2^32 for odd a: each turn doubles the number of right bits."""
    inverse = a
    for _ in range(4):
        inverse = inverse * (jnp.uint32(2) - a * inverse)
    return inverse


def _attention_layer(weights, x, context, kv, layer):
    x = x.astype(jnp.uint32)
    position = context.position.astype(jnp.uint32)
    k = x[:, None] * weights["k_proj"]["weight"]
    v = (x ^ position)[:, None] * weights["v_proj"]["weight"]
    k, v = (jnp.stack([y & (2**BITS - 1), y >> BITS], axis=-1).astype(jnp.float32) for y in (k, v))
    places = context.places
    k_blocks = paged_attention.write(kv.k, layer, k, places.block, places.offset)
    v_blocks = paged_attention.write(kv.v, layer, v, places.block, places.offset)
    sums = _sum_keys(k_blocks, v_blocks, layer, context.tiles)
    match context:
        case PrefillContext():
            out = context.chunks.scatter(sums)
        case DecodeContext():
            out = sums[:, 0]
    return out, KVBlocks(k=k_blocks, v=v_blocks)


def _sum_keys(k_blocks, v_blocks, layer, tiles):
    """The sum over all positions up to each query's own of a hash of position, key and value: [g, q]."""
    count = tiles.position.shape[0]
    keys, values = (
        pool[layer, tiles.block_table].astype(jnp.uint32).reshape(count, -1, *pool.shape[3:])
        for pool in (k_blocks, v_blocks)
    )
    key, value = (part[..., 0] | (part[..., 1] << BITS) for part in (keys, values))
    position = jnp.arange(key.shape[1], dtype=jnp.uint32)[:, None]
    hashed = jnp.sum(_mix(key ^ _mix(value + position)), axis=-1, dtype=jnp.uint32)
    # What no query may see is selected away, poison included.
    seen = jnp.max(tiles.position, axis=1)[:, None] >= position[:, 0].astype(jnp.int32)
    seen &= position[:, 0].astype(jnp.int32) < tiles.longest
    total = jnp.cumsum(jnp.where(seen, hashed, 0), axis=1, dtype=jnp.uint32)
    return jnp.take_along_axis(total, jnp.maximum(tiles.position, 0), axis=1)


class Oracle:
    """What a request of the ledger model must produce. Greedy only; Python integers only."""

    def __init__(self, model: LedgerModel):
        self._vocab_size = model.vocab_size
        self._params = jax.tree.map(lambda leaf: leaf.tolist(), model.params())
        self._greedy = functools.cache(self._start)

    def solo_run(self, prompt, max_tokens: int, stop_token_ids=()) -> list[int]:
        """The tokens of a greedy request, up to and including the first that ends it."""
        run = self._greedy(tuple(prompt))
        produced = []
        for i in range(max_tokens):
            while len(run.tokens) <= i:
                run.feed(run.tokens[-1])
            produced.append(run.tokens[i])
            if produced[-1] in stop_token_ids:
                break
        return produced

    def _start(self, prompt: tuple[int, ...]) -> "_Sequence":
        run = _Sequence(self._params, self._vocab_size)
        for token in prompt[:-1]:
            run.fold(token)
        run.feed(prompt[-1])
        return run


class _Sequence:
    """One sequence as far as it has come, with the greedy continuation drawn so far."""

    def __init__(self, params, vocab_size: int):
        self._params, self._vocab_size = params, vocab_size
        self._states = [[[0] * (KEY_DIM * VALUE_DIM) for _ in range(HEADS)] for _ in PATTERN]
        self._windows = [[0] * (TAPS - 1) for _ in PATTERN]
        self._sums = [0] * len(PATTERN)
        self._position = 0
        self.tokens: list[int] = []

    def feed(self, token: int) -> None:
        """Folds a token and draws its successor."""
        hidden = self.fold(token)
        weights = self._params["lm_head"]["weight"]
        logits = [_mix_int(hidden ^ weights[v]) >> (32 - LOGIT_BITS) for v in range(self._vocab_size)]
        self.tokens.append(logits.index(max(logits)))

    def fold(self, token: int) -> int:
        x = self._params["embed_tokens"]["weight"][token]
        for i, kind in enumerate(PATTERN):
            out = self._delta(i, x) if kind == "D" else self._attend(i, x)
            x = _mix_int((x + out) & MASK)
        self._position += 1
        return x

    def _delta(self, layer: int, x: int) -> int:
        weights = self._params["layers"][layer]["linear_attn"]
        inputs = [*self._windows[layer], x]
        self._windows[layer] = inputs[1:]
        out = 0
        for head, state in enumerate(self._states[layer]):
            scale, taps = weights["in_proj_qkv"]["weight"][head], weights["conv1d"]["weight"][head]
            u = sum(scale * value * tap for value, tap in zip(inputs, taps, strict=True))
            a, b = weights["A_log"][head], weights["in_proj_b"]["weight"][head]
            state[:] = [(a[i] * state[i] + b[i] * u) & MASK for i in range(len(state))]
            out += sum(weights["out_proj"]["weight"][i][head] * state[i] for i in range(len(state)))
        return out

    def _attend(self, layer: int, x: int) -> int:
        weights = self._params["layers"][layer]["self_attn"]
        for k, v in zip(weights["k_proj"]["weight"], weights["v_proj"]["weight"], strict=True):
            value = ((x ^ self._position) * v + self._position) & MASK
            # The stored value has 32 bits, and the position of a key is where the block table puts it.
            self._sums[layer] += _mix_int((x * k & MASK) ^ _mix_int(value))
        return self._sums[layer]


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)
