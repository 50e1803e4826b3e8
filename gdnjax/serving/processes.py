"""Several processes that run one engine: process 0 plans and sends the integers of each step, the others follow.

Every process has a Runner, its devices' part of the parameters and pools, and the same jitted steps over the mesh of
all. Only process 0 has a scheduler, a tokenizer and a prefix cache. Whatever it does to its devices, it first sends:
a number that stands for a step and its shapes, and the words of its batch (`gdnjax.words`). The others do the same in
the same order, and read nothing: what a step emits is the same on all devices.

The bytes go through a socket to each follower. A collective would be one more program on the devices for each step, and
could not be waited for with a time limit; the key-value store of JAX's coordination service, over which the processes
find one another here, takes about a millisecond.
"""

import atexit
import contextlib
import dataclasses
import json
import logging
import os
import secrets
import socket
import struct
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jaxlib.version
import numpy as np

from gdnjax import batch as batches
from gdnjax.config import EngineConfig
from gdnjax.distributed import ProcessLostError
from gdnjax.serving.channel import Connection, Kind, Peers, lost
from gdnjax.step import StepOptions
from gdnjax.version import __version__
from gdnjax.words import WORD, Form

log = logging.getLogger("gdnjax")

T = TypeVar("T")

MEETING = "gdnjax/meeting"
"""Where process 0 is to be found: a key of JAX's store while it waits for the others."""

OVER = "gdnjax/over"
"""A key with what has become of process 0, for those who wait to be met: "" where it has ended well."""

ENGINE = "gdnjax/engine"
"""A key that is there while process 0 has an engine."""

MEETING_S = 300
"""Seconds that process 0 waits for the others."""

ANSWER_S = 10
"""Seconds for the first words of a connection."""

DEVICE_ERROR_S = 3.0
"""Seconds that an error of the devices waits for the news that another process is gone."""

NUMBER = struct.Struct("<I")


@dataclasses.dataclass(frozen=True)
class Call:
    """A jitted step by its name in Steps, what it takes beside parameters and state, and its options, where it has
    variants.
    """

    step: str
    batch: Any
    options: StepOptions | None = None


def alone() -> bool:
    """Whether this is the only process of its program."""
    return jax.process_count() == 1


class Writer:
    """Calls to bytes. What steps of one shape have in common goes out once, as a form."""

    def __init__(self) -> None:
        self._forms: dict[Any, int] = {}

    def message(self, call: Call, send: Callable[[Kind, bytes], None]) -> bytes:
        """A call, after its form, if that is new, has been sent."""
        form = Form.of(call.batch)
        key = (call.step, call.options, form)
        number = self._forms.get(key)
        if number is None:
            number = self._forms[key] = len(self._forms)
            content = {
                "number": number,
                "step": call.step,
                "batch": form.kind.__name__,
                "options": None if call.options is None else dataclasses.asdict(call.options),
                "fields": form.fields,
            }
            send(Kind.FORM, json.dumps(content).encode())
        return b"".join([NUMBER.pack(number), form.pack(call.batch).data])


class Reader:
    """Bytes to calls."""

    def __init__(self) -> None:
        self._forms: dict[int, tuple[str, Form, StepOptions | None]] = {}

    def learn(self, content: bytes) -> None:
        """Takes in a form."""
        found = json.loads(content)
        options = None if found["options"] is None else StepOptions(**found["options"])
        fields = tuple((name, dtype, tuple(shape)) for name, dtype, shape in found["fields"])
        self._forms[found["number"]] = found["step"], Form(getattr(batches, found["batch"]), fields), options

    def call(self, content: bytes) -> Call:
        """The call of a message whose form is known."""
        (number,) = NUMBER.unpack_from(content)
        step, form, options = self._forms[number]
        return Call(step, form.views(np.frombuffer(content, WORD, offset=NUMBER.size)), options)


