"""Rungs 2, 3 and 6 on a small float32 model: bit-equal in one bucket, bounded across them, and no fault unseen."""

import dataclasses
import functools
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdnjax import LLM, SamplingParams, full_logits, load_model
from gdnjax.assets import EMBEDDED_MODEL, model_directory
from gdnjax.state import NULL_SLOT
from tests import faults
from tests.float64 import reference
from tests.micro import MICRO, micro_model, micro_params
from tests.pools import pool_of, with_pools
from tests.serving.exactness import (
    ALL,
    CACHED,
    GREEDY,
    LOGPROB_BOUND,
    MAX_MODEL_LEN,
    STATE_BOUND,
    Error,
    Exact,
    Run,
    Tally,
    build,
    distance,
    error_of,
    exact_micro,
    finish,
    gaps,
    interleave,
    leave_idle,
    micro_arrivals,
    prompt_of,
    queue,
    solo,
    some_drawn,
    table,
    within_bounds,
)

pytestmark = pytest.mark.usefixtures("quickly_compiled")

KEY_DIM = MICRO.delta.key_head_dim


@pytest.fixture(scope="module")
def mixed_engine() -> LLM:
    return build(state_layout="mixed")


@pytest.fixture
def mixed(mixed_engine):
    yield mixed_engine
    leave_idle(mixed_engine)


@functools.cache
def caching_engine(name: str) -> LLM:
    return build(**INTERLEAVED[name])


@pytest.fixture
def cached():
    """With a mixed pool and an empty cache."""
    llm = caching_engine("mixed")
    llm.reset_prefix_cache()
    yield llm
    leave_idle(llm)


