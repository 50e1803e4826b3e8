"""What the routes share: the engine, who may come in, and the requests that are on their way."""

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

from gdnjax.serving.async_llm import AsyncLLM, Stream
from gdnjax.serving.loop import EngineStoppedError
from gdnjax.serving.outputs import RequestOutput, StreamOutput
from gdnjax.serving.scheduler import NONE_LEFT
from gdnjax.serving.server.budget import BudgetedStream
from gdnjax.serving.server.errors import ApiError, bad_request
from gdnjax.serving.server.logprobs import TokenTexts
from gdnjax.serving.server.metrics import make_registry
from gdnjax.serving.server.protocol import GenerationBody
from gdnjax.serving.server.sampling import fields_of
from gdnjax.serving.server.settings import ServerConfig
from gdnjax.serving.server.structures import in_fields_of

log = logging.getLogger("gdnjax.server")

RETRY_SOON = {"Retry-After": "5"}

POLL_S = 0.02
"""How often a server that is to end looks whether everybody has his answer."""


class Service:
    """The engine behind an application. Made before the engine is, so that it can say that it is not ready.

    Belongs to the event loop's thread.
    """

    def __init__(self, llm: AsyncLLM | None, config: ServerConfig):
        self.config = config
        self._llm: AsyncLLM | None = None
        self._texts: TokenTexts | None = None
        self._registry: CollectorRegistry | None = None
        self._runs: dict[Run, None] = {}
        self._ending: ApiError | None = None
        self._hurried = False
        self._serials = itertools.count()
        # Seconds of an answer, newer ones counting more: for those that are told to come back.
        self._seconds = 1.0
        self.started = time.time()
        if llm is not None:
            self.begin(llm)

    def begin(self, llm: AsyncLLM) -> None:
        """The engine is there: from now on the server is ready."""
        llm.llm.frontend.rehearse_grammars(float(self.config.structure_timeout))
        self._registry = make_registry(llm, self.config.served_model_names[0])
        self._llm = llm
        self._texts = TokenTexts(llm.llm.tokenizer)

    @property
    def llm(self) -> AsyncLLM:
        """The engine. Raises ApiError while there is none, when it has failed, and when the server is to end."""
        self.check_ready()
        assert self._llm is not None
        return self._llm

    @property
    def texts(self) -> TokenTexts:
        assert self._texts is not None
        return self._texts

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine's thread, which no request comes back from."""
        return self._llm.failure if self._llm is not None else None

    def metrics(self) -> bytes:
        """What Prometheus is told. Raises ApiError before there is an engine. May be called by any thread."""
        if self._llm is None:
            self.check_ready()
        assert self._registry is not None
        return generate_latest(self._registry)

    @property
    def load(self) -> int:
        """Samples that clients wait for."""
        return sum(run.num_samples for run in self._runs)

    def check_ready(self) -> None:
        """Raises ApiError of status 503 unless requests can be served."""
        if self._ending is not None:
            raise self._ending
        if self._llm is None:
            raise ApiError(503, "the server is starting: the model is loaded and compiled", headers=RETRY_SOON)
        if self.failure is not None:
            raise ApiError(503, f"the engine has failed: {self.failure}")

    def check_model(self, name: str | None) -> str:
        """What answers call the model. Raises ApiError for another model's name."""
        names = self.config.served_model_names
        if name is None:
            return names[0]
        if name not in names:
            raise ApiError(404, f"the model {name!r} does not exist; there is: {', '.join(names)}", param="model")
        return name

    @contextlib.asynccontextmanager
    async def admit(self, kind: str, request_id: str | None, num_samples: int) -> AsyncIterator["Run"]:
        """Room for one HTTP request: a Run, which is closed if the block is left by an error.

        Raises ApiError where the queue is full. The run's id is `kind` and the client's request id, or a new one.
        """
        room = self.llm.llm.config.max_num_seqs + self.config.max_queue
        if num_samples > room:
            raise ApiError(400, f"{num_samples} samples are asked for at once; allowed: {room}", param="n")
        if self.load + num_samples > room:
            wait = max(1, min(60, math.ceil(self._seconds)))
            raise ApiError(
                429,
                f"the queue is full: {self.load} samples are on their way, and there is room for {room}",
                headers={"Retry-After": str(wait)},
            )
        run = Run(self, self.answer_id(kind, request_id), request_id, num_samples)
        self._runs[run] = None
        try:
            yield run
        except BaseException:
            await run.close()
            raise

    @staticmethod
    def answer_id(kind: str, request_id: str | None) -> str:
        """What an answer is called: `kind`, and the client's name for its request or a new one."""
        return f"{kind}-{request_id or uuid.uuid4().hex}"

    async def abort_in_engine(self, name: str) -> None:
        assert self._llm is not None
        await self._llm.abort(name)

    def new_id(self) -> str:
        """A name in the engine, which nothing else has: clients may use one of theirs twice."""
        return f"http-{next(self._serials)}"

    def _forget(self, run: "Run") -> None:
        if run in self._runs:
            del self._runs[run]
            self._seconds += (time.monotonic() - run.began - self._seconds) / 8

    async def abort(self, request_ids: Iterable[str] | None) -> list[str]:
        """Ends answers by their ids, or all; they end with finish_reason "abort". Returns the ids of those it ended."""
        wanted = None if request_ids is None else set(request_ids)
        runs = [run for run in self._runs if wanted is None or {run.answer_id, run.request_id} & wanted]
        for run in runs:
            await run.abort()
        return [run.answer_id for run in runs]

    def hurry(self) -> None:
        """Has `end` wait no longer. May be called by a signal's handler."""
        self._hurried = True

    async def end(self) -> bool:
        """Lets in nobody any more, and waits for those who wait for answers, for as long as the configuration says.

        The answers of the others end with an error then. Whether there were none.
        """
        self._ending = ApiError(503, "the server is shutting down", headers={"Connection": "close"})
        deadline = time.monotonic() + self.config.shutdown_timeout
        while self._runs and time.monotonic() < deadline and not self._hurried:
            await asyncio.sleep(POLL_S)
        left = list(self._runs)
        if left:
            log.warning("shutting down: %d answers are cut off", len(left))
        for run in left:
            await run.abort(self._ending)
        return not left


