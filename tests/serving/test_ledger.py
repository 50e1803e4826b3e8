"""Rung 1: exact integers through the real step and scheduler equal a plain Python run of each request alone.

Every bookkeeping fault (a slot, block, window, position, length, layout bit or row that is not the request's own)
changes a token, so random schedules compare tokens and nothing else.
"""

import dataclasses
import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from gdnjax import LLM, EngineConfig, SamplingParams
from gdnjax.batch import DecodeBatch
from gdnjax.serving.tokenizer import Tokenizer
from tests import faults
from tests.ledger import KEY_DIM, LedgerModel, Oracle
from tests.make_tokenizer import write_tokenizer

EOS = 3
STOPS = (5, 7, 11, 13, 17, 19)
MAX_MODEL_LEN = 256
LENGTHS = (1, 2, 3, 5, 17, 62, 63, 64, 65, 66, 100, 127, 128, 129, 191, 192, 200, 250)

GEOMETRIES = {
    "kv, room for all, small and large buckets": EngineConfig(
        state_layout="kv", max_num_seqs=8, max_num_batched_tokens=256, decode_buckets=(1, 8), block_size=16
    ),
    "vk, one piece of 64 a step, scarce blocks, one logit row": EngineConfig(
        state_layout="vk", max_num_seqs=3, max_num_batched_tokens=64, decode_buckets=(3,), block_size=4,
        num_kv_blocks=70, max_logit_rows=1,
    ),
    "mixed, scarce slots and blocks": EngineConfig(
        state_layout="mixed", max_num_seqs=4, max_num_batched_tokens=128, prefill_buckets=(128,),
        decode_buckets=(1, 4), block_size=32, num_kv_blocks=18, max_logit_rows=2,
    ),
    "mixed, two ranks": EngineConfig(
        state_layout="mixed", max_num_seqs=4, max_num_batched_tokens=128, prefill_buckets=(128,),
        decode_buckets=(4,), block_size=16, tensor_parallel_size=2,
    ),
}  # fmt: skip
KV, VK, MIXED, TWO_RANKS = GEOMETRIES

# Beside greedy ones, which the oracle knows. All of them are compared with the engine's own run of one request.
DRAWN = (
    {"temperature": 1.0},
    {"temperature": 0.7, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 7, "top_p": 0.8},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"temperature": 0.9, "presence_penalty": -0.7, "logit_bias": {2: 3.5, 50: -9.0}},
    {"temperature": 0.0, "min_tokens": 6, "allowed_token_ids": (3, 5, 7, 9, 20, 21, 22, 60)},
)


@functools.cache
def engine_of(name: str) -> LLM:
    """Built once; every schedule uses the slots and blocks that the schedules before it left behind."""
    config = dataclasses.replace(GEOMETRIES[name], warmup=False, compilation_cache_dir="")
    model = LedgerModel(tp=config.tensor_parallel_size)
    return LLM.from_model(model, model.params(), config, max_model_len=MAX_MODEL_LEN, eos_token_ids=(EOS,))


@functools.cache
def oracle() -> Oracle:
    return Oracle(LedgerModel())


@functools.cache
def prompt_of(seed: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng([seed, length]).integers(0, LedgerModel().vocab_size, length).tolist())


@dataclasses.dataclass(frozen=True)
class Wanted:
    """One request of a schedule: `arrives` is a turn, `aborted` counts turns from then (None: never)."""

    prompt: tuple[int, int]
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    n: int
    drawn: int | None
    arrives: int
    aborted: int | None

    @property
    def params(self) -> SamplingParams:
        how = {"temperature": 0.0} if self.drawn is None else DRAWN[self.drawn]
        if how.get("min_tokens", 0) > self.max_tokens:
            how = how | {"min_tokens": self.max_tokens}
        return SamplingParams(
            max_tokens=self.max_tokens, stop_token_ids=self.stop_token_ids, ignore_eos=self.ignore_eos, n=self.n,
            seed=self.prompt[0] + (1 << 40), **how,
        )  # fmt: skip

    def expected(self, name: str, sample: int) -> list[int]:
        prompt, params = prompt_of(*self.prompt), self.params
        if self.drawn is not None:
            return solo_on_engine(name, self, sample)
        longest = min(params.max_tokens, MAX_MODEL_LEN - len(prompt))
        return oracle().solo_run(prompt, longest, self.stop_token_ids + (() if self.ignore_eos else (EOS,)))


