"""The application on a socket: ready when the engine is, and until its answers are finished when it is to end."""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn

from gdnjax.serving.async_llm import AsyncLLM
from gdnjax.serving.server.app import make_app
from gdnjax.serving.server.connections import Connection
from gdnjax.serving.server.service import Service
from gdnjax.serving.server.settings import ServerConfig

LAST_WORDS_S = 5.0
"""Seconds for the last bytes of answers to leave."""

KEEP_ALIVE_S = 65
"""Seconds that an idle connection is kept: longer than most proxies do, so that it is they who close it."""

BACKLOG = 2048


def host(make_llm: Callable[[], AsyncLLM], config: ServerConfig, *, access_log: bool = False) -> signal.Signals | None:
    """Serves until SIGTERM or Ctrl-C, and lets answers finish then. To be called by the main thread.

    Listens first, then makes the engine in another thread: alive meanwhile, and not ready. Returns None where every
    answer was finished, and the signal where answers were cut off, or where the engine was not there yet: its thread is
    still at it, so that the process is to be ended at once. Raises what `make_llm` raises, and OSError where nothing
    can listen there.
    """
    with _listen(config) as listening:
        app = make_app(None, config)
        service: Service = app.state.service
        server = _Server(app, service, access_log=access_log)
        url = _url(config.host, listening.getsockname()[1])
        _say(f"listening at {url}; not ready: the model is loaded and compiled")
        loading = _Loading(make_llm)

        async def run() -> None:
            loading.tell(asyncio.get_running_loop(), begun)
            await server.serve([listening])

        def begun() -> None:
            """The engine is there, or will never be."""
            if loading.llm is not None:
                keep_what_there_is()
                service.begin(loading.llm)
                _say(f"ready: {', '.join(config.served_model_names)} at {url}")
            else:
                server.should_exit = True

        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
            runner.run(run())
    if loading.error is not None:
        raise loading.error
    if loading.llm is None:
        return server.signal or signal.SIGTERM
    loading.llm.close()
    return None if server.all_finished else server.signal


def keep_what_there_is() -> None:
    """What has been made so far stays as long as the process does: Python's garbage collector leaves it alone from now
    on. Walking over modules, tokenizer and compiled steps would stop every stream for a sixth of a second.
    """
    gc.collect()
    gc.freeze()


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _url(host_name: str, port: int) -> str:
    return f"http://{f'[{host_name}]' if ':' in host_name else host_name}:{port}"


def _listen(config: ServerConfig) -> socket.socket:
    """A socket there. Raises OSError that names the place."""
    try:
        family, *_ = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server((config.host, config.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"--host {config.host} --port {config.port}") from error


class _Loading:
    """The making of the engine, in a thread that the process does not wait for."""

    def __init__(self, make_llm: Callable[[], AsyncLLM]):
        self.llm: AsyncLLM | None = None
        self.error: BaseException | None = None
        self._make_llm = make_llm

    def tell(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], Any]) -> None:
        """Begins, and calls `callback` in `loop` when it is over."""

        def run() -> None:
            try:
                self.llm = self._make_llm()
            except BaseException as error:
                self.error = error
            # The server may have been told to end meanwhile.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(callback)

        threading.Thread(target=run, name="gdnjax-load", daemon=True).start()


class _Server(uvicorn.Server):
    """uvicorn's, which ends as `Service.end` says: no new requests, answers that finish, and a bound."""

    def __init__(self, app: Any, service: Service, *, access_log: bool):
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                lifespan="off",
                log_config=None,
                access_log=access_log,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(LAST_WORDS_S),
            )
        )
        self._service = service
        self.signal: signal.Signals | None = None
        self.all_finished = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            # A second one: whoever sends it does not want to wait.
            self._service.hurry()
        self.signal = signal.Signals(sig)
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Without raising them again in the end: the exit status is the command's."""
        numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        logging.getLogger("gdnjax.server").info("shutting down: %d samples are waited for", self._service.load)
        self.all_finished = await self._service.end()
        await super().shutdown(sockets)
