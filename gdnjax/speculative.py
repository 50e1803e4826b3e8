"""Drafts and the target's scores to emitted tokens: which drafts of a verification are kept, and what follows them.

A verification has T = 1 + drafts rows. Row j gives the token of absolute position L + 1 + j, and draft j is a proposal
for that same token. Kept are the drafts before the first that the rule refuses; then comes one token of the target's
own. Two rules give tokens of the target's own distribution, whatever the drafter's:

- shared noise: the drafter drew with the target's noise, and a draft is kept while it is the target's token. The
  tokens are those of an unspeculated run. Kept with probability (1 - TV) / (1 + TV) or more, TV the total variation
  between target and drafter.
- rejection sampling (arXiv:2211.17192, arXiv:2302.01318): kept with probability 1 - TV. The distribution is that of an
  unspeculated run, the tokens are not.

All noise is a function of (seed, absolute position, stream). The next verification uses the noise of positions behind
a refused draft again, which is sound: no emitted token has depended on it.
"""

import math

import jax.numpy as jnp

from gdnjax import sampling, sharding
from gdnjax.pallas_kernels.gumbel_argmax import uniform
from gdnjax.sampling import Draw, Vocab
from gdnjax.shapes import Array, Bool, Float32, Int32

DRAFT_STREAM = 1
"""Noise of the drafter under rejection sampling. With shared noise it draws with the target's own, stream 0."""

ACCEPTANCE_STREAM = 2
"""Uniforms that keep or refuse drafts under rejection sampling."""

FORCED_STREAM = 3
"""Uniforms of a forced acceptance."""


def accept_shared(
    drafts: Int32[Array, "n drafts"], targets: Int32[Array, "n T"], valid: Int32[Array, "n"]
) -> Int32[Array, "n"]:
    """How many drafts are kept: those before the first that is not the target's token of its row.

    `targets` has a row more than drafts. Only the first `valid` drafts count. The emitted tokens are the targets.
    """
    return _kept(drafts == targets[:, :-1], valid)


def accept_rejection(
    target_scores: Float32[Array, "n T V"],
    draft_scores: Float32[Array, "n drafts V"],
    drafts: Int32[Array, "n drafts"],
    valid: Int32[Array, "n"],
    draw: Draw,
    vocab: Vocab,
) -> tuple[Int32[Array, "n T"], Int32[Array, "n"]]:
    """Emitted tokens, and how many drafts are kept. With p and q the softmax of the scores, a draft is kept with
    probability min(1, p / q); in place of the first that is refused comes a token from norm(max(p - q, 0)), behind the
    last one a token from p. Rows of temperature 0 keep a draft while it is the target's best token.

    The first `valid` drafts must be drawn from `draft_scores` with noise of DRAFT_STREAM. `draw` has n * T rows, those
    of one request side by side. `tokens[:, : accepted + 1]` are emitted; what stands behind them is some token.
    """
    n, rows, width = target_scores.shape
    k = rows - 1
    first = jnp.arange(n) * rows
    if k == 0:
        return sampling.choose(target_scores[:, 0], draw, vocab)[:, None], jnp.zeros((n,), jnp.int32)

    p, q = target_scores[:, :k].reshape(n * k, width), draft_scores.reshape(n * k, width)
    token = drafts.reshape(n * k)
    verified = draw.take((first[:, None] + jnp.arange(k)).reshape(n * k))
    log_p = sampling.score_of(p, token, vocab) - sampling.log_total(p, vocab)
    log_q = sampling.score_of(q, token, vocab) - sampling.log_total(q, vocab)
    chance = uniform(verified.seed, verified.position, ACCEPTANCE_STREAM)
    lucky = jnp.log(chance) < log_p - log_q
    keep = jnp.where(verified.temperature > 0, lucky, sampling.argmax(p, vocab) == token)
    accepted = _kept(keep.reshape(n, k), valid)

    last = draw.take(first + accepted)
    p = target_scores[jnp.arange(n), accepted]
    q = draft_scores[jnp.arange(n), jnp.minimum(accepted, k - 1)]
    refused = (accepted < jnp.minimum(valid, k)) & (last.temperature > 0)
    token = sampling.choose(jnp.where(refused[:, None], _residual(p, q, vocab), p), last, vocab)
    return _emitted(drafts, accepted, token[:, None]), accepted


def accept_forced(
    drafts: Int32[Array, "n drafts"], targets: Int32[Array, "n T"], valid: Int32[Array, "n"], length: float, draw: Draw
) -> tuple[Int32[Array, "n T"], Int32[Array, "n"]]:
    """Emitted tokens, and how many drafts are kept: so many, whatever they are, that a verification gives `length`
    tokens on average, as far as `valid` goes. For benchmarks: the tokens are not the model's.

    `draw` has n * T rows, those of one request side by side. `tokens[:, : accepted + 1]` are emitted: drafts, then the
    target's token of its row; what stands behind them is some token.
    """
    n, rows = targets.shape
    whole = math.floor(length - 1)
    first = draw.take(jnp.arange(n) * rows)
    one_more = uniform(first.seed, first.position, FORCED_STREAM) < length - 1 - whole
    accepted = jnp.minimum(whole + one_more.astype(jnp.int32), jnp.minimum(valid, rows - 1))
    return _emitted(drafts, accepted, targets), accepted


def _kept(keep: Bool[Array, "n drafts"], valid: Int32[Array, "n"]) -> Int32[Array, "n"]:
    """How many of the first `valid` drafts stand before the first that is refused."""
    keep &= jnp.arange(keep.shape[1]) < valid[:, None]
    return jnp.cumprod(keep.astype(jnp.int32), axis=1).sum(axis=1)


def _emitted(drafts: Array, accepted: Array, token: Array) -> Array:
    """The kept drafts, and `token` (one of each row, or [n, 1]) behind them."""
    rows = jnp.arange(drafts.shape[1] + 1)
    return jnp.where(rows < accepted[:, None], jnp.pad(drafts, ((0, 0), (0, 1))), token)


def _residual(p: Float32[Array, "n V"], q: Float32[Array, "n V"], vocab: Vocab) -> Float32[Array, "n V"]:
    """log(max(p - q, 0)) of the two softmaxes; the scores of p themselves where that is 0 for every token."""
    log_p = p - sampling.log_total(p, vocab)[:, None]
    log_q = q - sampling.log_total(q, vocab)[:, None]
    more = log_q < log_p
    # log(p - q) = log p + log(1 - q / p): no underflow where both are small.
    gap = jnp.where(more, log_q - log_p, -1.0)
    residual = jnp.where(more, log_p + jnp.log(-jnp.expm1(gap)), -jnp.inf)
    # A draft that is refused leaves some mass, but rounding may lose it where p and q are all but equal.
    some = sharding.pmax(residual.max(-1), vocab.tp) > -jnp.inf
    return jnp.where(some[:, None], residual, p)
