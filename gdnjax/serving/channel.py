"""Connections between the processes of one program, and how a lost one is noticed. No jax.

A connection carries messages: a kind, a length and as many bytes. A thread reads all connections of a process and sends
signs of life; a process whose connection ends, or that is silent for SILENCE_S, is lost. The main thread may stand in a
sum over devices that the lost one never joins, where no exception reaches it. So it is given GRACE_S to raise the error
by itself, and then the process is ended.
"""

import contextlib
import enum
import logging
import os
import queue
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping
from typing import NoReturn

from gdnjax.distributed import LOST, ProcessLostError

log = logging.getLogger("gdnjax")

BEAT_S = 2.0
"""Seconds between two signs of life."""

SILENCE_S = 20.0
"""Without a sign of life for so long, a process is lost: stopped, or its host is off the network."""

GRACE_S = 5.0
"""What a process has left when another is lost."""

HEADER = struct.Struct("<BQ")
PIECE = 1 << 18


class Kind(enum.IntEnum):
    """What a message is."""

    BEAT = 0  # a sign of life
    NOTE = 1  # JSON: what is said at the start
    FORM = 2  # JSON: a step and the arrays that it takes, under a number
    STEP = 3  # the number of a form, and its arrays: run it
    COMPILE = 4  # numbers of forms: compile them, side by side
    START_OVER = 5  # empty pools in the place of what there is
    END = 6  # nothing more will come, and all is well
    FAILED = 7  # a text: what ended the sender
    LOST = 8  # a text: which other process the sender has lost, and how


Message = tuple[Kind, bytes]


class Connection:
    """One end of a connection to another process, which is called `name` in messages."""

    def __init__(self, end: socket.socket, name: str):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.end: socket.socket = end
        self.name: str = name
        self.heard: float = time.monotonic()
        self._lock = threading.Lock()
        self._read = bytearray()

    def send(self, kind: Kind, content: bytes = b"") -> None:
        """Raises OSError where the connection is gone."""
        with self._lock:
            self.end.sendall(HEADER.pack(kind, len(content)) + content)

    def beat(self) -> None:
        """A sign of life, unless another message is under way, which is one, too. Raises as `send` does."""
        if self._lock.acquire(blocking=False):
            try:
                self.end.sendall(HEADER.pack(Kind.BEAT, 0))
            finally:
                self._lock.release()

    def send_last(self, kind: Kind, content: bytes) -> None:
        """The last message, if the other end still reads."""
        if self._lock.acquire(timeout=GRACE_S / 2):
            try:
                self.end.settimeout(GRACE_S / 2)
                self.end.sendall(HEADER.pack(kind, len(content)) + content)
                self.end.shutdown(socket.SHUT_WR)
            except OSError:
                # Who is gone needs no message.
                return
            finally:
                self._lock.release()

    def first(self) -> bytes:
        """The first note. Raises OSError where none comes in the socket's time."""
        while (messages := self.receive()) is not None:
            for kind, content in messages:
                if kind == Kind.NOTE:
                    return content
        raise ConnectionError("no note has come")

    def receive(self) -> list[Message] | None:
        """What has come whole; waits for some bytes. None at the end of the connection."""
        piece = self.end.recv(PIECE)
        if not piece:
            return None
        self.heard = time.monotonic()
        self._read += piece
        found, place = [], 0
        while len(self._read) - place >= HEADER.size:
            kind, length = HEADER.unpack_from(self._read, place)
            if len(self._read) - place < HEADER.size + length:
                break
            place += HEADER.size
            found.append((Kind(kind), bytes(self._read[place : place + length])))
            place += length
        del self._read[:place]
        return found


