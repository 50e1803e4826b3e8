"""A process that was killed goes on from what it has saved: with its cache, with its requests, to the token."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from gdnjax import LLM, SamplingParams
from gdnjax.serving import saved_state
from tests.ledger import PATTERN, LedgerModel
from tests.serving.ledgers import (
    DRAWN,
    EOS,
    GEOMETRIES,
    HOST,
    MAX_MODEL_LEN,
    MIXED,
    PATTERNS,
    TWO_RANKS,
    check_cache,
    check_greedy,
    check_nothing_is_held,
    drain,
    engine_of,
    fresh,
    generate,
    greedy,
    prompt_of,
    queue,
    start,
)

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def another(name: str, **changes) -> LLM:
    """An engine of its own, as another process has it, which compiles nothing before it is used."""
    config = dataclasses.replace(GEOMETRIES[name], **{"warmup": False} | changes)
    pattern, mtp = PATTERNS.get(name, PATTERN), config.num_speculative_tokens > 0
    model = LedgerModel(tp=config.tensor_parallel_size, mtp=mtp, pattern=pattern)
    return LLM.from_model(model, model.params(), config, max_model_len=MAX_MODEL_LEN, eos_token_ids=(EOS,))


@functools.cache
def other_of(name: str) -> LLM:
    return another(name)


def forget_everything(llm: LLM) -> LLM:
    """As good as another process, where compiling its steps once more would show nothing."""
    engine = llm.engine
    engine.abort(*engine.scheduler.unfinished)
    engine.step()
    engine.runner.start_over([])
    engine.scheduler.start_over()
    return llm


def busy(llm: LLM, *, all_kinds: bool = True) -> list:
    """Requests of many kinds: some decode, one is in the middle of its prompt, some wait, some share prefixes."""
    shared = prompt_of(0, 64)
    drawn = SamplingParams(temperature=0.8, max_tokens=30, seed=7, ignore_eos=True)
    groups = [llm.submit([*shared, *prompt_of(1, 20)], greedy(40)), llm.submit([*shared, *prompt_of(2, 5)], drawn)]
    if all_kinds:
        groups += [
            llm.submit(list(prompt_of(3, 30)), SamplingParams(max_tokens=25, n=2, top_k=9, top_p=0.9)),
            llm.submit(list(prompt_of(4, 50)), SamplingParams(max_tokens=30, **DRAWN[3])),
            llm.submit([*shared, *prompt_of(5, 40)], SamplingParams(max_tokens=20, **DRAWN[4]), priority=1),
        ]
    for _ in range(6):
        llm.step()
    groups.append(llm.submit(list(prompt_of(6, 200)), greedy(10)))
    for _ in range(2):
        llm.step()
    return groups


@pytest.mark.short_cases(MIXED)
@pytest.mark.parametrize("name", [HOST, MIXED])
def test_another_process_goes_on_to_the_token(name, tmp_path):
    """Greedy and drawn requests, penalties, bias, samples, drafts on their way; and whoever saves goes on as well."""
    llm = fresh(name)
    first = generate(llm, prompt_of(9, 90), 20)
    groups = busy(llm, all_kinds=name == MIXED)
    assert any(request.num_steps for group in groups for request in group.requests)
    llm.save_state(tmp_path / "state")
    produced = [len(request.output_token_ids) for group in groups for request in group.requests]
    assert 0 < sum(produced) < sum(request.params.max_tokens for group in groups for request in group.requests)
    drain(llm)
    expected = {group.request_id: [r.output_token_ids for r in group.requests] for group in groups}
    seed = llm.frontend.prepare([[1]], SamplingParams())[0].requests[0].seed
    other = other_of(name) if name == HOST else forget_everything(llm)
    before = other.engine.scheduler.num_preemptions
    back = other.restore(tmp_path / "state")
    other.engine.scheduler.check_integrity()
    assert [len(request.output_token_ids) for group in back for request in group.requests] == produced
    assert other.engine.scheduler.num_preemptions == before
    if name == HOST:
        # Seeds of those who bring none go on, too.
        assert other.frontend.prepare([[1]], SamplingParams())[0].requests[0].seed == seed
    drain(other)
    assert {group.request_id: [r.output_token_ids for r in group.requests] for group in back} == expected
    for group in (back[0], back[-1]):
        check_greedy(other, group.requests[0])
    check_cache(other)
    # What was cached before is found, unless it has been evicted meanwhile.
    forget_everything(other).restore(tmp_path / "state")
    drain(other)
    again = generate(other, [*prompt_of(0, 64), 5], 3)
    assert again.num_cached_tokens >= 48
    check_greedy(other, first)
    check_nothing_is_held(other)


@pytest.mark.parametrize("name", [HOST, TWO_RANKS])
def test_pools_come_back_bit_for_bit(name, tmp_path):
    """In the places where they were, whatever is in them."""
    llm, other = another(name), another(name)
    runner, draw = llm.engine.runner, np.random.default_rng(0)
    runner.state = jax.tree.map(
        lambda leaf: jax.device_put(draw.integers(0, 100, leaf.shape).astype(leaf.dtype), leaf.sharding), runner.state
    )
    llm.save_state(tmp_path / "state")
    assert other.restore(tmp_path / "state") == []
    before, after = runner.state, other.engine.runner.state
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((before, after)))
    assert jax.tree.map(lambda leaf: leaf.sharding, before) == jax.tree.map(lambda leaf: leaf.sharding, after)


@pytest.mark.thorough
def test_what_nobody_holds_any_more_goes_on(tmp_path):
    llm, other = fresh(HOST), other_of(HOST)
    requests = queue(llm, prompt_of(0, 30), greedy(20, n=2))
    for _ in range(4):
        llm.step()
    llm.save_state(tmp_path / "state")
    (group,) = other.restore(tmp_path / "state")
    assert [request.index for request in group.requests] == [0, 1]
    for each in (llm, other):
        drain(each)
    assert [r.output_token_ids for r in group.requests] == [r.output_token_ids for r in requests]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The state of an idle engine."""
    directory = tmp_path_factory.mktemp("saved") / "state"
    llm = fresh(HOST)
    generate(llm, prompt_of(0, 40), 4)
    llm.save_state(directory)
    return directory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 16}, r"block_size=8, here 16"),
        ({"num_kv_blocks": 40}, r"num_kv_blocks=36, here 40"),
        ({"num_checkpoint_slots": 5}, r"num_checkpoint_slots=6, here 5"),
        ({"seed": 5, "state_layout": "vk"}, r"state_layout='mixed', here 'vk'; seed=0, here 5"),
    ],
)
def test_other_settings_are_refused_by_name(saved, changes, message):
    with pytest.raises(ValueError, match=message):
        another(HOST, **changes).restore(saved)


