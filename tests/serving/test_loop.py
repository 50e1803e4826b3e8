"""What fails in the engine's thread costs nobody an answer but those who cannot have one."""

import asyncio
import contextlib
import dataclasses
import random

import pytest

from gdnjax.serving.loop import EngineStoppedError
from tests.serving.fronts import PARAMS, check_stream, front, held, read, settled
from tests.serving.paper import check_output, distinct

NO_MEMORY = "RESOURCE_EXHAUSTED: out of memory"


def play(scene, monkeypatch, *, count=8, left=0, **sizes):
    """`count` streams while `scene(llm, requests)` has changed the engine. Returns their last pieces, in order; all but
    `left` are what they are alone.
    """

    async def whole():
        with front(**sizes) as llm:
            lengths = [4 + 5 * (i % 5) for i in range(count)]
            streams = [llm.generate(distinct(i, length), PARAMS) for i, length in enumerate(lengths)]
            with held(llm):
                requests = [request for stream in streams for request in (await stream.prepared()).requests]
                scene(llm, requests)
            found = await asyncio.gather(*map(read, streams))
            whole = [(stream, pieces) for stream, pieces in zip(streams, found, strict=True) if not errs(pieces)]
            for stream, pieces in whole:
                check_stream(stream, pieces)
            assert len(whole) == count - left
            monkeypatch.undo()
            after = llm.generate([3], PARAMS)
            check_stream(after, await read(after))
            await settled(llm)
            assert llm.failure is None
            return [pieces[-1] for pieces in found]

    return asyncio.run(asyncio.wait_for(whole(), 60))


def errs(pieces) -> bool:
    return pieces[-1].finish_reason == "error"


@pytest.mark.parametrize("where", ["runner.dispatch", "runner.read", "scheduler.plan", "scheduler.commit"])
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_faults_at_random_moments_cost_nobody_anything(where, share, monkeypatch):
    part, name = where.split(".")

    def scene(llm, requests):
        rng, owner = random.Random(share), getattr(llm.llm.engine, part)
        inner = getattr(owner, name)

        def sometimes(*given, **options):
            if rng.random() < share:
                raise RuntimeError(NO_MEMORY)
            return inner(*given, **options)

        monkeypatch.setattr(owner, name, sometimes)

    play(scene, monkeypatch)


def in_plan(plan) -> set:
    return {*plan.decoding, *(piece.request for piece in plan.pieces)}


@pytest.mark.parametrize("culprit", range(5))
@pytest.mark.parametrize("seqs", [1, 4, 8])
def test_request_that_every_turn_fails_for_ends_alone(culprit, seqs, monkeypatch):
    """As a batch would that cannot be packed with it."""

    def scene(llm, requests):
        runner = llm.llm.engine.runner
        dispatch = runner.dispatch

        def fails(plan):
            if requests[culprit] in in_plan(plan):
                raise LookupError("no such bucket")
            return dispatch(plan)

        monkeypatch.setattr(runner, "dispatch", fails)

    found = play(scene, monkeypatch, left=1, seqs=seqs, blocks=100)
    assert (found[culprit].finish_reason, found[culprit].stop_reason) == ("error", "LookupError: no such bucket")


def test_several_culprits_end_and_nobody_else(monkeypatch):
    def scene(llm, requests):
        runner = llm.llm.engine.runner
        read_turn = runner.read

        def fails(turn):
            if in_plan(turn.plan) & {requests[2], requests[5], requests[6]}:
                raise RuntimeError("the device has failed")
            return read_turn(turn)

        monkeypatch.setattr(runner, "read", fails)

    found = play(scene, monkeypatch, left=3, seqs=8, blocks=100)
    assert [last.finish_reason == "error" for last in found] == [i in (2, 5, 6) for i in range(8)]


def test_culprit_that_waits_is_found(monkeypatch):
    """It has no part in any turn: planning fails while it is in the queue."""

    def scene(llm, requests):
        scheduler = llm.llm.engine.scheduler
        plan = scheduler.plan

        def fails(**options):
            if requests[7] in scheduler.waiting:
                raise LookupError("no such prefix")
            return plan(**options)

        monkeypatch.setattr(scheduler, "plan", fails)

    found = play(scene, monkeypatch, left=1)
    assert found[7].stop_reason == "LookupError: no such prefix"


def test_requests_that_fail_only_together_all_get_through(monkeypatch):
    """As where a batch of so many takes more memory than there is."""

    def scene(llm, requests):
        runner = llm.llm.engine.runner
        dispatch = runner.dispatch

        def fails(plan):
            if len(in_plan(plan)) > 2:
                raise RuntimeError(NO_MEMORY)
            return dispatch(plan)

        monkeypatch.setattr(runner, "dispatch", fails)

    play(scene, monkeypatch, seqs=8, blocks=100)


def test_culprit_among_requests_that_fail_together_is_found(monkeypatch):
    def scene(llm, requests):
        runner = llm.llm.engine.runner
        dispatch = runner.dispatch

        def fails(plan):
            if len(in_plan(plan)) > 3 or requests[4] in in_plan(plan):
                raise RuntimeError(NO_MEMORY)
            return dispatch(plan)

        monkeypatch.setattr(runner, "dispatch", fails)

    assert play(scene, monkeypatch, left=1, seqs=8, blocks=100)[4].stop_reason == f"RuntimeError: {NO_MEMORY}"


