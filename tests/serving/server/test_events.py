"""Streams to clients, without an engine: comments in silence, errors as chunks, and nothing that stays open."""

import asyncio

import pytest

from gdnjax.serving.server.errors import ApiError
from gdnjax.serving.server.events import DONE, SILENCE, EventStream, frames


class Source:
    """Chunks with pauses between them, that know whether they were closed."""

    def __init__(self, *chunks):
        self.chunks, self.closed = list(chunks), 0

    async def __aiter__(self):
        for chunk in self.chunks:
            if isinstance(chunk, Exception):
                raise chunk
            if isinstance(chunk, float):
                await asyncio.sleep(chunk)
            else:
                yield chunk

    async def aclose(self):
        self.closed += 1


def sent(source, *, leaves_after=None, fails=False, keep_alive=10.0):
    """The bodies that a client gets, which may leave after some seconds, or whose connection fails."""
    bodies = []

    async def receive():
        await asyncio.sleep(3600 if leaves_after is None else leaves_after)
        return {"type": "http.disconnect"}

    async def send(message):
        if message["type"] == "http.response.body":
            if fails:
                raise OSError("gone")
            bodies.append(message["body"])

    response = EventStream(frames(aiter(source)), source, keep_alive=keep_alive)
    asyncio.run(asyncio.wait_for(response({"type": "http"}, receive, send), 30))
    assert source.closed == 1
    return bodies


def test_chunks_are_events_and_the_last_one_says_so():
    assert sent(Source({"a": "\u00e4\n"}, {"b": 1})) == [
        'data: {"a":"\u00e4\\n"}\n\n'.encode(),
        b'data: {"b":1}\n\n',
        DONE,
        b"",
    ]


def test_errors_are_the_last_chunk():
    known = sent(Source({"a": 1}, ApiError(504, "too slow"), {"never": 1}))
    assert known[1:] == [
        b'data: {"error":{"message":"too slow","type":"TimeoutError","param":null,"code":504}}\n\n',
        DONE,
        b"",
    ]
    other = sent(Source(RuntimeError("mistake")))
    assert b'"code":500' in other[0]
    assert other[1:] == [DONE, b""]


def test_silence_is_broken_by_comments():
    bodies = sent(Source({"a": 1}, 0.3, {"b": 1}), keep_alive=0.05)
    assert bodies.count(SILENCE) >= 2
    assert [body for body in bodies if body != SILENCE] == [b'data: {"a":1}\n\n', b'data: {"b":1}\n\n', DONE, b""]
    assert SILENCE not in sent(Source({"a": 1}, 0.05, {"b": 1}), keep_alive=5.0)


@pytest.mark.parametrize("how", [{"leaves_after": 0.05}, {"fails": True}])
def test_source_is_closed_when_the_client_is_gone(how):
    assert DONE not in sent(Source({"a": 1}, 20.0, {"b": 1}), **how)


def test_source_that_has_not_begun_is_closed():
    assert sent(Source({"a": 1}), leaves_after=0.0)[1:] in ([], [DONE], [DONE, b""])
