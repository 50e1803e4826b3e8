"""Rows that are verified, accepted and folded later give what tokens one by one give, whatever was rejected between."""

import jax.numpy as jnp
import numpy as np
import pytest

from gdnjax.pallas_kernels import gated_delta_rule
from gdnjax.pallas_kernels.gated_delta_rule import Gates, StateOrder
from tests.pallas_kernels.backends import jit, running
from tests.pallas_kernels.test_gated_delta_rule import BOUND, WORKLOADS, random_inputs, read_back, recurrence

SLOTS, ROWS, TOKENS = 7, 3, 4
"""Three requests; steps of four tokens, as with three drafts."""

ACCEPTED = ((1, 4, 2), (4, 1, 3), (2, 2, 4), (1, 3, 1), (4, 4, 4), (3, 1, 2))
"""Tokens of each request that are kept, step by step."""

SLOT = np.array([5, 1, 3], np.int32)
OTHER = SLOT + 1


def steps():
    """Where each request stands before every step, and how many of its rows are pending then."""
    begin, pending = np.zeros(ROWS, int), np.zeros(ROWS, np.int32)
    for accepted in ACCEPTED:
        yield begin.copy(), pending, np.array(accepted, np.int32)
        begin += accepted
        pending = np.array(accepted, np.int32)


def verified(rows, begin, accepted, garbage):
    """[ROWS, TOKENS, ...]: the rows' next tokens, and garbage in the place of those that will be rejected."""
    out = np.full((ROWS, TOKENS, *rows[0].shape[1:]), garbage, rows[0].dtype)
    for i, row in enumerate(rows):
        out[i, : accepted[i]] = row[begin[i] : begin[i] + accepted[i]]
    return jnp.asarray(out)


def both_slots(write):
    """Read slots and write slots."""
    return jnp.asarray(SLOT), jnp.asarray(write)


@jit(static_argnames=("read", "write", "width"))
def delta_verify(qkv, gates, ssm, pending, *, read, write, width):
    order = StateOrder(read=read, write=write)
    return gated_delta_rule.verify(
        qkv,
        Gates(**gates),
        ssm,
        1,
        *both_slots(SLOT),
        pending,
        order,
        key_head_dim=width,
        new=TOKENS,
        backend=running(),
    )


@jit(static_argnames=("read", "write", "width"))
def delta_fold(qkv, gates, ssm, count, *, read, write, width):
    order = StateOrder(read=read, write=write)
    return gated_delta_rule.fold(
        qkv, Gates(**gates), ssm, 1, *both_slots(OTHER), count, order, key_head_dim=width, backend=running()
    )


def both(new, before):
    """Pending rows, then new ones; NaN where nothing is pending yet."""
    return jnp.concatenate([jnp.full_like(new, jnp.nan) if before is None else before, new], axis=1)


@pytest.mark.short_cases
@pytest.mark.parametrize("vk", [False, True])
@pytest.mark.parametrize("name", ["ratio 1, K < V", "ratio 3", "correlated keys", "channels, K < V"])
def test_delta_rule_of_verified_rows_equals_the_recurrence(name, vk):
    work = WORKLOADS[name]
    rows = random_inputs(work, [sum(column) for column in zip(*ACCEPTED, strict=True)])
    zero = np.zeros((work.value_heads, work.key_dim, work.value_dim))
    whole = [recurrence(work, row, zero)[0] for row in rows]
    pool = np.full((2, SLOTS, work.value_heads, work.state_size), np.nan, np.float32)
    pool[1, SLOT] = 0
    ssm, before = jnp.asarray(pool), {"qkv": None, "a": None, "b": None}
    shared = {"A_log": jnp.asarray(rows[0].A_log), "dt_bias": jnp.asarray(rows[0].dt_bias)}
    for begin, pending, accepted in steps():
        new = {name: verified([getattr(row, name) for row in rows], begin, accepted, np.nan) for name in before}
        now = {name: both(new[name], before[name]) for name in before}
        gates = {"a": now["a"], "b": now["b"], **shared}
        o, ssm = delta_verify(now["qkv"], gates, ssm, jnp.asarray(pending), read=vk, write=vk, width=work.key_dim)
        # A new row goes on from rows that are kept only, so those after a rejected one mean nothing.
        for i in range(ROWS):
            expected = whole[i][begin[i] : begin[i] + accepted[i]]
            found = np.asarray(o)[i, : accepted[i]]
            np.testing.assert_allclose(found, expected, atol=BOUND * np.abs(whole[i]).max(), rtol=0)
            _, state = recurrence(work, rows[i][: begin[i]], zero)
            stored = read_back(np.asarray(ssm)[1, SLOT[i]], work, vk)
            np.testing.assert_allclose(stored, state, atol=BOUND * max(1, np.abs(state).max()), rtol=0)
        before = new
    # Every prefix of what is pending can be sealed, and nothing else is touched.
    begin = np.array([sum(column[:-1]) for column in zip(*ACCEPTED, strict=True)])
    gates = {"a": before["a"], "b": before["b"], **shared}
    for count in range(min(ACCEPTED[-1]) + 1):
        counts = jnp.full(ROWS, count, jnp.int32)
        sealed = np.asarray(delta_fold(before["qkv"], gates, ssm, counts, read=vk, write=not vk, width=work.key_dim))
        for i in range(ROWS):
            _, state = recurrence(work, rows[i][: begin[i] + count], zero)
            stored = read_back(sealed[1, OTHER[i]], work, not vk)
            np.testing.assert_array_equal(sealed[1, SLOT[i]], np.asarray(ssm)[1, SLOT[i]])
            np.testing.assert_allclose(stored, state, atol=BOUND * max(1, np.abs(state).max()), rtol=0)


@pytest.mark.short_cases
@pytest.mark.parametrize("name", ["ratio 2, K > V", "channels, K < V"])
def test_verified_rows_change_nothing_that_is_stored(name):
    """With nothing pending a step leaves the state as it is, bit for bit, whatever its tokens are."""
    work = WORKLOADS[name]
    rows = random_inputs(work, [TOKENS] * ROWS)
    pool = np.random.default_rng(0).standard_normal((2, SLOTS, work.value_heads, work.state_size)).astype(np.float32)
    new = {name: jnp.stack([jnp.asarray(getattr(row, name)) for row in rows]) for name in ("qkv", "a", "b")}
    gates = {name: both(new[name], None) for name in ("a", "b")}
    gates |= {"A_log": jnp.asarray(rows[0].A_log), "dt_bias": jnp.asarray(rows[0].dt_bias)}
    none = jnp.zeros(ROWS, jnp.int32)
    _, ssm = delta_verify(
        both(new["qkv"], None), gates, jnp.asarray(pool), none, read=True, write=True, width=work.key_dim
    )
    np.testing.assert_array_equal(np.asarray(ssm), pool)
