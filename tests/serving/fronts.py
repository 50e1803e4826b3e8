"""An LLM over the device of plain Python, for what is in front of an engine; and how tests read its streams."""

import asyncio
import contextlib
import threading
import weakref

from gdnjax import LLM, AsyncLLM, SamplingParams
from gdnjax.serving.engine import Engine
from gdnjax.serving.frontend import Frontend
from tests.serving.interrupts import PaperRunner
from tests.serving.paper import EOS, LETTERS, MAX_MODEL_LEN, check_output, make_scheduler

PARAMS = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def paper_llm(*, blocks=60, block_size=4, seqs=4, tokens=64, tokenizer=LETTERS, **sizes) -> LLM:
    """An LLM whose tokens are hashes of those before them; prompts are token ids below 26."""
    scheduler = make_scheduler(seqs=seqs, tokens=tokens, blocks=blocks, block_size=block_size, warmup=False, **sizes)
    llm = LLM.__new__(LLM)
    llm.config, llm.max_model_len = scheduler.config, MAX_MODEL_LEN
    llm.frontend = Frontend(
        scheduler.config,
        max_model_len=MAX_MODEL_LEN,
        vocab_size=26,
        num_blocks=blocks,
        tokenizer=tokenizer,
        eos_token_ids=(EOS,),
    )
    runner = PaperRunner(scheduler.config)
    runner.host_sizes = scheduler.cache.host.sizes if scheduler.cache.host is not None else None
    llm.engine = Engine(runner, scheduler.allocator, tokenizer)
    llm._submissions, llm._submissions_lock = weakref.WeakSet(), threading.Lock()
    return llm


def front(**sizes) -> AsyncLLM:
    """An AsyncLLM over `paper_llm`."""
    return AsyncLLM.from_llm(paper_llm(**sizes))


@contextlib.contextmanager
def held(llm: AsyncLLM):
    """The device gives nothing to be read while within."""
    runner, go_on = llm.llm.engine.runner, threading.Event()
    inner = runner.read

    def waiting(turn):
        assert go_on.wait(30)
        return inner(turn)

    runner.read = waiting
    try:
        yield
    finally:
        go_on.set()
        # A fault that was put around it meanwhile stays.
        if runner.read is waiting:
            runner.read = inner


async def read(stream) -> list:
    """Every piece of a stream."""
    return [piece async for piece in stream]


def check_stream(stream, pieces) -> None:
    """What was read is what its requests produce alone, and in pieces what it is as a whole."""
    for request in stream.submission.requests:
        check_output(request)
    output = pieces[-1].output
    assert output.finished
    assert output.request_id == stream.request_id
    for sample in output.outputs:
        own = [piece for piece in pieces if piece.index == sample.index]
        assert "".join(map(str, own)) == sample.text
        assert sum((piece.token_ids for piece in own), ()) == sample.token_ids
        assert (own[-1].finish_reason, own[-1].stop_reason) == (sample.finish_reason, sample.stop_reason)
        assert not any(piece.finish_reason for piece in own[:-1])
    assert not any(piece.output for piece in pieces[:-1])


async def settled(llm: AsyncLLM) -> dict:
    """The statistics once nothing is left; fails where something is after some seconds."""
    for _ in range(500):
        stats = await llm.stats()
        if not (llm.num_unfinished or stats["num_running"] or stats["num_waiting"]):
            break
        await asyncio.sleep(0.01)
    assert (llm.num_unfinished, stats["num_running"], stats["num_waiting"]) == (0, 0, 0)
    assert (stats["slots_used"], stats["blocks_used"]) == (0, 0)
    assert not llm._loop._samples
    llm.llm.engine.between_turns(llm.llm.engine.scheduler.check_integrity)
    return stats
