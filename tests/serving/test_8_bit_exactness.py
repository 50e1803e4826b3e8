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

from gdnjax import LLM, EngineConfig, build_model
from gdnjax.backend import Backend
from gdnjax.cache import Cache
from gdnjax.config import LayerKind
from gdnjax.models import engine_geometry
from tests.float64 import Reference, reference
from tests.micro import LATENTS, MICRO, SHALLOW, micro_params, shallow_params
from tests.serving.exactness import (
    CACHED,
    Exact,
    Run,
    Tally,
    build,
    build_shallow,
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
from tests.serving.test_exactness import assert_bit_equal, fresh_and_hit, go_on_from_decode, poison, preempted_in_decode

pytestmark = pytest.mark.usefixtures("quickly_compiled")

PIECES = {"max_num_batched_tokens": 64, "prefill_buckets": (64,)}
ENGINES = {
    "int8": {"kv_cache_dtype": "int8", "state_layout": "mixed", **CACHED},
    "fp8": {"kv_cache_dtype": "fp8", "state_layout": "mixed", **CACHED},
    "int8, 2 drafts": {"kv_cache_dtype": "int8", "num_speculative_tokens": 2, **PIECES, **CACHED},
    "fp8, interpreted": {"kv_cache_dtype": "fp8", "kernels": "interpret", **PIECES, **CACHED},
}
INTERLEAVINGS = {name: 2 if "interpreted" in name else 4 for name in ENGINES}
"""Of 2 to 4 requests each."""


@functools.cache
def engine(name: str) -> LLM:
    return build_shallow(**ENGINES[name])


@pytest.fixture(params=["int8", pytest.param("fp8", marks=pytest.mark.thorough)])
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

    def __init__(self, kv_cache_dtype: str, ranks: int):
        # As the engines: of several ranks there is MICRO.
        super().__init__(*((SHALLOW, shallow_params(mtp=True)) if ranks == 1 else (MICRO, micro_params(mtp=True))))
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
def stored(kv_cache_dtype: str, ranks: int = 1) -> Stored:
    return Stored(kv_cache_dtype, ranks)


def is_within(llm: LLM, run: Run) -> bool:
    error = error_of(run, stored(llm.config.kv_cache_dtype, llm.config.tensor_parallel_size).forced(run))
    print(error)
    return within_bounds(error)


@pytest.mark.short_cases("int8")
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


def test_request_is_bit_equal_beside_neighbours_in_poisoned_pools_and_cut_elsewhere(cached):
    """Its codes, its scales and all that is made of them. NaN in every scale that nobody has written."""
    engine = cached.engine
    alone = solo(cached, prompt_of(0, 150))
    cached.reset_prefix_cache()
    engine.runner.state = poison(engine.runner.state)
    neighbour = queue(cached, prompt_of(1, 50))
    request = queue(cached, alone.prompt)
    engine.step()
    assert request.num_computed == 64
    (found,) = finish(cached, request)
    assert neighbour.finished
    assert_bit_equal(found, alone)
    engine.runner.state = jax.tree.map(jnp.nan_to_num, engine.runner.state)


def test_hit_reads_the_very_codes_that_were_written(cached):
    """The whole prompt is cached. What is left of it is computed by the program that computed it the first time."""
    fresh, hit = fresh_and_hit(cached)
    for name in ("keys", "values"):
        np.testing.assert_array_equal(getattr(hit, name)[:, :128], getattr(fresh, name)[:, :128])
    assert is_within(cached, fresh)
    assert is_within(cached, hit)


def test_preempted_request_is_within_the_float64_bound(cached):
    """In mid-decode; it goes on from its own blocks."""
    assert is_within(cached, preempted_in_decode(cached))


def test_fork_of_what_decode_wrote_is_within_the_float64_bound(cached):
    """Within a block: its codes and its scales are copied."""
    assert is_within(cached, go_on_from_decode(cached))


@pytest.mark.short_cases("k_scale")
@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_float64_bound_sees_a_scale_that_is_not_copied(monkeypatch, name):
    copy = Cache.with_copied_blocks

    def forgetful(cache, source, target):
        kept = {kind: pools[name] for kind, pools in cache.pages.items()}
        cache = copy(cache, source, target)
        for kind, pool in kept.items():
            cache = cache.with_pages(kind, **{name: pool})
        return cache

    monkeypatch.setattr(Cache, "with_copied_blocks", forgetful)
    llm = build_shallow(**ENGINES["int8"])
    assert not is_within(llm, go_on_from_decode(llm))
    llm.close()


@pytest.mark.thorough
def test_four_ranks_are_within_the_float64_bound():
    """Two of them hold each kv head and its scales."""
    llm = build(kv_cache_dtype="int8", tensor_parallel_size=4)
    assert is_within(llm, solo(llm, prompt_of(0, 40)))
    llm.close()


@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "int8"])
def test_latents_in_8_bits_are_refused_before_anything_is_made(kv_cache_dtype):
    said = f"latents are not stored in 8 bits, got kv_cache_dtype='{kv_cache_dtype}'; allowed: 'auto', 'float32'"
    with pytest.raises(ValueError, match=said):
        LLM.from_model(build_model(LATENTS, "float32"), {}, kv_cache_dtype=kv_cache_dtype)


def test_8_bits_without_attention_are_refused():
    model = dataclasses.replace(SHALLOW, layer_kinds=(LayerKind.DELTA,) * 2, mtp_layers=0)
    with pytest.raises(ValueError, match="kv_cache_dtype='int8' is of no use with a model without attention layers"):
        LLM.from_model(build_model(model, "float32"), {}, kv_cache_dtype="int8")


def test_fp8_is_refused_on_devices_that_cannot_convert_it():
    model, config = (
        build_model(SHALLOW, "float32", backend=Backend("pallas", "sm_80")),
        EngineConfig(kv_cache_dtype="fp8"),
    )
    with pytest.raises(ValueError, match=r"pools of fp8 on sm_80.*sm_89 or later; allowed: int8"):
        engine_geometry(model, config)
    engine_geometry(model, dataclasses.replace(config, kv_cache_dtype="int8"))
