"""The delta rule, chunked and recurrent, against a float64 recurrence written from the formula."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gdnjax.pallas_kernels import gated_delta_rule
from gdnjax.pallas_kernels.gated_delta_rule import Gates, StateOrder
from gdnjax.pallas_kernels.gated_delta_rule.reference import unit_lower_inverse
from gdnjax.pallas_kernels.rows import Chunks, Rows
from tests.pallas_kernels.backends import jit, once, running
from tests.pallas_kernels.packed import pack_rows

LENGTHS = (1, 2, 63, 64, 65, 130)
SLOTS = 9
LAYERS = 2

BOUND = 5e-6
"""Relative to the largest value. Measured against float64: at most 7e-7 on all of these workloads, correlated keys
included; the rest is room for other orders of float32 summation. A wrong decay or a lost row is above 1e-2."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """A geometry. `correlated`: keys of a row are within 0.02 of one direction. `channels`: each has its own decay."""

    key_heads: int
    ratio: int
    key_dim: int
    value_dim: int
    correlated: bool = False
    channels: bool = False
    beta_scale: float = 1.0

    @property
    def value_heads(self):
        return self.key_heads * self.ratio

    @property
    def state_size(self):
        return self.key_dim * self.value_dim


WORKLOADS = {
    "ratio 1, K < V": Workload(2, 1, 16, 24),
    "ratio 2, K > V": Workload(2, 2, 32, 8),
    "ratio 3": Workload(2, 3, 16, 16),
    "ratio 4": Workload(1, 4, 8, 12),
    "correlated keys": Workload(2, 1, 16, 16, correlated=True),
    "K 96, V 192, beta to 2": Workload(1, 1, 96, 192, beta_scale=2.0),
    "channels, K < V": Workload(2, 1, 16, 24, channels=True),
    "channels, ratio 2, K 24, correlated keys": Workload(1, 2, 24, 16, correlated=True, channels=True, beta_scale=2.0),
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What one row's layer sees: qkv [t, x], a and b [t, hv], A_log and dt_bias [hv]; a and dt_bias [..., hv, K]."""

    qkv: np.ndarray
    a: np.ndarray
    b: np.ndarray
    A_log: np.ndarray
    dt_bias: np.ndarray

    def __getitem__(self, part):
        return dataclasses.replace(self, qkv=self.qkv[part], a=self.a[part], b=self.b[part])


def random_inputs(work, lengths, seed=0):
    """Rows of inputs that share A_log and dt_bias, with half-lives of 1 to 200 tokens."""
    rng = np.random.default_rng(seed)
    heads, keys = work.value_heads, work.key_heads * work.key_dim
    rate = rng.uniform(0.5, 4, heads)
    gates = (heads, work.key_dim) if work.channels else (heads,)
    half_life = np.geomspace(1, 200, np.prod(gates)).reshape(gates)
    dt_bias = np.log(np.expm1(np.log(2) / (half_life.T * rate).T))
    rows = []
    for length in lengths:
        qkv = rng.standard_normal((length, 2 * keys + heads * work.value_dim))
        if work.correlated:
            qkv[:, keys : 2 * keys] = 0.02 * qkv[:, keys : 2 * keys] + rng.standard_normal(keys)
        a, b = 0.3 * rng.standard_normal((length, *gates)), 2 * rng.standard_normal((length, heads))
        parts = (qkv, a, b, np.log(rate), dt_bias)
        rows.append(Inputs(*(part.astype(np.float32) for part in parts)))
    return rows


