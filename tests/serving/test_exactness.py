"""Rungs 2, 3 and 6 on a small float32 model: bit-equal in one bucket, bounded across them, and no fault unseen.

All requests report the log-probabilities of the whole vocabulary, so what is compared is the whole distribution of
every emitted token, beside the tokens and the recurrent states.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdnjax import LLM, EngineConfig, SamplingParams, full_logits
from gdnjax.state import NULL_SLOT
from tests import faults
from tests.float64 import Reference, reference
from tests.micro import MICRO, micro_model, micro_params

MAX_MODEL_LEN = 256
ALL = MICRO.vocab_size
KEY_DIM, VALUE_DIM = MICRO.delta.key_head_dim, MICRO.delta.value_head_dim

LOGPROB_BOUND = 2e-5
"""Of |log-probability - float64|. Over the runs below float32 differs from float64 by 3.4e-6 to 8.8e-6, whatever the
buckets, pieces, layouts, ranks and hits: the bound is twice that. The smallest fault of tests/faults.py moves a
log-probability by 0.06, 3000 times the bound."""

STATE_BOUND = 1e-5
"""Of max|state - float64| / max|state| of a layer; float32 differs by 1.1e-6 to 2.5e-6 in the runs below."""

CACHED = {
    "enable_prefix_caching": True,
    "num_kv_blocks": 28,
    "num_checkpoint_slots": 6,
    "state_checkpoint_interval": 32,
}
"""Scarce: blocks for two or three requests of the runs below, so that some are preempted."""

GREEDY = SamplingParams(temperature=0.0, max_tokens=16, logprobs=ALL)


def build(**config) -> LLM:
    """An engine of one prefill and one decode bucket, without the prefix cache, unless told otherwise. Compiles at
    first use."""
    config = {
        "enable_prefix_caching": False,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 128,
        "prefill_buckets": (128,),
        "decode_buckets": (4,),
    } | config
    config = EngineConfig(max_logprobs=ALL, warmup=False, compilation_cache_dir="", block_size=16, **config)
    tp = config.tensor_parallel_size
    return LLM.from_model(micro_model(tp), micro_params(tp), config, max_model_len=MAX_MODEL_LEN)


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


def leave_idle(llm: LLM) -> None:
    """Whatever happened to the test."""
    engine = llm.engine
    for request in [*engine.scheduler.running, *engine.scheduler.waiting]:
        engine.abort(request)
    while engine.has_work:
        engine.step()


@functools.cache
def prompt_of(seed: int, length: int) -> list[int]:
    return np.random.default_rng([seed, length]).integers(0, MICRO.vocab_size, length).tolist()


@dataclasses.dataclass(frozen=True)
class Run:
    """What a request left behind. Axes: logprobs [tokens, V], prompt_logprobs [prompt - 1, V] or None,
    states [L, hv, K, V], windows [L, w, x] (channels as the ranks hold them), keys and values [layers, tokens, kh, hd].
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: np.ndarray
    prompt_logprobs: np.ndarray | None
    states: np.ndarray
    windows: np.ndarray
    keys: np.ndarray
    values: np.ndarray


def queue(llm: LLM, prompt: list[int], params: SamplingParams = GREEDY, priority: int = 0):
    (request,) = llm.submit(list(prompt), params, priority=priority).requests
    return request


def finish(llm: LLM, *requests) -> list[Run]:
    """Runs the engine until it is idle, and takes what each request left in its slot and blocks."""
    held, found = {}, {}
    for _ in range(500):
        held |= {request: (request.slot, list(request.blocks)) for request in requests if request.slot}
        llm.engine.step()
        for request in requests:
            # What is in flight was dispatched before anybody else could be given its slot or blocks.
            if request.finished and request not in found:
                found[request] = observe(llm, request, *held[request])
            elif request.slot:
                held[request] = request.slot, list(request.blocks)
        if not llm.engine.has_work:
            return [found[request] for request in requests]
    raise AssertionError("work is left after 500 turns")