def test_whoever_comes_during_a_trial_waits_for_its_end(monkeypatch):
    async def whole():
        with front(seqs=8, blocks=100) as llm:
            streams = [llm.generate(distinct(i, 6), PARAMS) for i in range(6)]
            with held(llm):
                requests = [request for stream in streams for request in (await stream.prepared()).requests]
                runner, late = llm.llm.engine.runner, []
                dispatch = runner.dispatch

                def fails(plan):
                    trials = llm._loop._trials
                    assert not (trials.under_way and {*late} & in_plan(plan))
                    if requests[3] in in_plan(plan):
                        if trials.under_way and not late:
                            late.append(None)
                            asyncio.run_coroutine_threadsafe(come(), event_loop).result(10)
                        raise LookupError("no such bucket")
                    return dispatch(plan)

                async def come():
                    stream = llm.generate(distinct(9, 6), PARAMS)
                    late[:] = (await stream.prepared()).requests
                    streams.append(stream)

                monkeypatch.setattr(runner, "dispatch", fails)
                event_loop = asyncio.get_running_loop()
            found = await asyncio.gather(*map(read, streams))
            assert [errs(pieces) for pieces in found] == [i == 3 for i in range(6)]
            (stream,) = streams[6:]
            check_stream(stream, await read(stream))
            await settled(llm)

    asyncio.run(asyncio.wait_for(whole(), 60))


def test_cancelled_and_overdue_requests_end_in_a_trial(monkeypatch):
    def scene(llm, requests):
        runner = llm.llm.engine.runner
        dispatch, calls = runner.dispatch, []

        def fails(plan):
            calls.append(None)
            if len(calls) == 6:
                assert llm._loop._trials.under_way
                llm.llm.engine.abort(requests[0], requests[7])
            if requests[3] in in_plan(plan):
                raise LookupError("no such bucket")
            return dispatch(plan)

        monkeypatch.setattr(runner, "dispatch", fails)

    found = play(scene, monkeypatch, left=1, seqs=8, blocks=100)
    assert [found[i].finish_reason for i in (0, 3, 7)] == ["abort", "error", "abort"]


def test_engine_that_cannot_start_over_at_once_tries_again(monkeypatch):
    def scene(llm, requests):
        runner = llm.llm.engine.runner
        dispatch, start_over, faults = runner.dispatch, runner.start_over, [1, 1, 1]

        def fails(plan):
            if len(faults) == 3:
                faults.pop()
                raise RuntimeError(NO_MEMORY)
            return dispatch(plan)

        def hardly(unread):
            if faults:
                faults.pop()
                raise RuntimeError(NO_MEMORY)
            return start_over(unread)

        monkeypatch.setattr(runner, "dispatch", fails)
        monkeypatch.setattr(runner, "start_over", hardly)

    play(scene, monkeypatch)


def test_engine_that_cannot_start_over_fails_everybody(monkeypatch):
    async def whole():
        llm = front()
        streams = [llm.generate(distinct(i, 6), dataclasses.replace(PARAMS, n=2)) for i in range(6)]
        with held(llm):
            for stream in streams:
                await stream.prepared()
            runner = llm.llm.engine.runner

            def fails(_):
                raise RuntimeError(NO_MEMORY)

            monkeypatch.setattr(runner, "dispatch", fails)
            monkeypatch.setattr(runner, "start_over", fails)
        found = await asyncio.gather(*map(read, streams), return_exceptions=True)
        assert all(isinstance(error, EngineStoppedError) for error in found)
        assert {str(error) for error in found} == {f"the engine's thread has failed: RuntimeError: {NO_MEMORY}"}
        assert isinstance(llm.failure, RuntimeError)
        assert found[0].__cause__ is llm.failure
        for later in (llm.generate([1]).prepared(), llm.stats()):
            with pytest.raises(EngineStoppedError, match="the engine's thread has failed"):
                await later
        assert llm.num_unfinished == 0
        await llm.drain(1)
        monkeypatch.undo()
        llm.close()
        assert llm.llm.engine.closed

    asyncio.run(asyncio.wait_for(whole(), 60))


def test_turns_that_fail_for_nobody_end_the_thread(monkeypatch):
    """What fails is the engine itself, and would for ever."""

    async def whole():
        with front() as llm:

            def fails(_):
                raise LookupError("no such counter")

            monkeypatch.setattr(llm.llm.engine.metrics, "finished", fails)
            with pytest.raises(EngineStoppedError, match="there is no request that it could be for"):
                await read(llm.generate([1], PARAMS))
            assert isinstance(llm.failure.__cause__, LookupError)
            monkeypatch.undo()

    asyncio.run(asyncio.wait_for(whole(), 60))


def test_turn_of_another_thread_that_fails_costs_streams_nothing(monkeypatch):
    async def whole():
        with front() as llm:
            streams = [llm.generate(distinct(i, 6), PARAMS) for i in range(4)]
            with held(llm):
                for stream in streams:
                    await stream.prepared()
            runner = llm.llm.engine.runner
            dispatch, faults = runner.dispatch, [1, 1, 1, 1]

            def fails(plan):
                if faults:
                    faults.pop()
                    raise RuntimeError(NO_MEMORY)
                return dispatch(plan)

            monkeypatch.setattr(runner, "dispatch", fails)

            def generates():
                submission = llm.llm.submit(distinct(9, 6), PARAMS)
                while not submission.finished:
                    with contextlib.suppress(RuntimeError):
                        llm.llm.step()
                check_output(submission.requests[0])

            other = asyncio.create_task(asyncio.to_thread(generates))
            for stream, pieces in zip(streams, await asyncio.gather(*map(read, streams)), strict=True):
                check_stream(stream, pieces)
            await other
            await settled(llm)

    asyncio.run(asyncio.wait_for(whole(), 60))
