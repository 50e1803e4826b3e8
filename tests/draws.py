"""How a token may be drawn, by definition, in NumPy: what tests of sampling and of speculation compare with."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy

from gdnjax import sharding
from gdnjax.sampling import Draw, Vocab

IMPOSSIBLE = 1e-9
"""p-value that a wrong rule must fall below, so that the test that passes the right one can see."""


def softmax(x):
    weights = np.exp(np.asarray(x, np.float64) - np.max(x, axis=-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def keep_min_p(x, min_p):
    probability = softmax(x)
    return probability >= min_p * probability.max()


def keep_top_k(x, k):
    if k <= 0 or k > len(x):
        return np.ones(len(x), bool)
    return x >= np.sort(x)[::-1][k - 1]


def keep_top_p(x, p):
    """The most probable tokens up to the one whose running sum reaches p, and all that tie with it."""
    if p >= 1:
        return np.ones(len(x), bool)
    ordered = np.sort(x)[::-1]
    total = np.cumsum(softmax(ordered))
    # Float32 sums could decide otherwise on a nearer boundary between unequal tokens, and neither would be wrong.
    boundaries = total[:-1][ordered[:-1] > ordered[1:]]
    assert (np.abs(boundaries - p) > 1e-6).all(), "the test's own numbers are too close to a boundary"
    return x >= ordered[np.searchsorted(total, p)]


def masked(x, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Temperature, min_p, top_k, top_p, in this order: float32 [V], -inf where a token may not be drawn."""
    x = np.asarray(x, np.float32) / np.float32(temperature or 1.0)
    for keep, value in ((keep_min_p, min_p), (keep_top_k, top_k), (keep_top_p, top_p)):
        x = np.where(keep(x, value), x, np.float32(-np.inf))
    return x


def make_draw(rows, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=(0, 0), position=None):
    """A Draw of `rows` rows; scalars are the same for all, positions count from 0 where not given."""

    def column(value, dtype):
        return jnp.asarray(np.broadcast_to(np.asarray(value, dtype), (rows,)))

    return Draw(
        position=column(np.arange(rows) if position is None else position, np.int32),
        temperature=column(temperature, np.float32),
        top_k=column(top_k, np.int32),
        top_p=column(top_p, np.float32),
        min_p=column(min_p, np.float32),
        seed=jnp.asarray(np.broadcast_to(np.asarray(seed, np.uint32), (rows, 2))),
    )


def whole(size):
    return Vocab(size=size, tp=1)


def fit(tokens, probability):
    """p-value of the chi-square test of drawn tokens against probabilities; 0 for a token that cannot be drawn.

    Tokens that are expected less than five times, for which the test does not hold, count as one.
    """
    observed, expected = np.bincount(tokens, minlength=len(probability)), len(tokens) * probability
    if observed[expected == 0].any():
        return 0.0
    rare = expected < 5
    observed, expected = (np.append(x[~rare], x[rare].sum()) for x in (observed, expected))
    if expected[-1] == 0:
        observed, expected = observed[:-1], expected[:-1]
    return scipy.stats.chisquare(observed, expected).pvalue


def over_ranks(tp, function, *arguments, specs):
    """`function(*arguments)` per rank; every rank's result, to be compared."""
    mesh = sharding.make_mesh(tp)
    if tp == 1:
        return [jax.tree.map(np.asarray, jax.jit(function)(*arguments))]

    def one_rank(*arguments):
        return jax.tree.map(lambda x: x[None], function(*arguments))

    mapped = jax.jit(sharding.shard_step(one_rank, mesh, specs, sharding.P(sharding.AXIS)))
    results = jax.tree.map(np.asarray, mapped(*arguments))
    return [jax.tree.map(lambda x, r=r: x[r], results) for r in range(tp)]


def padded(x, tp, value):
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % tp)), constant_values=value)


def primitives(jaxpr):
    """Every (primitive, largest operand) of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, max((np.prod(v.aval.shape) for v in equation.invars), default=0)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)