def recurrence(work, inputs, state):
    """DESIGN section 5, token by token in float64: state [hv, K, V] -> o [t, hv, V], state.

    g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b) beta_scale, q and k L2-normalised (eps 1e-6), q scaled by
    K^-1/2; S <- exp(g) S, or diag(exp(g)) S;  S <- S + k (beta (v - S^T k))^T;  o = S^T q
    """
    state = np.array(state, np.float64)
    keys = work.key_heads * work.key_dim
    outputs = []
    for t in range(len(inputs.qkv)):
        qkv = inputs.qkv[t].astype(np.float64)
        o = np.zeros((work.value_heads, work.value_dim))
        for head in range(work.value_heads):
            j = head // work.ratio
            q = qkv[j * work.key_dim : (j + 1) * work.key_dim]
            k = qkv[keys + j * work.key_dim : keys + (j + 1) * work.key_dim]
            v = qkv[2 * keys + head * work.value_dim : 2 * keys + (head + 1) * work.value_dim]
            q = q / np.sqrt(q @ q + 1e-6) / np.sqrt(work.key_dim)
            k = k / np.sqrt(k @ k + 1e-6)
            x = inputs.a[t, head].astype(np.float64) + inputs.dt_bias[head].astype(np.float64)
            g = -np.exp(float(inputs.A_log[head])) * np.log1p(np.exp(x))
            beta = work.beta_scale / (1 + np.exp(-float(inputs.b[t, head])))
            s = np.exp(g)[..., None] * state[head]
            s = s + np.outer(k, beta * (v - s.T @ k))
            o[head] = s.T @ q
            state[head] = s
        outputs.append(o)
    return np.array(outputs), state


def stored(states, vk, dtype=np.float32):
    """[..., K, V] as a pool row: flat, in the layout asked for."""
    states = np.swapaxes(states, -1, -2) if vk else states
    return states.reshape(*states.shape[:-2], -1).astype(dtype)


def read_back(row, work, vk):
    shape = (work.value_dim, work.key_dim) if vk else (work.key_dim, work.value_dim)
    states = np.asarray(row, np.float64).reshape(*row.shape[:-1], *shape)
    return np.swapaxes(states, -1, -2) if vk else states


def poisoned_pool(work, dtype=np.float32):
    return np.full((LAYERS, SLOTS, work.value_heads, work.state_size), np.nan, dtype)


STATIC = ("layer", "read", "write", "key_dim", "beta_scale")


@jit(static_argnames=STATIC)
def _prefill(qkv, gates, ssm, rows, chunks, bits, *, layer, read, write, key_dim, beta_scale):
    order = StateOrder(read=bits if read == "mixed" else read, write=write)
    packed = Rows(**rows), Chunks(**chunks)
    return gated_delta_rule.prefill(
        qkv, Gates(**gates, beta_scale=beta_scale), ssm, layer, *packed, order, key_head_dim=key_dim, backend=running()
    )


def prefill(work, packed, rows, pool, *, read=False, write=False):
    """Runs the op in layer 1; o per row, and the pool. `read`: one layout, or a bit for each of the ROWS rows."""
    gates = {"a": packed.pack([row.a for row in rows]), "b": packed.pack([row.b for row in rows])}
    o, ssm = _prefill(
        packed.pack([row.qkv for row in rows]),
        {**gates, "A_log": jnp.asarray(rows[0].A_log), "dt_bias": jnp.asarray(rows[0].dt_bias)},
        jnp.asarray(pool),
        vars(packed.rows),
        vars(packed.chunks),
        None if isinstance(read, bool) else jnp.asarray(read),
        layer=1,
        read=read if isinstance(read, bool) else "mixed",
        write=write,
        key_dim=work.key_dim,
        beta_scale=work.beta_scale,
    )
    o = np.asarray(o)
    return [o[here] for here in packed.slices], np.asarray(ssm)


@jit(static_argnames=STATIC)
def _decode(qkv, gates, ssm, read_slot, write_slot, bits, *, layer, read, write, key_dim, beta_scale):
    order, slots = StateOrder(read=bits if read == "mixed" else read, write=write), (read_slot, write_slot)
    return gated_delta_rule.decode(
        qkv, Gates(**gates, beta_scale=beta_scale), ssm, layer, *slots, order, key_head_dim=key_dim, backend=running()
    )


def decode(work, tokens, pool, slots, *, write_slots=None, layer=1, read=False, write=False):
    """Runs the op on one token of each of `tokens`: o [n, hv, v], and the pool."""
    gates = {name: jnp.asarray(np.concatenate([getattr(token, name) for token in tokens])) for name in ("a", "b")}
    o, ssm = _decode(
        jnp.asarray(np.concatenate([token.qkv for token in tokens])),
        {**gates, "A_log": jnp.asarray(tokens[0].A_log), "dt_bias": jnp.asarray(tokens[0].dt_bias)},
        jnp.asarray(pool),
        jnp.asarray(slots, jnp.int32),
        jnp.asarray(slots if write_slots is None else write_slots, jnp.int32),
        None if isinstance(read, bool) else jnp.asarray(read),
        layer=layer,
        read=read if isinstance(read, bool) else "mixed",
        write=write,
        key_dim=work.key_dim,
        beta_scale=work.beta_scale,
    )
    return np.asarray(o), np.asarray(ssm)


