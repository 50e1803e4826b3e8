"""Stochastic rounding of states: the noise, what it does to numbers, and that every kernel does the same."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gdnjax.pallas_kernels import gated_delta_rule
from gdnjax.pallas_kernels.gated_delta_rule import Gates, Rounding, StateOrder, rounding
from gdnjax.pallas_kernels.gated_delta_rule.api import prefill as prefill_op
from gdnjax.pallas_kernels.rows import Chunks, Rows
from tests.pallas_kernels.backends import jit, once, running
from tests.pallas_kernels.packed import pack_rows
from tests.pallas_kernels.test_gated_delta_rule import (
    CHANNELS,
    WORK,
    poisoned_pool,
    random_inputs,
    random_states,
    read_back,
    stored,
)

SIGMAS = 5
"""Of a statistic that is normal: what is seen by chance once in two million times."""

POSITIONS, ELEMENTS = 512, 2048
LAYER = 1


rounded_states = jax.jit(rounding.rounded_states, static_argnums=(2, 3))


def noise_of(seed=0, layer=0, head=0, first=0):
    """[POSITIONS, ELEMENTS]: consecutive positions and elements."""
    keys = rounding.keys_of(seed, jnp.arange(first, first + POSITIONS, dtype=jnp.int32))
    words = rounding.head_keys(keys[:, None], layer, head)
    return np.asarray(rounding.noise(words, jnp.arange(ELEMENTS, dtype=jnp.int32))).astype(np.int64)


@once
def test_noise_is_uniform():
    noise = noise_of()
    assert noise.min() >= 0
    assert noise.max() < 2**16
    cells, count = 1024, noise.size
    seen = np.bincount(noise.ravel() * cells >> 16, minlength=cells)
    chi_square = ((seen - count / cells) ** 2 / (count / cells)).sum()
    assert abs(chi_square - (cells - 1)) < SIGMAS * np.sqrt(2 * (cells - 1))
    for bit in range(16):
        ones = (noise >> bit & 1).sum()
        assert abs(ones - count / 2) < SIGMAS * np.sqrt(count) / 2


@once
def test_noise_of_neighbours_is_independent():
    """In element, position, layer, head and seed; and elements of two positions are not shifted against each other."""
    noise = noise_of()
    pairs = {
        "element": (noise[:, 1:], noise[:, :-1]),
        "row of the state": (noise[:, 128:], noise[:, :-128]),
        "position": (noise[1:], noise[:-1]),
        "shifted": (noise[1:, 1:], noise[:-1, :-1]),
        "layer": (noise, noise_of(layer=1)),
        "head": (noise, noise_of(head=1)),
        "seed": (noise, noise_of(seed=1)),
        "high half of the seed": (noise, noise_of(seed=1 << 32)),
    }
    for name, (one, other) in pairs.items():
        centred = [(x - 32767.5) / (2**16 / np.sqrt(12)) for x in (one, other)]
        assert abs((centred[0] * centred[1]).mean()) * np.sqrt(one.size) < SIGMAS, name


@once
def test_noise_belongs_to_the_position():
    np.testing.assert_array_equal(noise_of(first=3)[:-3], noise_of()[3:])


@once
def test_mean_of_rounded_numbers_is_the_number():
    """Over the noise of many positions. Rounding moves a number by at most a step, and its variance is at most a
    quarter of a step's square."""
    x = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    bits = jnp.asarray(noise_of()[:, :64].astype(np.uint32))
    found = np.asarray(rounding.rounded(jnp.broadcast_to(x, bits.shape), bits), np.float64)
    step = 2.0 ** (np.floor(np.log2(np.abs(x))) - 7)
    assert (np.abs(found - x) < step).all()
    np.testing.assert_array_equal(found, found.astype(ml_dtypes.bfloat16).astype(np.float64))
    assert (np.abs(found.mean(axis=0) - x) < SIGMAS * step / 2 / np.sqrt(POSITIONS)).all()


