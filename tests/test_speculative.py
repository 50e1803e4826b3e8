"""Which drafts are kept, and what follows them: the emitted tokens have the target's own distribution, by both rules.

The model here is a chain: the scores of a token depend on the token before it, for target and drafter, so that the
distribution of the first tokens of a request is known in closed form. A request runs through several verifications.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdnjax import sampling, sharding, speculative
from gdnjax.pallas_kernels.gumbel_argmax import gumbel, uniform
from gdnjax.sampling import Draw, Vocab
from gdnjax.state import NO_TOKEN
from tests.draws import IMPOSSIBLE, fit, make_draw, masked, over_ranks, primitives, softmax, whole

pytestmark = pytest.mark.usefixtures("quickly_compiled")

LIKELY = 1e-3
"""p-values of a correct rule are uniform, and seeds are fixed: of the thirty here one falls below this by accident in
one of thirty-three choices of seeds."""

SIZE = 12
DRAFTS = 3
REQUESTS = 40_000
EQUAL = 4_000
"""Requests where tokens are compared one by one, and nothing is counted."""

START = 2
"""The token before the first."""

_rng = np.random.default_rng(70)
TARGET = 1.5 * _rng.standard_normal((SIZE, SIZE)).astype(np.float32)
DRAFTER = TARGET + 0.8 * _rng.standard_normal((SIZE, SIZE)).astype(np.float32)
"""Logits by the token before. Total variation between the two is 0.24 on average, and up to 0.46."""

OPTIONS = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 4},
    {"temperature": 0.8, "top_p": 0.8},
    {"min_p": 0.15},
    {"temperature": 1.5, "top_k": 6, "top_p": 0.75, "min_p": 0.05},
]


def shared(target_scores, draft_scores, drafts, valid, draw):
    """The whole rule of shared noise, as a step applies it."""
    n, rows, size = target_scores.shape
    tokens = sampling.choose(target_scores.reshape(n * rows, size), draw, whole(size)).reshape(n, rows)
    return tokens, speculative.accept_shared(drafts, tokens, valid)


def rejection(target_scores, draft_scores, drafts, valid, draw):
    return speculative.accept_rejection(target_scores, draft_scores, drafts, valid, draw, whole(target_scores.shape[2]))


STREAMS = {shared: 0, rejection: speculative.DRAFT_STREAM}
"""The drafter's noise by rule; of any other rule that of rejection sampling."""