def assert_bit_equal(one: Run, other: Run) -> None:
    assert one.tokens == other.tokens
    for name in ("logprobs", "states", "windows", "keys", "values"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


# Rung 2. One prefill bucket and one decode bucket, so every run below executes the same two programs.

PROMPTS = {"in one piece": prompt_of(0, 40), "in two pieces": prompt_of(0, 150)}


@pytest.fixture(params=PROMPTS, scope="module")
def alone(request, mixed_engine) -> Run:
    return solo(mixed_engine, PROMPTS[request.param])


def test_request_is_bit_equal_to_itself(mixed, alone):
    assert_bit_equal(solo(mixed, alone.prompt), alone)


def test_request_ignores_neighbours_that_decode_beside_it(mixed, alone):
    """The others are in mid-decode when it comes, and one is prefilled while it decodes."""
    neighbours = [
        queue(mixed, prompt_of(seed, 30 * seed), dataclasses.replace(GREEDY, max_tokens=30)) for seed in (1, 2)
    ]
    for _ in range(4):
        mixed.engine.step()
    request = queue(mixed, alone.prompt)
    for _ in range(6):
        mixed.engine.step()
    queue(mixed, prompt_of(3, 100))
    (found,) = finish(mixed, request)
    assert all(len(neighbour.output_token_ids) == 30 for neighbour in neighbours)
    assert_bit_equal(found, alone)


def test_request_ignores_neighbours_in_its_prefill_step(mixed):
    """Other prompts stand before and behind it in the packed batch, so its tokens stand in other places."""
    alone = solo(mixed, PROMPTS["in one piece"])
    before, request = queue(mixed, prompt_of(1, 29)), queue(mixed, alone.prompt)
    queue(mixed, prompt_of(2, 50))
    mixed.engine.step()
    (turn,) = mixed.engine._in_flight
    assert [piece.request for piece in turn.plan.pieces][:2] == [before, request]
    assert len(turn.plan.pieces) == 3
    assert_bit_equal(*finish(mixed, request), alone)


def test_request_ignores_where_its_prompt_is_cut(mixed):
    """A neighbour takes the room for one chunk, so pieces are 64 + 86 where the request alone has 128 + 22."""
    alone = solo(mixed, PROMPTS["in two pieces"])
    queue(mixed, prompt_of(1, 50))
    request = queue(mixed, alone.prompt)
    mixed.engine.step()
    assert request.num_computed == 64
    assert_bit_equal(*finish(mixed, request), alone)


def test_request_ignores_its_slot_and_blocks(mixed, alone):
    allocator = mixed.engine.scheduler.allocator
    slots, blocks = allocator.slots.take(2), allocator.blocks.take(8)
    try:
        request = queue(mixed, alone.prompt)
        mixed.engine.step()
        assert request.slot not in slots
        assert not set(request.blocks) & set(blocks)
        (found,) = finish(mixed, request)
    finally:
        allocator.slots.give(slots)
        allocator.blocks.give(blocks)
    assert_bit_equal(found, alone)


def test_reused_slot_remembers_nothing(mixed, alone):
    """Its last owner was longer, and was aborted in mid-decode with a step in flight."""
    old = queue(mixed, prompt_of(5, 200), dataclasses.replace(GREEDY, max_tokens=50))
    for _ in range(12):
        mixed.engine.step()
    slot = old.slot
    mixed.engine.abort(old)
    request = queue(mixed, alone.prompt)
    mixed.engine.step()
    assert request.slot == slot
    assert_bit_equal(*finish(mixed, request), alone)


def test_request_ignores_poisoned_pools(mixed, alone):
    """NaN in every float and garbage in every integer of every slot, block and row that nobody holds, null ones too."""
    clean = mixed.engine.runner.state
    mixed.engine.runner.state = poison(clean)
    neighbours = [queue(mixed, prompt_of(seed, 20)) for seed in (1, 2)]
    for _ in range(3):
        mixed.engine.step()
    (found,) = finish(mixed, queue(mixed, alone.prompt))
    assert all(np.isfinite(table(neighbour.output_logprobs)).all() for neighbour in neighbours)
    assert_bit_equal(found, alone)
    # Later baselines are taken from a clean engine.
    mixed.engine.runner.state = jax.tree.map(jnp.nan_to_num, mixed.engine.runner.state)


def poison(state):
    """The state with garbage wherever a request may not look. Row 0 of the slot table and of the logit rows are
    what padding reads (length 0, no penalty): they stay."""

    def garbage(leaf, keep):
        kind = leaf.dtype.kind
        value = jnp.nan if kind == "f" else True if kind == "b" else 77
        poisoned = jnp.full_like(leaf, value)
        return poisoned.at[NULL_SLOT].set(leaf[NULL_SLOT]) if keep else poisoned

    def of(part, keep):
        return jax.tree.map(lambda leaf: jax.device_put(garbage(leaf, keep), leaf.sharding), part)

    return dataclasses.replace(
        state, cache=of(state.cache, False), slots=of(state.slots, True),
        logit_rows=of(state.logit_rows, True), token_counts=of(state.token_counts, True),
    )  # fmt: skip


# Rung 3. Other programs, so other orders of summation: bounded by float64.

GEOMETRIES = {
    "kv, one piece, decode bucket 8": {
        "max_num_batched_tokens": 256,
        "prefill_buckets": (256,),
        "max_num_seqs": 8,
        "decode_buckets": (8,),
    },
    "vk, decode bucket 1": {"state_layout": "vk", "decode_buckets": (1, 4)},
    "kv, four ranks": {"state_layout": "kv", "tensor_parallel_size": 4},
    "vk, four ranks, an expert each": {"tensor_parallel_size": 4, "enable_expert_parallel": True},
    "mixed, two ranks, cached, 3 drafts": {
        "state_layout": "mixed",
        "tensor_parallel_size": 2,
        "num_speculative_tokens": 3,
        **CACHED,
    },
}
CROSS_PROMPTS = (prompt_of(0, 3), prompt_of(0, 64), prompt_of(0, 150), prompt_of(7, 129))


@pytest.fixture(scope="module", params=GEOMETRIES)
def runs(request) -> list[Run]:
    """The prompts alone, one after another, then all at once."""
    llm = build(**GEOMETRIES[request.param])
    found = [solo(llm, prompt) for prompt in CROSS_PROMPTS]
    found += finish(llm, *[queue(llm, prompt) for prompt in CROSS_PROMPTS])
    llm.close()
    return found


@pytest.mark.short_cases("vk, four ranks, an expert each")
def test_logits_and_states_are_within_the_float64_bound(runs):
    errors = [error_of(run) for run in runs]
    print("largest:", *(f"{f.name} {max(getattr(e, f.name) for e in errors):.1e}" for f in dataclasses.fields(Error)))
    assert all(within_bounds(error) for error in errors), errors


@pytest.mark.short_cases("vk, four ranks, an expert each")
def test_near_ties_are_few(runs):
    """Where the two best tokens are closer than rounding, another bucket may draw the other: at most 2% of draws."""
    found = np.concatenate([gaps(run) for run in runs])
    assert np.sum(found < 2 * LOGPROB_BOUND) <= 0.02 * len(found)


def test_full_logits_are_within_the_float64_bound():
    tokens = np.array(prompt_of(7, 129))
    logits = np.asarray(jax.jit(functools.partial(full_logits, micro_model()))(micro_params(), jnp.asarray(tokens)))
    assert distance(logits, reference(MICRO, micro_params(), tokens).logits) <= LOGPROB_BOUND


@pytest.mark.thorough
def test_prompt_logprobs_of_pieces_are_within_the_float64_bound():
    """Each piece reports its own positions; the last of a piece has its target in the next."""
    llm = build(state_layout="kv", max_num_batched_tokens=64, prefill_buckets=(64,))
    params = dataclasses.replace(GREEDY, max_tokens=3, prompt_logprobs=ALL)
    for length in (64, 150):
        run = solo(llm, prompt_of(0, length), params)
        assert distance(run.prompt_logprobs, exact_micro().forced(run).logprobs[: length - 1]) <= LOGPROB_BOUND
        assert within_bounds(error_of(run))
    llm.close()


# Rung 3 with everything at once: cache, pieces, growth, preemption and neighbours.

INTERLEAVED = {
    "mixed": {"state_layout": "mixed", **CACHED},
    "vk, pieces of 64, 2 drafts": {
        "state_layout": "vk",
        "max_num_batched_tokens": 64,
        "prefill_buckets": (64,),
        "num_speculative_tokens": 2,
        **CACHED,
    },
    "mixed, 4 drafts": {"state_layout": "mixed", "num_speculative_tokens": 4, **CACHED},
}
NUM_INTERLEAVINGS = 8
"""Of each."""


@pytest.mark.short_cases("mixed-4")
@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(("name", "count"), [("mixed", 4), *((name, NUM_INTERLEAVINGS) for name in INTERLEAVED)])
def test_random_interleavings_are_within_the_float64_bound(name, count):
    """Teacher-forced on what was emitted, whatever was cached, cut, sent back, drafted and computed beside it. A drawn
    token is the one that its seed gives at its position, so it is that of a run without drafts.
    """
    llm, tally = caching_engine(name), Tally()
    speculating = llm.config.num_speculative_tokens > 0
    for seed in range(count):
        found = interleave(llm, seed, functools.partial(micro_arrivals, speculating=speculating))
        tally.add(llm, exact_micro(), found)
    print(tally, tally.acceptance)
    assert tally.within_bounds(), tally
    assert tally.hits >= 0.6 * count
    assert tally.preempted >= 0.2 * count
    assert tally.checkpoints >= 2.5 * count
    if speculating:
        assert tally.drawn >= count
        assert tally.beside >= 0.25 * count
        # Drawn drafts and tokens have their noise in common; greedy ones next to nothing.
        assert 0.05 < tally.acceptance < 0.35, tally


@pytest.mark.thorough
@pytest.mark.usefixtures("without_type_checks")
def test_seed_gives_the_same_tokens_with_and_without_drafts():
    """Up to the first near tie, of which there are few."""
    apart = []
    for seed in range(4):
        params = dataclasses.replace(GREEDY, temperature=float(seed > 0), seed=seed, max_tokens=30)
        prompt = prompt_of(200 + seed, 50)
        plain, speculating = (solo(caching_engine(name), prompt, params) for name in ("mixed", "mixed, 4 drafts"))
        for i, (one, other) in enumerate(zip(plain.tokens, speculating.tokens, strict=True)):
            if one != other:
                apart.append(float(gaps(plain)[i]))
                break
    print("near ties:", apart)
    assert len(apart) <= 1
    assert all(gap <= 2 * LOGPROB_BOUND for gap in apart)


# The same with the embedded model, whose head was trained, and with other heads in its place.

HEADS = {"trained": (0.0, 0.8, 1.0), "noisy": (1.0, 0.2, 0.7), "random": (np.inf, 0.0, 0.1)}
"""Noise on the projection behind the head's two norms, of its own size; then the band that acceptance has to be in."""


@pytest.fixture(scope="module")
def tiny_engine():
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 128, "prefill_buckets": (128,), "decode_buckets": (4,)}
    llm = LLM(
        EMBEDDED_MODEL,
        dtype="float32",
        state_layout="mixed",
        num_speculative_tokens=3,
        max_model_len=MAX_MODEL_LEN,
        warmup=False,
        use_tqdm=False,
        **options,
        **CACHED,
    )
    params = llm.params
    yield llm
    llm.engine.runner.params = params
    llm.close()