class Followers:
    """The other processes, as process 0 sees them.

    What it sends and what it does to its own devices goes through one thread, in one order: an interrupt of the main
    thread comes before both or after both.
    """

    def __init__(self, peers: Peers):
        self._peers, self._writer = peers, Writer()
        # A program that ends without closing its engine has not failed.
        self._goodbye = weakref.finalize(self, _end, peers)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gdnjax-dispatch")

    def compare(self, facts: Mapping[str, Any]) -> None:
        """What must be the same in all processes, as it is here: the others raise what differs."""
        _tell(self._peers, facts)

    def agree(self, left: tuple[int, int | None]) -> tuple[int, int | None]:
        """The least memory that any process has left, and the limit there, for all to plan with."""
        answers = [tuple(_hear(self._peers, number)) for number in self._peers.connections]
        least = min([left, *answers], key=lambda each: each[0])
        _tell(self._peers, least)
        return least

    def ready(self) -> None:
        """Waits until all are."""
        for number in self._peers.connections:
            _hear(self._peers, number)

    def run(self, call: Call, dispatch: Callable[[Call], T]) -> T:
        """Has all processes run a step."""

        def both() -> T:
            self._peers.send(Kind.STEP, self._writer.message(call, self._peers.send))
            return dispatch(call)

        return self._in_order(both)

    def compile(self, calls: Sequence[Call]) -> None:
        """Has the others compile steps, as this process is about to. They say when they are ready."""

        def send() -> None:
            messages = [self._writer.message(call, self._peers.send) for call in calls]
            lengths = b"".join(NUMBER.pack(len(message)) for message in messages)
            self._peers.send(Kind.COMPILE, b"".join([NUMBER.pack(len(messages)), lengths, *messages]))

        self._in_order(send)

    def start_over(self, empty: Callable[[], T]) -> T:
        """Has all processes do the same as `empty`, which replaces the pools."""

        def both() -> T:
            self._peers.send(Kind.START_OVER)
            return empty()

        return self._in_order(both)

    @contextlib.contextmanager
    def blaming(self) -> Iterator[None]:
        """Around what waits for the devices. An error there is put down to a lost process, where one is."""
        try:
            yield
        except Exception as error:
            self._fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """Ends the others with the reason why this process cannot go on."""
        self._peers.close(Kind.FAILED, _describe(error).encode())
        self._goodbye()

    def close(self) -> None:
        """Has the others end, and waits for it a little."""
        self._thread.shutdown(wait=self._peers.error is None)
        self._goodbye()

    def _in_order(self, work: Callable[[], T]) -> T:
        def checked() -> T:
            try:
                return work()
            except ProcessLostError:
                raise
            except Exception as error:
                # The others may have done what this process has not, and would wait for it in the next step.
                self._fail(error)
                raise

        return self._thread.submit(checked).result()

    def _fail(self, error: Exception) -> None:
        """Raises ProcessLostError where another process is behind an error; else there is no going on with them."""
        try:
            self._peers.check(DEVICE_ERROR_S)
        except ProcessLostError as gone:
            raise gone from error
        self.fail(error)


class Leader:
    """Process 0, as another process sees it."""

    def __init__(self, peers: Peers):
        self._peers, self._reader = peers, Reader()

    def engine(self) -> tuple[EngineConfig, int | None]:
        """The engine's config, and for a model in memory its context."""
        note = _hear(self._peers, 0)
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in note["config"].items()}
        return EngineConfig(**fields), note["max_model_len"]

    def compare(self, facts: Mapping[str, Any]) -> None:
        """Raises ValueError that names what is not as it is in process 0, with both values."""
        check_same(_hear(self._peers, 0), json.loads(_json(facts)))

    def agree(self, left: tuple[int, int | None]) -> tuple[int, int | None]:
        """See Followers.agree."""
        _tell(self._peers, left)
        least, limit = _hear(self._peers, 0)
        return least, limit

    def ready(self) -> None:
        """Tells process 0 so."""
        _tell(self._peers, None)

    def follow(self, runner: Any) -> None:
        """Does what process 0 does, until it is through. `runner` is a Runner."""
        while True:
            kind, content = self._peers.receive(0)
            match kind:
                case Kind.FORM:
                    self._reader.learn(content)
                case Kind.STEP:
                    runner.follow(self._reader.call(content))
                case Kind.COMPILE:
                    runner.compile(self._calls(content))
                    self.ready()
                case Kind.START_OVER:
                    runner.start_over(())
                case Kind.END:
                    return
                case _:
                    raise RuntimeError(f"process 0 sent {kind.name} among its steps")

    def _calls(self, content: bytes) -> list[Call]:
        (count,) = NUMBER.unpack_from(content)
        place, calls = NUMBER.size * (1 + count), []
        for (length,) in struct.iter_unpack(NUMBER.format, content[NUMBER.size : place]):
            calls.append(self._reader.call(content[place : place + length]))
            place += length
        return calls

    def fail(self, error: BaseException) -> None:
        """Ends the other processes with the reason why this one cannot go on."""
        self._peers.close(Kind.FAILED, _describe(error).encode())

    def close(self) -> None:
        """Says goodbye."""
        self._peers.close()