def draw_of_rows(seed, first, temperature, rows):
    """Draws of `rows` tokens of each request, from position `first` on, side by side."""
    count = first.shape[0]
    position = (first[:, None] + jnp.arange(rows)).reshape(-1)
    neutral = {"top_k": jnp.zeros(count * rows, jnp.int32), "top_p": jnp.ones(count * rows)}
    return Draw(
        position=position,
        temperature=jnp.full((count * rows,), temperature, jnp.float32),
        min_p=jnp.zeros(count * rows),
        seed=jnp.repeat(seed, rows, axis=0),
        **neutral,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def verification(rule, num_drafts, target, drafter, context, seed, first, temperature, valid, *rest):
    """Drafts behind `context`, and verifies them: emitted tokens, and how many drafts were kept."""
    fed = [context]
    for j in range(num_drafts):
        draw = draw_of_rows(seed, first + j, temperature, 1)
        fed.append(sampling.choose(drafter[fed[-1]], draw, whole(target.shape[1]), STREAMS.get(rule, 1)))
    fed = jnp.stack(fed, axis=1)
    draw = draw_of_rows(seed, first, temperature, num_drafts + 1)
    return rule(target[fed], drafter[fed[:, :-1]], fed[:, 1:], valid, draw, *rest)


def seeds_and_positions(count):
    """Many seeds, and eight stretches of positions of each that no request leaves."""
    request = np.arange(count)
    seed = np.stack([request // 8, np.full(count, 71)], axis=1)
    return jnp.asarray(seed, jnp.uint32), jnp.asarray(5 + 64 * (request % 8), jnp.int32)


def run(rule, target, drafter, temperature=1.0, want=3, valid=DRAFTS, start=START, rest=(), count=REQUESTS):
    """The first `want` tokens of each request, and how many drafts each of its first `want` verifications kept."""
    seed, first = seeds_and_positions(count)
    valid, context = (jnp.broadcast_to(jnp.asarray(x, jnp.int32), (count,)) for x in (valid, start))
    produced = np.zeros(count, int)
    line = np.zeros((count, want + DRAFTS + 1), int)
    accepted = []
    for _ in range(want):
        now = first + jnp.asarray(produced, jnp.int32)
        found = verification(rule, DRAFTS, target, drafter, context, seed, now, temperature, valid, *rest)
        tokens, kept = (np.asarray(x) for x in found)
        for j in range(DRAFTS + 1):
            of = np.flatnonzero((j <= kept) & (produced < want))
            line[of, produced[of] + j] = tokens[of, j]
        context = jnp.asarray(tokens[np.arange(count), kept])
        produced = produced + kept + 1
        accepted.append(kept)
    return line[:, :want], np.stack(accepted, axis=1)


@jax.jit
def _scores(logits, fields):
    return sampling.scores(logits, Draw(**fields), whole(SIZE), full=True)


def tables(options):
    """Scores of target and drafter, and the target's probabilities in float64, each by the token before."""
    draw = make_draw(SIZE, **options)
    of_target, of_drafter = (_scores(x, vars(draw)) for x in (TARGET, DRAFTER))
    return of_target, of_drafter, np.stack([softmax(masked(row, **options)) for row in TARGET])


def fits(line, transition):
    """p-values of tokens one and two, jointly, and of two and three."""
    first = transition[START]
    second = first @ transition
    return [
        fit(line[:, i] * SIZE + line[:, i + 1], (before[:, None] * transition).ravel())
        for i, before in enumerate((first, second))
    ]


@pytest.mark.short_cases(f"shared-{OPTIONS[0]}", f"rejection-{OPTIONS[-1]}")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rule", [shared, rejection])
def test_emitted_tokens_follow_the_target(rule, options):
    target, drafter, transition = tables(options)
    line, accepted = run(rule, target, drafter, options.get("temperature", 1.0))
    assert 0.1 < (accepted[:, 0] == DRAFTS).mean() < 0.9, "both ways out of a verification are taken"
    assert min(fits(line, transition)) > LIKELY


FAULTS = (
    "none",
    "drafts are compared with the most probable token",
    "drafts are kept when p > q / 2",
    "drafts are kept twice as readily",
    "a refused draft is replaced from p",
    "a refused draft is replaced with the drafter's noise",
    "the uniform that refused a draft draws its replacement",
    "all rows of a verification draw with the noise of the first",
)


def with_fault(target_scores, draft_scores, drafts, valid, draw, fault):
    """Rejection sampling, written plainly, with one thing wrong (an index of FAULTS, traced: one compilation)."""

    def has(name):
        return fault == FAULTS.index(name)

    n, rows, size = target_scores.shape
    one = jnp.arange(n)
    p, q = jax.nn.softmax(target_scores), jax.nn.softmax(draft_scores)
    chance = uniform(draw.seed, draw.position, speculative.ACCEPTANCE_STREAM).reshape(n, rows)
    ratio = jnp.take_along_axis(p[:, :-1] / q, drafts[:, :, None], axis=2)[:, :, 0]
    keep = chance[:, :-1] < jnp.where(has("drafts are kept twice as readily"), 2, 1) * ratio
    keep = jnp.where(has("drafts are kept when p > q / 2"), ratio > 0.5, keep)
    most_probable = jnp.argmax(target_scores[:, :-1], axis=2)
    keep = jnp.where(has("drafts are compared with the most probable token"), drafts == most_probable, keep)
    accepted = jnp.cumprod(keep, axis=1).sum(axis=1)

    residual = jnp.concatenate([jnp.maximum(p[:, :-1] - q, 0), p[:, -1:]], axis=1)
    weights = jnp.where(has("a refused draft is replaced from p"), p, residual)[one, accepted]
    last = draw.take(one * rows + accepted)
    token = sampling.choose(jnp.log(weights), last, whole(size))
    of_drafter = sampling.choose(jnp.log(weights), last, whole(size), speculative.DRAFT_STREAM)
    token = jnp.where(has("a refused draft is replaced with the drafter's noise"), of_drafter, token)
    below = jnp.cumsum(weights, axis=1) / weights.sum(axis=1, keepdims=True)
    inverse = jnp.sum(below < chance[one, accepted][:, None], axis=1)
    token = jnp.where(has("the uniform that refused a draft draws its replacement"), inverse, token)
    tokens = jnp.where(jnp.arange(rows) < accepted[:, None], jnp.pad(drafts, ((0, 0), (0, 1))), token[:, None])

    # Each of these tokens is right alone; no two are.
    same = shared(target_scores, draft_scores, drafts, valid, draw.take(jnp.repeat(one * rows, rows)))
    positions_share = has("all rows of a verification draw with the noise of the first")
    return jnp.where(positions_share, same[0], tokens), jnp.where(positions_share, same[1], accepted)


@pytest.mark.thorough
def test_the_rule_that_faults_are_put_into_is_right():
    target, drafter, transition = tables({})
    line, accepted = run(with_fault, target, drafter, rest=(FAULTS.index("none"),))
    assert min(fits(line, transition)) > LIKELY
    of_library, accepted_by_library = run(rejection, target, drafter)
    # They round differently: a uniform between the two ratios is met about once in a million.
    assert (line != of_library).any(axis=1).mean() < 1e-4
    assert (accepted != accepted_by_library).any(axis=1).mean() < 1e-4


@pytest.mark.short_cases("a refused draft is replaced from p")
@pytest.mark.parametrize("fault", FAULTS[1:])
def test_wrong_rules_are_seen(fault):
    target, drafter, transition = tables({})
    line, _ = run(with_fault, target, drafter, rest=(FAULTS.index(fault),))
    assert min(fits(line, transition)) < IMPOSSIBLE
    if fault == "all rows of a verification draw with the noise of the first":
        assert fit(line[:, 0], transition[START]) > LIKELY, "no single token gives it away"


STARTS = np.arange(EQUAL) % SIZE


@jax.jit
def _one_token(target, context, seed, position, temperature):
    return sampling.choose(target[context], draw_of_rows(seed, position, temperature, 1), whole(SIZE))


def unspeculated(target, temperature, want):
    """Tokens drawn one by one behind STARTS, with the noise of their positions."""
    seed, first = seeds_and_positions(EQUAL)
    line = [jnp.asarray(STARTS, jnp.int32)]
    for i in range(want):
        line.append(_one_token(target, line[-1], seed, first + i, temperature))
    return np.stack(line[1:], axis=1)


@pytest.mark.short_cases("some-1.0")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("proposal", ["the drafter's", "random", "none", "the target's", "some"])
def test_shared_noise_gives_the_tokens_of_an_unspeculated_run(proposal, temperature):
    want = 6
    other = np.random.default_rng(78).standard_normal((SIZE, SIZE)).astype(np.float32)
    drafter = {"random": other, "the target's": TARGET}.get(proposal, DRAFTER)
    valid = np.asarray({"none": 0, "some": np.arange(EQUAL) // SIZE % (DRAFTS + 1)}.get(proposal, DRAFTS))
    line, accepted = run(shared, TARGET, drafter, temperature, want, valid, STARTS, count=EQUAL)
    np.testing.assert_array_equal(line, unspeculated(TARGET, temperature, want))
    if proposal in ("none", "the target's"):
        assert (accepted == valid).all()
    else:
        assert len(set(accepted.ravel())) >= (DRAFTS + 1 if temperature else 2)
    assert (accepted <= valid[..., None]).all()


@pytest.mark.thorough
def test_greedy_rejection_gives_the_most_probable_tokens():
    line, accepted = run(rejection, TARGET, DRAFTER, 0.0, 6, start=STARTS, count=EQUAL)
    np.testing.assert_array_equal(line, unspeculated(TARGET, 0.0, 6))
    _, accepted_by_shared = run(shared, TARGET, DRAFTER, 0.0, 6, start=STARTS, count=EQUAL)
    np.testing.assert_array_equal(accepted, accepted_by_shared)


def test_rejection_without_drafts_gives_the_tokens_of_an_unspeculated_run():
    line, accepted = run(rejection, TARGET, DRAFTER, want=3, valid=0, start=STARTS, count=EQUAL)
    expected = unspeculated(TARGET, 1.0, 3)
    np.testing.assert_array_equal(line, expected)
    assert not accepted.any()
    context, none = jnp.asarray(STARTS, jnp.int32), jnp.zeros((EQUAL,), jnp.int32)
    found = verification(rejection, 0, TARGET, DRAFTER, context, *seeds_and_positions(EQUAL), 1.0, none)
    np.testing.assert_array_equal(found[0], expected[:, :1])
    np.testing.assert_array_equal(found[1], none)


def random_verifications(count, size, seed):
    """Scores with bans on either side, drafts (some that target or drafter cannot draw), valid counts and draws."""
    rng = np.random.default_rng(seed)
    target = 3 * rng.standard_normal((count, DRAFTS + 1, size)).astype(np.float32)
    draft = target[:, :DRAFTS] + rng.standard_normal((count, DRAFTS, size)).astype(np.float32)
    target[rng.random(target.shape) < 0.2] = -np.inf
    draft[rng.random(draft.shape) < 0.2] = -np.inf
    target[..., 0], draft[..., 0] = 0.0, 0.0  # something is left in every row
    drafts = np.where(rng.random((count, DRAFTS)) < 0.2, rng.integers(0, size, (count, DRAFTS)), draft.argmax(-1))
    drafts[1::3] = target[1::3, :DRAFTS].argmax(-1)
    valid = rng.integers(0, DRAFTS + 1, count)
    rows = DRAFTS + 1
    draw = make_draw(
        count * rows,
        temperature=np.repeat(np.where(np.arange(count) % 4, 0.7, 0.0), rows),
        seed=np.repeat(rng.integers(0, 1 << 32, (count, 2)), rows, axis=0),
        position=(rng.integers(0, 1 << 20, (count, 1)) + np.arange(rows)).ravel(),
    )
    return target, draft, drafts.astype(np.int32), valid.astype(np.int32), draw


def rejection_by_formula(target, draft, drafts, valid, temperature, chance, noise):
    """One request, in float64: the emitted tokens, as many as there are."""
    emitted = []
    for j, token in enumerate(drafts[:valid]):
        p, q = softmax(target[j]), softmax(draft[j])
        if temperature == 0:
            if token != target[j].argmax():
                return [*emitted, target[j].argmax()]
        # A draft that the drafter cannot have drawn: kept if the target can draw it.
        elif p[token] == 0 or (q[token] > 0 and chance[j] >= p[token] / q[token]):
            residual = np.maximum(p - q, 0)
            with np.errstate(divide="ignore"):
                return [*emitted, (np.log(residual) + noise[j]).argmax()]
        emitted.append(token)
    last = len(emitted)
    return [*emitted, (target[last] + (noise[last] if temperature else 0)).argmax()]


@jax.jit
def _rejection(target, draft, drafts, valid, fields):
    return rejection(target, draft, drafts, valid, Draw(**fields))


@jax.jit
def _noise(seed, position):
    """Uniforms [n] and Gumbel noise [n, 50]."""
    token = jnp.arange(50, dtype=jnp.uint32)
    return uniform(seed, position, speculative.ACCEPTANCE_STREAM), gumbel(seed, position, token)


def test_rejection_equals_formulas():
    count, size = 300, 50
    target, draft, drafts, valid, draw = random_verifications(count, size, 72)
    chance, noise = (np.asarray(x).reshape(count, DRAFTS + 1, -1) for x in _noise(draw.seed, draw.position))
    tokens, accepted = (np.asarray(x) for x in _rejection(target, draft, drafts, valid, vars(draw)))
    temperature = np.asarray(draw.temperature).reshape(count, -1)[:, 0]
    kept = []
    for i in range(count):
        expected = rejection_by_formula(target[i], draft[i], drafts[i], valid[i], temperature[i], chance[i], noise[i])
        np.testing.assert_array_equal(tokens[i, : accepted[i] + 1], expected, err_msg=str(i))
        kept.append(len(expected) - 1)
    assert (tokens >= 0).all()
    assert (tokens < size).all()
    for drawn in (temperature == 0, temperature > 0):
        assert set(np.asarray(kept)[drawn]) == set(range(DRAFTS + 1))


def test_equal_scores_refuse_no_draft():
    """log p - log q is 0 to the last bit, and the logarithm of a uniform is below it."""
    target, _, drafts, _, draw = random_verifications(300, 50, 73)
    possible = np.isfinite(np.take_along_axis(target[:, :-1], drafts[..., None], axis=2)[..., 0])
    drafts = np.where(possible, drafts, 0)
    fields = vars(draw) | {"temperature": jnp.ones_like(draw.temperature)}
    tokens, accepted = _rejection(target, target[:, :-1], drafts, np.full(300, DRAFTS, np.int32), fields)
    assert (np.asarray(accepted) == DRAFTS).all()
    np.testing.assert_array_equal(np.asarray(tokens)[:, :-1], drafts)


_residual = jax.jit(speculative._residual, static_argnums=2)


def test_residual_that_rounding_lost_is_the_target():
    p = np.random.default_rng(74).standard_normal((5, 60)).astype(np.float32)
    p[1, 5:] = -np.inf
    np.testing.assert_array_equal(_residual(p, p.copy(), whole(60)), p)


@pytest.mark.short_cases("0-1.0")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_rejection_draws_no_token_where_all_are_forbidden(first, temperature):
    """From row `first` on, by target and drafter, which then proposes NO_TOKEN; drafts before it are kept."""
    scores = jnp.zeros((1, 3, 4)).at[:, first:].set(-jnp.inf).at[:, :first, 2].set(60.0)
    drafts = jnp.where(jnp.arange(2) < first, 2, NO_TOKEN)[None]
    draw = draw_of_rows(jnp.zeros((1, 2), jnp.uint32), jnp.zeros(1, jnp.int32), temperature, 3)
    tokens, accepted = rejection(scores, scores[:, :2], drafts, jnp.asarray([2]), draw)
    emitted = tokens[0, : accepted[0] + 1].tolist()
    assert emitted[: first + 1] == [2] * first + [NO_TOKEN]
    # What ends a request is the first NO_TOKEN, as if it were a stop token.
    assert set(emitted[first:]) == {NO_TOKEN}


def test_residual_equals_formula_also_where_probabilities_underflow():
    """Down to log-probabilities of -150. The least probability of float32 is exp(-103)."""
    rng = np.random.default_rng(75)
    p = rng.uniform(-150, 0, (5, 60)).astype(np.float32)
    q = (p + rng.uniform(-2, 2, p.shape)).astype(np.float32)
    p[:, 3], q[:, 3], q[:, 7] = -np.inf, -1.0, -np.inf
    p[:, 9], q[:, 9] = -np.inf, -np.inf
    log_p, log_q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p.astype(np.float64), q.astype(np.float64)))
    actual, more = np.asarray(_residual(p, q, whole(60))), log_p > log_q
    np.testing.assert_array_equal(np.isfinite(actual), more)
    assert (log_p[more] < -110).any()
    gap = (log_q - np.where(more, log_p, 0))[more]
    # Scores of magnitude 150 have steps of 1.5e-5; the derivative of log(1 - exp(gap)) is 1 / gap near 0.
    bound = 3e-5 * (1 + 1 / -gap)
    assert (np.abs(actual[more] - log_p[more] - np.log1p(-np.exp(gap))) <= bound).all()


def test_shared_acceptance_counts_valid_drafts_before_the_first_that_differs():
    targets = jnp.asarray([[4, 5, 6, 7]] * 7, jnp.int32)
    drafts = [[4, 5, 6], [4, 5, 6], [4, 5, 6], [4, 0, 6], [0, 5, 6], [-1, -1, -1], [5, 6, 7]]
    valid = jnp.asarray([3, 2, 0, 3, 3, 3, 3], jnp.int32)
    accepted = speculative.accept_shared(jnp.asarray(drafts, jnp.int32), targets, valid)
    np.testing.assert_array_equal(accepted, [3, 2, 0, 1, 0, 0, 0])
    # More drafts in the slot than a verification has rows.
    accepted = speculative.accept_shared(jnp.asarray(drafts, jnp.int32)[:, :1], targets[:, :2], valid)
    np.testing.assert_array_equal(accepted, [1, 1, 0, 1, 0, 0, 0])
    none = speculative.accept_shared(jnp.zeros((7, 0), jnp.int32), targets[:, :1], valid)
    np.testing.assert_array_equal(none, [0] * 7)


@pytest.mark.parametrize("length", [1.0, 1.3, 2.0, 2.75, 3.9, 4.0])
def test_forced_acceptance_has_the_wanted_mean(length):
    count = 20_000
    drafts = jnp.asarray(np.arange(count)[:, None] + np.array([[1, 2, 3]]), jnp.int32)
    targets = -drafts[:, :1] * jnp.array([[10, 11, 12, 13]])
    draw = draw_of_rows(*seeds_and_positions(count), 1.0, 4)
    valid = jnp.asarray(np.where(np.arange(count) % 2, DRAFTS, np.arange(count) // 2 % 4), jnp.int32)
    tokens, accepted = (np.asarray(x) for x in speculative.accept_forced(drafts, targets, valid, length, draw))
    free = np.asarray(valid) == DRAFTS
    fraction = length % 1
    bound = 4.5 * np.sqrt(fraction * (1 - fraction) / free.sum())
    assert abs(1 + accepted[free].mean() - length) <= bound
    assert set(accepted[free]) == {int(length) - 1} | ({int(length)} if fraction else set())
    assert (accepted <= np.asarray(valid)).all()
    assert (accepted[~free] >= np.minimum(np.asarray(valid)[~free], int(length) - 1)).all()
    for j in range(DRAFTS + 1):
        expected = np.asarray(drafts)[:, j] if j < DRAFTS else None
        if expected is not None:
            np.testing.assert_array_equal(tokens[accepted > j, j], expected[accepted > j])
        np.testing.assert_array_equal(tokens[accepted == j, j], np.asarray(targets)[accepted == j, j])


VARIATIONS = (0.05, 0.1, 0.2, 0.4)


def pair_of(variation, kind):
    """Two distributions over 40 tokens of this total variation.

    "noisy": the drafter's logits are the target's with normal noise. "apart": where both have mass they agree, and the
    rest of each is where the other has none.
    """
    rng = np.random.default_rng(76)
    if kind == "apart":
        p, q = np.array([[1.0, 0.0], [0.0, 1.0]]) * variation
        common = (1 - variation) * softmax(rng.standard_normal(38))
        return np.append(common, p), np.append(common, q)
    logits, error = 2 * rng.standard_normal(40), rng.standard_normal(40)
    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        apart = np.abs(softmax(logits) - softmax(logits + middle * error)).sum() / 2
        low, high = (middle, high) if apart < variation else (low, middle)
    return softmax(logits), softmax(logits + low * error)


def together(p, q):
    """The chance that target and drafter draw the same token with the same noise:
    sum_i 1 / sum_j max(p_j / p_i, q_j / q_i), over the tokens that both can draw.
    """
    both = (p > 0) & (q > 0)
    return (1 / np.maximum(p / p[both, None], q / q[both, None]).sum(axis=1)).sum()


def acceptance(rule, p, q, count):
    """The share of drafts that is kept, one draft a verification, all rows of one distribution."""
    with np.errstate(divide="ignore"):
        target, drafter = (np.log(np.broadcast_to(x, (40, 40))).astype(np.float32) for x in (p, q))
    context, valid = jnp.zeros((count,), jnp.int32), jnp.ones((count,), jnp.int32)
    found = verification(rule, 1, target, drafter, context, *seeds_and_positions(count), 1.0, valid)
    return float(np.asarray(found[1]).mean())


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["noisy", "apart"])
@pytest.mark.parametrize("variation", VARIATIONS)
def test_acceptance_by_total_variation(variation, kind):
    """Rejection keeps 1 - TV of the drafts, which is the most that any rule can keep; shared noise keeps at least
    (1 - TV) / (1 + TV), and no more than that where the distributions are "apart"."""
    p, q = pair_of(variation, kind)
    np.testing.assert_allclose(np.abs(p - q).sum() / 2, variation, rtol=1e-9)
    least, most = (1 - variation) / (1 + variation), 1 - variation
    if kind == "apart":
        np.testing.assert_allclose(together(p, q), least, rtol=1e-9)
    else:
        assert least < together(p, q) < most
    for rule, expected in ((shared, together(p, q)), (rejection, most)):
        sigma = np.sqrt(expected * (1 - expected) / REQUESTS)
        assert abs(acceptance(rule, p, q, REQUESTS) - expected) < 4 * sigma, rule


def test_split_vocabulary_equals_one_rank():
    count, size = 60, 37  # odd, so that ranks pad it
    target, draft, drafts, valid, draw = random_verifications(count, size, 77)

    def run(target, draft, vocab):
        tokens, accepted = speculative.accept_rejection(
            target, draft, jnp.asarray(drafts), jnp.asarray(valid), draw, vocab
        )
        proposed = sampling.choose(target[:, 0], draw.take(jnp.arange(count) * (DRAFTS + 1)), vocab, 1)
        return tokens, accepted, proposed

    def at(tp):
        wide = [np.pad(x, ((0, 0), (0, 0), (0, -size % tp)), constant_values=-np.inf) for x in (target, draft)]
        spec = sharding.P(None, None, sharding.AXIS)
        return over_ranks(
            tp, functools.partial(run, vocab=Vocab(size=size, tp=tp)), *map(jnp.asarray, wide), specs=(spec, spec)
        )

    (expected,) = at(1)
    assert set(expected[1]) == set(range(DRAFTS + 1))
    for found in at(2):
        for actual, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(actual, wanted)


def test_residual_of_a_split_vocabulary_may_be_all_on_one_rank():
    q = np.random.default_rng(79).standard_normal((4, 40)).astype(np.float32)
    p = q.copy()
    p[np.arange(3), [0, 25, 39]] += 1  # only these are more probable than before; the last row is as it was
    spec = sharding.P(None, sharding.AXIS)
    run = functools.partial(speculative._residual, vocab=Vocab(size=40, tp=2))
    parts = over_ranks(2, run, jnp.asarray(p), jnp.asarray(q), specs=(spec, spec))
    residual = np.concatenate(parts, axis=1)
    np.testing.assert_array_equal(np.argwhere(np.isfinite(residual[:3])), [[0, 0], [1, 25], [2, 39]])
    np.testing.assert_array_equal(residual[3], p[3])


def test_no_sort_of_the_vocabulary():
    size = 4096
    scores = jnp.zeros((2, DRAFTS + 1, size))
    drafts, valid = jnp.zeros((2, DRAFTS), jnp.int32), jnp.full((2,), DRAFTS, jnp.int32)
    jaxpr = jax.make_jaxpr(lambda x: rejection(x, x[:, :-1], drafts, valid, make_draw(8)))(scores)
    names = {name for name, largest in primitives(jaxpr.jaxpr) if largest >= size}
    assert {"argmax", "threefry2x32", "exp"} <= names, "the walk saw the rule"
    assert not names & {"sort", "top_k", "approx_top_k", "cumsum"}, names