@functools.cache
def text_of(file: str) -> list[str]:
    """The packaged problems, as text."""
    lines = (model_directory(EMBEDDED_MODEL) / file).read_text().splitlines()
    return [f"Question: {line['question']}\nAnswer:" for line in map(json.loads, lines)]


def tiny_arrivals(rng: np.random.Generator, llm: LLM) -> list:
    """Questions, some behind one or two others. Log-probabilities are those of emitted tokens alone: others of this
    model are at -20 and below, where rounding of logits of 30 is as large as the bound.
    """
    arrivals = []
    for _ in range(3):
        before = text_of("shots.jsonl")[: int(rng.integers(3))]
        text = "\n\n".join([*before, text_of("problems.jsonl")[int(rng.integers(100))]])
        params = some_drawn(SamplingParams(max_tokens=int(rng.choice([6, 30])), logprobs=0), rng)
        arrivals.append((int(rng.integers(0, 12)), llm.tokenizer.encode(text), params, 0))
    return arrivals


@pytest.mark.thorough
@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("head", HEADS)
def test_embedded_model_is_within_the_float64_bound_whatever_its_head_drafts(tiny_engine, head):
    """Tokens, states and the head's own keys, where most drafts are accepted, some, and next to none."""
    llm, (noise, least, most) = tiny_engine, HEADS[head]
    trained = load_model(dtype="float32", mtp=True)[1]
    params = with_noise(trained, noise)
    llm.reset_prefix_cache()
    llm.engine.runner.params = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, llm.params))
    exact, tally = Exact(llm.model.config, params), Tally()
    for seed in range(2):
        tally.add(llm, exact, interleave(llm, seed, functools.partial(tiny_arrivals, llm=llm)))
    print(tally, tally.acceptance)
    assert tally.within_bounds(), tally
    assert min(tally.hits, tally.drawn, tally.preempted) >= 1
    assert tally.checkpoints >= 10
    assert least <= tally.acceptance <= most, tally


