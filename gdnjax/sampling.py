"""Logits to tokens, on the device, over a vocabulary that may be split over ranks. No sort of the vocabulary anywhere.

Noise is a function of (request seed, absolute position, token): the drawn token is argmax(logits / T + Gumbel noise).
So a request draws the same tokens whatever its neighbours, its slot, and how its prompt was cut.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.random import threefry_2x32

from gdnjax import sharding
from gdnjax.batch import Logprobs
from gdnjax.shapes import Array, Bool, Float, Float32, Int32, Leaf, UInt32
from gdnjax.state import NO_TOKEN, LogitRows, SlotTable

RADIX_BITS = 4
"""Bits of a threshold found in one pass over the logits: 8 passes of 15 candidates find all 32."""


@dataclasses.dataclass(frozen=True)
class Vocab:
    """How the vocabulary is split: tokens in all, and the ranks that share them evenly (the last part padded)."""

    size: int
    tp: int

    def offset(self, width: int) -> Array | int:
        """The first token of this rank, whose part is `width` wide."""
        return sharding.rank(self.tp) * width


@dataclasses.dataclass(frozen=True)
class Draw:
    """How each row draws."""

    position: Leaf  # [n] int32: absolute position of the token to draw
    temperature: Leaf  # [n] float32
    top_k: Leaf  # [n] int32
    top_p: Leaf  # [n] float32
    min_p: Leaf  # [n] float32
    seed: Leaf  # [n, 2] uint32

    @classmethod
    def of_slots(cls, slots: SlotTable, slot: Int32[Array, "n"], position: Int32[Array, "n"]) -> "Draw":
        return cls(
            position=position,
            temperature=slots.temperature[slot],
            top_k=slots.top_k[slot],
            top_p=slots.top_p[slot],
            min_p=slots.min_p[slot],
            seed=slots.seed[slot],
        )


def draw_plain(logits: Float32[Array, "n V"], draw: Draw, vocab: Vocab) -> Int32[Array, "n"]:
    """Tokens by temperature and min_p alone (greedy where the temperature is 0)."""
    return _argmax(_noisy(_min_p(_scaled(logits, draw), draw, vocab), draw, vocab), vocab)


def draw_full(logits: Float32[Array, "n V"], draw: Draw, vocab: Vocab) -> Int32[Array, "n"]:
    """Tokens by temperature, min_p, top_k and top_p, in this order."""
    scaled = _min_p(_scaled(logits, draw), draw, vocab)
    scaled = _top_k(scaled, draw.top_k, vocab)
    return _argmax(_noisy(_top_p(scaled, draw.top_p, vocab), draw, vocab), vocab)


def _scaled(logits: Array, draw: Draw) -> Array:
    temperature = jnp.where(draw.temperature > 0, draw.temperature, 1.0)
    return logits / temperature[:, None]


def _min_p(scaled: Array, draw: Draw, vocab: Vocab) -> Array:
    top = sharding.pmax(scaled.max(-1), vocab.tp)
    return jnp.where(scaled >= (top + jnp.log(draw.min_p))[:, None], scaled, -jnp.inf)


def _noisy(scaled: Array, draw: Draw, vocab: Vocab) -> Array:
    token = jnp.arange(scaled.shape[1], dtype=jnp.uint32) + jnp.uint32(vocab.offset(scaled.shape[1]))
    noise = gumbel(draw.seed, draw.position, token)
    return scaled + jnp.where(draw.temperature[:, None] > 0, noise, 0.0)


def gumbel(seed: UInt32[Array, "n 2"], position: Int32[Array, "n"], token: UInt32[Array, "V"]) -> Float32[Array, "n V"]:
    """Standard Gumbel noise, a function of (seed, position, token) alone: Threefry of the token, keyed by the rest."""

    def one_row(seed, position):
        key = threefry_2x32(seed, jnp.stack([position.astype(jnp.uint32), jnp.uint32(0)]))
        bits = threefry_2x32(key, jnp.concatenate([token, jnp.zeros_like(token)]))
        return bits[: token.shape[0]]

    bits = jax.vmap(one_row)(seed, position)
    # 1 - u keeps full relative precision where it matters: near u = 1, whose tokens win.
    complement = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-complement))


def _argmax(scores: Array, vocab: Vocab) -> Array:
    """The best token over all ranks; the lowest of those that tie."""
    best = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    if vocab.tp == 1:
        return best
    value = jnp.take_along_axis(scores, best[:, None], axis=-1)
    values = sharding.all_gather(value, vocab.tp, axis=1)
    tokens = sharding.all_gather((best + vocab.offset(scores.shape[1]))[:, None], vocab.tp, axis=1)
    return jnp.take_along_axis(tokens, jnp.argmax(values, axis=1)[:, None], axis=1)[:, 0]


def _top_k(scaled: Array, top_k: Array, vocab: Vocab) -> Array:
    keys = _ordered_bits(scaled)
    wanted = jnp.where(top_k > 0, top_k, vocab.size).astype(jnp.float32)
    threshold = _threshold(keys, jnp.ones_like(scaled), wanted, vocab)
    keep = (keys >= threshold[:, None]) | (top_k <= 0)[:, None]
    return jnp.where(keep, scaled, -jnp.inf)


def _top_p(scaled: Array, top_p: Array, vocab: Vocab) -> Array:
    top = sharding.pmax(scaled.max(-1), vocab.tp)
    mass = jnp.exp(scaled - top[:, None])
    wanted = top_p * sharding.psum(mass.sum(-1), vocab.tp)
    keys = _ordered_bits(scaled)
    threshold = _threshold(keys, mass, wanted, vocab)
    keep = (keys >= threshold[:, None]) | (top_p >= 1)[:, None]
    return jnp.where(keep, scaled, -jnp.inf)


def _ordered_bits(x: Float32[Array, "n V"]) -> UInt32[Array, "n V"]:
    """Unsigned integers in the order of the floats; the two zeros are one."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 0, bits | jnp.uint32(1 << 31), ~bits)


