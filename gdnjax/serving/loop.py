"""One thread that owns an engine: requests go in by a queue, and what comes of them goes out to event loops.

Nobody else needs to wait for the device. Whoever takes a turn beside it, as `LLM.generate` does in a thread of its own,
serves the readers here, too: they are told by the engine (`Engine.listen`), not by the turn.
"""

import abc
import asyncio
import concurrent.futures
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from gdnjax.serving.engine import Engine
from gdnjax.serving.request import Request
from gdnjax.serving.submission import Submission
from gdnjax.serving.trials import Trials

log = logging.getLogger("gdnjax")

ATTEMPTS = 3
"""How often the engine tries to start over before its thread gives up."""

PAUSE = 0.1
"""Seconds before it tries again, twice as many the next time."""

SETTLING = 2
"""Turns that are taken when nobody is left: the last one in flight is read, and who was aborted is counted."""

PATIENCE = 10.0
"""Seconds that the end of the program waits for the turn that is under way."""


class EngineStoppedError(RuntimeError):
    """The engine takes no more requests: it is closed, or it drains, or its thread has failed."""


Piece = tuple[int, str, list[int], list[Any] | None, str | None, int | str | None]
"""What has come of a sample since its last piece: its index, text, token ids, their log-probabilities, finish_reason
and stop_reason, as of a StreamOutput.
"""


class Reader(abc.ABC):
    """Who reads a submission.

    event_loop  where `receive` and `fail` are called.
    num_open    samples that have not ended; the loop's to count.
    """

    event_loop: asyncio.AbstractEventLoop
    num_open: int

    @abc.abstractmethod
    def receive(self, piece: Piece) -> None:
        """The next piece."""

    @abc.abstractmethod
    def fail(self, error: BaseException) -> None:
        """There will be no more pieces, and not for an end of the request."""

    @abc.abstractmethod
    def ended(self) -> None:
        """Nothing of it is in the engine any more. Called by any thread; it may neither wait nor raise."""


@dataclasses.dataclass(slots=True, eq=False)
class _Sample:
    """How far a reader has been told of a request."""

    reader: Reader
    num_characters: int = 0
    num_tokens: int = 0
    # When it was last told of something.
    told: float = 0.0


class _Command(NamedTuple):
    """What the thread is to do, and what is to be done in its place where the thread has ended."""

    do: Callable[[], None]
    refuse: Callable[[EngineStoppedError], None]