def observe(llm: LLM, request, slot: int, blocks: list[int]) -> Run:
    gdn, kv = jax.device_get((llm.engine.state.gdn, llm.engine.state.kv))
    flat = gdn.ssm[:, slot]
    if gdn.layout[slot]:
        flat = flat.reshape(*flat.shape[:2], VALUE_DIM, KEY_DIM).swapaxes(2, 3)
    fed = request.prompt_length + len(request.output_token_ids) - 1
    keys, values = (pool[:, blocks].reshape(pool.shape[0], -1, *pool.shape[3:])[:, :fed] for pool in (kv.k, kv.v))
    prompt_logprobs = request.prompt_logprobs and _table(request.prompt_logprobs)
    return Run(
        prompt=request.prompt_token_ids,
        tokens=list(request.output_token_ids),
        logprobs=_table(request.output_logprobs),
        prompt_logprobs=prompt_logprobs if request.prompt_logprobs else None,
        states=flat.reshape(*flat.shape[:2], KEY_DIM, VALUE_DIM),
        windows=gdn.conv[:, slot],
        keys=keys,
        values=values,
    )


def _table(entries: list[dict]) -> np.ndarray:
    return np.array([[entry[token].logprob for token in range(ALL)] for entry in entries], np.float32)


def solo(llm: LLM, prompt: list[int], params: SamplingParams = GREEDY) -> Run:
    return finish(llm, queue(llm, prompt, params))[0]


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
    clean = mixed.engine.state
    mixed.engine.state = poison(clean)
    neighbours = [queue(mixed, prompt_of(seed, 20)) for seed in (1, 2)]
    for _ in range(3):
        mixed.engine.step()
    (found,) = finish(mixed, queue(mixed, alone.prompt))
    assert all(np.isfinite(_table(neighbour.output_logprobs)).all() for neighbour in neighbours)
    assert_bit_equal(found, alone)
    # Later baselines are taken from a clean engine.
    mixed.engine.state = jax.tree.map(jnp.nan_to_num, mixed.engine.state)


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
        state, gdn=of(state.gdn, False), kv=of(state.kv, False), slots=of(state.slots, True),
        logit_rows=of(state.logit_rows, True),
    )  # fmt: skip


# Rung 3. Other programs, so other orders of summation: bounded by float64.

GEOMETRIES = {
    "kv, one piece": {"max_num_batched_tokens": 256, "prefill_buckets": (256,)},
    "kv, pieces of 64": {"max_num_batched_tokens": 64, "prefill_buckets": (64,)},
    "vk, decode bucket 1": {"state_layout": "vk", "decode_buckets": (1, 4)},
    "mixed, decode bucket 8": {"state_layout": "mixed", "max_num_seqs": 8, "decode_buckets": (8,)},
    "kv, four ranks": {"state_layout": "kv", "tensor_parallel_size": 4},
    "mixed, two ranks, cached": {"state_layout": "mixed", "tensor_parallel_size": 2, **CACHED},
}
CROSS_PROMPTS = (prompt_of(0, 3), prompt_of(0, 64), prompt_of(0, 150), prompt_of(7, 129))


@functools.cache
def _reference_of(tokens: tuple[int, ...]) -> Reference:
    return reference(MICRO, micro_params(), tokens)


def forced(run: Run) -> Reference:
    """Float64, teacher-forced on what the run was fed."""
    return _reference_of((*run.prompt, *run.tokens[:-1]))


@dataclasses.dataclass(frozen=True)
class Error:
    """How far a run is from float64. `token` is how far a token's log-probability is below the best one's."""

    logprob: float
    state: float
    window: float
    token: float


