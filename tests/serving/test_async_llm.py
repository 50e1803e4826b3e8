"""Streams of an engine that a thread of its own drives: whole, alone in their answers, and gone when they are left."""

import asyncio
import copy
import dataclasses
import gc
import pickle
import random
import threading

import pytest

from gdnjax import AsyncLLM, SamplingParams, StructuredOutputsParams
from gdnjax.serving.async_llm import PREPARERS
from gdnjax.serving.detokenizer import Detokenizer
from gdnjax.serving.loop import EngineLoop, EngineStoppedError
from tests.serving.fronts import PARAMS, check_stream, front, held, paper_llm, read, settled
from tests.serving.paper import check_output, distinct

LONG = dataclasses.replace(PARAMS, max_tokens=100)


def run(scene, **sizes):
    """`await scene(llm)`, and nothing is left behind."""

    async def whole():
        with front(**sizes) as llm:
            await asyncio.wait_for(scene(llm), 60)
            await settled(llm)
            await llm.reset_prefix_cache()
            allocator = llm.llm.engine.scheduler.allocator
            assert all(pool.num_free == pool.size for pool in allocator.pools.values())

    asyncio.run(whole())


async def read_all(*streams):
    return await asyncio.gather(*map(read, streams))


def test_streams_are_what_their_requests_produce_alone():
    async def scene(llm):
        rng = random.Random(0)
        streams = []
        for i in range(40):
            params = dataclasses.replace(PARAMS, max_tokens=rng.randint(1, 30), n=rng.choice([1, 1, 3]))
            params = dataclasses.replace(params, stop=rng.choice([None, ["cb", "g"]]))
            streams.append(llm.generate(distinct(i % 26, rng.randint(1, 40)), params, priority=rng.randint(-1, 1)))
        for stream, pieces in zip(streams, await read_all(*streams), strict=True):
            check_stream(stream, pieces)

    run(scene)


def test_engine_calls_each_event_loop_once_a_turn(monkeypatch):
    async def scene(llm):
        streams = [llm.generate(distinct(i, 4), LONG) for i in range(4)]
        event_loop, calls = asyncio.get_running_loop(), []
        with held(llm):
            for stream in streams:
                await stream.prepared()
        inner = event_loop.call_soon_threadsafe

        def counted(call, *args):
            calls.append(threading.current_thread().name)
            return inner(call, *args)

        monkeypatch.setattr(event_loop, "call_soon_threadsafe", counted)
        step, turns = llm.llm.engine.step, []
        monkeypatch.setattr(llm.llm.engine, "step", lambda: turns.append(None) or step())
        await read_all(*streams)
        monkeypatch.undo()
        assert 50 < calls.count("gdnjax-engine") <= len(turns) + 1

    run(scene)


def test_slow_reader_gets_what_has_come_in_one_piece():
    async def scene(llm):
        stream = llm.generate(distinct(1, 4), dataclasses.replace(PARAMS, logprobs=None))
        await stream.prepared()
        while llm.num_unfinished:
            await asyncio.sleep(0.01)
        pieces = await read(stream)
        assert len(pieces) == 1
        check_stream(stream, pieces)

    run(scene)


def test_threads_and_calls_of_the_llm_beside_streams_get_their_own():
    """Event loops of two threads, and LLM.generate in another."""

    async def scene(llm):
        async def reads(first):
            streams = [llm.generate(distinct(first + i, 5), PARAMS) for i in range(6)]
            for stream, pieces in zip(streams, await read_all(*streams), strict=True):
                check_stream(stream, pieces)
            return True

        def generates():
            submissions = [llm.llm.submit(distinct(20 + i, 7), PARAMS) for i in range(3)]
            while any(not submission.finished for submission in submissions):
                llm.llm.step()
            outputs = llm.llm.generate([distinct(23 + i, 7) for i in range(3)], PARAMS, use_tqdm=False)
            for submission in submissions:
                check_output(submission.requests[0])
            return len(outputs) == 3

        others = [asyncio.to_thread(lambda first=first: asyncio.run(reads(first))) for first in (6, 12)]
        assert all(await asyncio.gather(reads(0), asyncio.to_thread(generates), *others))

    run(scene)


