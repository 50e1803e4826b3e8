"""`AsyncLLM`: an engine for programs of asyncio. A stream is an `async for`; leaving it ends the request."""

import asyncio
import collections
import dataclasses
import itertools
import pathlib
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gdnjax.config import EngineConfig
from gdnjax.sampling_params import SamplingParams
from gdnjax.serving.chat import template_options
from gdnjax.serving.frontend import Prompt
from gdnjax.serving.llm import LLM
from gdnjax.serving.loop import EngineLoop, EngineStoppedError, Piece, Reader
from gdnjax.serving.outputs import StreamOutput
from gdnjax.serving.submission import Submission, Urgency, urgencies
from gdnjax.serving.tokenizer import Tokenizer
from gdnjax.shapes import Params

PREPARERS = 4
"""Threads that check and tokenise prompts."""

COMPILERS = 2
"""Threads that do so for requests with a structure, which may take seconds to compile: others do not wait for them."""

PATIENCE = 10.0
"""Seconds that the end of the program waits for the turn that is under way."""

POLL = 0.01
"""Seconds between two looks whether everything has ended."""


class _Mailbox(Reader):
    """What a stream gets. The loop holds it, and not the stream, which can so be seen to be dropped."""

    def __init__(self, owner: "AsyncLLM", name: str | None):
        self.name = name
        self.submission: Submission | None = None
        self.pieces: collections.deque[Piece] = collections.deque()
        self.error: BaseException | None = None
        self.num_open = 0
        # The stream waits here; nobody has more than one task.
        self.waiter: asyncio.Future | None = None
        # Queued in the engine; to be aborted as soon as it is.
        self.queued = self.aborted = False
        self._owner = owner

    def receive(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.wake()

    def fail(self, error: BaseException) -> None:
        # The engine's thread does so, too, when it comes to it: whoever has read the end finds the stream gone.
        self.ended()
        self.error = error
        self.wake()

    def ended(self) -> None:
        self._owner._forget(self)

    def wake(self) -> None:
        """Whoever waits looks again. Called in the event loop."""
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class Stream:
    """The pieces of a request as they come: an asynchronous iterator of StreamOutput, for one task.

    The request is checked and queued by the first `await`, which raises what is wrong with it. Leaving the loop, by
    `break`, an error, cancellation or `aclose()`, aborts the request; so does dropping the object.
    """

    # Of one whose construction failed.
    _closed = True

    def __init__(
        self,
        owner: "AsyncLLM",
        request_id: str | None,
        prepare: Callable[[float], Submission],
        executor: ThreadPoolExecutor,
    ):
        self._owner, self._prepare, self._executor = owner, prepare, executor
        self._box = _Mailbox(owner, request_id)
        self._begun = self._closed = False
        # Samples whose last piece was not given out.
        self._num_left = 0

    @property
    def request_id(self) -> str | None:
        """The caller's name for the request, or the one that it was given as it began."""
        return self._box.name

    @property
    def submission(self) -> Submission | None:
        """The prompt's tokens and its requests, once it is prepared; None before."""
        return self._box.submission

    def __aiter__(self) -> "Stream":
        return self

    async def prepared(self) -> Submission:
        """Checks, tokenises and queues the request, if that was not done. Raises ValueError for what is wrong with it,
        and EngineStoppedError where nothing is taken any more.
        """
        if self._box.submission is None:
            if self._begun:
                raise RuntimeError("a stream is for one task: another one prepares it, or its request was refused")
            self._begun = True
            await self._begin()
        assert self._box.submission is not None
        return self._box.submission

    async def _begin(self) -> None:
        box, owner, began = self._box, self._owner, time.monotonic()
        box.event_loop = asyncio.get_running_loop()
        try:
            owner._register(box)
            submission = await box.event_loop.run_in_executor(self._executor, self._prepare, began)
            for request in submission.requests:
                request.arrival_time = began
            self._num_left = len(submission.requests)
            box.submission = submission
            owner._queue(box, submission)
        except BaseException:
            self._closed = True
            owner._forget(box)
            raise

    async def __anext__(self) -> StreamOutput:
        if self._closed:
            raise StopAsyncIteration
        box = self._box
        if box.waiter is not None:
            raise RuntimeError("a stream is for one task, and another one waits for its next piece")
        try:
            if box.submission is None:
                await self.prepared()
            while not box.pieces:
                if box.error is not None:
                    raise box.error
                box.waiter = box.event_loop.create_future()
                try:
                    await box.waiter
                finally:
                    box.waiter = None
                if self._closed:
                    # By another task.
                    raise StopAsyncIteration
        except BaseException:
            self._leave()
            raise
        return self._next()

    def _next(self) -> StreamOutput:
        """The next piece, and as one with it those of the same sample that have come right behind it."""
        pieces = self._box.pieces
        index, text, token_ids, logprobs, finish_reason, stop_reason = pieces.popleft()
        while pieces and pieces[0][0] == index:
            _, more, further, entries, finish_reason, stop_reason = pieces.popleft()
            text, token_ids = text + more, token_ids + further
            logprobs = None if logprobs is None or entries is None else logprobs + entries
        output = None
        if finish_reason is not None:
            self._num_left -= 1
            if not self._num_left:
                self._closed = True
                self._box.ended()
                assert self.submission is not None
                output = dataclasses.replace(self.submission.output(), request_id=str(self.request_id))
        return StreamOutput(text, tuple(token_ids), finish_reason, output, index, logprobs, stop_reason)

    async def aclose(self) -> None:
        """Aborts the request if it has not ended. What has come of it and was not read is dropped."""
        self._leave()

    def _leave(self) -> None:
        if not self._closed:
            self._closed = True
            self._owner._drop(self._box)
            self._box.wake()

    async def __aenter__(self) -> "Stream":
        return self

    async def __aexit__(self, *_: object) -> None:
        self._leave()

    def __del__(self) -> None:
        self._leave()


class AsyncLLM:
    """A model ready to generate, for programs of asyncio. Arguments and errors as of LLM.

    One thread owns the device, and others check and tokenise; several event loops, of several threads, may use one.
    `llm` is the LLM inside: its own calls work beside the streams.
    """

    def __init__(
        self,
        model: str | pathlib.Path,
        config: EngineConfig | None = None,
        *,
        tokenizer: str | pathlib.Path | Tokenizer | None = None,
        use_tqdm: bool = True,
        **kwargs: Any,
    ):
        self._start(LLM(model, config, tokenizer=tokenizer, use_tqdm=use_tqdm, **kwargs))

    @classmethod
    def from_llm(cls, llm: LLM) -> "AsyncLLM":
        """One over an LLM that there is, which is closed with it. Raises RuntimeError where the LLM is closed, or has
        an AsyncLLM already.
        """
        if llm.engine.closed:
            raise RuntimeError("this LLM is closed")
        made = cls.__new__(cls)
        made._start(llm)
        return made

    def _start(self, llm: LLM) -> None:
        self.llm = llm
        self._loop = EngineLoop(llm.engine)
        # Where nobody closes it. A thread in the middle of a step when the program ends would have the device torn down
        # under it.
        weakref.finalize(self, self._loop.stop_soon, "this AsyncLLM is gone", PATIENCE)
        self._preparers = ThreadPoolExecutor(PREPARERS, thread_name_prefix="gdnjax-prepare")
        self._compilers = ThreadPoolExecutor(COMPILERS, thread_name_prefix="gdnjax-compile")
        # A stream that is collected in the middle of this leaves it, too.
        self._lock = threading.RLock()
        self._boxes: dict[str, _Mailbox] = {}
        self._numbers = itertools.count()
        self._refusal: str | None = None

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Stream:
        """The stream of a prompt's completions. What is wrong is raised by the first `await` of it.

        `priority` and `timeout`, from that `await` on, are as of LLM.generate. `request_id` is a name that no stream
        has which has not ended.
        """

        def prepare(began: float) -> Submission:
            urgency = _urgency(priority, timeout, began)
            (group,) = self.llm.frontend.prepare([prompt], sampling_params, [urgency])
            return group

        return Stream(self, request_id, prepare, self._executor_for(sampling_params))

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        sampling_params: SamplingParams | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        priority: int = 0,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Stream:
        """The stream of the answers to one conversation, rendered as by LLM.chat; else as `generate`.

        `continue_final_message` goes on with the last message in place of an answer of its own, for which
        `add_generation_prompt` must be False. `tools` go to the template, which must know them.
        """
        given = {
            "chat_template": chat_template,
            "continue_final_message": continue_final_message or None,
            "tools": tools,
        }
        given = {name: value for name, value in given.items() if value is not None}

        def prepare(began: float) -> Submission:
            urgency = _urgency(priority, timeout, began)
            options = template_options(chat_template_kwargs, given)
            (group,) = self.llm.frontend.prepare_chat(
                messages,
                sampling_params,
                lambda count: [urgency] * count,
                options=options,
                add_generation_prompt=add_generation_prompt,
            )
            return group

        return Stream(self, request_id, prepare, self._executor_for(sampling_params))

    async def abort(self, request_id: str) -> bool:
        """Ends a request by its name: its stream ends with finish_reason "abort". False where there is none."""
        with self._lock:
            box = self._boxes.get(request_id)
        if box is None:
            return False
        box.aborted = True
        if box.queued and box.submission is not None:
            self._loop.abort(box.submission)
        return True

    async def reset_prefix_cache(self) -> bool:
        """As LLM.reset_prefix_cache, between turns."""
        return await asyncio.wrap_future(self._loop.call(self.llm.reset_prefix_cache))

    async def update_weights(self, params: Params) -> None:
        """As LLM.update_weights, between turns: streams go on."""
        await asyncio.wrap_future(self._loop.call(lambda: self.llm.update_weights(params)))

    async def stats(self) -> dict[str, Any]:
        """As LLM.stats, between turns."""
        return await asyncio.wrap_future(self._loop.call(self.llm.stats))

    @property
    def num_unfinished(self) -> int:
        """Streams that have begun and whose requests have not ended, those that are being prepared among them."""
        return len(self._boxes)

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine's thread, if it died: nothing is served any more."""
        return self._loop.failure

    async def drain(self, timeout: float | None = None) -> None:
        """From now on streams are refused; returns when those that have begun have ended. Raises TimeoutError where
        some have not after `timeout` seconds: they go on.
        """
        with self._lock:
            self._refusal = self._refusal or "this AsyncLLM drains: it finishes what runs, and takes nothing new"
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.num_unfinished:
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"{self.num_unfinished} requests have not ended after {timeout} seconds")
            await asyncio.sleep(POLL)

    def close(self) -> None:
        """Frees the device. Streams in progress fail with EngineStoppedError, and so does whatever comes later. Waits
        for the turn that is under way.
        """
        with self._lock:
            self._refusal = "this AsyncLLM is closed"
        self._loop.stop("this AsyncLLM is closed")
        for executor in (self._preparers, self._compilers):
            executor.shutdown(wait=False, cancel_futures=True)
        self.llm.close()

    def __enter__(self) -> "AsyncLLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raises TypeError, as an LLM does."""
        raise TypeError("an AsyncLLM cannot be copied or pickled; make another of an LLM of the same directory")

    # Of streams.

    def _executor_for(self, params: SamplingParams | None) -> ThreadPoolExecutor:
        """The threads that prepare a request."""
        structured = isinstance(params, SamplingParams) and params.structured_outputs is not None
        return self._compilers if structured else self._preparers

    def _register(self, box: _Mailbox) -> None:
        """Notes a stream that begins, under its name. Raises ValueError for a name that another one has."""
        name = box.name
        if name is not None and (not isinstance(name, str) or not name):
            raise ValueError(f"request_id must be a text that is not empty, got {name!r}")
        with self._lock:
            if self._refusal is not None:
                raise EngineStoppedError(self._refusal)
            if name in self._boxes:
                raise ValueError(f"request_id {name!r} is that of a request that has not ended")
            while name is None or name in self._boxes:
                name = f"request-{next(self._numbers)}"
            self._boxes[name] = box
        box.name = name

    def _queue(self, box: _Mailbox, submission: Submission) -> None:
        self.llm.remember([submission])
        self._loop.add(box, submission)
        box.queued = True
        # Nobody else has seen that it is queued.
        if box.aborted:
            self._loop.abort(submission)

    def _drop(self, box: _Mailbox) -> None:
        if box.queued and box.submission is not None:
            self._loop.drop(box.submission)
        else:
            self._forget(box)

    def _forget(self, box: _Mailbox) -> None:
        with self._lock:
            if box.name is not None and self._boxes.get(box.name) is box:
                del self._boxes[box.name]


def _urgency(priority: int, timeout: float | None, began: float) -> Urgency:
    """A timeout counts from the moment that the stream began."""
    (urgency,) = urgencies(1, priority, timeout)
    return urgency if timeout is None else dataclasses.replace(urgency, deadline=began + timeout)
