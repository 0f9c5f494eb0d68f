"""The channels of a client: one per address, and which address to try next."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence

import grpc

from serving.api.generated.control_pb2_grpc import ControlStub
from serving.api.generated.inference_pb2_grpc import InferenceStub
from serving.errors import PerennialError, Retryable, Unavailable

Target = str | Sequence[str] | Callable[[], str]
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # in truth how long one attempt may take: busy machines are slow
    ("grpc.max_reconnect_backoff_ms", 1_000),
]


class Connection:
    """Gives the stubs of the current address; several addresses are tried in turn."""

    def __init__(self, target: Target) -> None:
        self._addresses = [target] if isinstance(target, str) else target
        self._turn = 0
        self._channels: dict[str, tuple[grpc.aio.Channel, InferenceStub, ControlStub]] = {}

    @property
    def address(self) -> str:
        """The address that the next call goes to."""
        if callable(self._addresses):
            return self._addresses()
        return self._addresses[self._turn % len(self._addresses)]

    def inference(self, address: str) -> InferenceStub:
        """The Inference methods at `address`."""
        return self._open(address)[1]

    def control(self, address: str) -> ControlStub:
        """The Control methods at `address`."""
        return self._open(address)[2]

    def failed(self, address: str) -> None:
        """Move on from `address`, once, however many of its streams report the failure."""
        if not callable(self._addresses) and address == self.address:
            self._turn += 1

    async def close(self) -> None:
        """Close every channel."""
        channels, self._channels = self._channels, {}
        for channel, _, _ in channels.values():
            await channel.close()

    def _open(self, address: str) -> tuple[grpc.aio.Channel, InferenceStub, ControlStub]:
        if address not in self._channels:
            channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
            self._channels[address] = (channel, InferenceStub(channel), ControlStub(channel))
        return self._channels[address]


class Backoff:
    """Waits between tries: doubling from 50 ms to 2 s, never less than the server asks for."""

    def __init__(self, give_up_s: float) -> None:
        self._give_up_s = give_up_s
        self.reset()

    def reset(self) -> None:
        """There was progress: the next failure is a first one."""
        self._delay_s = 0.05
        self._give_up_at = time.monotonic() + self._give_up_s

    async def wait(self, error: PerennialError) -> None:
        """Wait for the next try. Raises `Unavailable` when it would come too late."""
        delay_s = self._delay_s * random.uniform(0.5, 1.0)
        if isinstance(error, Retryable):
            delay_s = max(delay_s, error.retry_after_s)
        if time.monotonic() + delay_s > self._give_up_at:
            raise Unavailable(f"Gave up after {self._give_up_s:g} s without progress: {error}") from error
        self._delay_s = min(self._delay_s * 2, 2.0)
        await asyncio.sleep(delay_s)