class Run:
    """The prompts of one HTTP request on their way through the engine. `close()` ends what has not ended.

    answer_id    what the answer is called.
    request_id   what the client calls its request.
    num_samples  samples of all its prompts.
    """

    def __init__(self, service: Service, answer_id: str, request_id: str | None, num_samples: int):
        self.answer_id, self.request_id, self.num_samples = answer_id, request_id, num_samples
        self.began = time.monotonic()
        self.created = int(time.time())
        self._service = service
        self._streams: list[Stream | BudgetedStream] = []
        self._engine_ids: list[str] = []
        self._cut: ApiError | None = None

    async def prepare(
        self, make: Sequence[Callable[[str], Stream | BudgetedStream]], body: GenerationBody
    ) -> list[Any]:
        """Has the engine check and queue the prompts: a stream for each function of `make`, which is given its name.

        Returns their submissions. Raises ApiError, with the field of `body` that is to blame.
        """
        self._streams = [each(self.new_engine_id()) for each in make]
        prepared = await asyncio.gather(*(stream.prepared() for stream in self._streams), return_exceptions=True)
        for found in prepared:
            if isinstance(found, ValueError):
                raise in_fields_of(body, bad_request(found, fields_of(body))) from found
            if isinstance(found, EngineStoppedError):
                raise ApiError(503, f"the engine takes nothing any more: {found}") from found
            if isinstance(found, BaseException):
                raise found
        return prepared

    def new_engine_id(self) -> str:
        """A name in the engine for one more of its prompts."""
        self._engine_ids.append(self._service.new_id())
        return self._engine_ids[-1]

    async def pieces(self) -> AsyncGenerator[tuple[int, StreamOutput], None]:
        """What comes of the prompts, each with its prompt's index. Raises ApiError for what goes wrong."""
        try:
            if len(self._streams) == 1:
                async for piece in self._streams[0]:
                    self._check(piece)
                    yield 0, piece
                return
            async with contextlib.aclosing(_merged(self._streams)) as merged:
                async for index, piece in merged:
                    self._check(piece)
                    yield index, piece
        except (ApiError, asyncio.CancelledError):
            raise
        except Exception as error:
            if self._cut is not None:
                raise self._cut from error
            if self._service.failure is not None:
                raise ApiError(503, f"the engine has failed: {self._service.failure}") from error
            log.exception("a request failed")
            raise ApiError(500, f"the request failed: {error}") from error

    async def outputs(self) -> list[RequestOutput]:
        """The whole outputs of the prompts, in order."""
        found: dict[int, RequestOutput] = {}
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for index, piece in pieces:
                if piece.output is not None:
                    found[index] = piece.output
        return [found[index] for index in range(len(self._streams))]

    def _check(self, piece: StreamOutput) -> None:
        if piece.finish_reason == "error":
            if str(piece.stop_reason).startswith(NONE_LEFT):
                # Which asking again would not change.
                raise ApiError(400, f"the request cannot go on: {piece.stop_reason}")
            raise ApiError(500, f"the request failed: {piece.stop_reason}")
        if piece.finish_reason != "abort":
            return
        if self._cut is not None:
            raise self._cut
        if piece.stop_reason == "timeout":
            raise ApiError(504, f"the answer took longer than {self._service.config.request_timeout:g} s")

    async def abort(self, why: ApiError | None = None) -> None:
        """Ends it in the engine. Whoever waits for it gets what there is, or `why`."""
        self._cut = why
        for stream in self._streams:
            if isinstance(stream, BudgetedStream):
                stream.aborted = True
        for name in self._engine_ids:
            await self._service.abort_in_engine(name)

    async def close(self) -> None:
        """Ends what has not ended, and gives up its room."""
        self._service._forget(self)
        await asyncio.gather(*(stream.aclose() for stream in self._streams), return_exceptions=True)