def close(actual, expected, bound=BOUND):
    scale = max(np.abs(expected).max(), 1e-3)
    error = np.abs(np.asarray(actual, np.float64) - expected).max() / scale
    assert error < bound, error


def random_states(work, count, seed=1):
    rng = np.random.default_rng(seed)
    return 0.5 * rng.standard_normal((count, work.value_heads, work.key_dim, work.value_dim)).astype(np.float32)


@pytest.mark.short_cases
@pytest.mark.parametrize("work", WORKLOADS.values(), ids=WORKLOADS)
def test_chunked_form_equals_the_recurrence(work):
    """Every odd length in one batch, rows with a state and fresh rows, padding and unused slots full of NaN."""
    rows = random_inputs(work, LENGTHS)
    fresh = [i % 2 == 0 for i in range(len(rows))]
    states = random_states(work, len(rows))
    pool = poisoned_pool(work)
    for i, is_fresh in enumerate(fresh):
        if not is_fresh:
            pool[1, i + 1] = stored(states[i], vk=False)
    packed = pack_rows(LENGTHS, read=range(1, len(rows) + 1), fresh=fresh)
    outputs, ssm = prefill(work, packed, rows, pool)
    for i, row in enumerate(rows):
        expected, state = recurrence(work, row, np.zeros_like(states[i]) if fresh[i] else states[i])
        close(outputs[i], expected)
        close(read_back(ssm[1, i + 1], work, vk=False), state)


@pytest.mark.short_cases
@pytest.mark.parametrize("work", WORKLOADS.values(), ids=WORKLOADS)
def test_decode_equals_the_recurrence(work):
    rows = random_inputs(work, [3] * 4)
    states = random_states(work, 4)
    pool = poisoned_pool(work)
    pool[1, 1:5] = stored(states, vk=False)
    ssm, outputs = pool, []
    for t in range(3):
        o, ssm = decode(work, [row[t : t + 1] for row in rows], ssm, range(1, 5))
        outputs.append(o)
    for i, row in enumerate(rows):
        expected, state = recurrence(work, row, states[i])
        close(np.stack(outputs)[:, i], expected)
        close(read_back(ssm[1, i + 1], work, vk=False), state)


WORK = WORKLOADS["ratio 1, K < V"]
CHANNELS = WORKLOADS["channels, K < V"]
NAMES = {work: name for name, work in WORKLOADS.items()}


def test_prefill_then_decode_equals_one_prefill():
    (row,) = random_inputs(WORK, [70])
    pool = poisoned_pool(WORK)
    whole, _ = prefill(WORK, pack_rows([70], read=[3], fresh=[True]), [row], pool)
    _, ssm = prefill(WORK, pack_rows([69], read=[3], fresh=[True]), [row[:69]], pool)
    o, _ = decode(WORK, [row[69:]], ssm, [3])
    close(o[0], whole[0][69])


def test_fresh_row_ignores_what_its_slot_holds():
    (row,) = random_inputs(WORK, [65])
    packed = pack_rows([65], read=[2], fresh=[True])
    results = []
    for content in (0.0, 1e30, np.inf, np.nan):
        pool = np.full_like(poisoned_pool(WORK), content)
        outputs, ssm = prefill(WORK, packed, [row], pool)
        results.append((outputs[0], ssm[1, 2]))
    for o, state in results[1:]:
        np.testing.assert_array_equal(o, results[0][0])
        np.testing.assert_array_equal(state, results[0][1])


def test_state_is_used_where_a_row_is_not_fresh():
    """The other side of the test above: a state that is there does matter."""
    (row,) = random_inputs(WORK, [65])
    pool = poisoned_pool(WORK)
    pool[1, 2] = stored(random_states(WORK, 1)[0], vk=False)
    with_state, _ = prefill(WORK, pack_rows([65], read=[2], fresh=[False]), [row], pool)
    without, _ = prefill(WORK, pack_rows([65], read=[2], fresh=[True]), [row], pool)
    assert np.abs(with_state[0] - without[0]).max() > 1e-2 * np.abs(without[0]).max()


