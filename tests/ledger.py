"""A model of exact integers in the seats of the real layers, and what it must produce, in plain Python.

Everything is modulo 2^32. A delta layer convolves its input with the last three (the window), folds the result u into a
state of K x V numbers under two gates of its own, S <- A a S + B (u + b), and reads all of S; an attention layer stores
its input in the paged cache and adds up a hash of every (key, value, position) up to its own. So a wrong slot, block,
window, gate, position, layout bit or length changes the hidden number, and with it the next token and every one after
it.

A ring layer (R) stores a number of each token in its ring and adds up a hash of the last SIGHT of them, each with its
age.

`pattern` gives the layers: of both kinds, of attention alone (no state, so a cached prefix goes on anywhere), delta
layers alone (no pages), or with rings.

With its MTP head (`mtp`) the model is one whose drafts are right about half of the time. Head and target both know a
guess: a hash of a token, its position and, where there is a window, the token before it. The target's final number is
the guess where two bits of its own say so (three times of four), the head's where two bits of a hash of the sum over
its own paged cache say so.
What the head stores holds the target's hidden state before each token. So the drafts of a step are a function of the
tokens before it, and a wrong row of the head's cache, or a wrong hidden state, gives other drafts, which are accepted
or rejected elsewhere.

The numbers go through the real step, pools, contexts and sampler. `Oracle` computes the same with Python integers, one
sequence at a time, and knows nothing of slots, blocks, chunks, batches or steps.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdnjax import sharding
from gdnjax.backend import REFERENCE, Backend
from gdnjax.cache import Cache
from gdnjax.cache_kinds import CacheKind, CacheSpec, LeafSpec, Paged, Ring, Slot
from gdnjax.config import ATTENTION, DELTA
from gdnjax.models import ring
from gdnjax.models.context import DecodeContext, FoldContext, PrefillContext
from gdnjax.models.mtp import FIRST_INDEX
from gdnjax.pallas_kernels import paged_attention

PATTERN = "DAD"
HEADS = 2
KEY_DIM, VALUE_DIM = 2, 3
"""Different, so that a state read in the wrong layout is another state."""
TAPS = 4
WINDOW = TAPS - 1
KV_HEADS, HEAD_DIM = 2, 2
RING, SIGHT = "ring", 7
"""The kind of the ring layers, and how many tokens one sees there: no divisor of a chunk, a block or an interval."""
BITS = 24
"""Integers below 2^24 are exact in float32, the dtype of the paged cache and of logits."""
LOGIT_BITS = 20
MASK = (1 << 32) - 1
DIGEST, STRIDE, ENTRY, JUNK = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F
"""Odd constants, so that no two hashes of the head are the same function."""


@dataclasses.dataclass(frozen=True)
class LedgerModel:
    """A `gdnjax.models.Model` of one of `tp` ranks. Its hidden state is two numbers: that of the logits, and a digest
    of the token for the head.
    """

    vocab_size: int = 61
    tp: int = 1
    mtp: bool = False
    pattern: str = PATTERN

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.tp) * self.tp

    @property
    def expert_parallel(self) -> bool:
        return False

    @property
    def backend(self) -> Backend:
        return REFERENCE

    def on(self, backend) -> "LedgerModel":
        """It has no ops."""
        return self

    @property
    def hidden_size(self) -> int:
        return 2

    @property
    def hidden_dtype(self) -> str:
        return "uint32"

    def cache_spec(
        self, *, block_size: int, ssm_dtype: str, kv_cache_dtype: str = "auto", pending_rows: int = 0
    ) -> CacheSpec:
        """Integers, whatever the dtypes say."""
        heads, layers, numbers = HEADS // self.tp, self.pattern.count("D"), {"dtype": "uint32"}
        states = [
            LeafSpec(name="ssm", layers=layers, shape=(heads, KEY_DIM * VALUE_DIM), split=0, **numbers),
            LeafSpec(name="conv", layers=layers, shape=(WINDOW + pending_rows, heads), split=1, **numbers),
        ]
        if pending_rows:
            shape = (pending_rows, 2 * heads)
            states.append(LeafSpec(name="pending_ab", layers=layers, shape=shape, split=1, **numbers))
        layers, shape = self.pattern.count("A") + self.mtp, (KV_HEADS // self.tp, HEAD_DIM)
        entries = [LeafSpec(name=name, layers=layers, shape=shape, dtype="float32", split=0) for name in ("k", "v")]
        kinds: list[CacheKind] = [Slot(name=DELTA, leaves=tuple(states), ordered=True)] if "D" in self.pattern else []
        kinds += [Paged(name=ATTENTION, leaves=tuple(entries))] if layers else []
        if "R" in self.pattern:
            seen = LeafSpec(name="seen", layers=self.pattern.count("R"), shape=(heads,), split=0, **numbers)
            kinds.append(Ring.of(name=RING, entries=(seen,), window=SIGHT, pending_rows=pending_rows))
        return CacheSpec(tuple(kinds), block_size)

    def params(self) -> dict:
        """Multipliers under the names that the sharding table knows; global shapes, all odd."""
        numbers = np.random.default_rng(7)

        def odd(*shape):
            return {"weight": numbers.integers(0, 1 << 32, shape, np.uint32) | np.uint32(1)}

        def attention():
            return {"self_attn": {"k_proj": odd(KV_HEADS), "v_proj": odd(KV_HEADS)}}

        # Drawn before what depends on the ranks, so that all ranks' models are one.
        head, embedding = odd(1 << 12)["weight"], odd(1 << 12)["weight"]
        layers = {}
        for i, kind in enumerate(self.pattern):
            if kind == "D":
                layers[i] = {
                    "linear_attn": {
                        "in_proj_qkv": odd(HEADS),
                        "in_proj_a": odd(HEADS),
                        "in_proj_b": odd(HEADS),
                        "conv1d": odd(HEADS, TAPS),
                        "A_log": odd(HEADS, KEY_DIM * VALUE_DIM)["weight"],
                        "dt_bias": odd(HEADS, KEY_DIM * VALUE_DIM)["weight"],
                        "out_proj": odd(KEY_DIM * VALUE_DIM, HEADS),
                    }
                }
            elif kind == "R":
                layers[i] = {"self_attn": {"q_proj": odd(HEADS)}}
            else:
                layers[i] = attention()
        params = {
            "embed_tokens": {"weight": embedding[: self.padded_vocab_size]},
            "layers": layers,
            "lm_head": {"weight": head[: self.padded_vocab_size]},
        }
        return params | ({"mtp": {"layers": {0: attention()}}} if self.mtp else {})

    def forward(self, params, tokens, context, cache):
        embedding = x = self._embed(params["embed_tokens"]["weight"], tokens)
        rows = {"D": 0, "A": 0, "R": 0}
        befores = []
        for i, kind in enumerate(self.pattern):
            weights, row = params["layers"][i], rows[kind]
            if kind == "D":
                out, before, cache = _delta_layer(weights["linear_attn"], x, context, cache, row)
                befores.append(before)
            elif kind == "R":
                out, cache = _ring_layer(weights["self_attn"], x, context, cache, row)
            else:
                out, cache = _attention_layer(weights["self_attn"], x, context, cache, row)
            x = _mix(x + sharding.psum(out, self.tp))
            rows[kind] += 1
        if self.mtp:
            aux = jnp.uint32(0)
            if befores:
                # The first layer's window holds the embedding of the token before, times an odd number.
                scale = params["layers"][self.pattern.index("D")]["linear_attn"]["in_proj_qkv"]["weight"]
                aux = _digest(befores[0][:, 0] * _inverse(scale[0]))
            x = jnp.where(_agrees(x), _guess(embedding, aux, context.position.astype(jnp.uint32)), x)
        return jnp.stack([x, _digest(embedding)], axis=-1), cache

    def draft(self, params, tokens, previous, context, cache):
        """The head: an attention layer over (token, hidden state before it), behind those of the target."""
        embedding = self._embed(params["embed_tokens"]["weight"], tokens)
        context = dataclasses.replace(context, tiles=dataclasses.replace(context.tiles, first=FIRST_INDEX))
        weights, entry = params["mtp"]["layers"][0]["self_attn"], _entry(embedding, previous[:, 0], previous[:, 1])
        out, cache = _attention_layer(weights, entry, context, cache, self.pattern.count("A"))
        # Mixed, so that a constant error of the sum changes what it says of each token.
        x = _mix(sharding.psum(out, self.tp) ^ jnp.uint32(JUNK))
        # Without a window the target knows nothing of the token before.
        aux = previous[:, 1] if "D" in self.pattern else jnp.uint32(0)
        guess = _guess(embedding, aux, context.position.astype(jnp.uint32))
        x = jnp.where(_agrees(x), guess, x)
        return jnp.stack([x, _digest(embedding)], axis=-1), cache

    def fold(self, params, context: FoldContext, cache: Cache) -> Cache:
        rows = [i for i, kind in enumerate(self.pattern) if kind == "D"]
        for layer, i in enumerate(rows):
            cache = _fold_slots(params["layers"][i]["linear_attn"], context, cache, layer)
        for layer in range(self.pattern.count("R")):
            cache = cache.with_slots(RING, seen=ring.copy(cache.slots[RING]["seen"], layer, context))
        return cache

    def _embed(self, weight, tokens):
        local = tokens - sharding.rank(self.tp) * weight.shape[0]
        mine = (local >= 0) & (local < weight.shape[0])
        return sharding.psum(jnp.where(mine, weight[jnp.clip(local, 0, weight.shape[0] - 1)], 0), self.tp)

    def draft_logits(self, params, hidden):
        return self.logits(params, hidden)

    def logits(self, params, hidden):
        weight = params["lm_head"]["weight"]
        token = jnp.arange(weight.shape[0]) + sharding.rank(self.tp) * weight.shape[0]
        bits = _mix(hidden[:, :1] ^ weight) >> (32 - LOGIT_BITS)
        # 0 to 16, exact: wide enough that sampling has favourites, narrow enough that it has choices.
        logits = bits.astype(jnp.float32) * 2.0 ** (4 - LOGIT_BITS)
        return jnp.where(token < self.vocab_size, logits, -jnp.inf)


def _mix(x):
    """A bijection of 32-bit numbers in which every input bit reaches every output bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _agrees(x):
    """Whether target or head go by the guess: three numbers of four."""
    return (x & 3) != 0