def solo_on_engine(name: str, wanted: Wanted, sample: int) -> list[int]:
    """The request alone in the idle engine."""
    return _solo(name, dataclasses.replace(wanted, arrives=0, aborted=None, n=1), sample)


@functools.lru_cache(maxsize=4096)
def _solo(name: str, wanted: Wanted, sample: int) -> list[int]:
    llm = engine_of(name)
    assert not llm.engine.has_work
    params = dataclasses.replace(wanted.params, seed=wanted.params.seed ^ (sample << 32))
    (request,) = queue(llm, prompt_of(*wanted.prompt), params)
    drain(llm, 64)
    return request.output_token_ids


def wanted_requests(drawn: bool, max_n: int) -> st.SearchStrategy[Wanted]:
    return st.builds(
        Wanted,
        prompt=st.tuples(st.integers(0, 5), st.sampled_from(LENGTHS)),
        max_tokens=st.sampled_from((1, 2, 3, 5, 9, 17, 30)),
        stop_token_ids=st.sampled_from(((), STOPS[:2], STOPS)),
        ignore_eos=st.booleans(),
        n=st.integers(1, max_n),
        drawn=st.one_of(st.none(), st.integers(0, len(DRAWN) - 1)) if drawn else st.none(),
        arrives=st.integers(0, 15),
        aborted=st.one_of(st.none(), st.none(), st.integers(0, 15)),
    )


def queue(llm: LLM, prompt, params: SamplingParams) -> list:
    """Queues the samples of a prompt, checked as `generate` checks them, without running anything."""
    requests = llm._make_requests(list(prompt), params, 0).requests
    for request in requests:
        llm.engine.add(request)
    return requests


def drain(llm: LLM, turns: int) -> None:
    for _ in range(turns):
        if not llm.engine.has_work:
            return
        llm.engine.step()
        llm.engine.scheduler.check_integrity()
    raise AssertionError(f"work is left after {turns} turns")


def check_nothing_is_held(llm: LLM) -> None:
    allocator = llm.engine.scheduler.allocator
    assert not llm.engine.has_work
    assert allocator.num_free_slots == allocator.num_slots
    assert allocator.num_free_blocks == allocator.num_blocks
    assert allocator.num_free_logit_rows == allocator.num_logit_rows


