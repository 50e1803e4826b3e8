"""Connections, byte by byte: what comes before a body has bounds, of size and of time."""

import contextlib
import json
import socket
import time

import httpx
import pytest
from fastapi import FastAPI

from gdnjax.serving.server import connections
from tests.serving.server.sockets import serving

HEAD = b"GET /here HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture(scope="module")
def place():
    app = FastAPI()

    @app.get("/here")
    async def here() -> str:
        return "here"

    @app.post("/here")
    async def size(body: dict) -> int:
        return len(json.dumps(body))

    with serving(app) as url:
        yield "127.0.0.1", int(url.rpartition(":")[2])


@contextlib.contextmanager
def connected(place):
    with socket.create_connection(place, timeout=30) as made:
        yield made


def rest_of(connection):
    """What comes until the server closes it."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(1 << 16):
            found += piece
    return found


def sent(connection, piece, times):
    """How many of so many pieces the server takes."""
    for count in range(times):
        try:
            connection.sendall(piece)
        except OSError:
            return count
    return times


@pytest.mark.parametrize(
    ("first", "piece"),
    [
        (HEAD + b"X: ", b"a" * 4096),
        (HEAD, b"".join(b"a%d: b\r\n" % number for number in range(500))),
        (b"GET /", b"a" * 4096),
        (HEAD + b"\r\n" + HEAD + b"X: ", b"a" * 4096),
    ],
    ids=["one-header", "many-headers", "path", "the-second-request"],
)
def test_heads_without_an_end_are_not_kept(first, piece, place):
    with connected(place) as connection:
        connection.sendall(first)
        # What fits into the buffers between here and there is taken in any case.
        assert sent(connection, piece, 20_000) < 20_000


def test_heads_that_are_too_large_are_told(place):
    with connected(place) as connection:
        connection.sendall(HEAD + b"X: " + b"a" * connections.MAX_HEAD_BYTES)
        assert rest_of(connection).startswith(b"HTTP/1.1 431 ")


def test_heads_up_to_the_bound_are_read(place):
    with connected(place) as connection:
        filler = b"X: " + b"a" * (connections.MAX_HEAD_BYTES - 200)
        connection.sendall(HEAD + filler)
        time.sleep(0.05)
        connection.sendall(b"\r\nConnection: close\r\n\r\n")
        assert rest_of(connection).startswith(b"HTTP/1.1 200 OK")


def test_bodies_are_none_of_the_head(place):
    with httpx.Client(base_url=f"http://{place[0]}:{place[1]}") as client:
        for _ in range(3):
            assert client.post("/here", json={"x": "a" * 4 * connections.MAX_HEAD_BYTES}).status_code == 200


@pytest.mark.parametrize("first", [b"", HEAD, HEAD + b"\r\n" + HEAD], ids=["nothing", "half", "half-of-the-second"])
def test_heads_that_do_not_come_are_given_up(first, place, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.3)
    with connected(place) as connection:
        connection.sendall(first)
        rest_of(connection)


def test_answers_may_take_longer_than_heads(place, monkeypatch):
    """Whoever has sent his head is waited for, and so is his next one."""
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.3)
    with connected(place) as connection:
        connection.sendall(
            HEAD.replace(b"GET", b"POST") + b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n"
        )
        time.sleep(0.6)
        connection.sendall(b"{}")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 OK")
        time.sleep(0.6)
        connection.sendall(HEAD + b"Connection: close\r\n\r\n")
        assert rest_of(connection).startswith(b"HTTP/1.1 200 OK")
