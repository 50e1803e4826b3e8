"""Answers to clients that may leave: streams of server-sent events, and work that ends with its client."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from gdnjax.serving.server.errors import ApiError, unexpected

log = logging.getLogger("gdnjax.server")

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
SILENCE = b": keep-alive\n\n"
"""A comment, which clients skip."""

SHORT_SEND = "gdnjax.send"
"""Where a scope may have a shorter way to the client, for what follows the beginning of a response: without the layers
of the framework that watch whether there was one, and cost as much for each token as making its event.
"""

encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


class ClientGoneError(Exception):
    """The client has left before its answer was there."""


def frame(content: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: " + encode(content).encode() + b"\n\n"


class Pattern:
    """Events that differ in a text alone, which stands wherever `HOLE` is the value of a key in `content`.

    The rest is encoded once: encoding a chunk as a whole for every token takes longer than sending it.
    """

    HOLE = "\0text\0"

    def __init__(self, content: dict[str, Any]):
        self._parts = frame(content).split(encode(self.HOLE).encode())

    def frame(self, text: str) -> bytes:
        """The event with that text."""
        return encode(text).encode().join(self._parts)


async def frames(chunks: AsyncIterator[dict[str, Any] | bytes]) -> AsyncIterator[bytes]:
    """A stream in OpenAI's form: its chunks, which may be events already, an error as a chunk where there is one, and
    [DONE].
    """
    try:
        async for chunk in chunks:
            yield chunk if isinstance(chunk, bytes) else frame(chunk)
    except ApiError as error:
        yield frame(error.body)
    except Exception as error:
        log.exception("a stream failed")
        yield frame(unexpected(error).body)
    yield DONE


async def named_frames(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """A stream whose events have names, each its `type`; errors are events already."""
    async for event in events:
        yield b"event: " + event["type"].encode() + b"\n" + frame(event)


class EventStream(Response):
    """Sends `events` as they come and closes `source` in the end, however it ends: also when the client leaves.

    `source` is what the events are made of; its aclose() gives back whatever they hold. After `keep_alive` seconds of
    silence there is a comment.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        source: Any,
        *,
        keep_alive: float,
        headers: Mapping[str, str] | None = None,
    ):
        self._events, self._source, self._keep_alive = events, source, keep_alive
        self.status_code, self.background = 200, None
        self._sent = time.monotonic()
        # Proxies that buffer would hold tokens back.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        short = scope.get(SHORT_SEND, send)
        tasks = [asyncio.ensure_future(work) for work in (self._write(short), gone(receive), self._beat(short))]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await asyncio.wait(tasks[:2], return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _end(tasks)
            await self._source.aclose()
        if not tasks[0].cancelled() and (error := tasks[0].exception()) and not isinstance(error, OSError):
            raise error

    async def _write(self, send: Send) -> None:
        async for event in self._events:
            self._sent = time.monotonic()
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _beat(self, send: Send) -> None:
        while True:
            wait = self._sent + self._keep_alive - time.monotonic()
            if wait <= 0:
                self._sent = time.monotonic()
                await send({"type": "http.response.body", "body": SILENCE, "more_body": True})
            await asyncio.sleep(max(wait, 0.01))


async def gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives. Where the client leaves before that, ends it and raises ClientGoneError."""
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        result, task = task.result(), None
        return result
    finally:
        if task is not None:
            await _end([task])
            if not task.cancelled() and task.exception() is None:
                # A stream that came when nobody took it any more.
                close = getattr(task.result(), "aclose", None)
                if close is not None:
                    await close()
        await _end([left])


async def _end(tasks: Sequence[asyncio.Future]) -> None:
    for task in tasks:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks, return_exceptions=True)