def test_only_the_write_slots_of_the_layer_change():
    """A fork: rows read slots 1 and 2 and write slots 5 and 6; every other bit of the pool stays."""
    rows = random_inputs(WORK, [65, 3])
    rng = np.random.default_rng(3)
    pool = rng.standard_normal(poisoned_pool(WORK).shape).astype(np.float32)
    packed = pack_rows([65, 3], read=[1, 2], write=[5, 6], fresh=[False, False])
    _, ssm = prefill(WORK, packed, rows, pool)
    kept = np.ones(pool.shape[:2], bool)
    # Padded rows write the null slot, which nobody reads.
    kept[1, [0, 5, 6]] = False
    np.testing.assert_array_equal(ssm[kept], pool[kept])
    for i, row in enumerate(rows):
        close(
            read_back(ssm[1, 5 + i], WORK, vk=False), recurrence(WORK, row, read_back(pool[1, 1 + i], WORK, False))[1]
        )


def test_decode_changes_only_its_write_slots():
    (row,) = random_inputs(WORK, [1])
    rng = np.random.default_rng(4)
    pool = rng.standard_normal(poisoned_pool(WORK).shape).astype(np.float32)
    _, ssm = decode(WORK, [row] * 3, pool, [1, 4, 0], write_slots=[1, 7, 0], layer=0)
    kept = np.ones(pool.shape[:2], bool)
    kept[0, [0, 1, 7]] = False
    np.testing.assert_array_equal(ssm[kept], pool[kept])
    close(read_back(ssm[0, 7], WORK, False), recurrence(WORK, row, read_back(pool[0, 4], WORK, False))[1])


ORDERS = [(WORK, read, write) for read in ("kv", "vk", "mixed") for write in (False, True)]
ORDERS.append((CHANNELS, "mixed", False))


@pytest.mark.short_cases
@pytest.mark.parametrize(("work", "read", "write"), ORDERS, ids=lambda x: NAMES.get(x, x))
def test_layouts_hold_the_same_values(work, read, write):
    """K != V, so that a state read in the wrong order cannot pass."""
    assert work.key_dim != work.value_dim
    rows = random_inputs(work, [65, 2, 64])
    states = random_states(work, 3)
    bits = {"kv": [False] * 3, "vk": [True] * 3, "mixed": [True, False, True]}[read]
    pool = poisoned_pool(work)
    for i, vk in enumerate(bits):
        pool[1, i + 1] = stored(states[i], vk)
    # Mixed: a bit for every row, padded rows included.
    prefill_read, decode_read = ([*bits, True, False, True, False, True], bits) if read == "mixed" else (bits[0],) * 2
    # Prefill changes the order of no slot in place, and decode only in a mixed pool.
    slots = [1, 2, 3] if set(bits) == {write} else [4, 5, 6]
    packed = pack_rows([65, 2, 64], read=[1, 2, 3], write=slots, fresh=[False] * 3)
    outputs, ssm = prefill(work, packed, rows, pool, read=prefill_read, write=write)
    decode_slots = [1, 2, 3] if read == "mixed" else slots
    one_each, static = [row[:1] for row in rows], {"read": decode_read, "write": write}
    o, decoded = decode(work, one_each, pool, [1, 2, 3], write_slots=decode_slots, **static)
    for i, row in enumerate(rows):
        expected, state = recurrence(work, row, states[i])
        close(outputs[i], expected)
        close(read_back(ssm[1, slots[i]], work, write), state)
        expected, state = recurrence(work, row[:1], states[i])
        close(o[i], expected[0])
        close(read_back(decoded[1, decode_slots[i]], work, write), state)