def error_of(run: Run) -> Error:
    exact = forced(run)
    logprobs = exact.logprobs[len(run.prompt) - 1 :]
    drawn = np.take_along_axis(logprobs, np.array(run.tokens)[:, None], axis=1)[:, 0]
    return Error(
        logprob=_distance(run.logprobs, logprobs),
        state=max(_relative(a, b) for a, b in zip(run.states, exact.states, strict=True)),
        window=max(_relative(a, b) for a, b in zip(run.windows, exact.windows, strict=True)),
        token=float((logprobs.max(-1) - drawn).max()),
    )


def _distance(found: np.ndarray, exact: np.ndarray) -> float:
    """The largest difference; infinite where there is a NaN, which no comparison would notice."""
    difference = float(np.abs(found - exact).max())
    return difference if np.isfinite(difference) else np.inf


def _relative(found: np.ndarray, exact: np.ndarray) -> float:
    return _distance(found, exact) / float(np.abs(exact).max())


def within_bounds(error: Error) -> bool:
    return (
        error.logprob <= LOGPROB_BOUND
        and error.state <= STATE_BOUND
        and error.window <= STATE_BOUND
        and error.token <= 2 * LOGPROB_BOUND
    )


def in_channel_order(run: Run, tp: int) -> Run:
    """The windows with channels as one rank holds them: [q | k | v], not rank by rank."""
    delta = MICRO.delta
    sizes = np.array([delta.key_dim, delta.key_dim, delta.value_dim]) // tp
    ranks = [np.split(part, np.cumsum(sizes)[:-1], axis=-1) for part in np.split(run.windows, tp, axis=-1)]
    windows = np.concatenate([rank[i] for i in range(3) for rank in ranks], axis=-1)
    return dataclasses.replace(run, windows=windows)


@pytest.fixture(scope="module", params=GEOMETRIES)
def runs(request) -> list[Run]:
    """The prompts alone, one after another, then all at once."""
    llm = build(**GEOMETRIES[request.param])
    tp = llm.config.tensor_parallel_size
    found = [solo(llm, prompt) for prompt in CROSS_PROMPTS]
    found += finish(llm, *[queue(llm, prompt) for prompt in CROSS_PROMPTS])
    llm.close()
    return [in_channel_order(run, tp) for run in found]


def test_logits_and_states_are_within_the_float64_bound(runs):
    errors = [error_of(run) for run in runs]
    print("largest:", *(f"{f.name} {max(getattr(e, f.name) for e in errors):.1e}" for f in dataclasses.fields(Error)))
    assert all(within_bounds(error) for error in errors), errors


def test_near_ties_are_few(runs):
    """Where the two best tokens are closer than rounding, another bucket may draw the other: at most 2% of draws."""
    gaps = np.concatenate([_gaps(forced(run).logits[len(run.prompt) - 1 :]) for run in runs])
    assert np.sum(gaps < 2 * LOGPROB_BOUND) <= 0.02 * len(gaps)


def _gaps(logits: np.ndarray) -> np.ndarray:
    second, best = np.partition(logits, -2, axis=-1)[:, -2:].T
    return best - second


def test_full_logits_are_within_the_float64_bound():
    tokens = np.array(prompt_of(7, 129))
    logits = np.asarray(jax.jit(functools.partial(full_logits, micro_model()))(micro_params(), jnp.asarray(tokens)))
    assert _distance(logits, reference(MICRO, micro_params(), tokens).logits) <= LOGPROB_BOUND


def test_prompt_logprobs_of_pieces_are_within_the_float64_bound():
    """Each piece reports its own positions; the last of a piece has its target in the next."""
    llm = build(max_num_batched_tokens=64, prefill_buckets=(64,))
    params = dataclasses.replace(GREEDY, max_tokens=1, prompt_logprobs=ALL)
    for length in (64, 150):
        run = solo(llm, prompt_of(0, length), params)
        assert _distance(run.prompt_logprobs, forced(run).logprobs[: length - 1]) <= LOGPROB_BOUND
    llm.close()