@pytest.mark.parametrize("how", ["break", "aclose", "cancel", "drop", "raise"])
def test_stream_that_is_left_ends_its_request(how):
    async def scene(llm):
        kept = llm.generate(distinct(2, 4), LONG)

        async def leave():
            stream = llm.generate(distinct(1, 4), dataclasses.replace(LONG, n=2))
            if how == "drop":
                await stream.prepared()
                return
            async for piece in stream:
                if how == "break":
                    break
                if how == "aclose":
                    await stream.aclose()
                    assert await read(stream) == []
                if how == "raise":
                    raise LookupError(piece)
            if how == "cancel":
                await asyncio.sleep(60)

        task = asyncio.create_task(leave())
        if how == "cancel":
            while not llm.num_unfinished:
                await asyncio.sleep(0)
            task.cancel()
        (found,) = await asyncio.gather(task, return_exceptions=True)
        assert {"cancel": asyncio.CancelledError, "raise": LookupError}.get(how, type(None)) is type(found)
        del found, task
        gc.collect()
        check_stream(kept, await read(kept))
        assert (await settled(llm))["num_ended"].get("abort", 0) in (0, 2)

    run(scene)


@pytest.mark.parametrize("seed", range(3))
def test_random_disconnects_leave_nothing_behind_and_others_alone(seed):
    async def scene(llm):
        rng = random.Random(seed)

        async def client(number):
            for call in range(5):
                params = dataclasses.replace(PARAMS, max_tokens=rng.randint(1, 40), n=rng.choice([1, 2]))
                stream = llm.generate(distinct((number + call) % 26, rng.randint(1, 30)), params)
                leaves = rng.random() < 0.4
                most, pieces = rng.randint(0, 6), []
                try:
                    async with asyncio.timeout(rng.random() * 0.05 if leaves and rng.random() < 0.5 else None):
                        async for piece in stream:
                            pieces.append(piece)
                            if leaves and len(pieces) > most:
                                break
                        else:
                            check_stream(stream, pieces)
                except TimeoutError:
                    pass

        await asyncio.gather(*map(client, range(16)))
        gc.collect()

    run(scene, blocks=40)


def test_prompts_are_checked_and_tokenised_beside_the_thread_of_the_engine(monkeypatch):
    names = []

    class Spelling:
        eos_token_id, added_tokens_decoder, chat_template = None, {}, None

        def __len__(self):
            return 26

        def encode(self, text, **_):
            names.append(threading.current_thread().name)
            return [ord(letter) - ord("a") for letter in text]

        def decode(self, token_ids, **_):
            return "".join(chr(ord("a") + token) for token in token_ids)

    from gdnjax.serving.tokenizer import Tokenizer

    async def scene(llm):
        stream = llm.generate("hello", PARAMS)
        check_stream(stream, await read(stream))
        assert stream.submission.prompt == "hello"
        with pytest.raises(ValueError, match="prompt 0 has token id"):
            await read(llm.generate("HELLO", PARAMS))

    run(scene, tokenizer=Tokenizer(Spelling()))
    assert len(names) == 2
    assert all(name.startswith("gdnjax-prepare") for name in names)


def test_first_await_raises_what_is_wrong_and_nothing_is_queued(without_type_checks):
    async def scene(llm):
        for stream, error in [
            (llm.generate([]), "prompt 0 is empty"),
            (llm.generate([1], SamplingParams(logprobs=1000)), "exceeds max_logprobs"),
            (llm.generate([1], timeout=-1), "timeout must be"),
            (llm.generate([1], priority="high"), "priority must be"),
            (llm.generate([1], request_id=""), "request_id must be"),
        ]:
            with pytest.raises(ValueError, match=error):
                await stream.prepared()
            assert await read(stream) == []
            with pytest.raises(RuntimeError, match="its request was refused"):
                await stream.prepared()
        assert llm.llm.stats()["num_requests"] == 0

    run(scene)


def test_request_ids_name_requests_until_they_end():
    async def scene(llm):
        stream = llm.generate([1, 2], LONG, request_id="mine")
        with held(llm):
            await stream.prepared()
            with pytest.raises(ValueError, match="request_id 'mine' is that of a request that has not ended"):
                await llm.generate([1], request_id="mine").prepared()
            others = [llm.generate([3], PARAMS) for _ in range(2)]
            for other in others:
                await other.prepared()
            assert len({other.request_id for other in others}) == 2
            assert await llm.abort("mine")
        pieces = await read(stream)
        assert pieces[-1].finish_reason == "abort"
        check_stream(stream, pieces)
        await read_all(*others)
        assert not await llm.abort("mine")
        again = llm.generate([1, 2], PARAMS, request_id="mine")
        check_stream(again, await read(again))

    run(scene)