def _threshold(keys: Array, weight: Array, wanted: Array, vocab: Vocab) -> UInt32[Array, "n"]:
    """The largest threshold with sum(weight where keys >= threshold) >= wanted, digit by digit from the top."""
    digits = jnp.arange(1, 1 << RADIX_BITS, dtype=jnp.uint32)

    def one_digit(i, threshold):
        shift = (32 - RADIX_BITS * (i + 1)).astype(jnp.uint32)
        candidates = threshold[:, None] | (digits << shift)
        reached = jnp.sum(jnp.where(keys[:, :, None] >= candidates[:, None, :], weight[:, :, None], 0), axis=1)
        enough = sharding.psum(reached, vocab.tp) >= wanted[:, None]
        digit = jnp.max(jnp.where(enough, digits, 0), axis=1)
        return threshold | (digit << shift)

    return lax.fori_loop(0, 32 // RADIX_BITS, one_digit, jnp.zeros(keys.shape[:1], jnp.uint32))


def adjust(
    logits: Float32[Array, "n V"], rows: LogitRows, row: Int32[Array, "n"], banned: Int32[Array, "n bans"], vocab: Vocab
) -> Float32[Array, "n V"]:
    """Bias, bans and penalties. `banned` holds token ids (NO_TOKEN for none) that may not be drawn now, beside the
    request's bad words. Row 0 of `rows` changes nothing.
    """
    width = logits.shape[1]
    logits = logits + rows.bias[row]
    banned = jnp.concatenate([banned, _bad_word_ends(rows.bad_words[row], rows.recent[row])], axis=1)
    local = banned - vocab.offset(width)
    # A token of another rank, or none, lands past the end and is dropped.
    local = jnp.where((banned >= 0) & (local >= 0) & (local < width), local, width)
    logits = jax.vmap(lambda line, ids: line.at[ids].set(-jnp.inf, mode="drop"))(logits, local)
    counts = rows.counts[row]
    seen = (counts > 0) | rows.in_prompt[row]
    repetition = rows.repetition[row][:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
    logits = logits - rows.frequency[row][:, None] * counts
    return logits - rows.presence[row][:, None] * (counts > 0)


def _bad_word_ends(words: Int32[Array, "n words length"], recent: Int32[Array, "n tail"]) -> Int32[Array, "n words"]:
    """The last token of each bad word whose other tokens were just produced; NO_TOKEN for the others."""
    start, end = words[..., :-1], words[..., -1]
    produced = jnp.all((start == recent[:, None]) | (start == NO_TOKEN), axis=-1)
    return jnp.where(produced, end, NO_TOKEN)


def count_tokens(
    rows: LogitRows, row: Int32[Array, "n"], token: Int32[Array, "n"], active: Bool[Array, "n"], vocab: Vocab
) -> LogitRows:
    """The rows after each active row drew its token. `rows` is consumed."""
    count, width = rows.counts.shape
    row = jnp.where(active & (row > 0), row, count)  # others land past the end and are dropped
    local = token - vocab.offset(width)
    local = jnp.where((local >= 0) & (local < width), local, width)
    recent = rows.recent.at[row].get(mode="clip")
    recent = jnp.concatenate([recent[:, 1:], token[:, None]], axis=1)
    return dataclasses.replace(
        rows,
        counts=rows.counts.at[row, local].add(1, mode="drop"),
        recent=rows.recent.at[row].set(recent, mode="drop"),
    )


def logprobs(logits: Float32[Array, "n V"], chosen: Int32[Array, "n"], most: int, vocab: Vocab) -> Logprobs:
    """Log-probabilities of the chosen tokens and of the `most` most probable, under the logits as given."""
    width = logits.shape[1]
    top = sharding.pmax(logits.max(-1), vocab.tp)
    total = sharding.psum(jnp.exp(logits - top[:, None]).sum(-1), vocab.tp)
    normaliser = (top + jnp.log(total))[:, None]
    local = chosen - vocab.offset(width)
    mine = (local >= 0) & (local < width)
    value = jnp.take_along_axis(logits, jnp.clip(local, 0, width - 1)[:, None], axis=1)[:, 0]
    value = sharding.psum(jnp.where(mine, value, 0.0), vocab.tp)
    above = sharding.psum(jnp.sum(logits > value[:, None], axis=-1), vocab.tp)
    best, tokens = _most_probable(logits, most, vocab)
    return Logprobs(
        chosen=value - normaliser[:, 0],
        rank=1 + above.astype(jnp.int32),
        top_tokens=tokens,
        top=best - normaliser,
    )


def _most_probable(logits: Array, most: int, vocab: Vocab) -> tuple[Float[Array, "n most"], Int32[Array, "n most"]]:
    most = min(most, vocab.size)
    best, tokens = lax.top_k(logits, min(most, logits.shape[1]))
    if vocab.tp == 1:
        return best, tokens
    best = sharding.all_gather(best, vocab.tp, axis=1)
    tokens = sharding.all_gather(tokens + vocab.offset(logits.shape[1]), vocab.tp, axis=1)
    best, place = lax.top_k(best, most)
    return best, jnp.take_along_axis(tokens, place, axis=1)
