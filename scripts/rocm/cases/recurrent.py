"""Cases of the kernels that own recurrent state: the gated delta rule, and the windows of the convolution.

Of three rows one moves to another slot, one is padding, and one stays in its slot. Slots that nobody reads, the null
slot among them, other layers, pending rows past a row's count and padded tokens are poison. Padding gives zeros, and
goes nowhere, not even to the null slot.
"""

import functools
import math
import zlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import DTypeLike

from gdnjax.backend import FLOAT32_DOT
from gdnjax.config import CHUNK
from gdnjax.pallas_kernels import causal_conv1d, gated_delta_rule
from gdnjax.pallas_kernels.gated_delta_rule import Gates, Rounding, StateOrder, reference
from gdnjax.pallas_kernels.rows import Chunks, Rows, make_chunks
from rocm.cases.case import BFLOAT16, EXACT, Bound, Case, Op, poison

LAYERS, LAYER, SLOTS = 3, 1, 6
"""The layer is neither the first nor the last: a number that is lost is not put right by its bounds."""

TAPS = 4

FLOAT32 = Bound(norm=1.5e-7, place=2e-6)
"""A handful of float32 roundings, and exp, log and rsqrt of a unit or two in the last place; 1.0e-7 was seen."""

CHANNELS = Bound(norm=1.5e-7, place=5e-6)
"""The same with extreme gates of channels: half of the state is next to nothing then, and what a place is measured by
with it; 2.8e-6 was seen."""

SUMMED = Bound(norm=1e-6, place=4e-6)
"""A sum of 128 products that cancel, in float32; 4e-7 was seen."""

ACTIVATED = Bound(norm=2e-7, place=2e-4)
"""Four products that may cancel where some are thousands, and a sigmoid of that; 4.9e-5 was seen."""

ROUNDED = Bound(norm=2**-8, place=2**-8, flips=2e-3)
"""float32 inside, rounded to bfloat16 once: half a step is 2^-8 at most. Errors of 1e-7 in float32 move 1e-7 * 2^8 of
the places over a half, 3e-5, where nothing cancels."""

STEPPED = Bound(norm=2**-8, place=2**-7, flips=2e-3)
"""The same by noise that the definition has, too: what flips is a whole step away."""

CHUNKED_FLOAT32 = Bound(norm=2e-6, place=2e-5)
"""Sums over 64 tokens, behind the inverse of a triangular system; 7e-7 was seen."""

CHUNKED_DECAYED = Bound(norm=1e-4, place=2e-3)
"""With extreme gates: their running sum goes to thousands, and its differences lose that many digits of float32."""

CHUNKED_CHANNELS = Bound(norm=2e-6, place=5e-4)
"""With extreme gates of channels, whose sums are never subtracted: what is next to nothing has a large exponent, whose
last bit is so much of it; 2.5e-4 was seen."""

CHUNKED_SOLVED = Bound(norm=2e-6, place=2e-3)
"""Of the inverse: what is small in it is what large products have left of each other. The definition's is of a system
that differs from the kernel's by float32 roundings, and which of them depends on the CPU; 1.7e-3 was seen, where either
was within 2.0e-4 of the inverse of its own system in float64."""

CHUNKED_ONCE = Bound(norm=2**-8, place=2**-7, flips=1e-2)
"""The same, rounded to bfloat16 once."""

CHUNKED_ROUNDED = Bound(norm=8e-3, place=0.25)
"""The state, T, P and the new values are rounded to bfloat16 before each product; 5.6e-3 was seen."""

EXTREMES = (20.0, -20.0, 3.0, -100.0, 100.0, -3.0, 0.0, -0.5, 50.0, -0.01, -90.0)
"""Of gates: where exp overflows, underflows or is denormal, where log1p is linear, and where it is not."""

RATES = (((0.0, 1.0), ("a", "b")), ((90.0, -np.inf), ("b",)), ((-100.0, 4.0), ()), ((-1.5, 2.5), ()))
"""Of the sets behind those: logarithms of the rates, infinite and denormal ones among them, and the infinite gates."""