class Peers:
    """The processes that this one is connected to, by their numbers, watched from now on.

    A process that says END has left in peace. One that is gone without it, or says FAILED, is lost: whoever receives or
    sends from then on raises ProcessLostError, the other processes are told, and this one ends after GRACE_S.
    """

    def __init__(self, connections: Mapping[int, Connection]):
        self.connections: dict[int, Connection] = dict(connections)
        self.error: ProcessLostError | None = None
        self._inbox: dict[int, queue.SimpleQueue[Message | None]] = {
            number: queue.SimpleQueue() for number in connections
        }
        self._lost = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="gdnjax-processes", daemon=True)
        self._thread.start()

    def send(self, kind: Kind, content: bytes = b"") -> None:
        """Sends to all. Raises ProcessLostError where one of them is lost, RuntimeError after `close`."""
        if self._closed:
            raise RuntimeError("the other processes of this program have been ended, and nothing runs without them")
        for connection in self.connections.values():
            try:
                self.check()
                connection.send(kind, content)
            except OSError as error:
                # What it said last is on its way to the watching thread.
                self._lost.wait(1.0)
                self._lose(f"{connection.name} is gone: sending to it failed: {error.strerror or error}", connection)
                self.check()

    def receive(self, number: int) -> Message:
        """The next message of a process. Raises ProcessLostError where one is lost."""
        message = self._inbox[number].get()
        if message is None:
            self.check()
        assert message is not None
        return message

    def check(self, patience_s: float = 0.0) -> None:
        """Raises ProcessLostError where a process is lost, or is found to be within so many seconds."""
        if self._lost.wait(patience_s) if patience_s else self._lost.is_set():
            assert self.error is not None
            raise self.error

    def close(self, kind: Kind = Kind.END, content: bytes = b"") -> None:
        """The last message to all; waits for theirs, a little. Does nothing where a process is lost."""
        if self._closed or self.error is not None:
            return
        self._closed = True
        for connection in self.connections.values():
            connection.send_last(kind, content)
        self._thread.join(timeout=GRACE_S)
        for connection in self.connections.values():
            connection.end.close()

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        for number, connection in self.connections.items():
            selector.register(connection.end, selectors.EVENT_READ, (number, connection))
        last_beat = 0.0
        while self.error is None and selector.get_map():
            try:
                ready = selector.select(timeout=BEAT_S / 4)
            except (OSError, ValueError):
                # `close` has waited long enough.
                return
            for key, _ in ready:
                number, connection = key.data
                if self._take_in(number, connection):
                    selector.unregister(connection.end)
            now, beats = time.monotonic(), False
            if now - last_beat >= BEAT_S:
                last_beat, beats = now, True
            if not self._closed:
                self._look_after([key.data[1] for key in selector.get_map().values()], now, beats)
        selector.close()
        if self.error is not None:
            time.sleep(GRACE_S)
            end_process()

    def _look_after(self, connections: list[Connection], now: float, beats: bool) -> None:
        """Signs of life, to these and of these."""
        for connection in connections:
            if beats:
                # Where it fails, reading says why.
                with contextlib.suppress(OSError):
                    connection.beat()
            if now - connection.heard > SILENCE_S:
                self._lose(f"{connection.name} is gone: it has not been heard of for {SILENCE_S:g} s", connection)

    def _take_in(self, number: int, connection: Connection) -> bool:
        """Reads what has come, and returns whether it was the last."""
        try:
            messages = connection.receive()
        except OSError as error:
            messages = None
            how = f"its connection broke: {error.strerror or error}"
        else:
            how = "its connection has ended"
        if messages is None:
            self._lose(f"{connection.name} is gone: {how}", connection)
            return True
        for kind, content in messages:
            if kind in (Kind.FAILED, Kind.LOST):
                text = content.decode(errors="replace")
                self._lose(text if kind == Kind.LOST else f"{connection.name} failed: {text}", connection)
                return True
            if kind != Kind.BEAT:
                self._inbox[number].put((kind, content))
            if kind == Kind.END:
                return True
        return False

    def _lose(self, said: str, connection: Connection) -> None:
        if self.error is not None or self._closed:
            return
        self.error = lost(said)
        self._lost.set()
        for inbox in self._inbox.values():
            inbox.put(None)
        for other in self.connections.values():
            if other is not connection:
                other.send_last(Kind.LOST, said.encode())


def lost(said: str) -> ProcessLostError:
    """The error, which is logged at once: the runtime may end this process before anybody raises it."""
    log.error("%s", said)
    return ProcessLostError(said)


def end_process() -> NoReturn:
    """Ends the process without waiting for any of its threads."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(LOST)