@dataclasses.dataclass
class Chunks:
    """A stream of chunks that holds a run. Whoever is given one iterates over it, one way or the other, and closes it.

    make  begins the chunks; told True, it may give events in their place, which say the same.
    """

    make: Callable[[bool], AsyncGenerator[Any, None]]
    run: Run
    _begun: AsyncGenerator[Any, None] | None = None

    def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        return self._begin(False)

    def framed(self) -> AsyncIterator[dict[str, Any] | bytes]:
        """Chunks, most of them as the events that they become."""
        return self._begin(True)

    def _begin(self, framed: bool) -> AsyncGenerator[Any, None]:
        assert self._begun is None, "the chunks of a run come once"
        self._begun = self.make(framed)
        return self._begun

    async def aclose(self) -> None:
        # One that has not begun would not run its own finally.
        if self._begun is not None:
            await self._begun.aclose()
        await self.run.close()


async def _merged(streams: Sequence[Stream | BudgetedStream]) -> AsyncGenerator[tuple[int, StreamOutput], None]:
    """What comes of several streams, as it comes."""
    arrived: asyncio.Queue[tuple[int, StreamOutput | BaseException | None]] = asyncio.Queue()

    async def pump(index: int, stream: Stream | BudgetedStream) -> None:
        try:
            async for piece in stream:
                arrived.put_nowait((index, piece))
        except Exception as error:
            arrived.put_nowait((index, error))
        else:
            arrived.put_nowait((index, None))

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            index, piece = await arrived.get()
            if isinstance(piece, BaseException):
                raise piece
            if piece is None:
                left -= 1
            else:
                yield index, piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