EXTREME = 3
"""Sets of gates that begin at other places of EXTREMES, so that short ones have them all between them."""


def random(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def normal(r: np.random.Generator, shape, dtype: DTypeLike = BFLOAT16, scale: float = 1.0) -> np.ndarray:
    return (scale * r.standard_normal(shape)).astype(dtype)


def gates_of(
    r: np.random.Generator,
    shape: tuple[int, ...],
    heads: int,
    *,
    chosen: int,
    dtype,
    half_lives: tuple[float, float],
    channels: int = 0,
) -> dict:
    """Of set `chosen`: 0 is mild, 1 to EXTREME are made of EXTREMES, later ones of infinities and of wide numbers.

    With `channels` each of them decays by itself.
    """
    decays = (heads, channels) if channels else (heads,)
    shapes = {"a": (*shape, *decays), "b": (*shape, heads)}
    if chosen > EXTREME:
        rates, infinite = RATES[chosen - EXTREME - 1]
        gates = {name: normal(r, gate, dtype, 3.0) for name, gate in shapes.items()}
        for name in infinite:
            gates[name] = np.resize([np.inf, -np.inf, -np.inf], gates[name].shape).astype(dtype)
        return gates | {"A_log": np.resize(rates, heads).astype(np.float32), "dt_bias": normal(r, decays, np.float32)}
    if chosen:
        parts = {"a": EXTREMES, "b": EXTREMES[::-1]}
        gates = {name: np.resize(np.roll(part, 3 * chosen), shapes[name]).astype(dtype) for name, part in parts.items()}
        return gates | {"A_log": np.zeros(heads, np.float32), "dt_bias": np.zeros(decays, np.float32)}
    # By a softplus of middling argument and rate 1, up to a tiny one and rate e^5: there the low terms of log1p show.
    rate = np.linspace(0.0, 5.0, heads)
    softplus = (np.log(2.0) / np.linspace(*half_lives, math.prod(decays)).reshape(decays).T / np.exp(rate)).T
    return {
        "a": normal(r, shapes["a"], dtype, 0.3),
        "b": normal(r, shapes["b"], dtype, 2.0),
        "A_log": rate.astype(np.float32),
        "dt_bias": np.log(np.expm1(softplus)).astype(np.float32),
    }


def gates_in(x, beta_scale: float = 1.0) -> Gates:
    return Gates(a=x["a"], b=x["b"], A_log=x["A_log"], dt_bias=x["dt_bias"], beta_scale=beta_scale)


def order_in(x, order: tuple[str, str]) -> StateOrder:
    return StateOrder(read=x["stored"] if order[0] == "mixed" else order[0] == "vk", write=order[1] == "vk")


def keys_of(r: np.random.Generator, count: int) -> np.ndarray:
    return r.integers(0, 2**32, count, np.uint32)


def rounding_in(x) -> Rounding | None:
    """Of a rank whose first head is not the first of all."""
    if "keys" not in x:
        return None
    return Rounding(keys=x["keys"], checkpoints=x.get("checkpoint_keys"), first_head=5)


def pool_of(
    r: np.random.Generator, slots, shape: tuple[int, ...], dtype, scale: float, count: int = SLOTS
) -> np.ndarray:
    """A pool of `count` slots that is poison but for some of one layer."""
    pool = poison((LAYERS, count, *shape), dtype)
    for slot in slots:
        pool[LAYER, slot] = normal(r, shape, dtype, scale)
    return pool


def slots_mask(pool: np.ndarray, slots) -> np.ndarray:
    mask = np.zeros(pool.shape, bool)
    mask[LAYER, np.asarray(slots)] = True
    return mask


@functools.cache
def delta_op(kind: str, order: tuple[str, str], new: int, dim: int, beta_scale: float) -> Op:
    def call(x, layer, backend):
        state_order, static = order_in(x, order), {"key_head_dim": dim, "rounding": rounding_in(x), "backend": backend}
        common = (x["qkv"], gates_in(x, beta_scale), x["ssm"], layer, x["read"], x["write"])
        if kind == "decode":
            o, ssm = gated_delta_rule.decode(*common, state_order, **static)
        elif kind == "verify":
            o, ssm = gated_delta_rule.verify(*common, x["count"], state_order, new=new, **static)
        else:
            return {"ssm": gated_delta_rule.fold(*common, x["count"], state_order, **static)}
        return {"o": o, "ssm": ssm}

    return call


def delta(
    kind: str,
    order: tuple[str, str] = ("vk", "vk"),
    *,
    state: DTypeLike = np.float32,
    act: DTypeLike = BFLOAT16,
    old: int = 0,
    new: int = 1,
    heads: int = 2,
    key_heads: int = 1,
    dim: int = 128,
    value_dim: int | None = None,
    channels: bool = False,
    beta_scale: float = 1.0,
    gates: int = 0,
    in_place: bool = False,
    stochastic: bool = False,
) -> Case:
    """Decode, verify of `old` pending and `new` rows, or fold of up to `old` rows; counts are `old`, 0 and `old` - 1.

    `gates` chooses a set of them: other values for the same code. `channels`: each has a decay of its own.
    `in_place` lets the order change where a row stays in its slot, which is against the contract of a pool that is not
    mixed: programs of one head race. `stochastic`: states are rounded by noise, which the definition has, too.
    """
    value_dim = value_dim or dim
    name = f"{'kda' if channels else 'gdn'}-{kind}-{order[0]}-{order[1]}-{np.dtype(state).name}-{np.dtype(act).name}"
    name += f"-{old}+{new}" * (kind != "decode") + f"-{heads}x{dim}" * (dim != 128)
    name += f"x{value_dim}" * (value_dim != dim) + f"-beta{beta_scale:g}" * (beta_scale != 1)
    name += f"-gates{gates}" * bool(gates) + "-race" * in_place + "-stochastic" * stochastic
    r = random(name)
    # The second row is padding.
    read, write = [1, 0, 4], [2, 0, 4]
    if order[0] == "mixed":
        # The order changes in place.
        write = [1, 0, 4]
    elif order[0] != order[1] and not in_place:
        read, write = [1, 3, 4], [2, 0, 5]
    lead = (3,) if kind == "decode" else (3, old + new)
    x = {"qkv": normal(r, (*lead, 2 * key_heads * dim + heads * value_dim), act)}
    # Of the last row's keys and queries the norm is so small that the epsilon under the root shows.
    x["qkv"][2, ..., : 2 * key_heads * dim] *= np.asarray(2**-10, act)
    x |= gates_of(r, lead, heads, chosen=gates, dtype=act, half_lives=(1, 4), channels=dim * channels)
    count = [old, 0, max(old - 1, 0)]
    for part in ("qkv", "a", "b"):
        x[part][1] = np.nan
        if kind != "decode":
            for row, here in enumerate(count):
                x[part][row, here:old] = np.nan
    x |= {"read": np.array(read, np.int32), "write": np.array(write, np.int32), "count": np.array(count, np.int32)}
    x["ssm"] = pool_of(r, [slot for slot in read if slot], (heads, dim * value_dim), state, 0.1)
    if stochastic:
        x["keys"] = keys_of(r, 3)
    if order[0] == "mixed":
        x["stored"] = np.array([True, False, False])
    real = np.array([True, False, True])
    exact = CHANNELS if channels and gates else FLOAT32
    bounds = {"ssm": STEPPED if stochastic else exact if state == np.float32 else ROUNDED}
    if kind != "fold":
        bounds["o"] = SUMMED if act == np.float32 else ROUNDED
    return Case(
        name,
        delta_op(kind, order, new, dim, beta_scale),
        x,
        LAYER,
        bounds,
        seen={"ssm": slots_mask(x["ssm"], [write[0], write[2]]), "o": real.reshape(3, *(1,) * (len(lead) + 1))},
        kept={"ssm": ~slots_mask(x["ssm"], [write[0], write[2]])},
        padding={"o": ~real.reshape(3, *(1,) * (len(lead) + 1))},
        rounded=frozenset({"ssm"} if stochastic else ()),
    )


def packed(lengths: tuple[int, ...], tokens: int, checkpoints: list[int] | None) -> dict[str, np.ndarray]:
    """Rows of some lengths one after another, then a row, a chunk and tokens that are padding."""
    starts = np.cumsum([0, *lengths[:-1]])
    table = [
        (row, start + at, min(CHUNK, length - at))
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True))
        for at in range(0, length, CHUNK)
    ]
    row, start, length = zip(*table, (0, 0, 0), strict=True)
    padding = tokens - sum(lengths)
    columns = {
        "start": [*starts, 0],
        "length": [*lengths, 0],
        "chunk_row": row,
        "chunk_start": start,
        "chunk_length": length,
        "token_row": [*np.repeat(np.arange(len(lengths)), lengths), *[0] * padding],
        "token_offset": [*np.concatenate([np.arange(n) for n in lengths]), *[0] * padding],
    }
    x: dict[str, np.ndarray] = {name: np.asarray(column, np.int32) for name, column in columns.items()}
    x["token_valid"] = np.arange(tokens) < sum(lengths)
    if checkpoints is not None:
        x["checkpoint"] = np.asarray(checkpoints, np.int32)
    return x


