"""Rung 1 with drafts, by name: exact tokens, and how many drafts every step keeps; and the faults that must be seen."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdnjax import LLM, EngineConfig, SamplingParams, step
from gdnjax.cache import LAYOUT_KV
from gdnjax.serving.scheduler import NOTHING_ALLOWED
from gdnjax.serving.tokenizer import Tokenizer
from tests import faults
from tests.ledger import LedgerModel, Oracle
from tests.make_tokenizer import write_tokenizer
from tests.pools import pool_of
from tests.serving.ledgers import (
    ALONE,
    DRAWN,
    GEOMETRIES,
    INVARIANT,
    KV,
    KV_DRAFTS,
    LARGE_BLOCKS,
    MAX_MODEL_LEN,
    MIXED_DRAFTS,
    NO_CACHE,
    VK_DRAFTS,
    Watch,
    check_cache,
    check_greedy,
    check_nothing_is_held,
    drain,
    fresh,
    generate,
    go_on_from_decode,
    greedy,
    greedy_run_with_stop,
    in_flight_plan,
    oracle_of,
    prompt_of,
    queue,
    start,
)

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.fixture(
    params=[
        pytest.param(KV_DRAFTS, marks=pytest.mark.thorough),
        pytest.param(VK_DRAFTS, marks=pytest.mark.thorough),
        MIXED_DRAFTS,
    ]
)
def llm(request) -> LLM:
    """Of each layout, with an empty cache."""
    return fresh(request.param)


def pattern_of(llm: LLM, request) -> list[tuple[int, int]]:
    """What the steps of a request have to be that has blocks enough and is not interrupted."""
    most = llm.config.num_speculative_tokens if request.params.speculate else 0
    longest = request.max_length - request.prompt_length
    return oracle_of(llm).pattern(request.prompt_token_ids, longest, most, request.stop_token_ids)


def steps_of(watch: Watch, request) -> list[tuple[int, int]]:
    return [(step.drafts, step.count) for step in watch.steps.get(request, [])]


@pytest.mark.short_cases(*(f"{length}-{MIXED_DRAFTS}" for length in (1, 15, 64, 130)))
@pytest.mark.parametrize("name", [KV_DRAFTS, VK_DRAFTS, MIXED_DRAFTS, LARGE_BLOCKS, NO_CACHE, INVARIANT])
@pytest.mark.parametrize("length", [1, 15, 64, 130])
def test_steps_of_a_request_alone_are_those_of_the_oracle(name, length):
    llm = fresh(name)
    with Watch(llm) as watch:
        request = generate(llm, prompt_of(0, length), 40)
    assert steps_of(watch, request) == pattern_of(llm, request)
    watch.check_counts(request)
    assert 0 < request.num_accepted_tokens < request.num_draft_tokens


@pytest.mark.thorough
def test_steps_ignore_neighbours_and_who_opts_out():
    """Blocks are plenty: each request's drafts are kept and rejected as in a run of its own."""
    llm = fresh(KV_DRAFTS)
    with Watch(llm) as watch:
        params = [greedy(5 + 7 * i, speculate=i % 3 != 2) for i in range(7)]
        requests = [queue(llm, prompt_of(i, 10 + 17 * i), one)[0] for i, one in enumerate(params)]
        drain(llm)
    for request in requests:
        check_greedy(llm, request)
        assert steps_of(watch, request) == pattern_of(llm, request)
        watch.check_counts(request)
        assert request.params.speculate or request.num_draft_tokens == 0
    check_cache(llm)


def test_resumed_request_drafts_as_if_uninterrupted(llm):
    """Its pending rows are folded, not computed again, and its drafts are those of the tokens that it has."""
    with Watch(llm):
        request = start(llm, prompt_of(0, 40), 60, 9)
        llm.engine.preempt(request)
        assert len(llm.engine.scheduler._seals) == 1
        llm.engine.step()
        (admission,) = in_flight_plan(llm).admitted
        assert admission.position == request.num_tokens - 1
        drain(llm)
    check_greedy(llm, request)
    assert check_cache(llm) > 0