def with_noise(params: dict, noise: float) -> dict:
    """Parameters with a head whose projection is so much noise to one part of its own; infinity: noise alone."""
    weight = np.asarray(params["mtp"]["fc"]["weight"])
    other = np.random.default_rng(8).normal(size=weight.shape).astype(np.float32) * weight.std()
    mixed = other if noise == np.inf else weight + np.float32(noise) * other
    return params | {"mtp": params["mtp"] | {"fc": {"weight": mixed}}}


def go_on_from_decode(llm: LLM) -> Run:
    """The second turn of a conversation: it forks the end of the first, within a block, which decode wrote."""
    first = solo(llm, prompt_of(0, 40))
    second = queue(llm, [*first.prompt, *first.tokens, *prompt_of(1, 9)], dataclasses.replace(GREEDY, max_tokens=4))
    (run,) = finish(llm, second)
    assert second.num_cached_tokens == 55
    return run


def test_fork_of_what_decode_wrote_is_within_the_float64_bound(cached):
    assert within_bounds(error_of(go_on_from_decode(cached)))


def preempted_in_decode(llm: LLM) -> Run:
    """A request that is sent back in mid-decode, and goes on from what it had."""
    request = queue(llm, prompt_of(0, 70))
    while len(request.output_token_ids) < 8:
        llm.engine.step()
    llm.engine.preempt(request)
    (run,) = finish(llm, request)
    assert request.num_preemptions == 1
    return run


def fresh_and_hit(llm: LLM) -> tuple[Run, Run]:
    """One prompt twice. The second time all of it is cached, and its last token alone is computed."""
    fresh = solo(llm, prompt_of(0, 129))
    request = queue(llm, prompt_of(0, 129))
    (hit,) = finish(llm, request)
    assert request.num_cached_tokens == 128
    return fresh, hit


def test_preempted_request_is_within_the_float64_bound(cached):
    """In mid-decode: it goes on from its own state, copied nowhere."""
    run = preempted_in_decode(cached)
    assert len(run.tokens) == 16
    assert within_bounds(error_of(run))


def test_hit_is_within_the_float64_bound_of_fresh(cached):
    """The whole prompt is cached; what is left of it is computed from the state below its last token."""
    for run in fresh_and_hit(cached):
        assert within_bounds(error_of(run))


# Rung 6: the same faults that the ledger must see (test_ledger.py) leave the float bounds too.


def run_under(llm: LLM, fault) -> Run:
    victim = queue(llm, prompt_of(0, 65), dataclasses.replace(GREEDY, max_tokens=12))
    neighbour = queue(llm, prompt_of(1, 50), dataclasses.replace(GREEDY, max_tokens=12))
    for _ in range(4):
        llm.engine.step()
    fault(llm.engine, victim, neighbour)
    return finish(llm, victim)[0]


@pytest.mark.parametrize("fault", faults.BETWEEN_TURNS, ids=lambda fault: fault.__name__)
def test_float64_bound_sees_the_fault(mixed, fault):
    if fault is faults.transposed_state:
        fault = functools.partial(fault, key_dim=KEY_DIM)
    error = error_of(run_under(mixed, fault))
    print(error)
    assert error.logprob > 100 * LOGPROB_BOUND