@pytest.mark.short_cases
@pytest.mark.parametrize("cuts", [None, [{}]], ids=["without checkpoints", "with checkpoints"])
def test_bfloat16_pool_rounds_the_state_once(cuts):
    """Outputs of a piece are computed in float32; only what is stored is rounded (2^-8 relative: half an ulp)."""
    (row,) = random_inputs(WORK, [130])
    state = random_states(WORK, 1)[0].astype(ml_dtypes.bfloat16)
    pool = poisoned_pool(WORK, ml_dtypes.bfloat16)
    pool[1, 1] = stored(state, vk=False, dtype=ml_dtypes.bfloat16)
    outputs, ssm = prefill(WORK, pack_rows([130], read=[1], fresh=[False], cuts=cuts), [row], pool)
    assert ssm.dtype == ml_dtypes.bfloat16
    expected, final = recurrence(WORK, row, state.astype(np.float64))
    close(outputs[0], expected)
    actual = read_back(ssm[1, 1].astype(np.float32), WORK, vk=False)
    assert np.all(np.abs(actual - final) <= 2**-8 * np.abs(final) + BOUND * np.abs(final).max())


@pytest.mark.parametrize("cuts", [(64,), (128,), (64, 128, 192)])
def test_pieces_cut_at_chunks_equal_the_whole_bit_for_bit(cuts):
    """Float32 state: cutting on the grid of 64 tokens stores exactly what the scan would have carried."""
    total = 200
    (row,) = random_inputs(WORK, [total])
    pool = poisoned_pool(WORK)
    whole, final = prefill(WORK, pack_rows([total], read=[2], fresh=[True]), [row], pool)
    pieces = []
    for start, end in zip((0, *cuts), (*cuts, total), strict=True):
        packed = pack_rows([end - start], read=[2], fresh=[start == 0])
        (o,), pool = prefill(WORK, packed, [row[start:end]], pool)
        pieces.append(o)
    np.testing.assert_array_equal(np.concatenate(pieces), whole[0])
    np.testing.assert_array_equal(pool[1, 2], final[1, 2])


def test_pieces_cut_anywhere_equal_the_whole_within_rounding():
    (row,) = random_inputs(WORK, [150])
    pool = poisoned_pool(WORK)
    whole, final = prefill(WORK, pack_rows([150], read=[2], fresh=[True]), [row], pool)
    pieces = []
    for start, end in ((0, 1), (1, 38), (38, 101), (101, 150)):
        (o,), pool = prefill(WORK, pack_rows([end - start], read=[2], fresh=[start == 0]), [row[start:end]], pool)
        pieces.append(o)
    close(np.concatenate(pieces), whole[0])
    close(pool[1, 2], final[1, 2])


CUTS = {1: 3, 16: 4, 48: 5, 63: 6, 65: 7, 100: 8}
"""Places of checkpoints in a row of 130 tokens, and the slots that keep them."""


@pytest.mark.short_cases("reference-channels, K < V-True", "interpret-ratio 1, K < V-False")
@pytest.mark.parametrize(("work", "vk"), [(WORK, False), (WORK, True), (CHANNELS, True)], ids=lambda x: NAMES.get(x))
def test_checkpoint_is_the_state_of_the_piece_that_ends_there(work, vk):
    """Bit for bit, whatever the slot held before; and so is what a fork of it goes on to."""
    (row,) = random_inputs(work, [130])
    pool = poisoned_pool(work)
    pool[1, 1] = stored(random_states(work, 1)[0], vk)
    given = {"read": vk, "write": vk}
    whole, ssm = prefill(work, pack_rows([130], read=[1], write=[2], fresh=[False], cuts=[CUTS]), [row], pool, **given)
    for place, slot in CUTS.items():
        expected = recurrence(work, row[:place], read_back(pool[1, 1], work, vk))[1]
        close(read_back(ssm[1, slot], work, vk), expected)
        earlier = {cut: 0 for cut in CUTS if cut < place}
        piece = pack_rows([place], read=[1], write=[2], fresh=[False], cuts=[earlier])
        _, ended = prefill(work, piece, [row[:place]], pool, **given)
        np.testing.assert_array_equal(ssm[1, slot], ended[1, 2])
        later = {cut - place: 0 for cut in CUTS if cut > place}
        fork = pack_rows([130 - place], read=[slot], write=[2], fresh=[False], cuts=[later], behind=[place])
        outputs, forked = prefill(work, fork, [row[place:]], poisoned_but(ssm, slot), **given)
        np.testing.assert_array_equal(outputs[0], whole[0][place:])
        np.testing.assert_array_equal(forked[1, 2], ssm[1, 2])
        np.testing.assert_array_equal(forked[1, slot], ssm[1, slot])