@pytest.mark.short_cases
@pytest.mark.parametrize("max_tokens", range(1, 9))
def test_max_tokens_ends_a_request_within_a_run_of_drafts(llm, max_tokens):
    """Nothing is fed behind the last token, so no draft is verified that could not be kept."""
    with Watch(llm) as watch:
        requests = [queue(llm, prompt_of(seed, 33), greedy(max_tokens))[0] for seed in range(6)]
        drain(llm)
    for request in requests:
        check_greedy(llm, request)
        assert request.finish_reason == "length"
        assert steps_of(watch, request) == pattern_of(llm, request)
        assert sum(count for _, count in steps_of(watch, request)) == max_tokens - 1
    check_cache(llm)


def test_no_query_comes_to_the_end_of_the_context(monkeypatch):
    """Where the context is as long as the block table, there is nothing behind it to read keys from. Only what may be
    verified is drafted: nothing by a request that ends in that step.
    """
    made, positions, drafting = step.decode_context, [], []

    def seen(position, length):
        positions.append(int(position.max()))
        # Behind the last token there is: what is fed is a draft.
        drafting.extend((int(length[row]), int(position[row, 0])) for row in np.flatnonzero(position[:, 0] > length))

    def recorded(pools, slot, first, valid):
        context = made(pools, slot, first, valid)
        jax.debug.callback(seen, context.tiles.position, pools.slots.length[slot])
        return context

    monkeypatch.setattr(step, "decode_context", recorded)
    model, end = LedgerModel(mtp=True), 64
    config = EngineConfig(
        max_num_seqs=2, max_num_batched_tokens=64, prefill_buckets=(64,), decode_buckets=(2,), block_size=16,
        num_kv_blocks=10, enable_prefix_caching=False, num_speculative_tokens=3, warmup=False,
    )  # fmt: skip
    with LLM.from_model(model, model.params(), config, max_model_len=end) as llm:
        for seed in range(3):
            with Watch(llm) as watch:
                (request,) = queue(llm, prompt_of(seed, 50 + seed), greedy(14 - seed))
                (short,) = queue(llm, prompt_of(seed, 9), greedy(1))
                drain(llm)
            assert request.num_tokens == end
            assert steps_of(watch, request) == pattern_of(llm, request)
            check_greedy(llm, short)
    jax.effects_barrier()
    # The head gets the last token, too, for its key; behind that there is nothing. The last draft that is fed is the
    # one before the last that is verified.
    assert max(positions) == end - 1
    assert max(position for _, position in drafting) == end - 3
    # The one token of these is their last.
    assert not {length for length, _ in drafting} & {9, end - 1}


def _accepted_run(model: Oracle, num_drafts: int, length: int = 3) -> tuple[tuple[int, ...], list[int], int]:
    """A prompt, its greedy output, and the place where a step begins that emits `length` tokens or more, the second of
    which stands nowhere before.
    """
    for seed in range(100):
        prompt = prompt_of(seed, 65)
        tokens, place = model.solo_run(prompt, 40), 1
        for _, count in model.pattern(prompt, 40, num_drafts):
            if count >= length and tokens[place + 1] not in tokens[: place + 1] and place > 4:
                return prompt, tokens, place
            place += count
    raise AssertionError("no run of drafts is long enough")


def test_stop_token_among_accepted_drafts_ends_the_request_there(llm):
    """What was right behind it is neither emitted nor kept in the cache."""
    prompt, tokens, place = _accepted_run(oracle_of(llm), llm.config.num_speculative_tokens)
    with Watch(llm) as watch:
        (request,) = queue(llm, prompt, greedy(40, stop_token_ids=(tokens[place + 1],)))
        drain(llm)
    assert request.output_token_ids == tokens[: place + 2]
    assert (request.finish_reason, request.stop_reason) == ("stop", tokens[place + 1])
    # The stop token is the draft that was tested last.
    assert steps_of(watch, request)[-1] == (1, 2)
    watch.check_counts(request)
    check_cache(llm)
    # The stop token was never fed: the state stands before it.
    again = generate(llm, [*prompt, *tokens[: place + 1], *prompt_of(1, 5)], 5)
    assert again.num_cached_tokens == len(prompt) + place + 1