@pytest.mark.parametrize("fails", [False, True])
def test_who_has_read_the_end_finds_the_stream_gone(monkeypatch, fails):
    """However late the engine's thread comes to it: its name may be taken again at once."""

    async def scene(llm):
        with monkeypatch.context() as late:
            late.setattr(EngineLoop, "_close_one", lambda *_: None)
            for _ in range(3):
                stream = llm.generate([1, 2], LONG if fails else PARAMS, request_id="mine")
                await stream.prepared()
                if fails:
                    stream._box.fail(EngineStoppedError("lost"))
                    with pytest.raises(EngineStoppedError, match="lost"):
                        await read(stream)
                else:
                    check_stream(stream, await read(stream))
                assert llm.num_unfinished == 0

    run(scene)


def slow_preparation(llm, monkeypatch):
    """(set when a prompt begins to be prepared, to be set for it to go on)"""
    begun, go_on, prepare = threading.Event(), threading.Event(), llm.llm.frontend.prepare

    def slow(*given):
        begun.set()
        go_on.wait(10)
        return prepare(*given)

    monkeypatch.setattr(llm.llm.frontend, "prepare", slow)
    return begun, go_on


def test_abort_of_a_request_that_is_being_prepared_ends_it(monkeypatch):
    async def scene(llm):
        begun, go_on = slow_preparation(llm, monkeypatch)
        reading = asyncio.create_task(read(llm.generate([1], LONG, request_id="mine")))
        await asyncio.to_thread(begun.wait)
        assert await llm.abort("mine")
        go_on.set()
        assert (await reading)[-1].finish_reason == "abort"

    run(scene)


def test_others_do_not_wait_for_structures_that_are_compiled(monkeypatch):
    async def scene(llm):
        go_on, begun, prepare = threading.Event(), threading.Event(), llm.llm.frontend.prepare

        def slow(prompts, params, *given):
            if params.structured_outputs is not None:
                begun.set()
                go_on.wait(30)
                raise ValueError("no grammar")
            return prepare(prompts, params, *given)

        monkeypatch.setattr(llm.llm.frontend, "prepare", slow)
        asked = dataclasses.replace(PARAMS, structured_outputs=StructuredOutputsParams(regex="a"))
        compiling = [asyncio.create_task(read(llm.generate([1], asked))) for _ in range(2 * PREPARERS)]
        await asyncio.to_thread(begun.wait)
        try:
            stream = llm.generate([1, 2], PARAMS)
            check_stream(stream, await asyncio.wait_for(read(stream), 30))
        finally:
            go_on.set()
        assert all(isinstance(found, ValueError) for found in await asyncio.gather(*compiling, return_exceptions=True))

    run(scene)


def test_cancellation_while_a_prompt_is_prepared_queues_nothing(monkeypatch):
    async def scene(llm):
        begun, go_on = slow_preparation(llm, monkeypatch)
        reading = asyncio.create_task(read(llm.generate([1], LONG)))
        await asyncio.to_thread(begun.wait)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        go_on.set()
        assert llm.num_unfinished == 0
        assert llm.llm.stats()["num_requests"] == 0

    run(scene)


def test_timeout_ends_a_stream_with_its_reason(monkeypatch):
    async def scene(llm):
        stream = llm.generate([1], LONG, timeout=1e-6)
        last = (await read(stream))[-1]
        assert (last.finish_reason, last.stop_reason) == ("abort", "timeout")

    run(scene)


def test_urgent_requests_come_first():
    async def scene(llm):
        first = llm.generate(distinct(0, 4), LONG)
        low, high = (llm.generate(distinct(i, 4), PARAMS, priority=p) for i, p in ((1, 0), (2, -1)))
        with held(llm):
            for stream in (first, low, high):
                await stream.prepared()
        # As the engine ended them: a loop that is late reads several ends at once, in any order.
        ends = {}
        for name, pieces in zip(("first", "low", "high"), await read_all(first, low, high), strict=True):
            ends[name] = pieces[-1].output.metrics.finished_time
        assert sorted(ends, key=ends.get) == ["high", "first", "low"]

    run(scene, seqs=1)


