"""Drawn tokens against Threefry by jax.random's own function, and against noise-free rows."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from gdnjax.backend import INTERPRET
from gdnjax.pallas_kernels.gumbel_argmax import gumbel, gumbel_argmax, kernels, tiles
from tests.pallas_kernels.backends import once

WIDTH = 300
TEMPERATURE = np.array([0.0, 1.0, 0.7, 0.0, 2.0], np.float32)
POSITION = np.array([0, 5, 2**31 - 1, 7, 9], np.int32)


def operands(width=WIDTH, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((5, width)).astype(np.float32) * 3
    return logits, rng.integers(0, 2**32, (5, 2), dtype=np.uint32)


def draw(logits, seeds, least=None, temperature=TEMPERATURE, **options):
    arrays = (logits, temperature, least, seeds, POSITION)
    found = gumbel_argmax(*(None if x is None else jnp.asarray(x) for x in arrays), **options)
    return [np.asarray(x) for x in found]


def noisy(logits, seeds, first=0, stream=0):
    """Log-weights and noise [5, width], added up in numpy."""
    token = jnp.arange(first, first + logits.shape[1], dtype=jnp.uint32)
    noise = np.asarray(gumbel(jnp.asarray(seeds), jnp.asarray(POSITION), token, stream))
    drawn = TEMPERATURE > 0
    scaled = logits / np.where(drawn, TEMPERATURE, 1)[:, None]
    return scaled, scaled + np.where(drawn[:, None], noise, 0)


@pytest.mark.short_cases
@pytest.mark.parametrize("stream", [0, 1, 3])
@pytest.mark.parametrize("first", [0, 248_000])
@pytest.mark.parametrize("width", [1, 64, 300], ids="width {}".format)
def test_the_best_of_logits_over_temperature_and_noise(width, first, stream, backend):
    logits, seeds = operands(width)
    token, value, top = draw(logits, seeds, first=first, stream=stream, backend=backend)
    scaled, sums = noisy(logits, seeds, first, stream)
    np.testing.assert_array_equal(token, sums.argmax(1))
    # The noise is two logarithms: a few ulp of numbers up to 20.
    np.testing.assert_allclose(value, sums.max(1), atol=1e-5)
    np.testing.assert_allclose(top, scaled.max(1), rtol=1e-6)


def test_rows_with_a_bound_draw_from_what_reaches_it_and_the_others_are_left_out(backend):
    logits, seeds = operands()
    least = np.array([-np.inf, 6.0, 9.0, 1.0, -np.inf], np.float32)
    token, value, top = draw(logits, seeds, least, backend=backend)
    scaled, sums = noisy(logits, seeds)
    expected = np.where(scaled >= least[:, None], sums, -np.inf).argmax(1)
    assert (expected[1:4] != sums.argmax(1)[1:4]).any()
    np.testing.assert_array_equal(token, [0, *expected[1:4], 0])
    assert np.isneginf(value[[0, 4]]).all()
    assert np.isneginf(top[[0, 4]]).all()


def test_the_lowest_of_those_that_tie(backend):
    logits = np.zeros((5, WIDTH), np.float32)
    logits[:, [70, 140, 260]] = 1
    token, _, _ = draw(logits, operands()[1], temperature=np.zeros(5, np.float32), backend=backend)
    np.testing.assert_array_equal(token, [70] * 5)


def test_tokens_that_may_not_be_drawn_are_not(backend):
    logits, seeds = operands()
    logits[:, :290] = -np.inf
    token, _, _ = draw(logits, seeds, backend=backend)
    assert (token >= 290).all()


@once
@pytest.mark.parametrize("spread", [0.0, 3.0, 30.0, 3000.0])
def test_noise_that_is_spared_changes_no_bit(spread, monkeypatch):
    """Draws are those of noise for every token: of rows that all but tie, and of rows whose best stand out."""
    width = 2000
    logits, seeds = np.random.default_rng(4).standard_normal((5, width)).astype(np.float32) * spread, operands()[1]
    logits[4, :50] = [np.nan, np.inf, -np.inf, np.inf, 1] * 10
    found = {}
    for sparing in (False, True):
        tile = dataclasses.replace(tiles.of(INTERPRET), sparing=sparing)
        monkeypatch.setattr(tiles, "of", lambda backend, tile=tile: tile)
        for temperature in (0.01, 1.0, 3.0):
            hot = np.full(5, temperature, np.float32)
            drawn = draw(logits, seeds, temperature=hot, backend=INTERPRET)
            if sparing:
                for one, other in zip(drawn, found[temperature], strict=True):
                    np.testing.assert_array_equal(one, other)
            found[temperature] = drawn


@once
def test_no_noise_is_above_its_bound():
    least = np.float32(0.5) * np.float32(2.0**-32)
    assert 0 < kernels.MOST_NOISE + np.log(-np.log1p(-np.float64(least))) < 0.01
