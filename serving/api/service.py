"""What the servicers need from the controller; nothing of gRPC is visible on this side."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Protocol, TypeVar

from data.models import ModelSpec
from data.plan import PlanBook
from data.shared_plan import SharedPlanBook
from serving.requests import Chunk, Event, GenerationRequest, ServerInfo

Item_co = TypeVar("Item_co", covariant=True)


class Stream(Protocol[Item_co]):
    """An asynchronous iterator that is closed when its reader is done with it; async generators are."""

    def __aiter__(self) -> AsyncIterator[Item_co]:
        """Itself."""
        ...

    async def __anext__(self) -> Item_co:
        """The next item: all that is ready, in one, if items can be joined."""
        ...

    async def aclose(self) -> None:
        """Stop; nobody will ask for another item."""
        ...


class Service(Protocol):
    """The controller as its front end sees it. All methods run on one asyncio loop.

    `specs` are the models by the names that admitted requests have: "" for the only one. Errors are those of
    `serving.errors`; every one carries a sentence for the caller.
    """

    specs: Mapping[str, ModelSpec]

    async def submit(self, request: GenerationRequest) -> Stream[Chunk]:
        """Admit and journal a request, and return its stream.

        Submitting a known `request_id` for the same answer attaches to it from the start. Raises
        `InvalidInput`, `AlreadyExists`, `QueueFull`, `Unavailable`. Closing the iterator before the
        end aborts the request unless it is resumable.
        """
        ...

    def attach(self, request_id: str, resume_from: int) -> Stream[Chunk]:
        """The stream of a known request from output token `resume_from` on.

        Raises `NotFound`, or `InvalidInput` if fewer than `resume_from` tokens exist.
        """
        ...

    async def abort(self, request_id: str) -> bool:
        """End a request now; its KV is free within one step. False if it had ended already."""
        ...

    def info(self) -> ServerInfo:
        """What is being served right now."""
        ...

    def plan_book(self) -> PlanBook | SharedPlanBook:
        """The plan book in force."""
        ...

    async def reload_plan(self, source: str) -> str:
        """Load a plan book (file path, or empty to poll the registry now); returns its SHA-256.

        Raises `PlanMismatch` if it is damaged or made for another model; the old book stays.
        """
        ...

    async def drain(self, timeout_s: float | None) -> int:
        """Refuse new requests and wait for running ones; returns how many were left at the timeout."""
        ...

    async def notify(self, instance: str, deadline_s: float, source: str) -> None:
        """An instance will be gone in `deadline_s` seconds. Raises `NotFound`."""
        ...

    def events(self, since: int) -> Stream[Event]:
        """Events with a sequence number above `since`, then live ones, for ever."""
        ...

    def decode(self, token_ids: tuple[int, ...], model: str) -> str:
        """Text of token ids."""
        ...

    def encode(self, text: str, model: str) -> tuple[int, ...]:
        """Token ids of text, with the model's special tokens."""
        ...
