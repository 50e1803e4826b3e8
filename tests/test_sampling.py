"""Logits to tokens: masks equal a sort-based definition, noise is a function of (seed, position, token) alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy

from gdnjax import sampling, sharding
from gdnjax.pallas_kernels.gumbel_argmax import gumbel, reference, uniform
from gdnjax.sampling import Change, Draw, Vocab
from gdnjax.sampling_params import MAX_BAD_SEQUENCES, MAX_BAD_WORD_TOKENS
from gdnjax.serving import packing
from gdnjax.state import ALL_ALLOWED, IN_PROMPT, MOST_COUNTED, NO_TOKEN, LogitRows
from gdnjax.step import PROMPT_LOGPROB_ROWS
from tests.draws import (
    IMPOSSIBLE,
    fit,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    make_draw,
    masked,
    over_ranks,
    padded,
    primitives,
    softmax,
    whole,
)

pytestmark = pytest.mark.usefixtures("quickly_compiled")

LIKELY = 1e-4
"""p-values of a correct sampler are uniform: of the seventy in this file, all with fixed seeds, one falls below this by
accident in one of two hundred choices of seeds."""


def log_softmax(x):
    x = np.asarray(x, np.float64)
    top = x.max(-1, keepdims=True)
    return x - top - np.log(np.exp(x - top).sum(-1, keepdims=True))


# Compiled once a shape; called as they are, every call would compile its loops again.
_gumbel = jax.jit(gumbel)
_logprobs = jax.jit(sampling.logprobs, static_argnums=(2, 3))
_top_k, _top_p = (jax.jit(mask, static_argnums=2) for mask in (sampling._top_k, sampling._top_p))


def noise(draw, size):
    return np.asarray(_gumbel(draw.seed, draw.position, jnp.arange(size, dtype=jnp.uint32)))


@functools.partial(jax.jit, static_argnums=(0, 6))
def _tokens(function, logits, position, floats, top_k, seed, size):
    temperature, top_p, min_p = floats
    draw = Draw(position, temperature, top_k, top_p, min_p, seed)
    return function(jnp.broadcast_to(logits, (position.shape[0], size)), draw, Vocab(size=size, tp=1))


def tokens_of(function, logits, draw):
    """Tokens drawn from one row of logits, or from a row each."""
    logits = jnp.asarray(logits, jnp.float32)
    floats = (draw.temperature, draw.top_p, draw.min_p)
    return np.asarray(_tokens(function, logits, draw.position, floats, draw.top_k, draw.seed, logits.shape[-1]))


def dependence(left, right):
    """p-value of the chi-square test of independence of two columns of tokens."""
    table = np.zeros((left.max() + 1, right.max() + 1))
    np.add.at(table, (left, right), 1)
    return scipy.stats.chi2_contingency(table).pvalue


@pytest.mark.parametrize("function", [sampling.draw_plain, sampling.draw_full])
def test_greedy_equals_argmax(function):
    logits = np.random.default_rng(0).standard_normal((16, 97)).astype(np.float32)
    logits[3, [10, 20]] = 9.0  # the lowest of those that tie
    logits[4, 1:] = -np.inf
    draw = make_draw(16, temperature=0.0, top_k=np.arange(16), top_p=0.7, min_p=0.1, position=7)
    np.testing.assert_array_equal(tokens_of(function, logits, draw), logits.argmax(-1))


@pytest.mark.parametrize("function", [sampling.draw_plain, sampling.draw_full])
def test_greedy_and_drawn_rows_do_not_mix(function):
    logits = np.random.default_rng(1).standard_normal((8, 33)).astype(np.float32)
    temperature = np.array([0, 1, 0, 0.3, 2, 0, 1, 1], np.float32)
    draw = make_draw(8, temperature=temperature, seed=(3, 4))
    scaled = logits / np.where(temperature > 0, temperature, 1)[:, None]
    expected = (scaled + np.where(temperature[:, None] > 0, noise(draw, 33), 0)).argmax(-1)
    np.testing.assert_array_equal(tokens_of(function, logits, draw), expected)


def rows_of_logits(size):
    """Random rows, rows full of ties, rows with -inf, a constant row, signed zeros."""
    rng = np.random.default_rng(size)
    rows = rng.standard_normal((6, size)).astype(np.float32) * np.float32(6)
    rows[1] = rng.integers(-2, 3, size)
    rows[2, 1:][rng.random(size - 1) < 0.6] = -np.inf
    rows[3] = 1.25
    rows[4] = -np.abs(rows[4])
    rows[4, :: max(1, size // 7)] = 0.0
    rows[4, 1 :: max(1, size // 5)] = -0.0
    rows[5] *= 1e-3
    return rows


def check_masks(rows, mask, keep, values, dtype):
    """Every row with every value, in one batch, against sorting one by one."""
    pairs = [(row, value) for row in rows for value in np.asarray(values, dtype)]
    logits = np.stack([row for row, _ in pairs])
    actual = mask(jnp.asarray(logits), jnp.asarray([value for _, value in pairs]), whole(rows.shape[1]))
    expected = np.stack([np.where(keep(row, value), row, -np.inf) for row, value in pairs])
    np.testing.assert_array_equal(np.asarray(actual), expected)


SIZES = (1, 2, 7, 300, 5003)


@pytest.mark.parametrize("size", SIZES)
def test_top_k_mask_equals_sorting(size):
    check_masks(
        rows_of_logits(size), _top_k, keep_top_k, [-1, 0, 1, 2, 3, 50, 299, 300, 301, 5003, 2**31 - 1], np.int32
    )


@pytest.mark.parametrize("size", SIZES)
def test_top_p_mask_equals_sorting(size):
    check_masks(rows_of_logits(size), _top_p, keep_top_p, [1e-6, 0.1, 0.53, 0.9, 0.987, 1.0], np.float32)


@pytest.mark.parametrize("size", SIZES)
def test_min_p_mask_equals_definition(size):
    def mask(logits, values, vocab):
        return sampling._min_p(logits, make_draw(len(values), min_p=values), vocab)

    check_masks(rows_of_logits(size), mask, keep_min_p, [0.0, 1e-4, 0.05, 0.5, 1.0], np.float32)


def test_top_p_of_one_keeps_every_token():
    """Even those whose mass is lost in float32."""
    row = np.linspace(0, -80, 500, dtype=np.float32)[None]
    kept = _top_p(jnp.asarray(row), jnp.ones((1,), jnp.float32), whole(500))
    np.testing.assert_array_equal(np.asarray(kept), row)


def test_masks_of_a_real_vocabulary_equal_sorting():
    size = 248_320
    # Twelve nats of spread: the tokens at the boundaries weigh far more than float32 rounding of the sum.
    row = 12 * np.random.default_rng(5).standard_normal(size).astype(np.float32)
    row[100:200] = row[50]
    k, p = np.float32(1000), np.float32(0.6)
    top_k = _top_k(jnp.asarray(row[None]), jnp.full((1,), k, jnp.int32), whole(size))
    np.testing.assert_array_equal(np.asarray(top_k)[0], np.where(keep_top_k(row, int(k)), row, -np.inf))
    top_p = _top_p(jnp.asarray(row[None]), jnp.full((1,), p), whole(size))
    np.testing.assert_array_equal(np.asarray(top_p)[0], np.where(keep_top_p(row, p), row, -np.inf))


@pytest.mark.parametrize("p", [0.3, 0.9, 0.999])
def test_top_p_mass_of_a_flat_vocabulary_is_within_rounding(p):
    """No token weighs more than the rounding here, so the set is not unique: its mass is held instead. 1e-5: float32
    sums of 248,320 terms, in whatever tree XLA chooses, stay within log2(terms) = 18 roundings of 6e-8."""
    row = np.random.default_rng(6).standard_normal(248_320).astype(np.float32)
    top_p = _top_p(jnp.asarray(row[None]), jnp.full((1,), p, jnp.float32), whole(len(row)))
    kept = np.isfinite(np.asarray(top_p)[0])
    mass = softmax(row)
    assert mass[kept].sum() >= p - 1e-5
    assert mass[kept].sum() - mass[kept].min() <= p + 1e-5
    assert row[kept].min() > row[~kept].max()


@pytest.mark.parametrize(
    ("options", "support", "other_order"),
    [
        # 0.4 0.3 0.2 0.1: the best two, then 0.571 of their mass reaches 0.55.
        ({"top_k": 2, "top_p": 0.55}, {0}, {0, 1}),
        # The same for min_p before top_p.
        ({"min_p": 0.6, "top_p": 0.55}, {0}, {0, 1}),
        # At temperature 2 three tokens reach 0.6 of the best; at temperature 1 two do.
        ({"min_p": 0.6, "temperature": 2.0}, {0, 1, 2}, {0, 1}),
        # At temperature 2 the best three have 0.84 of the mass, at temperature 1 0.9.
        ({"top_p": 0.87, "temperature": 2.0}, {0, 1, 2, 3}, {0, 1, 2}),
    ],
)
def test_rules_apply_in_the_documented_order(options, support, other_order):
    assert support != other_order
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert set(np.flatnonzero(np.isfinite(masked(logits, **options)))) == support
    assert set(tokens_of(sampling.draw_full, logits, make_draw(2000, **options))) == support


def test_full_draw_equals_definition_for_any_parameters():
    rng = np.random.default_rng(8)
    rows, size = 96, 211
    logits = 4 * rng.standard_normal((rows, size)).astype(np.float32)
    options = {
        "temperature": rng.uniform(0.2, 2.0, rows).astype(np.float32),
        "top_k": rng.integers(-1, 30, rows),
        "top_p": rng.uniform(0.3, 1.0, rows).astype(np.float32),
        "min_p": rng.uniform(0.0, 0.1, rows).astype(np.float32),
    }
    draw = make_draw(rows, **options, seed=(5, 6), position=rng.integers(0, 1 << 20, rows))
    allowed = np.stack([masked(row, **{name: v[i] for name, v in options.items()}) for i, row in enumerate(logits)])
    expected = (allowed + noise(draw, size)).argmax(-1)
    np.testing.assert_array_equal(tokens_of(sampling.draw_full, logits, draw), expected)


def test_scores_are_what_the_draw_adds_noise_to():
    rng = np.random.default_rng(10)
    logits = 4 * rng.standard_normal((24, 60)).astype(np.float32)
    options = {"temperature": np.where(np.arange(24) % 4, rng.uniform(0.2, 2.0, 24), 0), "min_p": np.full(24, 0.01)}
    full = {"top_k": rng.integers(-1, 20, 24), "top_p": rng.uniform(0.3, 1.0, 24)}
    draw = make_draw(24, **options, **full, seed=(7, 8))
    jitted = jax.jit(lambda x, full: sampling.scores(x, draw, whole(60), full), static_argnums=1)
    for values, chosen, function in (
        (options, jitted(logits, False), sampling.draw_plain),
        (options | full, jitted(logits, True), sampling.draw_full),
    ):
        expected = np.stack([masked(row, **{name: v[i] for name, v in values.items()}) for i, row in enumerate(logits)])
        # The compiler may divide by a constant temperature with its reciprocal: two roundings instead of one.
        np.testing.assert_allclose(np.asarray(chosen), expected, rtol=2.5e-7)
        tokens = tokens_of(function, logits, draw)
        noisy = expected + np.where(np.asarray(draw.temperature)[:, None] > 0, noise(draw, 60), 0)
        np.testing.assert_array_equal(tokens, noisy.argmax(-1))


def test_rows_of_a_draw_are_taken_with_all_their_fields():
    draw = make_draw(5, temperature=np.arange(5), top_k=np.arange(5), top_p=np.linspace(0.1, 1, 5), seed=(1, 2))
    taken = draw.take(jnp.array([3, 0, 3]))
    for name, value in vars(draw).items():
        np.testing.assert_array_equal(getattr(taken, name), np.asarray(value)[[3, 0, 3]], err_msg=name)


def test_full_draw_equals_plain_draw_without_top_k_and_top_p():
    logits = 3 * np.random.default_rng(9).standard_normal((32, 100)).astype(np.float32)
    draw = make_draw(32, temperature=np.linspace(0, 2, 32), min_p=np.linspace(0, 0.3, 32), seed=(1, 2))
    full, plain = (tokens_of(function, logits, draw) for function in (sampling.draw_full, sampling.draw_plain))
    np.testing.assert_array_equal(full, plain)


def test_noise_ignores_batch_row_and_batch_size():
    token = jnp.arange(50, dtype=jnp.uint32)
    seeds = jnp.asarray([[1, 2], [3, 4], [5, 6], [1, 2]], jnp.uint32)
    positions = jnp.asarray([7, 7, 9, 8], jnp.int32)
    together = np.asarray(_gumbel(seeds, positions, token))
    for i in range(4):
        alone = np.asarray(_gumbel(seeds[i : i + 1], positions[i : i + 1], token))[0]
        np.testing.assert_array_equal(alone, together[i])
    order = np.array([2, 0, 1, 1])
    np.testing.assert_array_equal(np.asarray(_gumbel(seeds[order], positions[order], token)), together[order])
    assert len({row.tobytes() for row in together}) == 4


def test_noise_of_a_token_ignores_where_the_vocabulary_is_cut():
    draw = make_draw(3, seed=(9, 9))
    everywhere = noise(draw, 96)
    for start in (0, 1, 47, 48):
        part = _gumbel(draw.seed, draw.position, jnp.arange(start, start + 48, dtype=jnp.uint32))
        np.testing.assert_array_equal(np.asarray(part), everywhere[:, start : start + 48])


def test_noise_depends_on_seed_words_and_position():
    cases = [((0, 0), 0), ((1, 0), 0), ((0, 1), 0), ((0, 0), 1), ((1, 0), 1), ((0, 1), 1), ((2**32 - 1, 0), 0)]
    rows = [noise(make_draw(1, seed=seed, position=position), 64)[0] for seed, position in cases]
    assert len({row.tobytes() for row in rows}) == len(cases)
    off_diagonal = np.corrcoef(rows)[~np.eye(len(rows), dtype=bool)]
    # 64 values: a correlation of independent rows has a standard deviation of 1/8.
    assert np.abs(off_diagonal).max() < 4.5 / 8


def test_streams_are_pinned():
    """The uniforms behind the noise, exactly: a seed must give the same tokens in every version."""
    seed = jnp.asarray([[0, 0], [1, 0], [2**32 - 1, 7]], jnp.uint32)
    position = jnp.asarray([0, 5, 1 << 20], jnp.int32)
    token = jnp.asarray([0, 1, 248_319], jnp.uint32)
    pinned = {
        0: [
            ["0x1.f09d06p-1", "0x1.8b63eep-2", "0x1.52f854p-1"],
            ["0x1.42f26ap-2", "0x1.56266ep-1", "0x1.30210ap-1"],
            ["0x1.05f456p-2", "0x1.a5952ap-1", "0x1.94457ap-2"],
        ],
        1: [
            ["0x1.4a3cc6p-4", "0x1.85b222p-2", "0x1.3d477ap-1"],
            ["0x1.20369ap-1", "0x1.f47de0p-2", "0x1.1723b6p-1"],
            ["0x1.2f98a4p-4", "0x1.4ef028p-2", "0x1.52529cp-1"],
        ],
        2: [
            ["0x1.4dc8c0p-1", "0x1.8de3d0p-1", "0x1.59c998p-3"],
            ["0x1.9f7ed6p-1", "0x1.625dbap-1", "0x1.45bd06p-3"],
            ["0x1.c9c712p-2", "0x1.a1e10ep-1", "0x1.e54fa4p-4"],
        ],
    }
    for stream, rows in pinned.items():
        values = np.asarray([[float.fromhex(value) for value in row] for row in rows], np.float32)
        np.testing.assert_array_equal(reference._uniform(seed, position, token, stream), values)
        np.testing.assert_array_equal(uniform(seed, position, stream), values[:, 0])
        # Two logarithms, whose last bits are the platform's.
        expected = -np.log(-np.log1p(-values.astype(np.float64)))
        np.testing.assert_allclose(gumbel(seed, position, token, stream), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(gumbel(seed, position, token), gumbel(seed, position, token, 0))


@pytest.mark.thorough
def test_streams_are_independent():
    def stream(number):
        return lambda logits, draw, vocab: sampling.choose(logits, draw, vocab, number)

    draw = make_draw(DRAWS, seed=(31, 32))
    drawn = [tokens_of(stream(number), LOGITS, draw) for number in range(4)]
    np.testing.assert_array_equal(drawn[0], tokens_of(sampling.draw_plain, LOGITS, draw))
    for number, tokens in enumerate(drawn):
        assert fit(tokens, softmax(LOGITS)) > LIKELY
        for other in drawn[:number]:
            assert dependence(tokens, other) > LIKELY


def test_uniforms_are_uniform_and_independent_of_position_and_stream():
    draw = make_draw(DRAWS, seed=(33, 34))
    values = {stream: np.asarray(uniform(draw.seed, draw.position, stream)) for stream in (2, 3)}
    for column in values.values():
        assert 0 < column.min() < column.max() < 1
        assert scipy.stats.kstest(column, "uniform").pvalue > LIKELY
        tenth = (10 * column).astype(int)
        assert dependence(tenth[:-1], tenth[1:]) > LIKELY
    assert dependence((10 * values[2]).astype(int), (10 * values[3]).astype(int)) > LIKELY


def test_noise_is_standard_gumbel():
    values = noise(make_draw(1000, seed=(11, 12)), 300).ravel()
    assert scipy.stats.kstest(values, scipy.stats.gumbel_r.cdf).pvalue > LIKELY
    sigma = np.pi / np.sqrt(6)
    assert abs(values.mean() - np.euler_gamma) < 4 * sigma / np.sqrt(values.size)
    # The fourth central moment of the Gumbel distribution is 5.4 sigma^4.
    assert abs(values.var() - sigma**2) < 4 * np.sqrt(5.4 - 1) * sigma**2 / np.sqrt(values.size)
    # The upper tail decides who wins: its counts are Poisson.
    for bound in (5.0, 8.0, 10.0):
        expected = values.size * scipy.stats.gumbel_r.sf(bound)
        assert scipy.stats.poisson.sf((values > bound).sum() - 1, expected) > LIKELY, bound
        assert scipy.stats.poisson.cdf((values > bound).sum(), expected) > LIKELY, bound
    assert scipy.stats.kstest(values, scipy.stats.norm(np.euler_gamma, sigma).cdf).pvalue < IMPOSSIBLE


def test_noise_is_finite_for_every_uniform():
    """The smallest and the largest that 32 bits can give, by the formula of `gumbel`."""
    bits = np.array([0, 1, 2**31, 2**32 - 2, 2**32 - 1], np.uint32)
    complement = np.minimum((bits.astype(np.float32) + np.float32(0.5)) * np.float32(2**-32), np.float32(1 - 2**-24))
    values = -np.log(-np.log1p(-complement))
    assert np.isfinite(values).all()
    assert values.max() < 24
    assert values.min() > -3


DRAWS = 40_000
LOGITS = np.array([2.0, 1.5, 1.5, 0.7, 0.0, -0.4, -1.0, -1.5, -3.0, -np.inf])


@pytest.mark.short_cases
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.4},
        {"temperature": 2.5},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.0, "top_k": 4},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.75, "min_p": 0.05},
    ],
)
def test_drawn_tokens_follow_softmax(options):
    tokens = tokens_of(sampling.draw_full, LOGITS, make_draw(DRAWS, **options, seed=(21, 22)))
    probability = softmax(masked(LOGITS, **options))
    assert fit(tokens, probability) > LIKELY
    if len(options) == 1:
        plain = tokens_of(sampling.draw_plain, LOGITS, make_draw(DRAWS, **options, seed=(23, 24)))
        assert fit(plain, probability) > LIKELY


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"temperature": 1.1}, {"temperature": 1.0}),
        ({"temperature": 1.0, "top_k": 5}, {"temperature": 1.0, "top_k": 4}),
        ({"temperature": 0.7, "top_p": 0.97}, {"temperature": 0.7, "top_p": 0.8}),
        ({"temperature": 1.0, "min_p": 0.1}, {"temperature": 1.0, "min_p": 0.2}),
        ({"temperature": 1.0}, {"temperature": 1.0, "min_p": 0.02}),
    ],
)
def test_fit_of_a_wrong_rule_fails(wrong, right):
    tokens = tokens_of(sampling.draw_full, LOGITS, make_draw(DRAWS, **wrong, seed=(21, 22)))
    assert fit(tokens, softmax(masked(LOGITS, **right))) < IMPOSSIBLE


def test_fit_of_wrong_noise_fails():
    """Normal noise of the same mean and variance, and Gumbel noise that is 5% too wide."""
    rng = np.random.default_rng(0)
    probability = softmax(LOGITS)
    normal = rng.normal(0, np.pi / np.sqrt(6), (DRAWS, len(LOGITS)))
    assert fit((LOGITS + normal).argmax(-1), probability) < IMPOSSIBLE
    wide = 1.05 * noise(make_draw(DRAWS, seed=(21, 22)), len(LOGITS))
    assert fit((LOGITS + wide).argmax(-1), probability) < 1e-3


@pytest.mark.thorough
def test_fits_over_seeds_are_uniform():
    """Sees what single p-values let pass: a sampler that is a little off, or one that is more regular than chance."""
    probability = softmax(LOGITS)
    draws = (make_draw(DRAWS, seed=(seed, 7)) for seed in range(50))
    fits = [fit(tokens_of(sampling.draw_plain, LOGITS, draw), probability) for draw in draws]
    assert scipy.stats.kstest(fits, scipy.stats.uniform.cdf).pvalue > LIKELY


def test_drawn_tokens_are_independent_over_positions_and_seeds():
    tokens = tokens_of(sampling.draw_plain, LOGITS, make_draw(DRAWS, seed=(31, 32)))
    for lag in (1, 2, 64, 4096):
        assert dependence(tokens[:-lag], tokens[lag:]) > LIKELY, lag
    neighbours = ((33, 32), (31, 33), (31 ^ 1, 32), (31, 32 ^ (1 << 31)))
    for seed in neighbours:
        other = tokens_of(sampling.draw_plain, LOGITS, make_draw(DRAWS, seed=seed))
        assert dependence(tokens, other) > LIKELY, seed
    # Noise that only every second position renews.
    stuck = tokens_of(sampling.draw_plain, LOGITS, make_draw(DRAWS, seed=(31, 32), position=np.arange(DRAWS) // 2))
    assert dependence(stuck[:-1], stuck[1:]) < IMPOSSIBLE


def test_drawn_tokens_of_consecutive_seeds_follow_softmax():
    """Seeds that users pick are small and consecutive; position 0 of each must be as good as one long run."""
    seeds = np.stack([np.arange(DRAWS), np.zeros(DRAWS)], axis=1).astype(np.uint32)
    tokens = tokens_of(sampling.draw_plain, LOGITS, make_draw(DRAWS, seed=seeds, position=0))
    assert fit(tokens, softmax(LOGITS)) > LIKELY
    assert dependence(tokens[:-1], tokens[1:]) > LIKELY


SIZE = 37
"""Odd, so that two and four ranks pad it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What changes logits, in as many rows of each kind; in the tests a request has the same row of all."""

    counts: jax.Array
    in_prompt: jax.Array
    bias: jax.Array
    repetition: jax.Array
    frequency: jax.Array
    presence: jax.Array
    bad_words: jax.Array
    recent: jax.Array

    @property
    def logit_rows(self) -> LogitRows:
        return LogitRows(bias=self.bias, bad_words=self.bad_words, recent=self.recent)

    @property
    def token_counts(self) -> jax.Array:
        return (self.counts + IN_PROMPT * self.in_prompt).astype(jnp.uint16)

    def change(self, row, banned, drafted=None) -> Change:
        return Change(row, row, self.repetition[row], self.frequency[row], self.presence[row], banned, drafted)


SPLIT = ("counts", "in_prompt", "bias")
"""Fields along the vocabulary."""

ROW_SPECS = Rows(
    **{f.name: sharding.P(None, sharding.AXIS) if f.name in SPLIT else sharding.P() for f in dataclasses.fields(Rows)}
)


def adjusted(logits, rows, row, banned, vocab, drafted=None):
    return sampling.adjust(logits, rows.logit_rows, rows.token_counts, rows.change(row, banned, drafted), vocab)


def counted(rows, row, tokens, count, vocab):
    entries = sampling.count_tokens(rows.token_counts, row, tokens, count, vocab)
    recent = sampling.remember_tokens(rows.logit_rows, row, tokens, count).recent
    counts, in_prompt = (entries & MOST_COUNTED).astype(jnp.int32), entries >= IN_PROMPT
    return dataclasses.replace(rows, counts=counts, in_prompt=in_prompt, recent=recent)


_adjust = jax.jit(adjusted, static_argnums=4)
_count_tokens = jax.jit(counted, static_argnums=4)


def random_rows(rng, size=SIZE, rows=5):
    """Rows with every kind of content in rows 1 and up, as numpy; row 0 is neutral."""
    bias = np.where(rng.random((rows, size)) < 0.3, rng.normal(0, 3, (rows, size)), 0).astype(np.float32)
    bias[2, rng.random(size) < 0.5] = -np.inf
    values = {
        "counts": rng.integers(0, 4, (rows, size)).astype(np.int32) * (rng.random((rows, size)) < 0.4),
        "in_prompt": rng.random((rows, size)) < 0.3,
        "bias": bias,
        "repetition": np.array([1, 1.3, 0.7, 1.0, 2.0], np.float32),
        "frequency": np.array([0, 0.5, -0.4, 1.1, 0.0], np.float32),
        "presence": np.array([0, -0.6, 0.9, 0.0, 2.0], np.float32),
        "bad_words": np.full((rows, MAX_BAD_SEQUENCES, MAX_BAD_WORD_TOKENS), NO_TOKEN, np.int32),
        "recent": np.full((rows, MAX_BAD_WORD_TOKENS - 1), NO_TOKEN, np.int32),
    }
    values["recent"][1:] = rng.integers(0, size, (rows - 1, MAX_BAD_WORD_TOKENS - 1))
    for name in ("counts", "in_prompt", "bias"):
        values[name][0] = 0
    return Rows(**{name: jnp.asarray(value) for name, value in values.items()})


def set_bad_words(rows, row, words):
    table = np.asarray(rows.bad_words).copy()
    for i, word in enumerate(words):
        table[row, i, MAX_BAD_WORD_TOKENS - len(word) :] = word
    return Rows(**{**vars(rows), "bad_words": jnp.asarray(table)})


def adjust_by_formula(logits, rows, row, banned, words):
    """logit_bias, bans, repetition on prompt and output, frequency and presence on output; float64, one line."""
    x = np.asarray(logits, np.float64) + np.asarray(rows.bias)[row]
    recent = [token for token in np.asarray(rows.recent)[row] if token != NO_TOKEN]
    for word in words:
        *start, end = word
        if start == recent[len(recent) - len(start) :]:
            x[end] = -np.inf
    for token in banned:
        if token != NO_TOKEN:
            x[token] = -np.inf
    counts, in_prompt = np.asarray(rows.counts)[row], np.asarray(rows.in_prompt)[row]
    for token in range(len(x)):
        if counts[token] or in_prompt[token]:
            r = float(rows.repetition[row])
            x[token] = x[token] / r if x[token] > 0 else x[token] * r
        x[token] -= float(rows.frequency[row]) * counts[token]
        x[token] -= float(rows.presence[row]) * (counts[token] > 0)
    return x


LINES, DRAFTED = 7, 9
"""Rows of logits in every call of `adjust`, and room for drafted tokens: more than `recent` remembers."""


def adjust(logits, rows, row, banned, drafted=()):
    """Adjusted [n, SIZE]; the call is padded to LINES rows, 3 bans and DRAFTED drafted tokens, so that one compilation
    serves all tests."""
    count = len(logits)
    drafted_table = np.full((LINES, DRAFTED), NO_TOKEN, np.int32)
    for line, tokens in zip(drafted_table, drafted, strict=False):
        line[: len(tokens)] = tokens
    padding = ((0, LINES - count), (0, 0))
    banned = np.pad(np.asarray(banned, np.int32), ((0, 0), (0, 3 - np.shape(banned)[1])), constant_values=NO_TOKEN)
    changed = _adjust(
        jnp.asarray(np.pad(np.asarray(logits, np.float32), padding)),
        rows,
        jnp.asarray(np.pad(row, padding[0]), jnp.int32),
        jnp.asarray(np.pad(banned, padding, constant_values=NO_TOKEN)),
        whole(SIZE),
        jnp.asarray(drafted_table),
    )
    return np.asarray(changed)[:count]


def close(actual, expected):
    # A handful of float32 operations on values of magnitude 20.
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-5)


def test_adjusted_logits_equal_formulas():
    rng = np.random.default_rng(40)
    rows = random_rows(rng)
    logits = 5 * rng.standard_normal((7, SIZE)).astype(np.float32)
    row = np.array([1, 0, 3, 2, 4, 1, 2])
    banned = np.full((7, 3), NO_TOKEN, np.int32)
    banned[2], banned[4] = [0, NO_TOKEN, 36], [5, 5, 6]
    expected = np.stack([adjust_by_formula(logits[i], rows, row[i], banned[i], []) for i in range(7)])
    close(adjust(logits, rows, row, banned), expected)


@pytest.mark.parametrize("field", ["repetition", "frequency", "presence"])
def test_each_penalty_alone_equals_its_formula(field):
    rng = np.random.default_rng(41)
    rows = random_rows(rng)
    neutral = {"repetition": jnp.ones(5), "frequency": jnp.zeros(5), "presence": jnp.zeros(5)}
    neutral.pop(field)
    rows = Rows(**{**vars(rows), "bias": jnp.zeros((5, SIZE)), **neutral})
    logits = 5 * rng.standard_normal((4, SIZE)).astype(np.float32)
    row, banned = np.arange(1, 5), np.full((4, 1), NO_TOKEN, np.int32)
    actual = adjust(logits, rows, row, banned)
    close(actual, np.stack([adjust_by_formula(logits[i], rows, row[i], [], []) for i in range(4)]))
    counts, in_prompt = np.asarray(rows.counts)[1:], np.asarray(rows.in_prompt)[1:]
    touched = (counts > 0) | (in_prompt if field == "repetition" else False)
    np.testing.assert_array_equal(actual[~touched], logits[~touched])


def test_row_zero_changes_nothing_bit_for_bit():
    rng = np.random.default_rng(42)
    logits = 5 * rng.standard_normal((3, SIZE)).astype(np.float32)
    logits[1, 4] = -np.inf
    actual = adjust(logits, random_rows(rng), [0, 0, 0], np.full((3, 2), NO_TOKEN, np.int32))
    np.testing.assert_array_equal(actual, logits)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("size", [SIZE, 64, 128, 31])
def test_mask_forbids_what_its_bits_do_not_allow_however_the_vocabulary_is_cut(size, tp):
    """Row 0 changes nothing bit for bit; whoever has no mask in the batch has that row."""
    rng = np.random.default_rng(size)
    allowed = rng.random((2, size)) < 0.4
    logits = rng.standard_normal((4, size)).astype(np.float32)
    bits = np.pad(allowed, ((0, 0), (0, -size % 32)))
    words = np.packbits(bits, axis=1, bitorder="little").view("<u4").astype(np.uint32)
    batch = packing.pack_masks(words, rows=3, vocab_size=size, ranks=tp)
    masks = np.concatenate([np.full((1, batch.words.shape[1]), ALL_ALLOWED), batch.words])
    split, row = sharding.P(None, sharding.AXIS), jnp.array([2, 0, 1, 3], jnp.int32)
    specs = (split, split, sharding.P())
    parts = over_ranks(tp, sampling.allowed, padded(logits, tp, 0.0), jnp.asarray(masks), row, specs=specs)
    actual = np.concatenate(parts, axis=1)[:, :size]
    expected = logits.copy()
    expected[0][~allowed[1]], expected[2][~allowed[0]] = -np.inf, -np.inf
    np.testing.assert_array_equal(actual, expected)


def test_banned_tokens_cannot_be_drawn_and_others_are_untouched():
    rng = np.random.default_rng(43)
    logits = rng.standard_normal((2, SIZE)).astype(np.float32)
    banned = np.array([[3, 36, NO_TOKEN], [NO_TOKEN] * 3], np.int32)
    actual = adjust(logits, random_rows(rng), [0, 0], banned)
    np.testing.assert_array_equal(np.flatnonzero(np.isinf(actual[0])), [3, 36])
    np.testing.assert_array_equal(actual[1], logits[1])


@pytest.mark.parametrize(
    ("word", "recent", "forbidden"),
    [
        ([5], [], True),
        ([5], [1, 2, 3], True),
        ([7, 5], [7], True),
        ([7, 5], [], False),
        ([7, 5], [7, 8], False),
        ([7, 5], [5, 7], True),
        ([1, 2, 3, 5], [9, 1, 2, 3], True),
        ([1, 2, 3, 5], [2, 3], False),
        ([1, 2, 3, 5], [1, 2, 9], False),
        ([1, 2, 3, 4, 6, 7, 8, 5], [1, 2, 3, 4, 6, 7, 8], True),
        ([1, 2, 3, 4, 6, 7, 8, 5], [0, 2, 3, 4, 6, 7, 8], False),
    ],
)
def test_last_token_of_a_bad_word_is_forbidden_after_its_beginning(word, recent, forbidden):
    """`recent` is what `count_tokens` has seen, one token at a time."""
    empty = random_rows(np.random.default_rng(44))
    rows = Rows(**{**vars(empty), "recent": jnp.full_like(empty.recent, NO_TOKEN)})
    rows = set_bad_words(rows, 1, [word, [30, 31]])
    for token in recent:
        rows = _count_tokens(rows, jnp.array([1]), jnp.array([[token]], jnp.int32), jnp.array([1]), whole(SIZE))
    rows = Rows(**{**vars(rows), "bias": jnp.zeros_like(rows.bias)})
    actual = adjust(np.zeros((1, SIZE)), rows, [1], np.full((1, 1), NO_TOKEN, np.int32))
    np.testing.assert_array_equal(np.flatnonzero(np.isinf(actual[0])), [5] if forbidden else [])


def test_counts_follow_rows_that_count_only():
    rows = random_rows(np.random.default_rng(45))
    row = jnp.array([1, 0, 3, 4, 0], jnp.int32)
    token = jnp.array([5, 6, 36, 8, 9], jnp.int32)
    active = jnp.array([1, 1, 1, 0, 0])
    after = _count_tokens(rows, row, token[:, None], active, whole(SIZE))
    counts, recent = np.asarray(rows.counts).copy(), np.asarray(rows.recent).copy()
    for r, t in ((1, 5), (3, 36)):
        counts[r, t] += 1
        recent[r] = [*recent[r, 1:], t]
    np.testing.assert_array_equal(np.asarray(after.counts), counts)
    np.testing.assert_array_equal(np.asarray(after.recent), recent)


def with_spare_tokens(tokens, rng):
    """Tokens [1, DRAFTED] whose first are those given; none of the others may count."""
    line = rng.integers(0, SIZE, (1, DRAFTED)).astype(np.int32)
    line[0, : len(tokens)] = tokens
    return jnp.asarray(line)


def test_counting_many_tokens_equals_counting_them_one_by_one():
    rng = np.random.default_rng(46)
    rows = random_rows(rng)
    row = jnp.array([4, 1, 0, 3, 2], jnp.int32)
    tokens = jnp.asarray(rng.integers(0, SIZE, (5, DRAFTED)), jnp.int32)
    tokens = tokens.at[1].set(7).at[3, :3].set(jnp.array([36, 0, 36]))
    count = jnp.array([3, DRAFTED, 5, 8, 0], jnp.int32)
    at_once = _count_tokens(rows, row, tokens, count, whole(SIZE))
    one_by_one = rows
    for i in range(DRAFTED):
        now = (count > i).astype(jnp.int32)
        one_by_one = _count_tokens(one_by_one, row, tokens[:, i : i + 1], now, whole(SIZE))
    assert int(at_once.counts.sum() - rows.counts.sum()) == 3 + DRAFTED + 8
    for name, value in vars(at_once).items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(getattr(one_by_one, name)), err_msg=name)


def test_rows_that_count_nothing_leave_no_trace_in_a_row_that_counts():
    """A slot that is done may still name a row that another request holds by now."""
    rows = random_rows(np.random.default_rng(47))
    row = jnp.array([2, 2, 2], jnp.int32)
    tokens = jnp.array([[5, 6], [7, 8], [9, 10]], jnp.int32)
    after = _count_tokens(rows, row, tokens, jnp.array([0, 2, 0]), whole(SIZE))
    np.testing.assert_array_equal(after.recent[2], [*np.asarray(rows.recent)[2, 2:], 7, 8])
    changed = np.argwhere(np.asarray(after.counts) != np.asarray(rows.counts))
    np.testing.assert_array_equal(changed, [[2, 7], [2, 8]])


def test_drafted_tokens_adjust_as_counted_ones_bit_for_bit():
    rng = np.random.default_rng(48)
    rows = random_rows(rng)
    # Ends whose beginnings are drafted in whole, drafted in part, and longer ago than the last draft.
    for r in range(1, 5):
        last = int(rows.recent[r, -1])
        rows = set_bad_words(rows, r, [[11, 12, 13], [last, 11, 14], [last, 15], [12, 11, 16], [17]])
    drafts = [[], [11], [11, 12], [3, 3, 11], [12, 11], list(range(20, 20 + DRAFTED)), [0, 36, 12, 12, 11, 12]]
    banned = rng.integers(-1, SIZE, (LINES, 3)).astype(np.int32)
    for r in range(5):
        logits = 5 * rng.standard_normal((LINES, SIZE)).astype(np.float32)
        actual = adjust(logits, rows, [r] * LINES, banned, drafts)
        for i, tokens in enumerate(drafts):
            after = _count_tokens(
                rows, jnp.array([r]), with_spare_tokens(tokens, rng), jnp.array([len(tokens)]), whole(SIZE)
            )
            expected = adjust(logits, after, [r] * LINES, banned)[i]
            np.testing.assert_array_equal(actual[i].view(np.uint32), expected.view(np.uint32), err_msg=f"{r} {tokens}")
            if r and tokens:
                assert (actual[i] != adjust(logits, rows, [r] * LINES, banned)[i]).any(), "drafted tokens count"


def test_drafted_tokens_complete_bad_words():
    rows = random_rows(np.random.default_rng(49))
    rows = Rows(**{**vars(rows), "bias": jnp.zeros_like(rows.bias), "recent": rows.recent.at[1, -2:].set([8, 9])})
    rows = set_bad_words(rows, 1, [[9, 20, 5], [8, 9, 6], [20, 21, 7]])
    drafts = [[], [20], [20, 21], [21]]
    actual = adjust(np.zeros((4, SIZE)), rows, [1] * 4, np.full((4, 1), NO_TOKEN), drafts)
    assert [list(np.flatnonzero(np.isinf(line))) for line in actual] == [[6], [5], [7], []]


@pytest.mark.short_cases("5-3")
@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("count", [1, 4, 5, 11, 12])
def test_groups_of_rows_give_what_all_of_them_give_bit_for_bit(count, each):
    """Filters, noise, log-probabilities; of counts that the size of a group divides, and of others."""
    rng = np.random.default_rng([count, each])
    lines = count * each
    logits = jnp.asarray(4 * rng.standard_normal((lines, SIZE)).astype(np.float32))
    draw = make_draw(
        lines, top_k=rng.integers(0, 12, lines), top_p=rng.uniform(0.4, 1, lines), min_p=rng.uniform(0, 0.1, lines)
    )
    seen = []

    def run(rows):
        logits, position, top_k, top_p, min_p = rows
        seen.append(len(logits))
        here = dataclasses.replace(draw, position=position, top_k=top_k, top_p=top_p, min_p=min_p)
        here = dataclasses.replace(here, temperature=draw.temperature[: len(logits)], seed=draw.seed[: len(logits)])
        tokens = sampling.draw_full(logits, here, whole(SIZE))
        return tokens, sampling.logprobs(logits, tokens, 5, whole(SIZE))

    rows = (logits, draw.position, draw.top_k, draw.top_p, draw.min_p)
    expected = jax.jit(run)(rows)
    found = jax.jit(lambda rows: sampling.in_groups(run, rows, count, 4))(rows)
    assert max(seen[1:]) == min(count, 4) * each
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(one).view(np.uint32), np.asarray(other).view(np.uint32))


def logprobs(logits, chosen, most):
    found = _logprobs(jnp.asarray(logits), jnp.asarray(chosen, jnp.int32), most, whole(logits.shape[1]))
    return jax.tree.map(np.asarray, found)


def test_logprobs_equal_log_softmax():
    rng = np.random.default_rng(50)
    logits = 6 * rng.standard_normal((9, 83)).astype(np.float32)
    logits[3, 10:] = -np.inf
    chosen = rng.integers(0, 10, 9)
    found = logprobs(logits, chosen, 5)
    expected = log_softmax(logits)
    close(found.chosen, expected[np.arange(9), chosen])
    order = np.argsort(-logits, axis=-1, kind="stable")
    np.testing.assert_array_equal(found.top_tokens, order[:, :5])
    close(found.top, np.take_along_axis(expected, order[:, :5], axis=1))
    np.testing.assert_array_equal(found.rank, [1 + list(order[i]).index(chosen[i]) for i in range(9)])


def test_rank_counts_strictly_better_tokens():
    logits = np.array([[1.0, 3.0, 2.0, 2.0, 0.0]], np.float32)
    ranks = [int(logprobs(logits, [token], 0).rank[0]) for token in range(5)]
    assert ranks == [4, 1, 2, 2, 5]


def test_logprobs_give_no_more_alternatives_than_tokens():
    logits = np.array([[1.0, 3.0, 2.0]], np.float32)
    found = logprobs(logits, [0], 20)
    np.testing.assert_array_equal(found.top_tokens, [[1, 2, 0]])


@pytest.mark.thorough
@pytest.mark.parametrize("tp", [2, 4])
def test_sharded_draw_equals_one_rank(tp):
    """Tokens, counts and log-probabilities, with penalties, bans and every filter, on every rank."""
    rng = np.random.default_rng(60)
    count = 24
    logits = jnp.asarray(4 * rng.standard_normal((count, SIZE)).astype(np.float32))
    # Rows that tie over ranks, and one whose best tokens stand in the last, padded part.
    logits = logits.at[5].set(1.0).at[6, 36].set(40.0).at[7, jnp.array([1, 36])].set(40.0)
    rows = set_bad_words(random_rows(rng), 3, [[int(SIZE - 1)], [2]])
    row = jnp.asarray(rng.integers(0, 5, count), jnp.int32)
    banned = jnp.asarray(rng.integers(-1, SIZE, (count, 2)), jnp.int32)
    draw = make_draw(
        count,
        temperature=np.where(np.arange(count) % 5, rng.uniform(0.3, 2, count), 0),
        top_k=rng.integers(0, 12, count),
        top_p=rng.uniform(0.4, 1, count),
        min_p=rng.uniform(0, 0.1, count),
        seed=(3, 1),
    )
    active = jnp.asarray([2, 0, 1])

    drafted = jnp.asarray(
        np.where(np.arange(3) < rng.integers(0, 4, count)[:, None], rng.integers(0, SIZE, (count, 3)), -1)
    )

    def run(logits, rows, vocab):
        changed = adjusted(logits, rows, row, banned, vocab, drafted.astype(jnp.int32))
        # Rows are owned by one request each in a step; counted one after another they may repeat.
        full = sampling.draw_full(changed, draw, vocab)
        plain = sampling.draw_plain(changed, draw, vocab)
        after = counted(rows, jnp.arange(1, 4), full[:6].reshape(3, 2), active, vocab)
        return full, plain, sampling.logprobs(logits, full, 6, vocab), after.recent

    def at(tp):
        widths = {"counts": 0, "in_prompt": False, "bias": 0.0}
        parts = {name: padded(getattr(rows, name), tp, value) for name, value in widths.items()}
        return over_ranks(
            tp,
            functools.partial(run, vocab=Vocab(size=SIZE, tp=tp)),
            padded(logits, tp, -jnp.inf),
            Rows(**{**vars(rows), **parts}),
            specs=(sharding.P(None, sharding.AXIS), ROW_SPECS),
        )

    (expected,) = at(1)
    for full, plain, found, recent in at(tp):
        np.testing.assert_array_equal(full, expected[0])
        np.testing.assert_array_equal(plain, expected[1])
        np.testing.assert_array_equal(found.top_tokens, expected[2].top_tokens)
        np.testing.assert_array_equal(found.rank, expected[2].rank)
        close(found.chosen, expected[2].chosen)
        close(found.top, expected[2].top)
        np.testing.assert_array_equal(recent, expected[3])


@pytest.mark.parametrize("tp", [2, 4])
def test_sharded_counts_equal_one_rank(tp):
    rows = random_rows(np.random.default_rng(61))
    parts = {name: padded(getattr(rows, name), tp, 0) for name in ("counts", "in_prompt", "bias")}
    rows = Rows(**{**vars(rows), **parts})
    row, tokens = jnp.arange(1, 5), jnp.asarray([[0, 36], [9, 9], [20, 3], [36, 1]], jnp.int32)
    active = jnp.asarray([2, 2, 1, 0])

    def run(rows):
        return counted(rows, row, tokens, active, Vocab(size=SIZE, tp=tp))

    mapped = sharding.shard_step(run, sharding.make_mesh(tp), (ROW_SPECS,), ROW_SPECS)
    expected = np.asarray(rows.counts).copy()
    for r, token in ((1, 0), (1, 36), (2, 9), (2, 9), (3, 20)):
        expected[r, token] += 1
    np.testing.assert_array_equal(np.asarray(jax.jit(mapped)(rows).counts), expected)


def test_padded_vocabulary_is_never_drawn():
    """However hot and flat the distribution: the padding is -inf, and -inf plus noise loses."""
    tp, size = 4, 5
    draw = make_draw(500, temperature=100.0, seed=(1, 1))
    logits = padded(jnp.zeros((500, size)), tp, -jnp.inf)
    run = functools.partial(sampling.draw_full, draw=draw, vocab=Vocab(size=size, tp=tp))
    for tokens in over_ranks(tp, run, logits, specs=(sharding.P(None, sharding.AXIS),)):
        assert set(tokens) == set(range(size))


@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("function", [sampling.draw_plain, sampling.draw_full])
def test_row_in_which_every_token_is_forbidden_draws_none(function, tp):
    """Greedy or not, and whatever its neighbours draw."""
    size = 6
    draw = make_draw(4, temperature=[0, 1, 0, 1], min_p=0.1, top_k=2, top_p=0.9)
    logits = jnp.full((4, size), -jnp.inf).at[2, 5].set(-3.0).at[3, 4].set(-1e30)
    run = functools.partial(function, draw=draw, vocab=Vocab(size=size, tp=tp))
    for tokens in over_ranks(tp, run, padded(logits, tp, -jnp.inf), specs=(sharding.P(None, sharding.AXIS),)):
        assert tokens.tolist() == [NO_TOKEN, NO_TOKEN, 5, 4]


@pytest.mark.parametrize("function", [sampling.draw_plain, sampling.draw_full])
def test_no_sort_of_the_vocabulary(function):
    size = 4096
    jaxpr = jax.make_jaxpr(lambda x: function(x, make_draw(2), whole(size)))(jnp.zeros((2, size)))
    names = {name for name, largest in primitives(jaxpr.jaxpr) if largest >= size}
    assert {"argmax", "threefry2x32"} <= names, "the walk saw the draw"
    assert not names & {"sort", "top_k", "approx_top_k", "cumsum"}, names


def test_log_probabilities_sort_no_row():
    """The most probable are looked for in a few blocks of it."""
    size = PROMPT_LOGPROB_ROWS * 64
    jaxpr = jax.make_jaxpr(lambda x: sampling.logprobs(x, jnp.zeros((2,), jnp.int32), 5, whole(size)))(
        jnp.zeros((2, size))
    )
    sizes = list(primitives(jaxpr.jaxpr))
    assert "top_k" in {name for name, _ in sizes}
    assert not {"top_k", "sort"} & {name for name, largest in sizes if largest >= size}


@pytest.mark.parametrize("most", [1, 5, 20])
@pytest.mark.parametrize("kind", ["normal", "ties", "few values", "infinite"])
def test_largest_are_those_of_a_sort(kind, most):
    """With the lowest tokens of those that are as large."""
    rng = np.random.default_rng(most)
    width = 2 * most * sampling.BLOCK + 300
    logits = rng.standard_normal((3, width)).astype(np.float32)
    if kind == "ties":
        logits[:, rng.integers(0, width, 3 * most)] = 7.0
    elif kind == "few values":
        logits = np.round(logits)
    elif kind == "infinite":
        logits[:] = -np.inf
        logits[0, 700], logits[1, [5, width - 1]] = 1.0, 2.0
    found = jax.jit(sampling.largest, static_argnums=1)(jnp.asarray(logits), most)
    for actual, expected in zip(found, jax.lax.top_k(jnp.asarray(logits), most), strict=True):
        np.testing.assert_array_equal(actual, expected)
