"""A server of an engine, in this process: its loop has a thread of its own, as uvicorn's main thread would be."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

LOOP = "http"
"""The name of the event loop's thread."""


@contextlib.contextmanager
def serving(front: Any, name: str, max_queue: int, profile: str | None = None) -> Iterator[int]:
    """Serves an AsyncLLM under a model's `name`; gives the port. `profile`: a cProfile of the loop goes there."""
    import uvicorn

    from gdnjax.serving.server.app import make_app
    from gdnjax.serving.server.settings import ServerConfig

    app = make_app(front, ServerConfig(served_model_names=(name,), max_queue=max_queue))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, access_log=False))
    listening = socket.create_server(("127.0.0.1", 0), backlog=2048)

    def serve() -> None:
        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
            if profile is None:
                runner.run(server.serve([listening]))
                return
            import cProfile

            profiled = cProfile.Profile(time.thread_time)
            profiled.runcall(runner.run, server.serve([listening]))
            profiled.dump_stats(profile)

    thread = threading.Thread(target=serve, name=LOOP)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server's thread has ended before it served")
            time.sleep(0.01)
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def cpu_seconds() -> Iterator[dict[str, float]]:
    """Of the threads that there are, by name, and of the process; to be read behind the block."""
    threads = {thread.name: thread for thread in threading.enumerate() if thread.ident is not None}

    def now() -> dict[str, float]:
        found = {"process": time.process_time()}
        for name, thread in threads.items():
            if thread.is_alive():
                found[name] = time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0))
        return found

    before, found = now(), {}
    yield found
    found |= {name: seconds - before[name] for name, seconds in now().items()}