def _digest(embedding):
    return _mix(embedding ^ jnp.uint32(DIGEST))


def _guess(embedding, aux, position):
    return _mix(_mix(embedding + position * jnp.uint32(STRIDE)) ^ aux)


def _entry(embedding, x, aux):
    """What the head's attention layer is given: a token's embedding and both numbers of the hidden state before it."""
    return _mix(embedding ^ _mix(x ^ _mix(aux + jnp.uint32(ENTRY))))


def _delta_layer(weights, x, context, cache, layer):
    """The layer's outputs, the raw inputs of the token before each, and the pools."""
    pools = cache.slots[DELTA]
    channels = x[:, None] * weights["in_proj_qkv"]["weight"]
    gates = jnp.concatenate([x[:, None] * weights[name]["weight"] for name in ("in_proj_a", "in_proj_b")], axis=-1)
    match context:
        case PrefillContext():
            states, before, pools = _delta_prefill(weights, channels, gates, pools, layer, context)
        case DecodeContext():
            states, before, pools = _delta_decode(weights, channels, gates, pools, layer, context)
    out = jnp.sum(states * weights["out_proj"]["weight"].T, axis=(1, 2), dtype=jnp.uint32)
    return out, before, cache.with_slots(DELTA, **pools)


def _decays(weights, gates):
    """Odd multipliers of the states: [..., hv, k * v]."""
    a = gates[..., : gates.shape[-1] // 2] | 1
    return a[..., None] * weights["A_log"]


def _inputs(weights, u, gates):
    """What a token adds to the states: [..., hv, k * v]."""
    b = gates[..., gates.shape[-1] // 2 :]
    return (u + b)[..., None] * weights["dt_bias"]


def _folded(weights, states, inputs, gates):
    """States before and after each of T tokens: T + 1 of them. `inputs` are raw: of the window, then of the tokens."""
    rows = gates.shape[1]
    taps = weights["conv1d"]["weight"]
    u = sum(inputs[:, tap : tap + rows] * taps[:, tap] for tap in range(TAPS))
    decays, added = _decays(weights, gates), _inputs(weights, u, gates)
    found = [states]
    for row in range(rows):
        found.append(decays[:, row] * found[-1] + added[:, row])
    return jnp.stack(found, axis=1)


def _fold_pending(weights, states, stored, gates, count):
    """States and windows with the first `count` of the pending rows in them. `stored` is a slot's rows of `conv`."""
    row = jnp.arange(states.shape[0])
    window = jnp.take_along_axis(stored, (count[:, None] + jnp.arange(WINDOW))[..., None], axis=1)
    return _folded(weights, states, stored, gates)[row, count], window


def _fold_slots(weights, context, cache, layer):
    pools, order, slot = cache.slots[DELTA], context.orders[DELTA], context.read_slot
    stored = pools["conv"][layer, slot]
    states, window = _read_states(pools["ssm"], layer, slot, order.read), stored[:, :WINDOW]
    if "pending_ab" in pools:
        gates = pools["pending_ab"][layer, slot]
        states, window = _fold_pending(weights, states, stored, gates, context.count)
    ssm = _write_states(pools["ssm"], layer, context.write_slot, states, order.write)
    return cache.with_slots(DELTA, ssm=ssm, conv=pools["conv"].at[layer, context.write_slot, :WINDOW].set(window))


def _delta_decode(weights, channels, gates, pools, layer, context):
    slot, write_slot = context.read_slot, context.write_slot
    channels, gates = (x.reshape(slot.shape[0], -1, x.shape[-1]) for x in (channels, gates))
    states, stored = _read_states(pools["ssm"], layer, slot, context.orders[DELTA].read), pools["conv"][layer, slot]
    window = stored[:, :WINDOW]
    if context.pending is not None:
        pending_ab = pools["pending_ab"][layer, slot]
        states, window = _fold_pending(weights, states, stored, pending_ab, context.pending)
    rows = channels.shape[1]
    inputs = jnp.concatenate([window, channels], axis=1)
    after = _folded(weights, states, inputs, gates)
    if context.pending is None:
        ssm, conv = after[:, -1], pools["conv"].at[layer, write_slot, :WINDOW].set(inputs[:, rows:])
    else:
        ssm, conv = states, pools["conv"].at[layer, write_slot, : WINDOW + rows].set(inputs)
        pools = pools | {"pending_ab": pools["pending_ab"].at[layer, write_slot, :rows].set(gates)}
    ssm = _write_states(pools["ssm"], layer, write_slot, ssm, context.orders[DELTA].write)
    before = inputs[:, WINDOW - 1 : -1].reshape(-1, inputs.shape[-1])
    return after[:, 1:].reshape(-1, *after.shape[2:]), before, pools | {"ssm": ssm, "conv": conv}


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


def _delta_prefill(weights, channels, gates, pools, layer, context):
    """Chunk by chunk, as the real op: within a chunk S_i = D_i (S + sum_(j <= i) w_j / D_j), D_i the decays up to i."""
    rows, chunks = context.rows, context.chunks
    u, before, conv = _conv_prefill(channels, weights["conv1d"]["weight"], pools["conv"], layer, context)
    states = _read_states(pools["ssm"], layer, rows.read_slot, context.orders[DELTA].read)
    states = jnp.where(rows.fresh[:, None, None], 0, states)
    valid = chunks.valid[..., None, None]
    decays = jnp.where(valid, _decays(weights, chunks.gather(gates)), 1)
    after = jnp.cumprod(decays, axis=1, dtype=jnp.uint32)
    until = jnp.cumprod(_inverse(decays), axis=1, dtype=jnp.uint32)
    added = jnp.where(valid, _inputs(weights, chunks.gather(u), chunks.gather(gates)), 0)
    added = jnp.cumsum(added * until, axis=1, dtype=jnp.uint32)

    def one_chunk(states, chunk):
        row, after, added = chunk
        within = after * (states[row] + added)
        # Padding multiplies by 1 and adds 0.
        return states.at[row].set(within[-1]), within

    states, within = lax.scan(one_chunk, states, (chunks.row, after, added))
    ssm = _write_states(pools["ssm"], layer, rows.write_slot, states, context.orders[DELTA].write)
    if chunks.checkpoint is not None:
        ssm = _write_states(ssm, layer, chunks.checkpoint, within[:, -1], context.orders[DELTA].write)
    return chunks.scatter(within), before, pools | {"ssm": ssm, "conv": conv}


def _conv_prefill(x, taps, conv, layer, context):
    rows, chunks = context.rows, context.chunks
    window = jnp.where(rows.fresh[:, None, None], 0, conv[layer, rows.read_slot, :WINDOW])

    def back(offset, place, row, steps):
        """The input `steps` before `offset` of a row's piece, whose place in the packed batch is `place`."""
        packed = x[jnp.clip(place - steps, 0, x.shape[0] - 1)]
        stored = window[row, jnp.clip(WINDOW + offset - steps, 0, WINDOW - 1)]
        return jnp.where((offset >= steps)[:, None], packed, stored)

    place = jnp.arange(x.shape[0])
    inputs = [back(rows.token_offset, place, rows.token_row, WINDOW - tap) for tap in range(TAPS)]
    u = sum(inputs[tap] * taps[:, tap] for tap in range(TAPS))

    def window_at(offset, place, row):
        return jnp.stack([back(offset, place, row, WINDOW - i) for i in range(WINDOW)], axis=1)

    row = jnp.arange(rows.length.shape[0])
    conv = conv.at[layer, rows.write_slot, :WINDOW].set(window_at(rows.length, rows.start + rows.length, row))
    if chunks.checkpoint is not None:
        kept = window_at(chunks.end - rows.start[chunks.row], chunks.end, chunks.row)
        conv = conv.at[layer, chunks.checkpoint, :WINDOW].set(kept)
    return u, inputs[WINDOW - 1], conv


def _inverse(a):
    """1 / a modulo 2^32 for odd a: each turn doubles the number of right bits."""
    inverse = a
    for _ in range(4):
        inverse = inverse * (jnp.uint32(2) - a * inverse)
    return inverse


def _ring_layer(weights, x, context, cache, layer):
    pool, position = cache.slots[RING]["seen"], context.position.astype(jnp.uint32)
    entries = (x ^ position)[:, None] * weights["q_proj"]["weight"]
    seen, valid = ring.read(pool, layer, entries, context, SIGHT)
    age = jnp.arange(SIGHT, dtype=jnp.uint32)[:, None]
    out = jnp.sum(jnp.where(valid[..., None], _mix(seen + age), 0), axis=(1, 2), dtype=jnp.uint32)
    return out, cache.with_slots(RING, seen=ring.write(pool, layer, entries, context))


def _attention_layer(weights, x, context, cache, layer):
    x = x.astype(jnp.uint32)
    position = context.position.astype(jnp.uint32)
    k = x[:, None] * weights["k_proj"]["weight"]
    v = (x ^ position)[:, None] * weights["v_proj"]["weight"]
    k, v = (jnp.stack([y & (2**BITS - 1), y >> BITS], axis=-1).astype(jnp.float32) for y in (k, v))
    places = context.places
    pools = cache.pages[ATTENTION]
    k_blocks, v_blocks = paged_attention.write(pools["k"], pools["v"], layer, k, v, places.block, places.offset)
    sums = _sum_keys(k_blocks, v_blocks, layer, context.tiles)
    match context:
        case PrefillContext():
            out = context.chunks.scatter(sums)
        case DecodeContext():
            out = sums.reshape(-1)
    return out, cache.with_pages(ATTENTION, k=k_blocks, v=v_blocks)


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
    place = position[:, 0].astype(jnp.int32)
    seen = jnp.max(tiles.position, axis=1)[:, None] >= place
    seen &= (tiles.first <= place) & (place < tiles.longest)
    total = jnp.cumsum(jnp.where(seen, hashed, 0), axis=1, dtype=jnp.uint32)
    return jnp.take_along_axis(total, jnp.maximum(tiles.position, 0), axis=1)


@dataclasses.dataclass(eq=False)
class Point:
    """What stands behind `length` tokens of a sequence, the last of which is `token`; and what may come after it.

    `entries` are the (key, value) of that token, by attention layer (the head's is the last) and KV head; `rings` the
    inputs of the last tokens, newest first, by ring layer.
    """

    length: int
    token: int
    before: "Point | None"
    states: tuple[tuple[tuple[int, ...], ...], ...]
    windows: tuple[tuple[int, ...], ...]
    sums: tuple[int, ...]
    hidden: tuple[int, int]
    rings: tuple[tuple[int, ...], ...]
    entries: tuple[tuple[tuple[int, int], ...], ...] = ()
    successor: int | None = None
    drafts: tuple[int, ...] = ()
    after: dict[int, "Point"] = dataclasses.field(default_factory=dict)


class Oracle:
    """What sequences of the ledger model are, and what a greedy request must produce. Python integers only."""

    def __init__(self, model: LedgerModel):
        self._model = model
        self._weights = jax.tree.map(lambda leaf: leaf.tolist(), model.params())
        delta = [i for i, kind in enumerate(self._model.pattern) if kind == "D"]
        attention = [i for i, kind in enumerate(self._model.pattern) if kind == "A"]
        self._delta = {i: row for row, i in enumerate(delta)}
        self._attention = {i: row for row, i in enumerate(attention)}
        rings = [i for i, kind in enumerate(self._model.pattern) if kind == "R"]
        self._ring = {i: row for row, i in enumerate(rings)}
        zeros = (0,) * (KEY_DIM * VALUE_DIM)
        self._nothing = Point(
            length=0,
            token=0,
            before=None,
            states=((zeros,) * HEADS,) * len(delta),
            windows=((0,) * WINDOW,) * len(delta),
            sums=(0,) * (len(attention) + model.mtp),
            hidden=(0, 0),
            rings=((),) * len(rings),
        )

    def at(self, tokens) -> Point:
        """The point behind `tokens`. What sequences share is computed once."""
        point = self._nothing
        for token in tokens:
            point = self._next(point, token)
        return point

    def solo_run(self, prompt, max_tokens: int, stop_token_ids=()) -> list[int]:
        """The tokens of a greedy request, up to and including the first that ends it."""
        point, produced = self.at(prompt), []
        while len(produced) < max_tokens and (not produced or produced[-1] not in stop_token_ids):
            produced.append(self._successor(point))
            point = self._next(point, produced[-1])
        return produced

    def drafts(self, tokens, count: int) -> list[int]:
        """The drafts of a greedy request that follow `tokens`, the last of which has not been fed yet.

        They depend on nothing else: not on the steps that came before, nor on how many drafts those had.
        """
        point = self.at(tokens)
        if len(point.drafts) < count:
            point.drafts = self._draft(point, count)
        return list(point.drafts[:count])

    def _draft(self, point: Point, count: int) -> tuple[int, ...]:
        found: list[int] = []
        total, previous, token = point.sums[-1], point.before.hidden, point.token
        while len(found) < count:
            position = point.length - 1 + len(found)
            if found:
                total = (total + _total(self._head_entries(token, previous, position), position)) & MASK
            embedding = self._weights["embed_tokens"]["weight"][token]
            x = _mix_int(total ^ JUNK)
            if x & 3:
                x = _guess_int(embedding, previous[1] if self._delta else 0, position)
            token, previous = self._greedy(x), (x, _mix_int(embedding ^ DIGEST))
            found.append(token)
        return tuple(found)

    def num_accepted(self, tokens, count: int) -> int:
        """Of so many drafts after `tokens`, how many a greedy request keeps."""
        drafts = self.drafts(tokens, count)
        wanted = self.solo_run(tokens, count)
        return next((i for i, (one, other) in enumerate(zip(drafts, wanted, strict=True)) if one != other), count)

    def pattern(self, prompt, max_tokens: int, num_drafts: int, stop_token_ids=()) -> list[tuple[int, int]]:
        """(drafts put to the test, tokens emitted) of each decode step of a greedy request that nobody interrupts."""
        produced = self.solo_run(prompt, max_tokens, stop_token_ids)
        steps, known = [], 1
        while known < len(produced):
            drafts = min(num_drafts, max_tokens - known - 1)
            count = 1 + self.num_accepted([*prompt, *produced[:known]], drafts)
            left = len(produced) - known
            # What comes behind a stop token is not put to the test.
            steps.append((drafts, count) if count <= left else (left - 1, left))
            known += steps[-1][1]
        return steps

    def row(self, tokens) -> dict[str, np.ndarray]:
        """What a slot holds behind `tokens`: ssm [L, hv, k * v] in KV order, conv [L, w, x], hidden [d]; and where
        there are rings, seen [L, i, hv], oldest first, what the next token can see.
        """
        point = self.at(tokens)
        scales = [self._weights["layers"][i]["linear_attn"]["in_proj_qkv"]["weight"] for i in self._delta]
        conv = [[[x * scale & MASK for scale in row] for x in w] for w, row in zip(point.windows, scales, strict=True)]
        scales = [self._weights["layers"][i]["self_attn"]["q_proj"]["weight"] for i in self._ring]
        seen = [
            [[x * scale & MASK for scale in row] for x in past[: SIGHT - 1][::-1]]
            for past, row in zip(point.rings, scales, strict=True)
        ]
        found = {"ssm": point.states, "conv": conv, "hidden": point.hidden} | ({"seen": seen} if seen else {})
        return {name: np.array(value, np.uint32) for name, value in found.items()}

    def entries(self, tokens, start: int) -> np.ndarray:
        """What the paged cache holds of `tokens` from `start` on: [2 (key, value), L, t, kh, hd] float32."""
        point, found = self.at(tokens), []
        while point.length > start:
            found.append(point.entries)
            point = point.before
        values = np.array(found[::-1], np.uint32).transpose(3, 1, 0, 2)
        return np.stack([values & (2**BITS - 1), values >> BITS], axis=-1).astype(np.float32)

    def _successor(self, point: Point) -> int:
        if point.successor is None:
            point.successor = self._greedy(point.hidden[0])
        return point.successor

    def _greedy(self, x: int) -> int:
        weights = self._weights["lm_head"]["weight"]
        logits = [_mix_int(x ^ weights[v]) >> (32 - LOGIT_BITS) for v in range(self._model.vocab_size)]
        return logits.index(max(logits))

    def _next(self, point: Point, token: int) -> Point:
        if token not in point.after:
            point.after[token] = self._fold(point, token)
        return point.after[token]

    def _fold(self, point: Point, token: int) -> Point:
        embedding = x = self._weights["embed_tokens"]["weight"][token]
        states, windows, sums, entries, rings = [], [], [], [], []
        for i, kind in enumerate(self._model.pattern):
            if kind == "D":
                row = self._delta[i]
                windows.append((*point.windows[row][1:], x))
                out, after = self._fold_states(i, point.states[row], (*point.windows[row], x))
                states.append(after)
            elif kind == "R":
                rings.append(((x ^ point.length) & MASK, *point.rings[self._ring[i]])[:SIGHT])
                scales = self._weights["layers"][i]["self_attn"]["q_proj"]["weight"]
                seen = [(number * scale + age) & MASK for age, number in enumerate(rings[-1]) for scale in scales]
                out = sum(map(_mix_int, seen))
            else:
                entries.append(_entries_int(self._weights["layers"][i]["self_attn"], x, point.length))
                out = (point.sums[self._attention[i]] + _total(entries[-1], point.length)) & MASK
                sums.append(out)
            x = _mix_int((x + out) & MASK)
        if self._model.mtp:
            entries.append(self._head_entries(token, point.hidden, point.length))
            seen = point.length >= FIRST_INDEX
            sums.append((point.sums[-1] + seen * _total(entries[-1], point.length)) & MASK)
            if x & 3:
                aux = _mix_int(point.windows[0][-1] ^ DIGEST) if self._delta else 0
                x = _guess_int(embedding, aux, point.length)
        return Point(
            length=point.length + 1,
            token=token,
            before=point,
            states=tuple(states),
            windows=tuple(windows),
            sums=tuple(sums),
            hidden=(x, _mix_int(embedding ^ DIGEST)),
            entries=tuple(entries),
            rings=tuple(rings),
        )

    def _fold_states(self, layer: int, states, inputs) -> tuple[int, tuple]:
        weights = self._weights["layers"][layer]["linear_attn"]
        x, out, found = inputs[-1], 0, []
        for head, state in enumerate(states):
            scale, taps = weights["in_proj_qkv"]["weight"][head], weights["conv1d"]["weight"][head]
            u = sum(scale * value * tap for value, tap in zip(inputs, taps, strict=True))
            a = x * weights["in_proj_a"]["weight"][head] | 1
            b = x * weights["in_proj_b"]["weight"][head]
            decay, scale = weights["A_log"][head], weights["dt_bias"][head]
            after = tuple((decay[i] * a * state[i] + scale[i] * (u + b)) & MASK for i in range(len(state)))
            out += sum(weights["out_proj"]["weight"][i][head] * after[i] for i in range(len(after)))
            found.append(after)
        return out, tuple(found)

    def _head_entries(self, token: int, previous: tuple[int, int], position: int):
        embedding = self._weights["embed_tokens"]["weight"][token]
        x = _mix_int(embedding ^ _mix_int(previous[0] ^ _mix_int((previous[1] + ENTRY) & MASK)))
        return _entries_int(self._weights["mtp"]["layers"][0]["self_attn"], x, position)


def _entries_int(weights, x: int, position: int) -> tuple[tuple[int, int], ...]:
    """(key, value) of each KV head."""
    pairs = zip(weights["k_proj"]["weight"], weights["v_proj"]["weight"], strict=True)
    return tuple((x * k & MASK, (x ^ position) * v & MASK) for k, v in pairs)


def _total(entries, position: int) -> int:
    # The stored value has 32 bits, and the position of a key is where the block table puts it.
    return sum(_mix_int(key ^ _mix_int((value + position) & MASK)) for key, value in entries)


def _guess_int(embedding: int, aux: int, position: int) -> int:
    return _mix_int(_mix_int((embedding + position * STRIDE) & MASK) ^ aux)


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)