def rows_and_chunks(x) -> tuple[Rows, Chunks]:
    rows = Rows(
        read_slot=x["read"],
        write_slot=x["write"],
        fresh=x["fresh"],
        start=x["start"],
        length=x["length"],
        token_row=x["token_row"],
        token_offset=x["token_offset"],
        token_valid=x["token_valid"],
    )
    chunks = make_chunks(
        *(x[f"chunk_{column}"] for column in ("row", "start", "length")),
        tokens=x["token_valid"].shape[0],
        size=CHUNK,
        checkpoint=x.get("checkpoint"),
    )
    return rows, chunks


TOKENS = 80
CHECKPOINTS = [5, 0, 3, 0]
"""Behind the first chunk of the first row, and behind the second row."""


def prefill_slots() -> dict[str, np.ndarray]:
    """A fresh row, whose slot holds poison; one that moves; and a padded one."""
    return {
        "read": np.array([2, 4, 0], np.int32),
        "write": np.array([2, 1, 0], np.int32),
        "fresh": np.array([True, False, True]),
    }


@functools.cache
def chunked_op(order: tuple[str, str], dim: int, beta_scale: float) -> Op:
    def call(x, layer, backend):
        rows, chunks = rows_and_chunks(x)
        gates, state_order = gates_in(x, beta_scale), order_in(x, order)
        o, ssm = gated_delta_rule.prefill(
            x["qkv"],
            gates,
            x["ssm"],
            layer,
            rows,
            chunks,
            state_order,
            key_head_dim=dim,
            rounding=rounding_in(x),
            backend=backend,
        )
        terms = channel_chunk_terms if gates.per_channel else chunk_terms
        return {"o": o, "ssm": ssm} | (terms(x, gates, chunks, dim) if backend.is_reference else {})

    return call