def run_schedule(name: str, schedule: list[Wanted]) -> None:
    llm = engine_of(name)
    # Solo runs need the idle engine, so they come first.
    expected = [[wanted.expected(name, sample) for sample in range(wanted.n)] for wanted in schedule]
    groups: list[list] = [[] for _ in schedule]
    try:
        for turn in range(32):
            for i, wanted in enumerate(schedule):
                if wanted.arrives == turn:
                    groups[i] = queue(llm, prompt_of(*wanted.prompt), wanted.params)
                if wanted.aborted is not None and wanted.arrives + wanted.aborted == turn:
                    for request in groups[i]:
                        llm.engine.abort(request)
            llm.engine.step()
            llm.engine.scheduler.check_integrity()
        # Alone, one after another, would take this long; the queue may not take longer.
        drain(llm, sum(w.n * (w.max_tokens + w.prompt[1] // 64 + 3) for w in schedule))
        check_nothing_is_held(llm)
    finally:
        for request in [request for group in groups for request in group]:
            llm.engine.abort(request)
        drain(llm, 8)
    for wanted, group, samples in zip(schedule, groups, expected, strict=True):
        for request, tokens in zip(group, samples, strict=True):
            check_request(wanted, request, tokens)


def check_request(wanted: Wanted, request, expected: list[int]) -> None:
    produced = request.output_token_ids
    assert request.finished
    if request.finish_reason == "abort":
        assert wanted.aborted is not None
        assert produced == expected[: len(produced)]
        return
    assert produced == expected
    ends = wanted.stop_token_ids + (() if wanted.ignore_eos else (EOS,))
    assert request.finish_reason == ("stop" if expected[-1] in ends else "length")


def schedules(name: str, examples: int, *, drawn: bool, max_n: int = 2, longest: int = 8):
    """A property over random schedules on one engine."""

    @settings(
        max_examples=examples, derandomize=True, deadline=None, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip
    @given(st.lists(wanted_requests(drawn, max_n), min_size=1, max_size=longest))
    def check(schedule):
        run_schedule(name, schedule)

    return check


def test_random_schedules_with_room_equal_solo_runs():
    schedules(KV, 250, drawn=True)()


def test_random_schedules_with_scarce_blocks_equal_solo_runs():
    schedules(VK, 250, drawn=True)()


def test_random_schedules_in_a_mixed_pool_equal_solo_runs():
    schedules(MIXED, 400, drawn=True)()


def test_random_schedules_on_two_ranks_equal_solo_runs():
    schedules(TWO_RANKS, 100, drawn=False)()


def test_slot_of_an_aborted_request_serves_the_next_at_once():
    """What is in flight for the old owner reaches nobody, and the new owner's tokens are all its own."""
    llm = engine_of(VK)
    greedy = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    prompts = [prompt_of(seed, 17) for seed in range(4)]
    old, *others = [queue(llm, prompt, greedy)[0] for prompt in prompts[:3]]
    for _ in range(6):
        llm.engine.step()
    slot, kept = old.slot, list(old.output_token_ids)
    assert len(kept) >= 2
    assert any(old in turn.plan.decoding for turn in llm.engine._in_flight)
    llm.engine.abort(old)
    (new,) = queue(llm, prompts[3], greedy)
    llm.engine.step()
    assert new.slot == slot
    drain(llm, 40)
    assert old.output_token_ids == kept == oracle().solo_run(prompts[0], len(kept))
    for request in (*others, new):
        assert request.output_token_ids == oracle().solo_run(request.prompt_token_ids, 20)


def test_request_aborted_between_pieces_leaves_its_slot_clean():
    """The next owner of the slot starts afresh, though the old one never finished its prompt."""
    llm = engine_of(VK)
    greedy = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    (old,) = queue(llm, prompt_of(0, 200), greedy)
    llm.engine.step()
    llm.engine.step()
    assert 0 < old.num_prefilled < old.prompt_length
    slot = old.slot
    llm.engine.abort(old)
    (new,) = queue(llm, prompt_of(1, 129), greedy)
    llm.engine.step()
    assert new.slot == slot
    drain(llm, 40)
    assert old.output_token_ids == []
    assert new.output_token_ids == oracle().solo_run(prompt_of(1, 129), 9)


def test_late_found_stop_string_drops_the_tokens_after_it(tmp_path):
    """The host finds a stop string when the next token is already on its way."""
    write_tokenizer(tmp_path, vocab_size=400)
    tokenizer = Tokenizer.from_directory(tmp_path)
    model = LedgerModel(vocab_size=400)
    config = dataclasses.replace(GEOMETRIES[MIXED], warmup=False, compilation_cache_dir="")
    llm = LLM.from_model(model, model.params(), config, max_model_len=MAX_MODEL_LEN, tokenizer=tokenizer)
    tokens, stop, end = _greedy_run_with_stop(Oracle(model), tokenizer)
    prompt = prompt_of(0, 65)
    params = SamplingParams(temperature=0.0, max_tokens=len(tokens), stop=stop)
    (request,) = queue(llm, prompt, params)
    (neighbour,) = queue(llm, prompt, dataclasses.replace(params, stop=None))
    while not request.finished:
        llm.engine.step()
        llm.engine.scheduler.check_integrity()
    assert request.num_dispatched > end + 1
    assert request.output_token_ids == tokens[: end + 1]
    assert (request.finish_reason, request.stop_reason) == ("stop", stop)
    drain(llm, 60)
    assert request.output_token_ids == tokens[: end + 1]
    assert neighbour.output_token_ids == tokens
    check_nothing_is_held(llm)


def _greedy_run_with_stop(model: Oracle, tokenizer: Tokenizer) -> tuple[list[int], str, int]:
    """A greedy run, a text that one of its tokens is the first to contain, and the place of that token."""
    tokens = model.solo_run(prompt_of(0, 65), 40)
    for end in range(4, len(tokens) - 4):
        text = tokenizer.decode([tokens[end]], True)
        before = tokenizer.decode(tokens[:end], True)
        if len(text) > 1 and text.isascii() and text not in before + text[:-1]:
            return tokens, text, end
    raise AssertionError("no token of this run can serve as a stop string")


def _running(llm: LLM, prompt, max_tokens: int):
    """A request that has produced a token and goes on, with nothing in flight."""
    (request,) = queue(llm, prompt, SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True))
    while not request.prompt_dispatched or llm.engine._in_flight:
        if not request.prompt_dispatched:
            llm.engine.step()
        while llm.engine._in_flight:
            llm.engine._harvest(llm.engine._in_flight.popleft())
    assert len(request.output_token_ids) == 1
    return request


def _slots_and_blocks(state) -> list:
    """Copies of everything but the null slot and the null block."""
    rows = {"gdn": (1, {"layout": 0}), "kv": (1, {}), "slots": (0, {})}
    found = []
    for part, (axis, other) in rows.items():
        value = getattr(state, part)
        for field in dataclasses.fields(value):
            leaf = np.array(getattr(value, field.name))
            found.append(np.delete(leaf, 0, axis=other.get(field.name, axis)))
    return found


def test_step_in_flight_past_the_end_changes_nothing():
    """A request that has ended on the device may be dispatched once more before the host knows."""
    llm = engine_of(MIXED)
    request = _running(llm, prompt_of(2, 65), 2)
    batch = DecodeBatch(slot=np.array([request.slot], np.int32))
    decode = llm.engine.steps.decode(llm.engine._plain)
    llm.engine.state, last = decode(llm.engine.params, llm.engine.state, batch)
    assert bool(last.done[0])
    before = _slots_and_blocks(llm.engine.state)
    llm.engine.state, extra = decode(llm.engine.params, llm.engine.state, batch)
    after = _slots_and_blocks(llm.engine.state)
    assert (int(extra.count[0]), int(extra.tokens[0, 0]), bool(extra.done[0])) == (0, -1, False)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)
    llm.engine.abort(request)


@pytest.mark.parametrize("length", [40, MAX_MODEL_LEN - 6])
def test_writes_beyond_the_reservation_go_to_the_null_block(length):
    """A row that runs on and on, past its blocks and past max_model_len, touches nobody's block."""
    llm = engine_of(MIXED)
    engine = llm.engine
    request = _running(llm, prompt_of(1, length), 5)
    decode = engine.steps.decode(engine._plain)
    faults._replace(engine, "slots", max_length=engine.state.slots.max_length.at[request.slot].set(1 << 20))
    others = np.setdiff1d(np.arange(engine.state.kv.k.shape[1]), [0, *request.blocks])
    before = jax.tree.map(lambda leaf: np.array(leaf[:, others]), engine.state.kv)
    own = np.array(engine.state.kv.k[:, jnp.array(request.blocks)])
    for _ in range(60):
        batch = DecodeBatch(slot=np.array([request.slot], np.int32))
        engine.state, emitted = decode(engine.params, engine.state, batch)
        assert int(emitted.count[0]) == 1
    assert int(engine.state.slots.length[request.slot]) == length + 60
    after = jax.tree.map(lambda leaf: np.array(leaf[:, others]), engine.state.kv)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    # Within the reservation nothing that was there has been overwritten.
    now = np.array(engine.state.kv.k[:, jnp.array(request.blocks)]).reshape(own.shape[0], -1)
    kept = length * own.shape[3] * own.shape[4]
    np.testing.assert_array_equal(now[:, :kept], own.reshape(own.shape[0], -1)[:, :kept])
    engine.abort(request)
    check_nothing_is_held(llm)


def _tokens_under(fault) -> list[tuple[list[int], list[int]]]:
    """(produced, expected) of two requests in a mixed pool, one of which the fault befalls in mid-decode."""
    llm = engine_of(MIXED)
    greedy = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    prompts = [prompt_of(3, 65), prompt_of(4, 100)]
    victim, neighbour = [queue(llm, prompt, greedy)[0] for prompt in prompts]
    for _ in range(5):
        llm.engine.step()
    fault(llm.engine, victim, neighbour)
    drain(llm, 40)
    return [
        (request.output_token_ids, oracle().solo_run(request.prompt_token_ids, 16)) for request in (victim, neighbour)
    ]


@pytest.mark.parametrize("fault", faults.BETWEEN_TURNS, ids=lambda fault: fault.__name__)
def test_ledger_sees_the_fault(fault):
    if fault is faults.transposed_state:
        fault = functools.partial(fault, key_dim=KEY_DIM)
    produced, expected = _tokens_under(fault)[0]
    assert produced[:4] == expected[:4]
    assert produced != expected


def test_ledger_sees_nothing_without_a_fault():
    assert all(produced == expected for produced, expected in _tokens_under(lambda *_: None))


def test_ledger_sees_a_missing_reset(monkeypatch):
    llm = engine_of(MIXED)
    prompt, greedy = prompt_of(3, 65), SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    llm.generate(list(prompt), greedy, use_tqdm=False)
    monkeypatch.setattr(llm.engine, "steps", llm.engine.steps)
    faults.missing_reset(llm.engine)
    (result,) = llm.generate(list(prompt), greedy, use_tqdm=False)
    assert list(result.outputs[0].token_ids) != oracle().solo_run(prompt, 8)