@contextlib.contextmanager
def telling(others: Followers | Leader | None) -> Iterator[None]:
    """Around what must not fail in one process alone: what is raised ends the others, with its reason."""
    try:
        yield
    except BaseException as error:
        if others is not None:
            others.fail(error)
        raise


def lead(config: EngineConfig, max_model_len: int | None = None) -> Followers | None:
    """Meets the other processes, for an engine of this config; None where there are none. A model in memory has a
    context of `max_model_len`.

    Raises RuntimeError in another process than process 0, where there is an engine already, and where others do not
    come or are of another version.
    """
    if alone():
        return None
    if jax.process_index():
        raise RuntimeError(
            f"this is process {jax.process_index()} of {jax.process_count()}, and process 0 has the engine; allowed "
            "here: gdnjax.follow(model), which takes part in it until it is closed"
        )
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _store().key_value_try_get(ENGINE)
        raise RuntimeError("several processes have one engine at a time; close() this one before another is made")
    peers = Peers(_meet())
    _store().key_value_set(ENGINE, "")
    # Who follows asks for the next engine when this one is closed.
    atexit.register(_say_over, "")
    _tell(peers, {"config": dataclasses.asdict(config), "max_model_len": max_model_len})
    return Followers(peers)


def _end(peers: Peers) -> None:
    peers.close()
    # Of a program that has lost its runtime, nothing more will come.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _store().key_value_delete(ENGINE)


def find_leader() -> Leader | None:
    """Waits for process 0 to make an engine, however long that takes. None where it has ended without one.

    Raises RuntimeError in process 0, and ProcessLostError where process 0 is gone or has failed.
    """
    if jax.process_index() == 0:
        raise RuntimeError(f"this is process 0 of {jax.process_count()}, which nobody leads; allowed here: LLM")
    address = _wait_for_meeting()
    if address is None:
        return None
    end = socket.create_connection((address["host"], address["port"]), timeout=ANSWER_S)
    hello = {"token": address["token"], "process": jax.process_index(), **_about_this_process()}
    end.settimeout(None)
    connection = Connection(end, address["name"])
    connection.send(Kind.NOTE, json.dumps(hello).encode())
    return Leader(Peers({0: connection}))