def test_settings_of_which_nothing_depends_may_differ(saved):
    other = another(HOST, gpu_memory_utilization=0.7, host_cache_gib=1e-4)
    assert other.restore(saved) == []
    assert other.engine.scheduler.cache.num_blocks >= 5
    other.engine.scheduler.check_integrity()


def test_other_models_are_refused(saved):
    config = dataclasses.replace(GEOMETRIES[HOST], warmup=False)
    model = LedgerModel(mtp=True)
    params = model.params()
    # As many numbers as before: other weights.
    params["layers"][0]["linear_attn"]["in_proj_a"]["weight"] += np.uint32(2)
    llm = LLM.from_model(model, params, config, max_model_len=MAX_MODEL_LEN, eos_token_ids=(EOS,))
    with pytest.raises(ValueError, match="saved with another model: not the same weights as here"):
        llm.restore(saved)
    model = LedgerModel(mtp=True, pattern="AA")
    config = dataclasses.replace(config, num_checkpoint_slots=0)
    llm = LLM.from_model(model, model.params(), config, max_model_len=MAX_MODEL_LEN, eos_token_ids=(EOS,))
    with pytest.raises(ValueError, match="num_checkpoint_slots=6, here 0"):
        llm.restore(saved)


def test_engine_with_requests_is_not_restored(saved):
    llm = fresh(HOST)
    request = start(llm, prompt_of(1, 20), 12)
    with pytest.raises(RuntimeError, match="restore needs an engine without requests; this one has 1"):
        llm.restore(saved)
    drain(llm)
    check_greedy(llm, request)


def test_what_is_no_saved_state_is_refused(saved, tmp_path):
    llm = engine_of(HOST)
    with pytest.raises(FileNotFoundError, match=r"expected a directory that LLM\.save_state has written"):
        llm.restore(tmp_path)
    with pytest.raises(FileExistsError, match="is there already; save_state makes a directory of its own"):
        llm.save_state(tmp_path)
    content = json.loads((saved / saved_state.STATE).read_text())
    for text, message in (
        ("{", "damaged"),
        ("[]", "damaged"),
        (
            json.dumps(content | {"identity": content["identity"] | {"tokenizer": {"is there": True}}}),
            "saved with a tokenizer: texts would not go on",
        ),
        (json.dumps(content | {"format": 1}), f"format 1, by gdnjax .*; this one reads {saved_state.FORMAT}"),
    ):
        (tmp_path / saved_state.STATE).write_text(text)
        with pytest.raises(ValueError, match=message):
            llm.restore(tmp_path)


def test_pools_that_are_missing_leave_an_empty_engine(saved, tmp_path):
    """What was cached is lost, and the engine goes on."""
    llm = fresh(HOST)
    generate(llm, prompt_of(2, 40), 4)
    (tmp_path / saved_state.STATE).write_text((saved / saved_state.STATE).read_text())
    with pytest.raises(ValueError, match="damaged"):
        llm.restore(tmp_path)
    assert generate(llm, prompt_of(2, 40), 4).num_cached_tokens == 0
    check_nothing_is_held(llm)


def test_write_that_fails_leaves_nothing_and_the_engine_goes_on(tmp_path, monkeypatch):
    llm = fresh(HOST)
    request = start(llm, prompt_of(1, 40), 12)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved_state, "_write_arrays", full)
    with pytest.raises(OSError, match="No space left"):
        llm.save_state(tmp_path / "state")
    assert not (tmp_path / "state").exists()
    drain(llm)
    check_greedy(llm, request)
    assert request.num_preemptions == 0
    assert generate(llm, prompt_of(1, 40), 3).num_cached_tokens == 32