@once
@pytest.mark.parametrize("bits", [0, 0x8000, 0xFFFF])
def test_what_bfloat16_holds_stays_as_it_is(bits):
    """All of its numbers: zeros of both signs, denormals, infinities and NaN."""
    every = np.arange(2**16, dtype=np.uint32) << 16
    numbers = jax.lax.bitcast_convert_type(jnp.asarray(every), jnp.float32)
    found = rounding.rounded(numbers, jnp.full(every.shape, bits, jnp.uint32))
    np.testing.assert_array_equal(np.asarray(jax.lax.bitcast_convert_type(found, jnp.uint32)), every)


@once
def test_nan_of_low_bits_stays_nan():
    number = jax.lax.bitcast_convert_type(jnp.asarray([0x7F800001, 0xFF80FFFF], jnp.uint32), jnp.float32)
    for bits in (0, 0xFFFF):
        assert jnp.isnan(rounding.rounded(number, jnp.full((2,), bits, jnp.uint32)).astype(jnp.bfloat16)).all()


@once
def test_heads_of_a_rank_have_the_noise_of_all_heads():
    states, keys = random_states(WORK, 3), rounding.keys_of(7, jnp.asarray([5, 6, 900]))
    whole = rounded_states(jnp.asarray(states), keys, 0, LAYER)
    part = rounded_states(jnp.asarray(states[:, 1:]), keys, 1, LAYER)
    np.testing.assert_array_equal(whole[:, 1:], part)


# What a kernel stores in bfloat16 is what it stores in float32, rounded by the definition: bit for bit, since sums are
# in the same order in both.

SLOT, OTHER = [5, 1, 3], [6, 2, 4]
KEYS = rounding.keys_of(11, jnp.asarray([20, 21, 4000], jnp.int32))


def noise(rows, checkpoints=None):
    padded = jnp.concatenate([KEYS, jnp.zeros((rows - 3,), jnp.uint32)])
    return Rounding(keys=padded, checkpoints=checkpoints, first_head=2)


def rounded_by_definition(pool, slots, keys, work, vk):
    """[n, hv, K, V] of a pool of float32."""
    states = np.stack([read_back(pool[LAYER, slot], work, vk) for slot in slots]).astype(np.float32)
    return np.asarray(rounded_states(jnp.asarray(states), keys, 2, LAYER))


def pools_of_both(work, slots, vk):
    """The same states in bfloat16 and in float32."""
    states = random_states(work, len(slots)).astype(ml_dtypes.bfloat16)
    for dtype in (np.float32, ml_dtypes.bfloat16):
        pool = poisoned_pool(work, dtype)
        pool[LAYER, slots] = stored(states, vk, dtype)
        yield jnp.asarray(pool)


@jit(static_argnames=("kind", "width", "vk", "stochastic"))
def _rows(qkv, gates, ssm, count, *, kind, width, vk, stochastic):
    order, slots = StateOrder(read=vk, write=vk), (jnp.asarray(SLOT), jnp.asarray(OTHER))
    static = {"key_head_dim": width, "rounding": noise(3) if stochastic else None, "backend": running()}
    if kind == "decode":
        one = {name: x[:, 0] if name in ("a", "b") else x for name, x in gates.items()}
        return gated_delta_rule.decode(qkv[:, 0], Gates(**one), ssm, LAYER, *slots, order, **static)[1]
    if kind == "verify":
        return gated_delta_rule.verify(qkv, Gates(**gates), ssm, LAYER, *slots, count, order, new=2, **static)[1]
    return gated_delta_rule.fold(qkv, Gates(**gates), ssm, LAYER, *slots, count, order, **static)


