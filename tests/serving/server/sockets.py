"""Applications on a socket of this machine, for tests."""

import contextlib
import threading
import time

import uvicorn

from gdnjax.serving.server.connections import Connection


@contextlib.contextmanager
def serving(app):
    """The URL at which an application answers, by a thread of its own."""
    server = uvicorn.Server(
        uvicorn.Config(app, http=Connection, port=0, lifespan="off", log_config=None, timeout_graceful_shutdown=5)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