SCORES, SYSTEM, FACTORS, KEEP = (f"gated_delta_rule_scores[{i}]" for i in range(4))
KDA_SCORES, KDA_SYSTEM, KDA_BETA, KDA_KEEP, KDA_READ_K, KDA_READ_Q, KDA_WRITE_K = (
    f"gated_delta_rule_scores_kda[{i}]" for i in range(7)
)
INVERSE = "gated_delta_rule_inverse[1]"


def channel_chunk_terms(x, gates: Gates, chunks: Chunks, dim: int) -> dict[str, Any]:
    """As `chunk_terms`, where channels decay by themselves: see gated_delta_rule/channel_scores.py."""
    heads = x["ssm"].shape[2]
    parts = reference.split_qkv(x["qkv"], heads, dim, x["ssm"].shape[3] // dim)
    q, k, v, g, beta = (chunks.gather(part).swapaxes(1, 2) for part in (*parts, *reference.decay_and_beta(gates)))
    terms = reference.channel_chunk_terms(q, k, v, g, beta)
    decayed = reference.channel_products(q, k, g)
    system = jnp.tril(beta[..., None] * decayed.keys, -1)
    return {
        KDA_SCORES: terms.scores,
        KDA_SYSTEM: system,
        KDA_BETA: beta[:, :, None],
        KDA_KEEP: terms.keep,
        KDA_READ_K: k * decayed.before,
        KDA_READ_Q: terms.q_decayed,
        KDA_WRITE_K: terms.k_rest,
        INVERSE: reference.unit_lower_inverse(system) * beta[..., None, :],
    }


def chunk_terms(x, gates: Gates, chunks: Chunks, dim: int) -> dict[str, Any]:
    """What the kernels of the chunked form hand on, as gated_delta_rule/chunked.py defines it, for every chunk."""
    heads = x["ssm"].shape[2]
    value_dim = x["ssm"].shape[3] // dim
    q, k, v = reference.split_qkv(x["qkv"], heads, dim, value_dim)
    keys = x["qkv"][:, : x["qkv"].shape[1] - heads * value_dim].reshape(x["qkv"].shape[0], 2, -1, dim)
    norms = lax.rsqrt(jnp.sum(jnp.square(keys), axis=-1) + 1e-6)
    q_norm, k_norm = jnp.repeat(norms, heads // norms.shape[2], axis=2).swapaxes(0, 1)
    q, k, v, g, beta, q_norm, k_norm = (
        chunks.gather(part).swapaxes(1, 2)
        for part in (q, k, v, *reference.decay_and_beta(gates), q_norm * dim**-0.5, k_norm)
    )
    terms = reference.chunk_terms(q, k, v, g, beta)
    total = jnp.cumsum(g, axis=-1)
    last = total[..., -1:]
    lower = jnp.tril(jnp.ones((CHUNK, CHUNK), bool), -1)
    decay = jnp.exp(jnp.where(lower, total[..., :, None] - total[..., None, :], 0.0))
    products = jnp.einsum("chik,chjk->chij", k, k, precision=FLOAT32_DOT)
    system = jnp.where(lower, beta[..., None] * products * decay, 0.0)
    factors = (jnp.exp(total) * k_norm, jnp.exp(total) * q_norm, jnp.exp(last - total) * k_norm, beta)
    return {
        SCORES: terms.scores,
        SYSTEM: system,
        FACTORS: jnp.stack(factors, axis=2),
        KEEP: terms.keep,
        INVERSE: reference.unit_lower_inverse(system) * beta[..., None, :],
    }


def chunk_terms_seen(x) -> dict[str, np.ndarray]:
    """Of chunks and tokens that there are. The system has no diagonal, and nothing above it."""
    valid = np.arange(CHUNK) < x["chunk_length"][:, None]
    real = x["chunk_length"] > 0
    square = real[:, None, None, None]
    return {
        SCORES: square,
        SYSTEM: square & np.tril(np.ones((CHUNK, CHUNK), bool), -1),
        FACTORS: valid[:, None, None, :],
        KEEP: real[:, None],
        INVERSE: square,
    }


def channel_chunk_terms_seen(x) -> dict[str, np.ndarray]:
    seen = chunk_terms_seen(x)
    real, square = seen[KEEP], seen[SCORES]
    # What is no token is zeros.
    of_tokens = dict.fromkeys((KDA_BETA, KDA_READ_K, KDA_READ_Q, KDA_WRITE_K), square)
    return of_tokens | {
        KDA_SCORES: square,
        KDA_SYSTEM: seen[SYSTEM],
        KDA_KEEP: real[..., None],
        INVERSE: square,
    }


def chunked(
    order: tuple[str, str] = ("vk", "vk"),
    *,
    state: DTypeLike = np.float32,
    act: DTypeLike = BFLOAT16,
    lengths: tuple[int, int] = (70, 5),
    heads: int = 2,
    key_heads: int = 1,
    dim: int = 128,
    value_dim: int | None = None,
    channels: bool = False,
    beta_scale: float = 1.0,
    kept: bool = False,
    gates: int = 0,
    stochastic: bool = False,
) -> Case:
    """Two rows of a prefill step, the first in two chunks; `kept`: with checkpoints. `stochastic`: see `delta`."""
    value_dim = value_dim or dim
    name = f"{'kda' if channels else 'gdn'}-prefill-{order[0]}-{order[1]}-{np.dtype(state).name}-{np.dtype(act).name}"
    name += f"-{heads}x{dim}" * (dim != 128) + f"x{value_dim}" * (value_dim != dim)
    name += f"-beta{beta_scale:g}" * (beta_scale != 1) + "-kept" * kept + f"-gates{gates}" * bool(gates)
    name += "-stochastic" * stochastic
    r = random(name)
    x = packed(lengths, TOKENS, CHECKPOINTS if kept else None) | prefill_slots()
    keys = key_heads * dim
    qkv = r.standard_normal((TOKENS, 2 * keys + heads * value_dim))
    # Correlated keys: the inverse has something to do.
    qkv[:, keys : 2 * keys] = 0.5 * qkv[:, keys : 2 * keys] + r.standard_normal(keys)
    qkv[3, : 2 * keys] *= 2**-10
    x["qkv"] = qkv.astype(act)
    # So long that the first tokens of a chunk are felt at its end.
    x |= gates_of(r, (TOKENS,), heads, chosen=gates, dtype=act, half_lives=(16, 200), channels=dim * channels)
    for part in ("qkv", "a", "b"):
        x[part][sum(lengths) :] = np.nan
    x["ssm"] = pool_of(r, [4], (heads, dim * value_dim), state, 0.1)
    if stochastic:
        x |= {"keys": keys_of(r, 3)} | ({"checkpoint_keys": keys_of(r, len(x["checkpoint"]))} if kept else {})
    if order[0] == "mixed":
        x["stored"] = np.array([True, False, False])
    written = [1, 2] + [3, 5] * kept
    exact, solved = CHUNKED_FLOAT32, CHUNKED_SOLVED
    if gates and channels:
        exact = CHUNKED_CHANNELS
    elif gates:
        exact = solved = CHUNKED_DECAYED
    bound, rounded = exact, exact
    if act == BFLOAT16:
        bound, rounded, solved = CHUNKED_ROUNDED, CHUNKED_ONCE, CHUNKED_ONCE
    terms = {SCORES: rounded, SYSTEM: exact, FACTORS: exact, KEEP: exact, INVERSE: solved}
    if channels:
        terms = {KDA_SCORES: rounded, KDA_SYSTEM: exact, KDA_BETA: exact, KDA_KEEP: exact, INVERSE: solved}
        terms |= {KDA_READ_K: rounded, KDA_READ_Q: rounded, KDA_WRITE_K: exact}
    seen = channel_chunk_terms_seen(x) if channels else chunk_terms_seen(x)
    return Case(
        name,
        chunked_op(order, dim, beta_scale),
        x,
        LAYER,
        {"o": bound, "ssm": bound if state == np.float32 else CHUNKED_ROUNDED} | terms,
        seen={"o": x["token_valid"][:, None, None], "ssm": slots_mask(x["ssm"], written)} | seen,
        kept={"ssm": ~slots_mask(x["ssm"], written)},
        rounded=frozenset({"ssm"} if stochastic else ()),
    )


def weights(r: np.random.Generator, channels: int, dtype: DTypeLike, *, large: bool) -> np.ndarray:
    """Some so large that the sigmoid is nearly, or truly 0 or 1, and its exp infinite. A thread has two channels."""
    weight = normal(r, (channels, TAPS), dtype, 0.5)
    if not large:
        return weight
    for first, scale in ((2, 16), (3, 16), (34, 2**14), (35, 2**14)):
        weight[first::64] *= np.asarray(scale, dtype)
    return weight


def activated(dtype: DTypeLike, large: bool) -> Bound:
    return ROUNDED if dtype == BFLOAT16 else ACTIVATED if large else FLOAT32


@functools.cache
def conv_prefill_op() -> Op:
    def call(x, layer, backend):
        rows, chunks = rows_and_chunks(x)
        y, pool = causal_conv1d.prefill(x["x"], x["weight"], x["conv"], layer, rows, chunks, backend=backend)
        return {"y": y, "conv": pool}

    return call


def conv_prefill(channels: int = 520, *, dtype: DTypeLike = BFLOAT16, kept: bool = False, large: bool = True) -> Case:
    """A fresh row and eight others, the last of 2 tokens: fewer than a window holds. Rows begin at all places of the
    groups of tokens that the kernel unrolls.
    """
    name = f"conv-prefill-{channels}-{np.dtype(dtype).name}" + "-kept" * kept + "-small" * (not large)
    r = random(name)
    lengths = (9, 9, 9, 9, 9, 9, 9, 9, 2)
    read, write = [2, 4, 5, 6, 7, 8, 9, 10, 11, 0], [2, 1, 5, 6, 7, 8, 9, 10, 12, 0]
    x = packed(lengths, TOKENS, [13, 0, 0, 14, 0, 0, 0, 0, 3, 0] if kept else None)
    x |= {"read": np.array(read, np.int32), "write": np.array(write, np.int32)}
    x["fresh"] = np.array([True, *[False] * 8, True])
    x |= {"weight": weights(r, channels, dtype, large=large), "x": normal(r, (TOKENS, channels), dtype)}
    x["x"][sum(lengths) :] = np.nan
    x["conv"] = pool_of(r, read[1:-1], (TAPS - 1, channels), dtype, 1.0, count=15)
    written = write[:-1] + [3, 13, 14] * kept
    return Case(
        name,
        conv_prefill_op(),
        x,
        LAYER,
        {"y": activated(dtype, large), "conv": EXACT},
        seen={"conv": slots_mask(x["conv"], written)},
        kept={"conv": ~slots_mask(x["conv"], written)},
    )


@functools.cache
def conv_op(kind: str) -> Op:
    def call(x, layer, backend):
        slots = (x["read"], x["write"])
        if kind == "decode":
            y, pool = causal_conv1d.decode(x["x"], x["weight"], x["conv"], layer, *slots, backend=backend)
        elif kind == "verify":
            y, pool = causal_conv1d.verify(x["x"], x["weight"], x["conv"], layer, *slots, x["count"], backend=backend)
        else:
            y, pool = causal_conv1d.fold(x["weight"], x["conv"], layer, *slots, x["count"], backend=backend)
        return {"y": y, "conv": pool}

    return call


def conv(kind: str, channels: int = 520, *, dtype: DTypeLike = BFLOAT16, large: bool = True) -> Case:
    """Decode; verify of 3 pending rows and 3 tokens; or fold of up to 3 rows. `large`: with some large channels."""
    name = f"conv-{kind}-{channels}-{np.dtype(dtype).name}" + "-small" * (not large)
    r = random(name)
    pending = 0 if kind == "decode" else 3
    tokens = {"decode": 1, "verify": 3, "fold": 0}[kind]
    window = TAPS - 1
    count = [pending, 0, max(pending - 1, 0)]
    x = {
        "weight": weights(r, channels, dtype, large=large),
        "read": np.array([1, 0, 4], np.int32),
        "write": np.array([2, 0, 4], np.int32),
        "count": np.array(count, np.int32),
        "conv": pool_of(r, [1, 4], (window + pending, channels), dtype, 1.0),
    }
    if tokens:
        x["x"] = normal(r, (3, channels) if kind == "decode" else (3, tokens, channels), dtype)
        x["x"][1] = np.nan
    seen = np.ones((3, channels) if kind == "decode" else (3, pending + tokens, channels), bool)
    seen[1] = False
    for row in (0, 2):
        # Pending inputs past the count mean nothing, and neither do their outputs.
        x["conv"][LAYER, x["read"][row], window + count[row] :] = np.nan
        if kind != "decode":
            seen[row, count[row] : pending] = False
    written = slots_mask(x["conv"], [2, 4])
    written[:, :, window + (0 if kind == "decode" else tokens) :] = False
    return Case(
        name,
        conv_op(kind),
        x,
        LAYER,
        {"y": activated(dtype, large), "conv": EXACT},
        seen={"y": seen, "conv": written},
        kept={"conv": ~slots_mask(x["conv"], [2, 4])},
        padding={"y": np.arange(3).reshape(3, *(1,) * (seen.ndim - 1)) == 1},
    )
