"""Connections between processes: messages come whole and in order, and whoever is gone is missed and named."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from gdnjax.distributed import ProcessLostError
from gdnjax.serving import channel
from gdnjax.serving.channel import Connection, Kind, Peers


@pytest.fixture
def ended(monkeypatch) -> Iterator[list[float]]:
    """When this process would have been ended. What watches in a test is through when this is."""
    times: list[float] = []
    monkeypatch.setattr(channel, "end_process", lambda: times.append(time.monotonic()))
    monkeypatch.setattr(channel, "GRACE_S", 0.2)
    yield times
    for thread in threading.enumerate():
        if thread.name == "gdnjax-processes":
            thread.join(timeout=10)
            assert not thread.is_alive()


@pytest.fixture
def far():
    """The other ends of what `star` makes."""
    ends: list[socket.socket] = []
    yield ends
    for end in ends:
        end.close()


def star(far: list[socket.socket], count: int) -> Peers:
    """A process that is connected to so many others."""
    connections = {}
    for number in range(1, count + 1):
        with socket.create_server(("127.0.0.1", 0)) as server:
            far.append(socket.create_connection(server.getsockname()))
            connections[number] = Connection(server.accept()[0], f"process {number} of {count + 1}")
    return Peers(connections)


def everything(end: Connection) -> list:
    """What has come at an end, signs of life aside, until nothing more will."""
    found = []
    while (messages := end.receive()) is not None:
        found += [message for message in messages if message[0] != Kind.BEAT]
    return found


def test_messages_come_whole_and_in_order(far, ended):
    peers = star(far, 2)
    others = [Connection(end, "process 0 of 3") for end in far]
    sent = [(Kind.STEP, bytes([size % 251]) * size) for size in (0, 1, 300_000, 17)]
    for kind, content in sent:
        peers.send(kind, content)
        others[0].send(kind, content)
    assert [peers.receive(1) for _ in sent] == sent
    for other in others:
        other.send_last(Kind.END, b"")
    peers.close()
    assert [everything(other) for other in others] == [[*sent, (Kind.END, b"")]] * 2
    with pytest.raises(RuntimeError, match="have been ended"):
        peers.send(Kind.STEP)
    assert not ended


@pytest.mark.parametrize(
    ("leave", "said"),
    [
        (lambda end: end.close(), "process 1 of 3 is gone: its connection has ended"),
        (
            lambda end: Connection(end, "").send(Kind.FAILED, b"ValueError: no such thing"),
            "process 1 of 3 failed: ValueError: no such thing",
        ),
        (lambda end: Connection(end, "").send(Kind.LOST, b"process 7 of 9 is gone"), "process 7 of 9 is gone"),
    ],
    ids=["killed", "failed", "has lost another"],
)
def test_who_is_gone_is_named_everywhere_and_ends_this_process(far, ended, leave, said):
    peers = star(far, 2)
    began = time.monotonic()
    leave(far[0])
    with pytest.raises(ProcessLostError, match=f"^{said}"):
        peers.receive(2)
    with pytest.raises(ProcessLostError, match=f"^{said}"):
        peers.send(Kind.STEP)
    (last,) = everything(Connection(far[1], "process 0 of 3"))
    assert last == (Kind.LOST, said.encode())
    # Nothing stops it any more.
    peers.close()
    while not ended:
        assert time.monotonic() - began < 10
        time.sleep(0.01)
    assert ended[0] - began >= channel.GRACE_S


def test_silence_is_a_loss_and_signs_of_life_are_not(far, ended, monkeypatch):
    monkeypatch.setattr(channel, "BEAT_S", 0.05)
    monkeypatch.setattr(channel, "SILENCE_S", 0.5)
    peers = star(far, 2)
    lively = Connection(far[0], "process 0 of 3")
    began = time.monotonic()
    while peers.error is None:
        lively.beat()
        time.sleep(0.05)
        assert time.monotonic() - began < 10
    assert time.monotonic() - began >= 0.5
    assert str(peers.error) == "process 2 of 3 is gone: it has not been heard of for 0.5 s"
    assert (Kind.LOST, str(peers.error).encode()) in everything(lively)