# Rung 3 with everything at once: cache, pieces, growth, preemption and neighbours.

INTERLEAVED = {
    "kv": {"state_layout": "kv", **CACHED},
    "vk, pieces of 64": {"state_layout": "vk", "max_num_batched_tokens": 64, "prefill_buckets": (64,), **CACHED},
    "mixed": {"state_layout": "mixed", **CACHED},
}
NUM_INTERLEAVINGS = 36
"""Of each layout."""


@dataclasses.dataclass
class Tally:
    """What happened in the interleavings of one layout, and how far from float64 they came."""

    error: Error = Error(0.0, 0.0, 0.0, 0.0)
    hits: int = 0
    preempted: int = 0
    tokens: int = 0
    near_ties: int = 0

    def add(self, request, run: Run) -> None:
        error = error_of(run)
        names = [field.name for field in dataclasses.fields(Error)]
        self.error = Error(*[max(getattr(self.error, name), getattr(error, name)) for name in names])
        self.hits += request.num_cached_tokens > 0
        self.preempted += request.num_preemptions
        self.tokens += len(run.tokens)
        self.near_ties += int(np.sum(_gaps(forced(run).logits[len(run.prompt) - 1 :]) < 2 * LOGPROB_BOUND))


def interleave(llm: LLM, seed: int) -> list[tuple]:
    """A few requests that begin alike, at random times, some of them sent back once. Each with what it left."""
    rng = np.random.default_rng([99, seed])
    requests = []
    for _ in range(rng.integers(2, 5)):
        shared, own = rng.choice([0, 16, 40, 64, 100]), rng.integers(1, 60)
        prompt = prompt_of(int(rng.integers(2)), 100)[:shared] + prompt_of(50 + int(rng.integers(99)), int(own))
        params = dataclasses.replace(GREEDY, max_tokens=int(rng.choice([1, 6, 20, 40])))
        requests.append((int(rng.integers(0, 12)), prompt, params, int(rng.choice([0, 0, -1, 1]))))
    started, held, found = [], {}, {}
    for turn in range(600):
        started += [queue(llm, *what) for when, *what in requests if when == turn]
        held |= {request: (request.slot, list(request.blocks)) for request in started if request.slot}
        if rng.random() < 0.03 and llm.engine.scheduler.running:
            llm.engine.preempt(llm.engine.scheduler.running[-1])
        llm.engine.step()
        llm.engine.scheduler.check_integrity()
        for request in started:
            if request.finished and request not in found:
                found[request] = observe(llm, request, *held[request])
            elif request.slot:
                held[request] = request.slot, list(request.blocks)
        if turn > 12 and not llm.engine.has_work:
            assert len(found) == len(requests)
            return list(found.items())
    raise AssertionError("work is left after 600 turns")


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", INTERLEAVED)
def test_random_interleavings_are_within_the_float64_bound(name):
    """Teacher-forced on what was emitted, whatever was cached, cut, sent back and computed beside it."""
    llm, tally = caching_engine(name), Tally()
    for seed in range(NUM_INTERLEAVINGS):
        for request, run in interleave(llm, seed):
            tally.add(request, run)
    print(tally)
    assert within_bounds(tally.error), tally
    assert tally.near_ties <= 0.02 * tally.tokens
    assert tally.hits >= 20
    assert tally.preempted >= 5


def go_on_from_decode(llm: LLM) -> Run:
    """The second turn of a conversation: it forks the end of the first, within a block, which decode wrote."""
    first = solo(llm, prompt_of(0, 40))
    second = queue(llm, [*first.prompt, *first.tokens, *prompt_of(1, 9)], dataclasses.replace(GREEDY, max_tokens=4))
    (run,) = finish(llm, second)
    assert second.num_cached_tokens == 55
    return run


def test_fork_of_what_decode_wrote_is_within_the_float64_bound(cached):
    assert within_bounds(error_of(go_on_from_decode(cached)))