def poisoned_but(pool, slot):
    poisoned = np.full_like(pool, np.nan)
    poisoned[:, slot] = pool[:, slot]
    return poisoned


def test_only_checkpoints_and_write_slots_of_the_layer_change():
    rows = random_inputs(WORK, [70, 3])
    pool = np.random.default_rng(3).standard_normal(poisoned_pool(WORK).shape).astype(np.float32)
    packed = pack_rows([70, 3], read=[1, 2], write=[5, 6], fresh=[False] * 2, cuts=[{1: 7, 50: 0}, {3: 8}])
    _, ssm = prefill(WORK, packed, rows, pool)
    kept = np.ones(pool.shape[:2], bool)
    kept[1, [0, 5, 6, 7, 8]] = False
    np.testing.assert_array_equal(ssm[kept], pool[kept])
    np.testing.assert_array_equal(ssm[1, 8], ssm[1, 6])


def test_checkpoints_change_nothing_else():
    """Rows cut in the same places, with and without slots that keep what stands there."""
    rows = random_inputs(WORK, [130, 65])
    pool, results = poisoned_pool(WORK), []
    for cuts in (None, [{}, {}], [{64: 7}, {64: 8}]):
        packed = pack_rows([130, 65], read=[1, 2], fresh=[True] * 2, cuts=cuts)
        outputs, ssm = prefill(WORK, packed, rows, pool)
        results.append((*outputs, ssm[1, [1, 2]]))
    without, nothing_kept, kept = results
    for one, other in zip(nothing_kept, kept, strict=True):
        np.testing.assert_array_equal(one, other)
    # Another program: XLA may sum in another order.
    for one, other in zip(without, kept, strict=True):
        close(other, one)


def test_checkpoint_in_a_bfloat16_pool_is_the_state_rounded_once():
    (row,) = random_inputs(WORK, [130])
    packed = pack_rows([130], read=[2], fresh=[True], cuts=[CUTS])
    exact, rounded = (
        prefill(WORK, packed, [row], poisoned_pool(WORK, dtype))[1] for dtype in (np.float32, ml_dtypes.bfloat16)
    )
    slots = [2, *CUTS.values()]
    np.testing.assert_array_equal(exact[1, slots].astype(ml_dtypes.bfloat16), rounded[1, slots])


def test_row_ignores_its_neighbours_bit_for_bit():
    """Same batch shape, other contents in the other rows."""
    rows, others = random_inputs(WORK, LENGTHS), random_inputs(WORK, LENGTHS, seed=9)
    packed = pack_rows(LENGTHS, read=range(1, 7), fresh=[True] * 6)
    pool = poisoned_pool(WORK)
    expected, ssm = prefill(WORK, packed, rows, pool)
    for i in (0, 3, 5):
        swapped = [dataclasses.replace(other, A_log=rows[0].A_log, dt_bias=rows[0].dt_bias) for other in others]
        swapped[i] = rows[i]
        outputs, other_ssm = prefill(WORK, packed, swapped, pool)
        np.testing.assert_array_equal(outputs[i], expected[i])
        np.testing.assert_array_equal(other_ssm[1, i + 1], ssm[1, i + 1])


def test_strong_decay_and_full_writes_stay_finite():
    """g of -60 a token, beta of 1, a key that never changes: nothing overflows, nothing becomes NaN."""
    (row,) = random_inputs(WORK, [130])
    keys = WORK.key_heads * WORK.key_dim
    row.qkv[:, keys : 2 * keys] = row.qkv[0, keys : 2 * keys]
    row.b[:] = 40.0
    row.a[::2] = 60.0
    outputs, ssm = prefill(WORK, pack_rows([130], read=[2], fresh=[True]), [row], poisoned_pool(WORK))
    expected, state = recurrence(WORK, row, np.zeros((WORK.value_heads, WORK.key_dim, WORK.value_dim)))
    close(outputs[0], expected)
    close(read_back(ssm[1, 2], WORK, vk=False), state)