@pytest.mark.short_cases
@pytest.mark.parametrize(("kind", "work", "vk"), [
    ("decode", WORK, True), ("decode", WORK, False), ("verify", WORK, True), ("fold", WORK, True),
    ("decode", CHANNELS, True), ("verify", CHANNELS, False),
])  # fmt: skip
def test_rows_are_stored_by_the_noise_of_their_positions(kind, work, vk):
    rows = random_inputs(work, [4] * 3)
    gates = {name: jnp.asarray(np.stack([getattr(row, name) for row in rows])) for name in ("a", "b")}
    gates |= {name: jnp.asarray(getattr(rows[0], name)) for name in ("A_log", "dt_bias")}
    qkv, count = jnp.asarray(np.stack([row.qkv for row in rows])), jnp.asarray([2, 0, 1], jnp.int32)
    exact, found = (
        np.asarray(_rows(qkv, gates, pool, count, kind=kind, width=work.key_dim, vk=vk, stochastic=stochastic))
        for pool, stochastic in zip(pools_of_both(work, SLOT, vk), (False, True), strict=True)
    )
    expected = rounded_by_definition(exact, OTHER, KEYS, work, vk)
    actual = np.stack([read_back(found[LAYER, slot], work, vk) for slot in OTHER])
    np.testing.assert_array_equal(actual, expected)
    if kind != "decode":
        # Nothing was pending: what was stored is stored again.
        np.testing.assert_array_equal(found[LAYER, OTHER[1]], found[LAYER, SLOT[1]])


@jit(static_argnames=("width", "stochastic"))
def _prefill(qkv, gates, ssm, rows, chunks, keys, *, width, stochastic):
    return prefill_op(
        qkv,
        Gates(**gates),
        ssm,
        LAYER,
        Rows(**rows),
        Chunks(**chunks),
        StateOrder(read=True, write=True),
        key_head_dim=width,
        rounding=noise(rows["length"].shape[0], keys) if stochastic else None,
        backend=running(),
    )


@pytest.mark.short_cases
@pytest.mark.parametrize("work", [WORK, CHANNELS], ids=["head", "channels"])
def test_pieces_and_checkpoints_are_stored_by_the_noise_of_their_positions(work):
    rows = random_inputs(work, [130, 20, 65])
    packed = pack_rows([130, 20, 65], read=SLOT, fresh=[True, False, True], cuts=[{64: 7}, {}, {}])
    gates = {name: packed.pack([getattr(row, name) for row in rows]) for name in ("a", "b")}
    gates |= {name: jnp.asarray(getattr(rows[0], name)) for name in ("A_log", "dt_bias")}
    qkv = packed.pack([row.qkv for row in rows])
    keys = rounding.keys_of(11, jnp.arange(packed.chunks.row.shape[0], dtype=jnp.int32))
    static, table = {"width": work.key_dim}, (vars(packed.rows), vars(packed.chunks), keys)
    (o, exact), (o_rounded, found) = (
        map(np.asarray, _prefill(qkv, gates, pool, *table, stochastic=stochastic, **static))
        for pool, stochastic in zip(pools_of_both(work, SLOT, True), (False, True), strict=True)
    )
    for here in packed.slices:
        np.testing.assert_array_equal(o[here], o_rounded[here])
    chunk = int(np.flatnonzero(np.asarray(packed.chunks.checkpoint) == 7)[0])
    for slots, of_slots in ((SLOT, KEYS), ([7], keys[chunk : chunk + 1])):
        expected = rounded_by_definition(exact, slots, of_slots, work, True)
        actual = np.stack([read_back(found[LAYER, slot], work, True) for slot in slots])
        np.testing.assert_array_equal(actual, expected)


def test_pool_of_float32_is_not_rounded():
    (row,) = random_inputs(WORK, [1])
    gates = Gates(*(jnp.asarray(getattr(row, name)) for name in ("a", "b", "A_log", "dt_bias")))
    slots = jnp.asarray([1]), jnp.asarray([1])
    with pytest.raises(ValueError, match="to bfloat16 alone, got a pool of float32"):
        gated_delta_rule.decode(
            jnp.asarray(row.qkv),
            gates,
            jnp.asarray(poisoned_pool(WORK)),
            LAYER,
            *slots,
            StateOrder(True, True),
            key_head_dim=WORK.key_dim,
            rounding=noise(3),
            backend=running(),
        )