@pytest.mark.short_cases(MIXED_DRAFTS)
@pytest.mark.parametrize("name", [KV, KV_DRAFTS, MIXED_DRAFTS])
def test_request_whose_masks_leave_no_token_ends_there(name):
    """In the middle of a run of drafts. Nothing that was forbidden comes out, and what is cached is right."""
    llm = fresh(name)
    prompt, tokens, place = next(
        (prompt, tokens, place)
        for prompt in (prompt_of(seed, 65) for seed in range(100))
        for tokens in [oracle_of(llm).solo_run(prompt, 9)]
        for place in range(3, 8)
        if tokens[place] not in tokens[:place]
    )
    (request,) = queue(llm, prompt, greedy(40, allowed_token_ids=tokens[: place + 1]))
    # The first of them as bad words of the tokenizer would be; these models have no texts.
    request.bad_words = [[tokens[place], token] for token in set(tokens[: place + 1])]
    (neighbour,) = queue(llm, prompt_of(1, 20), greedy(12, logit_bias={0: 0.0}))
    drain(llm)
    assert request.output_token_ids == tokens[: place + 1]
    assert (request.finish_reason, request.stop_reason) == ("error", NOTHING_ALLOWED)
    check_greedy(llm, neighbour)
    check_cache(llm)
    again = generate(llm, [*prompt, *tokens[: place + 1], *prompt_of(1, 5)], 5)
    assert again.num_cached_tokens == len(prompt) + place + 1


@pytest.fixture(scope="module")
def speaking(tmp_path_factory) -> LLM:
    """Drafts, and text."""
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory, vocab_size=400)
    model = LedgerModel(vocab_size=400, mtp=True)
    config = dataclasses.replace(GEOMETRIES[MIXED_DRAFTS], warmup=False)
    tokenizer = Tokenizer.from_directory(directory)
    return LLM.from_model(model, model.params(), config, max_model_len=MAX_MODEL_LEN, tokenizer=tokenizer)


@pytest.mark.thorough
def test_stop_string_among_accepted_drafts_drops_the_tokens_behind_it(speaking):
    """The host finds it when drafts behind it have been accepted, and another step is on its way."""
    llm, model = speaking, Oracle(speaking.engine.runner.model)
    most = llm.config.num_speculative_tokens
    prompt, tokens, stop, end = greedy_run_with_stop(model, llm.get_tokenizer(), most)
    params = SamplingParams(temperature=0.0, max_tokens=len(tokens), stop=stop, logprobs=1)
    (request,) = queue(llm, prompt, params)
    (neighbour,) = queue(llm, prompt, dataclasses.replace(params, stop=None))
    while not request.finished:
        llm.engine.step()
        llm.engine.scheduler.check_integrity()
    assert any(request in turn.plan.decoding for turn in llm.engine._in_flight)
    assert request.output_token_ids == tokens[: end + 1]
    assert (request.finish_reason, request.stop_reason) == ("stop", stop)
    drain(llm, 80)
    assert request.output_token_ids == tokens[: end + 1]
    assert len(request.output_logprobs) == end + 1
    assert neighbour.output_token_ids == tokens
    # What was cached stops at the cut, or is what the neighbour has computed, too.
    found = queue(llm, [*prompt, *tokens[: end + 1], *prompt_of(1, 9)], greedy(5))[0]
    drain(llm)
    assert found.num_cached_tokens > 0
    assert found.output_token_ids == model.solo_run(found.prompt_token_ids, 5)
    check_nothing_is_held(llm)


def test_request_aborted_with_a_step_in_flight_leaves_what_is_known(llm):
    """The step that runs meanwhile may accept anything: what goes to the cache does not depend on it."""
    for seed in range(8):
        with Watch(llm):
            request = start(llm, prompt_of(seed, 40 + seed), 60, 8 + seed)
            slot, kept = request.slot, list(request.output_token_ids)
            assert any(request in turn.plan.decoding for turn in llm.engine._in_flight)
            llm.engine.abort(request)
            (other,) = queue(llm, prompt_of(50 + seed, 30), greedy(12))
            drain(llm)
        assert request.output_token_ids == kept
        assert slot
        check_greedy(llm, request)
        check_greedy(llm, other)
        check_cache(llm)


