"""What is read ahead changes nothing: neither what the kernel beside it gives nor what comes of the matrices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdnjax.backend import INTERPRET
from gdnjax.pallas_kernels import ahead, launch, matmul
from gdnjax.pallas_kernels.normed import Gated, Normed
from gdnjax.quantized import Quantized, quantise
from tests.pallas_kernels.backends import once

READING = ahead.Ahead(programs=3, size=16_384, most=16)


def weights(coded: bool):
    keys = jax.random.split(jax.random.key(1), 2)
    found = [jax.random.normal(key, (n, 128)) / 12 for key, n in zip(keys, (272, 300), strict=True)]
    return [Quantized(*quantise(w, "float8_e4m3fn"), (1, 128)) if coded else w.astype("bfloat16") for w in found]


@pytest.fixture
def reading(monkeypatch):
    def switch(on: bool):
        monkeypatch.setitem(ahead.TABLE, "interpret", READING if on else ahead.Ahead(0, 0, 0))
        return on

    return switch


def launches(monkeypatch) -> list:
    found, run = [], launch.run
    monkeypatch.setattr(launch, "run", lambda call, args: found.append(call) or run(call, args))
    return found


@once
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("coded", [False, True], ids=["numbers", "codes"])
def test_rows_and_products_are_those_without_it(coded, order, reading, monkeypatch):
    backend = dataclasses.replace(INTERPRET, order=order)
    x = jax.random.normal(jax.random.key(0), (3, 128)).astype("bfloat16")
    added = jax.random.normal(jax.random.key(2), (2, 3, 128))
    rows = Normed(x, jnp.ones(128, "bfloat16"), 1e-6, 0.0, added=added)
    calls, found = launches(monkeypatch), []
    for on in (False, True):
        reading(on)
        calls.clear()
        whole, ready = matmul.prepare(rows, *weights(coded), backend=backend)
        found.append([whole, *matmul.project(ready, *weights(coded), backend=backend)])
        assert [call.kernel is ahead.carrying for call in calls] == [on, False]
    for without, beside in zip(*found, strict=True):
        np.testing.assert_array_equal(without.astype(jnp.float32), beside.astype(jnp.float32))


@once
def test_gated_rows_read_ahead_for_codes_too(reading, monkeypatch):
    gate = jax.random.normal(jax.random.key(0), (2, 128)).astype("bfloat16")
    rows = Gated(gate.reshape(2, 4, 32).astype(jnp.float32), gate, jnp.ones(32), 1e-6, "silu")
    calls, found = launches(monkeypatch), []
    for on in (False, True):
        reading(on)
        calls.clear()
        found.append(matmul.project(rows, *weights(True), backend=INTERPRET))
        assert [call.kernel is ahead.carrying for call in calls] == [on, False]
    for without, beside in zip(*found, strict=True):
        np.testing.assert_array_equal(without.astype(jnp.float32), beside.astype(jnp.float32))


@once
def test_many_rows_and_small_matrices_read_nothing_ahead(reading, monkeypatch):
    reading(True)
    calls = launches(monkeypatch)
    for count, outputs in ((17, 300), (3, 80)):
        x = Normed(jnp.ones((count, 128), "bfloat16"), jnp.ones(128, "bfloat16"), 1e-6, 0.0)
        matmul.prepare(x, jnp.ones((outputs, 128), "bfloat16"), backend=INTERPRET)
    assert [call.kernel is ahead.carrying for call in calls] == [False, False]


@once
def test_it_reads_about_as_many_bytes_as_it_may_and_what_registers_hold():
    wide = jnp.zeros((12_288, 2048), "bfloat16")
    assert ahead.widths(ahead.Ahead(262, 8 << 20, 16), [wide, wide]) == (128, 128)
    assert ahead.widths(ahead.Ahead(262, 64 << 20, 16), [wide]) == (1024,)
    assert ahead.widths(ahead.Ahead(262, 8 << 20, 16), [jnp.zeros((4096, 96), "int8")]) == (64,)
