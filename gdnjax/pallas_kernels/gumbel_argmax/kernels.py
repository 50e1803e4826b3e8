"""One pass over the logits, with noise for the rows that have a temperature, and for no other.

Bytes: the logits once (127 MB for 128 rows of 248,320 tokens), so the ceiling is that of reading memory; with noise
some 130 operations a token besides, two thirds of them Threefry's, in integers: of those a Hopper has half as many
units as of others, so that 128 rows of 248,320 take it 130 us at least. XLA computes the noise of greedy rows, too, and
reads the logits twice.

Noise is never above 22.88. So where the best of some tokens is further than that below the best sum so far, none of
them is made; and where it is made, u alone rules most tokens out, since the noise of u is below -log(u). Both leave a
margin for what floating point makes of the sums, so that what is drawn is the same to the bit.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gdnjax.backend import Backend
from gdnjax.pallas_kernels.gumbel_argmax import tiles
from gdnjax.pallas_kernels.launch import launch
from gdnjax.shapes import Array

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA

MOST_NOISE = 22.88
"""Above -log(-log1p(-u)) of the least u there is, 2^-33."""


def gumbel_argmax(logits, temperature, least, seed, position, first, stream: int, backend: Backend):
    rows, width = logits.shape
    tile = tiles.of(backend)
    steps = -(-width // tile.tokens)
    splits = max(1, min(steps, tile.programs // rows))
    bounds = () if least is None else (least,)
    numbers = jnp.asarray(first, jnp.int32).reshape(1)
    token, value, top = launch(
        _draw,
        backend,
        name="gumbel_argmax",
        programs=rows * splits,
        args=(numbers, temperature, *bounds, seed.astype(jnp.uint32), position, logits),
        out=[jax.ShapeDtypeStruct((rows, splits), dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32)],
        warps=tile.warps,
        tokens=tile.tokens,
        splits=splits,
        stream=stream,
        bounded=least is not None,
        sparing=tile.sparing,
    )
    # Parts are in the order of their tokens, so the first of the best has the lowest token.
    best = jnp.argmax(value, axis=1)[:, None]
    return (
        jnp.take_along_axis(token, best, axis=1)[:, 0],
        jnp.take_along_axis(value, best, axis=1)[:, 0],
        jnp.max(top, axis=1),
    )


def _draw(program, first_ref, temperature_ref, *refs, tokens, splits, stream, bounded, sparing):
    least_ref, refs = (refs[0], refs[1:]) if bounded else (None, refs)
    seed_ref, position_ref, logits_ref, token_ref, value_ref, top_ref = refs
    width = logits_ref.shape[1]
    row, split = program // splits, program % splits
    steps = -(-width // tokens)
    begin, end = split * steps // splits, (split + 1) * steps // splits
    temperature = temperature_ref[row]
    drawn = temperature > 0
    scale = jnp.where(drawn, temperature, 1.0)
    lane = jnp.arange(tokens, dtype=jnp.int32)
    seed = (seed_ref[row, 0], seed_ref[row, 1])
    key = _threefry(seed, position_ref[row].astype(jnp.uint32), jnp.uint32(stream))

    def one_step(i, carry, *, noisy):
        best, place, top, most = carry
        token = i * tokens + lane
        inside = token < width
        scaled = plgpu.load(logits_ref.at[row, token], mask=inside, other=-jnp.inf) / scale
        top = jnp.maximum(top, scaled)
        if least_ref is not None:
            scaled = jnp.where(scaled >= least_ref[row], scaled, -jnp.inf)

        def uniform():
            bits, _ = _threefry(key, (token + first_ref[0]).astype(jnp.uint32), jnp.zeros_like(token, jnp.uint32))
            return jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)

        def better_of(sums):
            better = sums > best
            return jnp.where(better, sums, best), jnp.where(better, token, place)

        def with_noise(u):
            return better_of(scaled - jnp.log(-jnp.log1p(-u)))

        if not noisy:
            return *better_of(scaled), top, most
        if not sparing:
            return *with_noise(uniform()), top, most
        # Sums are rounded by less. Nothing is further than infinity, whatever is added to it.
        margin = 1e-3 + 1e-6 * jnp.minimum(jnp.abs(most), 1e30)

        def some_may_win():
            u = uniform()
            may = jnp.max(jnp.where(u <= jnp.exp(scaled - most + margin), 1.0, 0.0)) > 0
            return lax.cond(may, lambda: with_noise(u), lambda: (best, place))

        # What is no number is never the best.
        may = jnp.max(jnp.where(scaled > -jnp.inf, scaled, -jnp.inf)) + MOST_NOISE + margin >= most
        best, place = lax.cond(may, some_may_win, lambda: (best, place))
        return best, place, top, jnp.max(best)

    def walk(noisy):
        start = jnp.full((tokens,), -jnp.inf)
        carry = (start, begin * tokens + lane, start, jnp.full((), -jnp.inf))
        best, place, top, _ = lax.fori_loop(begin, end, lambda i, carry: one_step(i, carry, noisy=noisy), carry)
        value = jnp.max(best)
        at = (row, split)
        token_ref[at] = jnp.min(jnp.where(best == value, place, width))
        value_ref[at] = value
        top_ref[at] = jnp.max(top)

    if least_ref is None:
        pl.when(drawn)(lambda: walk(True))
        pl.when(jnp.logical_not(drawn))(lambda: walk(False))
        return
    wanted = least_ref[row] > -jnp.inf
    pl.when(wanted & drawn)(lambda: walk(True))
    pl.when(wanted & jnp.logical_not(drawn))(lambda: walk(False))

    def leave_out():
        # The bound of such a row is what it gets.
        token_ref[row, split] = 0
        value_ref[row, split] = least_ref[row]
        top_ref[row, split] = least_ref[row]

    pl.when(jnp.logical_not(wanted))(leave_out)


def _threefry(key: tuple[Array, Array], x0: Array, x1: Array) -> tuple[Array, Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al., SC 2011), as jax.random has it."""
    k0, k1 = key
    keys = (k0, k1, k0 ^ k1 ^ jnp.uint32(PARITY))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = ((x1 << jnp.uint32(rotation)) | (x1 >> jnp.uint32(32 - rotation))) ^ x0
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x0, x1