@pytest.mark.thorough
@pytest.mark.parametrize("full", [False, True])
def test_log_probabilities_are_one_for_each_token(llm, full):
    """As many as there are tokens, and those that a run without drafts gives, to the bit."""
    params = greedy(30, logprobs=2, **({"top_k": 5} if full else {}))
    found = []
    for engine in (llm, fresh(ALONE)):
        (request,) = queue(engine, prompt_of(4, 50), params)
        drain(engine)
        check_greedy(engine, request)
        assert len(request.output_logprobs) == 30
        for token, entries in zip(request.output_token_ids, request.output_logprobs, strict=True):
            assert token in entries
            assert entries[token].rank == 1
        found.append(request.output_logprobs)
    assert found[0] == found[1]


@pytest.mark.short_cases(*(f"{drawn}-{MIXED_DRAFTS}" for drawn in (1, 2, 4)))
@pytest.mark.parametrize("name", [KV_DRAFTS, MIXED_DRAFTS, INVARIANT])
@pytest.mark.parametrize("drawn", range(len(DRAWN)))
def test_drawn_tokens_do_not_depend_on_drafts(name, drawn):
    """Drafts and target share their noise, so a seed gives the tokens of a run that does not speculate."""
    params = SamplingParams(max_tokens=40, ignore_eos=True, seed=11, **DRAWN[drawn])
    produced, prompt = [], prompt_of(3, 40)
    for engine, speculate in ((fresh(name), True), (fresh(name), False), (fresh(ALONE), True)):
        with Watch(engine):
            (request,) = queue(engine, prompt, dataclasses.replace(params, speculate=speculate))
            queue(engine, prompt_of(2, 70), greedy(30))
            drain(engine)
        produced.append(request.output_token_ids)
        assert (request.num_draft_tokens > 0) == (speculate and engine.config.num_speculative_tokens > 0)
    assert len(produced[0]) == 40
    assert produced[0] == produced[1] == produced[2]


def test_number_of_drafts_may_change_from_step_to_step(llm, monkeypatch):
    """As an engine does that measures whether drafting pays."""
    numbers = np.random.default_rng(1)
    most = llm.config.num_speculative_tokens
    monkeypatch.setattr(llm.engine, "_choose_drafts", lambda: int(numbers.choice([0, most])))
    with Watch(llm) as watch:
        requests = [queue(llm, prompt_of(seed, 40), greedy(60))[0] for seed in range(3)]
        drain(llm)
    for request in requests:
        check_greedy(llm, request)
        watch.check_counts(request)
        assert {step.drafts for step in watch.steps[request]} >= {0, most}
    check_cache(llm)


def test_checkpoints_of_decode_steps_stand_at_exact_positions(llm):
    """At every multiple of the interval, however many tokens the steps over it have accepted."""
    interval = llm.config.checkpoint_interval
    with Watch(llm) as watch:
        for seed in range(6):
            llm.reset_prefix_cache()
            request = generate(llm, prompt_of(seed, 30), 150)
    assert watch.num_inside > 0
    cache = llm.engine.scheduler.cache
    found = sorted(node.end for node in (cache._untried | cache._proven).values())
    passed = [end for end in range(0, request.num_tokens, interval) if end > 30]
    if llm.config.num_checkpoint_slots > len(passed) + 2:
        assert set(passed) <= set(found)
    assert set(found) & set(passed)
    assert check_cache(llm) >= len(found)


@pytest.mark.short_cases(MIXED_DRAFTS)
@pytest.mark.parametrize("name", [KV_DRAFTS, MIXED_DRAFTS])
def test_two_requests_fork_beside_a_running_source(name):
    """From a checkpoint that its decode steps have left at an exact position, while it goes on."""
    llm = fresh(name)
    interval = llm.config.checkpoint_interval
    with Watch(llm) as watch:
        source = start(llm, prompt_of(0, 30), 120, 2 * interval + 3)
        position = (30 + 2 * interval) // interval * interval
        while source.num_settled < position + 1 or source.marks:
            llm.engine.step()
        held = source.tokens(0, position)
        forks = [queue(llm, [*held, *prompt_of(seed, 12)], greedy(20))[0] for seed in (1, 2)]
        llm.engine.step()
        pieces = in_flight_plan(llm).pieces
        assert {piece.start for piece in pieces} == {position}
        assert len({piece.read_slot for piece in pieces}) == 1
        assert source in in_flight_plan(llm).decoding
        drain(llm)
    for request in (source, *forks):
        check_greedy(llm, request)
        assert steps_of(watch, request) == pattern_of(llm, request)
    assert [fork.num_cached_tokens for fork in forks] == [position, position]
    check_cache(llm)


