"""The rendezvous store of an epoch. It lives with the controller; closing it frees whoever waits in it."""

from __future__ import annotations

import socket
from datetime import timedelta

import torch.distributed as dist


class Rendezvous:
    """A store server on `host`, reachable at `address` until closed."""

    def __init__(self, host: str, timeout_s: float) -> None:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        # Handing over a bound socket keeps the store off every other interface.
        listener.bind((host, 0))
        listener.listen(128)
        port = listener.getsockname()[1]
        self.address = f"{host}:{port}"
        self._store: dist.TCPStore | None = dist.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),
        )

    def close(self) -> None:
        """Stop serving; clients that wait get an error at once."""
        self._store = None
