"""Prefect's API server on a free port of 127.0.0.1, which it prints; it ends when its standard input does."""

from __future__ import annotations

import os
import socket

import uvicorn

from serving import lifeline


def main() -> None:
    """Serve until told to stop."""
    lifeline.watch_stdin()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    os.write(1, f"{listener.getsockname()[1]}\n".encode())
    config = uvicorn.Config("prefect.server.api.server:create_app", factory=True, log_level="error", lifespan="on")
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