def check_same(leader: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises ValueError that names what differs between process 0 and this process, with both values."""
    differing = [
        f"{name} is {here.get(name)!r}, on process 0 {value!r}"
        for name, value in leader.items()
        if here.get(name) != value
    ]
    if differing:
        raise ValueError(f"processes of one engine must agree: {'; '.join(differing)}")


@contextlib.contextmanager
def leading() -> Iterator[None]:
    """Around a program's work on process 0: those who wait for another engine are told when there will be none."""
    try:
        yield
    except BaseException as error:
        _say_over(_describe(error) or type(error).__name__)
        raise
    _say_over("")


def _say_over(why: str) -> None:
    if _store() is not None:
        # It may have been said, and why; and at the end of a program another process may be gone.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _store().key_value_set(OVER, why)


def _meet() -> dict[int, Connection]:
    """Connections to all other processes, as soon as each has come."""
    wanted, found = set(range(1, jax.process_count())), {}
    host = _coordinator_host()
    with _listen(host) as server:
        token, about = secrets.token_hex(16), _about_this_process()
        port = server.getsockname()[1]
        address = {"host": host, "port": port, "token": token, "name": _name(0, about)}
        store = _store()
        store.key_value_set(MEETING, json.dumps(address), allow_overwrite=True)
        try:
            deadline = time.monotonic() + MEETING_S
            while missing := wanted - set(found):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise RuntimeError(
                        f"processes {', '.join(map(str, sorted(missing)))} of {jax.process_count()} did not come to "
                        f"follow process 0 within {MEETING_S} s: they have to call gdnjax.follow, or run its command"
                    )
                server.settimeout(left)
                with contextlib.suppress(TimeoutError):
                    _greet(server, token, found)
        finally:
            store.key_value_delete(MEETING)
    return {number: found[number] for number in sorted(found)}


def _greet(server: socket.socket, token: str, found: dict[int, Connection]) -> None:
    """One connection more, if whoever calls belongs here."""
    end, _ = server.accept()
    end.settimeout(ANSWER_S)
    connection = Connection(end, "")
    try:
        hello = json.loads(connection.first())
        accepted = isinstance(hello, dict) and secrets.compare_digest(str(hello.get("token")), token)
    except (OSError, ValueError):
        accepted = False
    if not accepted:
        end.close()
        return
    connection.name = _name(hello["process"], hello)
    end.settimeout(None)
    found[hello["process"]] = connection
    own = _about_this_process()
    for name, version in own["versions"].items():
        if hello["versions"].get(name) != version:
            error = f"{connection.name} has {name} {hello['versions'].get(name)}, process 0 has {version}"
            for each in found.values():
                each.send_last(Kind.FAILED, error.encode())
            raise RuntimeError(f"{error}; processes of one engine must have the same")


def _wait_for_meeting() -> dict[str, Any] | None:
    store = _store()
    while True:
        try:
            return json.loads(store.blocking_key_value_get(MEETING, 500))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise lost(f"process 0 is gone: {error}") from error
        try:
            why = store.key_value_try_get(OVER)
        except jax.errors.JaxRuntimeError:
            continue
        if why:
            raise lost(f"process 0 failed: {why}")
        return None


def _listen(host: str) -> socket.socket:
    """A socket at the address at which the others find this host, or, where it has none of that name, at all of its."""
    try:
        family, _, _, _, place = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        return socket.create_server((place[0], 0), family=socket.AddressFamily(family))
    except OSError:
        both = socket.has_dualstack_ipv6()
        return socket.create_server(("", 0), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)


def _runtime() -> Any:
    # JAX has no public name for its coordination service's store, nor for the address that a launcher gave.
    from jax._src import distributed

    return distributed.global_state


def _store() -> Any:
    return _runtime().client


def _coordinator_host() -> str:
    return _runtime().coordinator_address.rpartition(":")[0].strip("[]")


def _about_this_process() -> dict[str, Any]:
    versions = {"gdnjax": __version__, "jax": jax.__version__, "jaxlib": jaxlib.version.__version__}
    return {"host": socket.gethostname(), "pid": os.getpid(), "versions": versions}


def _name(number: int, about: Mapping[str, Any]) -> str:
    return f"process {number} of {jax.process_count()} (host {about['host']}, pid {about['pid']})"


def _json(note: Any) -> str:
    # Paths are their words.
    return json.dumps(note, default=str)


def _tell(peers: Peers, note: Any) -> None:
    peers.send(Kind.NOTE, _json(note).encode())


def _hear(peers: Peers, number: int) -> Any:
    kind, content = peers.receive(number)
    if kind != Kind.NOTE:
        raise RuntimeError(f"process {number} sent {kind.name} before its engine was ready")
    return json.loads(content)


def _describe(error: BaseException) -> str:
    """In one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
