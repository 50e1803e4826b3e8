"""A turn is whole or it never was: an interrupt at every line of plan and harvest, and signals at random moments."""

import contextlib
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from gdnjax.serving.engine import Engine
from tests.serving.interrupts import PaperRunner
from tests.serving.ledgers import (
    KV,
    VK_DRAFTS,
    check_nothing_is_held,
    drain,
    fresh,
    greedy,
    oracle_of,
    prompt_of,
    queue,
)
from tests.serving.paper import check_output, make_request, make_scheduler

pytestmark = pytest.mark.usefixtures("quickly_compiled")

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.thorough
def test_interrupt_at_every_line_costs_nobody_else_anything():
    """Others' outputs are those of their solo runs, the cache holds nothing wrong, and nothing leaks."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.interrupts"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines, played, wrong = map(int, re.findall(r"\d+", done.stdout.splitlines()[-1]))
    assert (lines > 550, played > 2500, wrong) == (True, True, 0)


def paper_engine():
    """An engine over the device of plain Python, three requests that run, and a turn in flight."""
    scheduler = make_scheduler(seqs=3, tokens=64, blocks=30, block_size=4, warmup=False)
    engine = Engine(PaperRunner(scheduler.config), scheduler.allocator)
    requests = [make_request([5, 2, 7, i], max_tokens=10, ignore_eos=True) for i in range(3)]
    for request in requests:
        engine.add(request)
    while not all(request.output_token_ids for request in requests):
        engine.step()
    return engine, requests


def run_to_the_end(engine, requests):
    while engine.has_work:
        engine.step()
        engine.scheduler.check_integrity()
        engine.runner.device.check_cache(engine.scheduler.cache.root, engine.scheduler._seals)
    for request in requests:
        check_output(request)


@pytest.mark.parametrize("where", ["scheduler._marks_for", "runner.dispatch", "runner.read", "scheduler.commit"])
def test_turn_in_whose_middle_a_stream_is_collected_ends_as_it_began(where, monkeypatch):
    """As Python does with a stream that nobody holds any more, wherever it is."""
    engine, requests = paper_engine()
    part, name = where.split(".")
    owner = getattr(engine, part)
    inner = getattr(owner, name)

    def outer(*args):
        monkeypatch.undo()
        engine.abort(requests[1])
        return inner(*args)

    monkeypatch.setattr(owner, name, outer)
    assert requests[1] in engine.step()
    assert requests[1].finish_reason == "abort"
    run_to_the_end(engine, requests)
    assert not engine.scheduler.num_preemptions


def test_turn_is_no_place_for_anything_but_an_abort(monkeypatch):
    """A signal handler that queues, steps or closes would do it to a turn that is half done."""
    engine, requests = paper_engine()
    plan, late = engine.scheduler.plan, make_request(9)
    calls = (lambda: engine.add(late), engine.step, engine.take_turn, engine.reset_prefix_cache, engine.close)

    def within(**options):
        for call in calls:
            with pytest.raises(RuntimeError, match="in the middle of a turn of this very thread"):
                call()
        return plan(**options)

    monkeypatch.setattr(engine.scheduler, "plan", within)
    engine.step()
    monkeypatch.undo()
    run_to_the_end(engine, requests)


def test_preemption_after_a_turn_that_was_cut_off(monkeypatch):
    """What was in flight then is given up, and nobody may look for it."""
    engine, requests = paper_engine()

    def interrupt(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.scheduler, "plan", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.undo()
    engine.preempt(requests[0])
    run_to_the_end(engine, requests)


@contextlib.contextmanager
def interrupted_after(seconds: float):
    """An interrupt that comes so late, unless what runs within is over by then."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        SEEN.append(seconds)
    finally:
        signal.signal(signal.SIGALRM, before)


SEEN: list[float] = []
"""After how long those came that came at all."""

LENGTH = 12
PROMPTS = [prompt_of(seed, length) for seed, length in enumerate((9, 40, 70, 21))]


def answers(llm, by: str) -> list[list[int]]:
    """What a caller gets for three of the prompts; a stream asks for one after the other."""
    if by == "generate":
        outputs = llm.generate([list(prompt) for prompt in PROMPTS[:3]], greedy(LENGTH), use_tqdm=False)
    else:
        outputs = [list(llm.stream(list(prompt), greedy(LENGTH)))[-1].output for prompt in PROMPTS[:3]]
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.thorough
@pytest.mark.parametrize("name", [KV, VK_DRAFTS])
def test_signals_at_random_moments_leave_right_answers(name, caplog):
    """Steps really run: the moment may be within a dispatch, after which the pools that it took are gone."""
    caplog.set_level("ERROR", logger="gdnjax")
    llm, moments = fresh(name), random.Random(name)
    expected = [oracle_of(llm).solo_run(list(prompt), LENGTH) for prompt in PROMPTS]
    took = {}
    for by in ("generate", "stream", "generate", "stream"):
        began = time.perf_counter()
        assert answers(llm, by) == expected[:3]
        took[by] = time.perf_counter() - began
    SEEN.clear()
    while len(SEEN) < 50:
        by = moments.choice(["generate", "stream"])
        (beside,) = queue(llm, PROMPTS[3], greedy(LENGTH))
        with interrupted_after(max(1e-4, moments.random() * took[by])):
            assert answers(llm, by) == expected[:3]
        drain(llm)
        assert beside.output_token_ids == expected[3]
    assert answers(llm, "generate") == expected[:3]
    drain(llm)
    check_nothing_is_held(llm)
