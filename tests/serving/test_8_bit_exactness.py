"""Keys and values of 8 bits in the engine: float32 rounding apart, attention reads what is stored, and nothing else.

Float64 reads the keys and values that the engine has stored, code times scale, so that the bounds are those of a
float32 cache: LOGPROB_BOUND and STATE_BOUND. What is stored is held to the float64 keys and values themselves, by half
of the quantisation step.

Codes and scales of a token depend on its own keys and values alone. They are bit-equal where those are: in one bucket.
Another bucket rounds otherwise, by a millionth, and so moves one number in some ten thousand across the middle between
two codes. That is a whole step, and whoever reads it is held to what is stored.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdnjax import LLM
from gdnjax.cache import Cache
from tests.float64 import Reference, reference
from tests.micro import MICRO, micro_params
from tests.serving.exactness import (
    CACHED,
    GREEDY,
    Exact,
    Run,
    Tally,
    build,
    error_of,
    finish,
    interleave,
    leave_idle,
    micro_arrivals,
    prompt_of,
    queue,
    solo,
    within_bounds,
)
from tests.serving.test_exactness import assert_bit_equal, go_on_from_decode, poison

pytestmark = pytest.mark.usefixtures("quickly_compiled")

EIGHT_BITS = ("int8", "fp8")
PIECES = {"max_num_batched_tokens": 64, "prefill_buckets": (64,)}
ENGINES = {
    "int8": {"kv_cache_dtype": "int8", "state_layout": "mixed", **CACHED},
    "fp8": {"kv_cache_dtype": "fp8", "state_layout": "mixed", **CACHED},
    "int8, 2 drafts": {"kv_cache_dtype": "int8", "num_speculative_tokens": 2, **PIECES, **CACHED},
    "fp8, 2 drafts, interpreted": {
        "kv_cache_dtype": "fp8",
        "num_speculative_tokens": 2,
        "kernels": "interpret",
        **PIECES,
        **CACHED,
    },
}
INTERLEAVINGS = {name: 3 if "interpreted" in name else 8 for name in ENGINES}
"""Of 2 to 4 requests each."""


@functools.cache
def engine(name: str) -> LLM:
    return build(**ENGINES[name])


@pytest.fixture(params=EIGHT_BITS)
def cached(request):
    """With a mixed pool and an empty cache."""
    llm = engine(request.param)
    llm.reset_prefix_cache()
    yield llm
    leave_idle(llm)


class Stored(Exact):
    """Float64 whose attention reads what a run has stored.

    `keys` and `values` of what it gives are the nearest to those of the run that rounding allows. int8 stores
    multiples of its scale, the head's largest magnitude over 127, so that rounding moves a number by half a scale.
    float8 has three bits behind the first, so that it moves x by |x| / 16, or by 2^-10 scales (over 448) near 0.
    """

    def __init__(self, kv_cache_dtype: str):
        super().__init__(MICRO, micro_params(mtp=True))
        self._dtype = kv_cache_dtype

    def forced(self, run: Run, positions: tuple[int, ...] = ()) -> Reference:
        stored = [(k[: run.num_fed], v[: run.num_fed]) for k, v in zip(run.keys, run.values, strict=True)]
        exact = reference(
            self.config,
            self.params,
            run.sequence,
            (*positions, run.position),
            [tuple(x.astype(np.float64) for x in pair) for pair in stored[: self.config.num_attention_layers]],
        )
        return dataclasses.replace(
            exact, keys=self._allowed(run.keys, exact.keys), values=self._allowed(run.values, exact.values)
        )

    def _allowed(self, found: np.ndarray, exact: list[np.ndarray]) -> list[np.ndarray]:
        return [self._nearest(*pair) for pair in zip(found, exact[: len(found)], strict=True)] + exact[len(found) :]

    def _nearest(self, found: np.ndarray, exact: np.ndarray) -> np.ndarray:
        top = np.abs(exact).max(-1, keepdims=True)
        half = top / 254 if self._dtype == "int8" else np.maximum(np.abs(exact) / 16, top / 448 * 2.0**-10)
        allowed = exact.copy()
        places = len(found)
        allowed[:places] = np.clip(found, (exact - half)[:places], (exact + half)[:places])
        return allowed


@functools.cache
def stored(kv_cache_dtype: str) -> Stored:
    return Stored(kv_cache_dtype)


def is_within(llm: LLM, run: Run) -> bool:
    error = error_of(run, stored(llm.config.kv_cache_dtype).forced(run))
    print(error)
    return within_bounds(error)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", ENGINES)
def test_random_interleavings_are_within_the_float64_bound(name):
    """Hits, pieces, preemption, checkpoints, drafts. Teacher-forced on what was emitted and on what was stored."""
    llm, tally = engine(name), Tally()
    speculating = llm.config.num_speculative_tokens > 0
    for seed in range(INTERLEAVINGS[name]):
        found = interleave(llm, seed, functools.partial(micro_arrivals, speculating=speculating))
        tally.add(llm, stored(llm.config.kv_cache_dtype), found)
    print(tally)
    assert tally.within_bounds(), tally
    assert tally.hits >= 3
    assert tally.preempted >= 1
    assert tally.checkpoints >= 15