class EngineLoop:
    """The thread, which begins with the object and ends with `stop()`, or by a failure."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        # Of requests that have not ended. Looked at and changed between turns only, whoever takes them.
        self._samples: dict[Request, _Sample] = {}
        self._failure: BaseException | None = None
        # A finaliser may post in the middle of a post.
        self._lock = threading.RLock()
        self._stopped: str | None = None
        # What the thread is at, to be refused where it fails there.
        self._undone: _Command | None = None
        self._trials = Trials(engine)
        # Turns in a row that failed for nobody.
        self._in_vain = 0
        engine.listen(self._hear)
        self._thread = threading.Thread(target=self._run, name="gdnjax-engine", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> BaseException | None:
        """What ended the thread, if it was not `stop()`."""
        return self._failure

    def add(self, reader: Reader, submission: Submission) -> None:
        """Queues requests whose pieces go to `reader`. Raises EngineStoppedError where nobody would take them."""
        reader.num_open = len(submission.requests)
        self._post(lambda: self._add(reader, submission), lambda error: self._fail(reader, error))

    def abort(self, submission: Submission) -> None:
        """Ends requests wherever they are; their reader is told. May be called from anywhere, finalisers included."""
        self._commands.put(_Command(lambda: self._engine.abort(*submission.requests), lambda error: None))

    def drop(self, submission: Submission) -> None:
        """The same where nobody reads any more."""
        self._commands.put(_Command(lambda: self._drop(submission.requests), lambda error: None))

    def call(self, function: Callable[[], Any]) -> concurrent.futures.Future:
        """`function()` by the thread, between turns. Raises EngineStoppedError where nobody would call it."""
        future: concurrent.futures.Future = concurrent.futures.Future()

        def answer() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._post(answer, future.set_exception)
        return future

    def stop(self, reason: str) -> None:
        """Ends the thread behind the turn that is under way, and waits for it. Readers fail with
        EngineStoppedError(reason).
        """
        self.stop_soon(reason)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def stop_soon(self, reason: str, patience: float = 0.0) -> None:
        """The same, waiting for `patience` seconds at most."""
        with self._lock:
            self._stopped = self._stopped or reason
        self._commands.put(None)
        if patience and threading.current_thread() is not self._thread:
            self._thread.join(patience)

    def _post(self, do: Callable[[], None], refuse: Callable[[EngineStoppedError], None]) -> None:
        with self._lock:
            if self._stopped is not None:
                raise self._refusal()
            self._commands.put(_Command(do, refuse))

    def _refusal(self) -> EngineStoppedError:
        error = EngineStoppedError(self._stopped)
        error.__cause__ = self._failure
        return error

    # The thread.

    def _run(self) -> None:
        try:
            settling = 0
            while self._obey(wait=not (self._samples or settling)):
                settling = SETTLING if self._samples else max(0, settling - 1)
                if self._samples or settling:
                    self._turn()
        except BaseException as error:
            self._die(error)
        self._end()

    def _die(self, error: BaseException) -> None:
        with self._lock:
            if self._engine.closed:
                self._stopped = self._stopped or "this LLM is closed"
                return
            self._failure = error
            self._stopped = f"the engine's thread has failed: {type(error).__name__}: {error}"
        log.error("the engine's thread ends", exc_info=error)

    def _obey(self, wait: bool) -> bool:
        """Does what was posted, and waits for it if there is nothing else to do. False: the thread is to end."""
        try:
            command = self._commands.get() if wait else self._commands.get_nowait()
            while command is not None:
                self._undone = command
                # Another thread's turn may have been cut off.
                self._recover()
                self._engine.between_turns(command.do)
                self._undone = None
                command = self._commands.get_nowait()
        except queue.Empty:
            return True
        return False

    def _end(self) -> None:
        """Nobody is to wait for what will not come."""
        self._engine.listen(None)
        readers = dict.fromkeys(sample.reader for sample in self._samples.values())
        requests = list(self._samples)
        self._samples.clear()
        for reader in readers:
            self._fail(reader, self._refusal())
        # Nothing is posted any more that could be refused: it was said that the thread has stopped.
        commands = [self._undone]
        while not self._commands.empty():
            commands.append(self._commands.get())
        for command in commands:
            if command is not None:
                command.refuse(self._refusal())
        try:
            self._engine.abort(*requests)
        except Exception:
            log.exception("%d requests stay in an engine that cannot start over", len(requests))

    def _turn(self) -> None:
        """A turn, after which the engine is whole, whatever happened in it. Raises where it cannot be made so."""
        error = None
        try:
            error = self._engine.between_turns(self._attempt)
            if error is None:
                self._in_vain = 0
                self._trials.passed()
                return
            if not self._trials.has_suspects:
                self._in_vain += 1
            log.warning("a turn was cut off and is tried again", exc_info=error)
            self._recover()
            self._trials.failed(error)
        except Exception:
            if self._engine.closed:
                raise
            log.exception("what follows a turn was cut off, too, and is tried again")
            self._recover()
        if self._in_vain == ATTEMPTS:
            raise RuntimeError("turns fail, and there is no request that it could be for") from error

    def _attempt(self) -> Exception | None:
        try:
            self._engine.step()
        except Exception as error:
            if self._engine.closed:
                raise
            self._trials.suspect()
            return error
        return None

    def _recover(self) -> None:
        """Makes an engine whole whose turn was cut off, and is patient with a device that has no memory for it now."""
        for attempt in range(ATTEMPTS):
            try:
                self._engine.between_turns(lambda: None)
                return
            except Exception:
                if self._engine.closed or attempt == ATTEMPTS - 1:
                    raise
                log.exception("the engine cannot start over, and tries again")
                time.sleep(PAUSE * 2**attempt)

    def _add(self, reader: Reader, submission: Submission) -> None:
        self._samples |= {request: _Sample(reader) for request in submission.requests}
        for request in submission.requests:
            self._engine.add(request)
        if self._trials.under_way:
            self._trials.hold(*submission.requests)

    def _drop(self, requests: Iterable[Request]) -> None:
        self._let_go(requests)
        self._engine.abort(*requests)

    def _let_go(self, requests: Iterable[Request]) -> None:
        for request in requests:
            sample = self._samples.pop(request, None)
            if sample is not None:
                self._close_one(sample.reader)

    def _close_one(self, reader: Reader) -> None:
        reader.num_open -= 1
        if not reader.num_open:
            reader.ended()

    def _hear(self, moved: list[Request]) -> None:
        """Hands on what has come of requests: in one call of each event loop."""
        told: dict[asyncio.AbstractEventLoop, list[tuple[Reader, Piece]]] = {}
        closed: list[Reader] = []
        samples, now = self._samples, time.monotonic()
        observe = self._engine.metrics.histograms["inter_token_latency"].observe
        # What is done here the device may have to wait for, with every request of a turn: no call that can be spared.
        for request in moved:
            sample = samples.get(request)
            if sample is None:
                continue
            start, finish_reason = sample.num_tokens, request.finish_reason
            token_ids = request.output_token_ids[start:]
            if not token_ids and finish_reason is None:
                continue
            text = request.detokenizer.text_since(sample.num_characters)
            sample.num_tokens = start + len(token_ids)
            if start:
                observe(now - sample.told)
            sample.told = now
            sample.num_characters += len(text)
            reader = sample.reader
            logprobs = None if request.params.logprobs is None else request.logprobs_since(start)
            piece = (request.index, text, token_ids, logprobs, finish_reason, request.stop_reason)
            if finish_reason is not None:
                del samples[request]
                closed.append(reader)
            batch = told.get(reader.event_loop)
            if batch is None:
                batch = told[reader.event_loop] = []
            batch.append((reader, piece))
        for event_loop, pieces in told.items():
            try:
                event_loop.call_soon_threadsafe(_deliver, pieces)
            except RuntimeError:
                self._lose(event_loop)
        for reader in closed:
            self._close_one(reader)

    def _lose(self, event_loop: asyncio.AbstractEventLoop) -> None:
        """An event loop was closed with streams in it: nobody reads them any more."""
        lost = [request for request, sample in self._samples.items() if sample.reader.event_loop is event_loop]
        log.info("an event loop was closed with %d unfinished requests in it, which end", len(lost))
        self._commands.put(_Command(lambda: self._drop(lost), lambda error: None))

    def _fail(self, reader: Reader, error: BaseException) -> None:
        try:
            reader.event_loop.call_soon_threadsafe(reader.fail, error)
        except RuntimeError:
            log.info("a stream whose event loop is closed is not told: %s", error)
        reader.ended()


def _deliver(pieces: list[tuple[Reader, Piece]]) -> None:
    for reader, piece in pieces:
        reader.receive(piece)
