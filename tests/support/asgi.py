"""An ASGI app on a real port, in a thread: connections can break off, which test clients cannot."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from klein.entrypoints.http.connections import BoundedProtocol


@contextmanager
def serve(app: ASGIApp) -> Iterator[str]:
    """The address at which `app` answers."""
    config = uvicorn.Config(
        app, port=0, http=BoundedProtocol, log_level="error", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