@pytest.mark.short_cases
@pytest.mark.parametrize("correlated", [False, True])
def test_channels_of_extreme_decays_lose_nothing(correlated):
    """g of -20 a token beside -1e-4, by channel and by token, in runs and in turns: as close as with mild gates."""
    (row,) = random_inputs(dataclasses.replace(CHANNELS, correlated=correlated), [130])
    rng = np.random.default_rng(2)
    strong = rng.random(row.a.shape) < np.linspace(0, 1, CHANNELS.key_dim)
    strong[40:70] = strong[40]
    g = np.where(strong, -20.0, -1e-4)
    row.a[:] = np.log(np.expm1(-g / np.exp(row.A_log)[:, None])) - row.dt_bias
    outputs, ssm = prefill(CHANNELS, pack_rows([130], read=[2], fresh=[True]), [row], poisoned_pool(CHANNELS))
    expected, state = recurrence(CHANNELS, row, np.zeros((CHANNELS.value_heads, CHANNELS.key_dim, CHANNELS.value_dim)))
    close(outputs[0], expected)
    close(read_back(ssm[1, 2], CHANNELS, vk=False), state)


@pytest.mark.thorough
def test_channels_agree_with_transformers():
    """Kimi Delta Attention by PyTorch, in chunks of its own, the forget gate included."""
    kimi = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    torch = pytest.importorskip("torch")
    (row,) = random_inputs(CHANNELS, [130])
    outputs, ssm = prefill(CHANNELS, pack_rows([130], read=[2], fresh=[True]), [row], poisoned_pool(CHANNELS))
    heads, width = CHANNELS.value_heads, CHANNELS.key_dim
    qkv, a, b, A_log, dt_bias = (torch.from_numpy(getattr(row, field.name)) for field in dataclasses.fields(row))
    gate = kimi.KimiLinearForgetGate(
        SimpleNamespace(hidden_size=heads * width, linear_head_dim=width, linear_num_heads=heads)
    )
    gate.f_a_proj = gate.f_b_proj = torch.nn.Identity()
    gate.A_log.data, gate.dt_bias.data = A_log.view(1, 1, heads, 1), dt_bias.view(-1)
    q, k, v = (x.view(1, 130, heads, -1) for x in qkv.split([heads * width] * 2 + [heads * CHANNELS.value_dim], dim=-1))
    with torch.no_grad():
        given = {"g": gate(a.view(1, 130, -1)), "beta": b[None].sigmoid(), "initial_state": None}
        o, state = kimi.chunk_kimi_delta_attention(
            q, k, v, **given, output_final_state=True, use_qk_l2norm_in_kernel=True
        )
    close(outputs[0], o[0].numpy())
    close(read_back(ssm[1, 2], CHANNELS, vk=False), state[0].numpy())


@once
@pytest.mark.parametrize(
    "wrong", [{"a": (4, 2, 8)}, {"dt_bias": (2,)}, {"a": (4, 2)}, {"A_log": (2, 16)}, {"b": (4, 1)}]
)
def test_gates_of_other_shapes_are_refused(wrong):
    shapes = {"a": (4, 2, 16), "b": (4, 2), "A_log": (2,), "dt_bias": (2, 16)} | wrong
    gates = Gates(**{name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()})
    qkv, ssm = jnp.zeros((4, 112)), jnp.zeros((2, 9, 2, 16 * 24))
    slots = jnp.zeros(4, jnp.int32)
    with pytest.raises(ValueError, match=r"gates of shapes .*allowed: .*per channel"):
        gated_delta_rule.decode(qkv, gates, ssm, 0, slots, slots, StateOrder(False, False), key_head_dim=16)


@once
@pytest.mark.parametrize("size", [16, 64])
def test_inverse_and_its_derivative_equal_numpy(size):
    """d(L^-1) = -L^-1 dL L^-1, in float64; what stands on and above the diagonal is read by neither."""
    rng = np.random.default_rng(size)
    matrix, change = (rng.standard_normal((3, size, size)) * 0.2 for _ in range(2))
    with_junk = [np.asarray(x + 7 * np.triu(np.ones_like(x)), np.float32) for x in (matrix, change)]
    inverse, tangent = jax.jit(lambda x, dx: jax.jvp(unit_lower_inverse, (x,), (dx,)))(*with_junk)
    expected = np.linalg.inv(np.eye(size) + np.tril(matrix, -1))
    derivative = -expected @ np.tril(change, -1) @ expected
    for actual, exact in ((inverse, expected), (tangent, derivative)):
        assert np.abs(actual - exact).max() <= BOUND * np.abs(exact).max()
