"""A client of many streams at once that reads no JSON of them: what it spent on a chunk would be the server's."""

import contextlib
import json
import multiprocessing
import selectors
import socket
import time
from collections.abc import Sequence
from typing import Any

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}

WARM_S = 1.0
"""Seconds before the first of the single requests that come beside streams."""

PROBE_S = 0.1
"""Seconds between two of them."""

FIRST_TOKENS = 2
"""Output tokens of a single request."""


class Client:
    """Streams of a server, counted as they come, or single requests, or both; in a process of its own.

    Each of `texts` becomes a stream of `tokens` tokens. The `singles` come one after another, each with another text;
    beside streams as long as all of these run, the same ones again and again, and else each once.
    """

    def __init__(self, port: int, endpoint: str, texts: Sequence[str], tokens: int, singles: Sequence[str]):
        self._port, self._path, self._texts, self._tokens, self._singles = port, PATHS[endpoint], texts, tokens, singles
        # A chat's first event has no token.
        self._chat, self._first = endpoint == "chat", 1 + (endpoint == "chat")
        self._chosen = selectors.DefaultSelector()
        self._events: dict[socket.socket, int] = {}
        self._open = 0
        # The single request that is on its way: its socket, what came, when it began and when its first token came.
        self._probe: socket.socket | None = None
        self._text, self._began, self._came = b"", 0.0, 0.0
        self._firsts: list[tuple[float, float]] = []

    def _ask(self, text: str, tokens: int, **fields: Any) -> socket.socket:
        asked = {"messages": [{"role": "user", "content": text}]} if self._chat else {"prompt": text}
        body = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True, **asked, **fields}
        content = json.dumps(body).encode()
        head = f"POST {self._path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nConnection: close\r\n"
        sock = socket.create_connection(("127.0.0.1", self._port))
        sock.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        self._chosen.register(sock, selectors.EVENT_READ)
        return sock

    def run(self, connection: Any) -> None:
        """Sends (events of the streams, seconds from the first to the last of them, [(seconds to the first token, those
        by the engine)] of the single requests).
        """
        began = time.monotonic()
        for text in self._texts:
            self._events[self._ask(text, self._tokens)] = 0
        self._open, beside, asked = len(self._texts), bool(self._texts), 0
        next_probe = began + WARM_S * beside
        while self._open or self._probe is not None or (not beside and asked < len(self._singles)):
            all_run = self._open == len(self._texts)
            if self._singles and self._probe is None and all_run and time.monotonic() >= next_probe:
                self._text, self._came, self._began = b"", 0.0, time.monotonic()
                text = self._singles[asked % len(self._singles)]
                self._probe, asked = self._ask(text, FIRST_TOKENS, stream_options={"include_usage": True}), asked + 1
                next_probe = self._began + PROBE_S
            for key, _ in self._chosen.select(PROBE_S):
                self._read(key.fileobj)
            if not self._open and beside and self._probe is not None:
                break
        connection.send((sum(self._events.values()), time.monotonic() - began, self._firsts))

    def _read(self, sock: Any) -> None:
        data = sock.recv(1 << 16)
        if not data:
            self._chosen.unregister(sock)
            sock.close()
            if sock is self._probe:
                self._probe = None
                inside = json.loads(b"{" + self._text.split(b'"metrics":{')[1].split(b"}")[0] + b"}")
                self._firsts.append((self._came - self._began, inside["time_to_first_token_ms"] / 1e3))
            else:
                self._open -= 1
        elif sock is self._probe:
            self._text += data
            if not self._came and self._text.count(b"data: ") >= self._first:
                self._came = time.monotonic()
        else:
            self._events[sock] += data.count(b"data: ")


def _run(connection: Any, *arguments: Any) -> None:
    with contextlib.closing(connection):
        Client(*arguments).run(connection)


def ask(*arguments: Any) -> tuple[int, float, list[tuple[float, float]]]:
    """What Client(*arguments).run sends, from a process of its own. Raises EOFError where that has failed."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    client = context.Process(target=_run, args=(theirs, *arguments), daemon=True)
    client.start()
    theirs.close()
    found = ours.recv()
    client.join()
    return found
