from __future__ import annotations

import asyncio
import socket
import time

from serving.controller.leases import LOOKS, Lease, looks


def test_a_lease_is_lost_after_so_many_looks_and_renewed_by_a_word() -> None:
    lease = Lease()
    assert [lease.look() for _ in range(LOOKS - 1)] == [False] * (LOOKS - 1)
    lease.renew()
    assert [lease.look() for _ in range(LOOKS)] == [False] * (LOOKS - 1) + [True]


async def test_looks_take_the_time_of_a_lease() -> None:
    began = time.monotonic()
    async for count in looks(0.2):
        if count == LOOKS - 1:
            break
    assert 0.2 <= time.monotonic() - began < 1.0


async def test_who_was_held_up_takes_one_look_for_all_that_time_and_listens_before() -> None:
    lease, (here, there) = Lease(), socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=here)
    hearing = asyncio.create_task(_hear(reader, lease))
    watch = looks(0.1)
    for _ in range(LOOKS - 1):
        await anext(watch)
        lease.look()
    there.send(b"alive\n")
    time.sleep(0.5)  # noqa: ASYNC251 - this is the point
    await anext(watch)
    assert not lease.look()
    there.close()
    await hearing
    writer.close()
    await writer.wait_closed()


async def _hear(reader: asyncio.StreamReader, lease: Lease) -> None:
    while await reader.readline():
        lease.renew()