def test_float64_bound_sees_nothing_without_a_fault(mixed):
    assert within_bounds(error_of(run_under(mixed, lambda *_: None)))


def test_float64_bound_sees_a_missing_reset(mixed, monkeypatch):
    solo(mixed, prompt_of(5, 65))
    monkeypatch.setattr(mixed.engine.runner, "steps", mixed.engine.runner.steps)
    faults.missing_reset(mixed.engine)
    assert error_of(solo(mixed, prompt_of(0, 65))).logprob > 100 * LOGPROB_BOUND


@pytest.mark.parametrize("fault", faults.FORKS, ids=lambda fault: fault.__name__)
def test_float64_bound_sees_the_fault_of_a_fork_in_its_states(cached, monkeypatch, fault):
    """And when the text breaks is reported: often later, or never."""
    expected = go_on_from_decode(cached).tokens
    cached.reset_prefix_cache()
    # Or a block that is not filled could hold by chance what it should.
    state = cached.engine.runner.state
    cached.engine.runner.state = with_pools(
        state, **{name: jnp.zeros_like(pool_of(state, name)) for name in ("k", "v")}
    )
    monkeypatch.setattr(cached.engine.runner, "steps", cached.engine.runner.steps)
    fault(cached.engine)
    run = go_on_from_decode(cached)
    cached.reset_prefix_cache()
    error = error_of(run)
    wrong = [i for i, (one, other) in enumerate(zip(run.tokens, expected, strict=True)) if one != other]
    print(error, "first wrong token:", wrong[0] if wrong else "none")
    assert error.state > 100 * STATE_BOUND
    assert error.logprob > 100 * LOGPROB_BOUND


@pytest.mark.parametrize("fault", faults.CHECKPOINTS, ids=lambda fault: fault.__name__)
def test_float64_bound_sees_the_fault_of_a_checkpoint(cached, monkeypatch, fault):
    """Written by a prefill step at 128, and by a decode step at 64."""
    monkeypatch.setattr(cached.engine.runner, "steps", cached.engine.runner.steps)
    fault(cached.engine)
    faults.replace_pools(cached.engine, layout=jnp.zeros_like(pool_of(cached.engine.runner.state, "layout")))
    if fault is faults.checkpoint_one_chunk_early:
        solo(cached, prompt_of(0, 129))
        run = solo(cached, prompt_of(0, 129))
    else:
        first = solo(cached, prompt_of(0, 55))
        run = solo(cached, [*first.prompt, *first.tokens[:9], *prompt_of(1, 9)])
    cached.reset_prefix_cache()
    assert error_of(run).state > 100 * STATE_BOUND


@pytest.mark.thorough
@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("fault", [None, *faults.SPECULATING], ids=lambda fault: fault and fault.__name__)
def test_float64_bound_sees_the_fault_of_speculation(monkeypatch, fault):
    """In the log-probabilities, in the head's keys, or in a checkpoint. Wrong drafts alone do no harm."""
    llm, tally = caching_engine("mixed, 4 drafts"), Tally()
    llm.reset_prefix_cache()
    monkeypatch.setattr(llm.engine.runner, "steps", llm.engine.runner.steps)
    faults.replace_pools(llm.engine, layout=jnp.zeros_like(pool_of(llm.engine.runner.state, "layout")))
    befalls = fault is not None and len(inspect.signature(fault).parameters) > 1
    if fault is not None and not befalls:
        fault(llm.engine)
    params = dataclasses.replace(GREEDY, temperature=1.0, seed=3, max_tokens=40)
    victim, neighbour = queue(llm, prompt_of(0, 65), params), queue(llm, prompt_of(1, 50), params)
    for _ in range(5):
        llm.engine.step()
    if befalls:
        fault(llm.engine, victim, neighbour)
    tally.add(llm, exact_micro(), dict(zip((victim, neighbour), finish(llm, victim, neighbour), strict=True)))
    llm.reset_prefix_cache()
    print(tally)
    seen = {
        "tokens": tally.error.logprob > 100 * LOGPROB_BOUND,
        "head": tally.error.kv > 100 * STATE_BOUND,
        "cache": tally.checkpoint > 100 * STATE_BOUND,
    }
    match faults.SPECULATING.get(fault):
        case "tokens":
            assert seen["tokens"]
        case "cache":
            assert seen["cache"]
        case _ if fault is faults.stale_rows_of_the_head:
            assert seen["head"]
        case _:
            assert tally.within_bounds(), tally