def test_preempted_request_is_within_the_float64_bound(cached):
    """In mid-decode: it goes on from its own state, copied nowhere."""
    request = queue(cached, prompt_of(0, 70))
    while len(request.output_token_ids) < 8:
        cached.engine.step()
    cached.engine.preempt(request)
    (run,) = finish(cached, request)
    assert request.num_preemptions == 1
    assert len(run.tokens) == 16
    assert within_bounds(error_of(run))


def test_hit_is_within_the_float64_bound_of_fresh(cached):
    """The whole prompt is cached; what is left of it is computed from the state below its last token."""
    fresh = solo(cached, prompt_of(0, 129))
    request = queue(cached, prompt_of(0, 129))
    (hit,) = finish(cached, request)
    assert request.num_cached_tokens == 128
    for run in (fresh, hit):
        assert within_bounds(error_of(run))


# The invariant mode: one prefill bucket, one decode bucket, one sampler, one grid.


@pytest.mark.usefixtures("without_type_checks")
def test_invariant_mode_gives_the_same_bits_whatever_the_load():
    """Tokens and log-probabilities, alone with nothing cached, and among others with and without a hit."""
    llm = build(state_layout="mixed", batch_invariant=True, **(CACHED | {"num_kv_blocks": 64}))
    shared = prompt_of(0, 130)
    prompts = [[*shared, *prompt_of(1, 20)], [*shared, *prompt_of(2, 70)], shared[:100], prompt_of(3, 64)]
    params = [dataclasses.replace(GREEDY, max_tokens=12), dataclasses.replace(GREEDY, temperature=1.0, seed=5)]
    wanted = [(prompt, params[i % 2]) for i, prompt in enumerate(prompts)]
    alone = []
    for prompt, how in wanted:
        llm.reset_prefix_cache()
        alone.append(solo(llm, prompt, how))
    llm.reset_prefix_cache()
    hits = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        requests = []
        for i in rng.permutation(len(wanted)):
            requests.append((i, queue(llm, *wanted[i])))
            queue(llm, prompt_of(100 + seed, int(rng.integers(1, 120))), params[seed % 2])
            for _ in range(rng.integers(0, 6)):
                llm.engine.step()
        while llm.engine.has_work:
            llm.engine.step()
        for i, request in requests:
            assert request.output_token_ids == alone[i].tokens
            np.testing.assert_array_equal(_table(request.output_logprobs), alone[i].logprobs)
            hits += request.num_cached_tokens > 0
    llm.close()
    assert hits >= 8


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
    monkeypatch.setattr(mixed.engine, "steps", mixed.engine.steps)
    faults.missing_reset(mixed.engine)
    assert error_of(solo(mixed, prompt_of(0, 65))).logprob > 100 * LOGPROB_BOUND


@pytest.mark.parametrize("fault", faults.FORKS, ids=lambda fault: fault.__name__)
def test_float64_bound_sees_the_fault_of_a_fork_in_its_states(cached, monkeypatch, fault):
    """And when the text breaks is reported: often later, or never."""
    expected = go_on_from_decode(cached).tokens
    cached.reset_prefix_cache()
    monkeypatch.setattr(cached.engine, "steps", cached.engine.steps)
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
    monkeypatch.setattr(cached.engine, "steps", cached.engine.steps)
    fault(cached.engine)
    faults._replace(cached.engine, "gdn", layout=jnp.zeros_like(cached.engine.state.gdn.layout))
    if fault is faults.checkpoint_one_chunk_early:
        solo(cached, prompt_of(0, 129))
        run = solo(cached, prompt_of(0, 129))
    else:
        first = solo(cached, prompt_of(0, 55))
        run = solo(cached, [*first.prompt, *first.tokens[:9], *prompt_of(1, 9)])
    cached.reset_prefix_cache()
    assert error_of(run).state > 100 * STATE_BOUND