def test_ledger_sees_a_stale_layout_bit_of_what_decode_sealed():
    """Every one of the forks whose layout bit says what prefill writes goes wrong at once in its cache."""
    llm = fresh(MIXED_DRAFTS)
    wrong = 0
    for seed in range(20):
        first = start(llm, prompt_of(seed, 20 + seed), 6)
        drain(llm)
        generate(llm, prompt_of(99, 1), 1)
        faults.replace_pools(llm.engine, layout=jnp.full_like(pool_of(llm.engine.runner.state, "layout"), LAYOUT_KV))
        (second,) = queue(llm, [*first.tokens(0, first.num_tokens), *prompt_of(seed + 1, 9)], greedy(12))
        drain(llm)
        assert second.num_cached_tokens == first.num_tokens - 1
        wrong += second.output_token_ids != oracle_of(llm).solo_run(second.prompt_token_ids, 12)
        llm.reset_prefix_cache()
    assert wrong == 20


def _seen_of(llm: LLM, fault) -> tuple[list[int], int, bool]:
    """(tokens, steps that kept other drafts than they should, whether the cache is wrong) under a fault.

    Of two requests, one of which the fault befalls in mid-decode, unless it changes the steps of both.
    """
    prompts = [prompt_of(3, 65), prompt_of(4, 100)]
    befalls = len(inspect.signature(fault).parameters) > 1
    with Watch(llm, strict=False) as watch:
        victim, neighbour = [queue(llm, prompt, greedy(40))[0] for prompt in prompts]
        if not befalls:
            fault(llm.engine)
        while len(victim.output_token_ids) < 4:
            llm.engine.step()
        if befalls:
            fault(llm.engine, victim, neighbour)
        drain(llm)
    try:
        check_cache(llm)
    except AssertionError:
        return victim.output_token_ids, watch.wrong, True
    return victim.output_token_ids, watch.wrong, False


@pytest.mark.parametrize("fault", faults.SPECULATING, ids=lambda fault: fault.__name__)
def test_ledger_sees_the_fault_of_speculation(fault, monkeypatch):
    """Each by what it is named with: the tokens, the drafts that are kept, or what the cache was given."""
    llm = fresh(MIXED_DRAFTS)
    monkeypatch.setattr(llm.engine.runner, "steps", llm.engine.runner.steps)
    tokens, wrong, cache = _seen_of(llm, fault)
    expected = oracle_of(llm).solo_run(prompt_of(3, 65), 40)
    seen = "tokens" if tokens != expected else "drafts" if wrong else "cache" if cache else "nothing"
    assert seen == faults.SPECULATING[fault]
    llm.reset_prefix_cache()


def test_ledger_sees_nothing_without_a_fault_of_speculation():
    llm = fresh(MIXED_DRAFTS)
    tokens, wrong, cache = _seen_of(llm, lambda *_: None)
    assert tokens == oracle_of(llm).solo_run(prompt_of(3, 65), 40)
    assert (wrong, cache) == (0, False)


@pytest.mark.parametrize(
    "fault",
    [faults.seal_without_hidden_state, faults.hidden_of_the_row_before, faults.stale_rows_of_the_head],
    ids=lambda fault: fault.__name__,
)
def test_fault_of_the_head_changes_no_token(fault, monkeypatch):
    """A fork goes on from it: its tokens are right, and its steps keep other drafts than they should."""
    llm = fresh(MIXED_DRAFTS)
    monkeypatch.setattr(llm.engine.runner, "steps", llm.engine.runner.steps)
    befalls = len(inspect.signature(fault).parameters) > 1
    if not befalls:
        fault(llm.engine)
    with Watch(llm, strict=False) as watch:
        for seed in range(12):
            if befalls:
                request = start(llm, prompt_of(seed, 30), 30, 5)
                fault(llm.engine, request, None)
                drain(llm)
            else:
                request, _ = go_on_from_decode(llm, seed, max_tokens=20)
            check_greedy(llm, request)
    assert watch.wrong > 0
    llm.reset_prefix_cache()