def test_stream_is_for_one_task():
    """A second one is refused and disturbs nothing, but it may close the stream."""

    async def scene(llm):
        stream = llm.generate([1], LONG)
        with held(llm):
            await stream.prepared()
            first = asyncio.create_task(anext(stream))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="a stream is for one task"):
                await anext(stream)
        pieces = [await first, *await read(stream)]
        check_stream(stream, pieces)
        stream = llm.generate([1], LONG)
        with held(llm):
            await stream.prepared()
            reading = asyncio.create_task(read(stream))
            await asyncio.sleep(0)
            await stream.aclose()
            assert await reading == []

    run(scene)


def test_drain_finishes_what_runs_and_refuses_what_comes():
    async def scene(llm):
        stream = llm.generate([1, 2], LONG)
        await stream.prepared()
        reading = asyncio.create_task(read(stream))
        await llm.drain(30)
        assert llm.num_unfinished == 0
        with pytest.raises(EngineStoppedError, match="drains"):
            await llm.generate([1]).prepared()
        check_stream(stream, await reading)

    run(scene)


def test_drain_says_who_has_not_ended():
    async def scene(llm):
        stream = llm.generate([1, 2], PARAMS)
        with held(llm):
            await stream.prepared()
            with pytest.raises(TimeoutError, match=r"1 requests have not ended after 0\.05 seconds"):
                await llm.drain(0.05)
        check_stream(stream, await read(stream))

    run(scene)


def test_close_fails_streams_and_whatever_comes_later():
    async def scene():
        llm = front()
        stream = llm.generate([1], dataclasses.replace(PARAMS, max_tokens=230))
        await stream.prepared()
        llm.close()
        llm.close()
        with pytest.raises(EngineStoppedError, match="this AsyncLLM is closed"):
            await read(stream)
        for later in (llm.generate([1]).prepared(), llm.stats(), llm.reset_prefix_cache()):
            with pytest.raises(EngineStoppedError, match="this AsyncLLM is closed"):
                await later
        assert llm.llm.engine.closed
        assert (llm.num_unfinished, llm.failure) == (0, None)

    asyncio.run(scene())


def test_llm_that_is_closed_under_its_streams_fails_them():
    async def scene():
        llm = front()
        stream = llm.generate([1], dataclasses.replace(PARAMS, max_tokens=230))
        await stream.prepared()
        llm.llm.close()
        with pytest.raises(EngineStoppedError, match="this LLM is closed"):
            await read(stream)
        assert llm.failure is None
        llm.close()

    asyncio.run(scene())


def test_event_loop_that_is_closed_takes_its_streams_along():
    llm, left = front(), []

    async def begins():
        left.append(llm.generate([1], dataclasses.replace(PARAMS, max_tokens=230)))
        await left[0].prepared()

    async def goes_on():
        stream = llm.generate([2], PARAMS)
        check_stream(stream, await read(stream))
        await settled(llm)

    asyncio.run(begins())
    asyncio.run(goes_on())
    llm.close()


def test_llm_has_one_front_at_a_time():
    llm = paper_llm()
    first = AsyncLLM.from_llm(llm)
    with pytest.raises(RuntimeError, match="an LLM has one AsyncLLM"):
        AsyncLLM.from_llm(llm)
    first.close()
    with pytest.raises(RuntimeError, match="this LLM is closed"):
        AsyncLLM.from_llm(llm)


def test_front_that_nobody_holds_ends_its_thread_and_leaves_the_llm():
    llm = paper_llm()
    made = AsyncLLM.from_llm(llm)
    thread = made._loop._thread
    del made
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
    (output,) = llm.generate([[1, 2]], PARAMS, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == PARAMS.max_tokens
    AsyncLLM.from_llm(llm).close()


def test_front_refuses_to_be_copied_or_pickled():
    with front() as llm:
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="an AsyncLLM cannot be copied or pickled"):
                copied(llm)


def test_request_whose_text_cannot_be_made_ends_alone(monkeypatch):
    async def scene(llm):
        doomed, *others = [llm.generate(distinct(i, 4), PARAMS) for i in range(4)]
        (request,) = (await doomed.prepared()).requests
        append = Detokenizer.append

        def fails(detokenizer, token_ids):
            if detokenizer is request.detokenizer:
                raise UnicodeError("no such letter")
            return append(detokenizer, token_ids)

        monkeypatch.setattr(Detokenizer, "append", fails)
        found = await read_all(doomed, *others)
        assert (found[0][-1].finish_reason, found[0][-1].stop_reason) == ("error", "UnicodeError: no such letter")
        for stream, pieces in zip(others, found[1:], strict=True):
            check_stream(stream, pieces)

    run(scene)
