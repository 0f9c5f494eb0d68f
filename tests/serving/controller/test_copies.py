from __future__ import annotations

import pytest

from data.layout import Device, ParallelConfig
from serving import messages as m
from serving.controller.copies import Copies
from serving.controller.dispatch import Replica


class Workers:
    """Five instances of one device; remembers what they are told."""

    def __init__(self) -> None:
        self.devices = tuple(Device(f"i{index}", 0) for index in range(5))
        self.told: list[tuple[Device, m.Message]] = []
        self.zones: dict[str, str] = {}

    def send(self, device: Device, message: m.Message) -> None:
        self.told.append((device, message))

    def connected_devices(self) -> tuple[Device, ...]:
        return self.devices

    def usable_devices(self) -> tuple[Device, ...]:
        return self.devices

    def kv_address(self, device: Device) -> str:
        return f"{device}:1"

    def zone(self, device: Device) -> str:
        return self.zones.get(device.instance, "")

    def keepers(self) -> dict[Device, str]:
        """Where each device was last told to send its copies."""
        return {device: one.address.split("/")[0] for device, one in self.told if isinstance(one, m.Replicate)}

    def kept(self) -> list[int] | None:
        """What was last said about what to keep."""
        return next((list(one.replicas) for _, one in reversed(self.told) if isinstance(one, m.Keep)), None)


@pytest.fixture
def workers() -> Workers:
    return Workers()


def replica(number: int, *devices: Device) -> Replica:
    return Replica(number, 1, ParallelConfig(replicas=1, stages=len(devices), shards=1, max_batch=4), devices, 8)


def test_copies_of_former_replicas_stay_until_those_of_their_successors_are_complete(workers: Workers) -> None:
    copies, (a, b, c, *_) = Copies(workers), workers.devices
    old, new = replica(1, a), replica(2, b, c)
    copies.arrange([old])
    copies.heard(a, m.CopyState(1, complete=True))
    copies.keep([old])
    assert workers.kept() == [1]
    copies.ended([1])
    copies.arrange([new])
    copies.keep([new])
    assert (workers.kept(), copies.former) == ([1, 2], (1,))
    copies.heard(b, m.CopyState(2, complete=True))
    copies.keep([new])
    assert not copies.complete(new)
    assert workers.kept() == [1, 2]
    assert [keeper is not None for keeper in copies.keepers(new)] == [True, False]
    copies.heard(c, m.CopyState(2, complete=True))
    copies.keep([new])
    assert copies.complete(new)
    assert [keeper.instance for keeper in copies.keepers(new) if keeper] == [
        workers.keepers()[device] for device in (b, c)
    ]
    assert (workers.kept(), copies.former) == ([2], ())


def test_a_copy_is_not_complete_any_more_once_its_keeper_is_gone_or_requests_join(workers: Workers) -> None:
    copies, (a, b, *_) = Copies(workers), workers.devices
    one = replica(1, a)
    copies.arrange([one])
    assert [message.address for _, message in workers.told if isinstance(message, m.Replicate)] == [f"{b}:1"]
    for undo in (lambda: copies.lost(b), lambda: copies.incomplete([1])):
        copies.heard(a, m.CopyState(1, complete=True))
        assert copies.complete(one)
        undo()
        assert not copies.complete(one)
        copies.arrange([one])
    copies.heard(a, m.CopyState(1, complete=False))
    assert not copies.complete(one)


def test_the_number_of_former_replicas_is_bounded(workers: Workers) -> None:
    copies = Copies(workers)
    for number in range(100):
        copies.ended([number, number])
    copies.keep([replica(200, workers.devices[0])])
    assert workers.kept() == [*range(92, 100), 200]


def test_copies_leave_the_zone_as_soon_as_there_is_another(workers: Workers) -> None:
    copies, (a, b, *_) = Copies(workers), workers.devices
    workers.zones = dict.fromkeys(("i0", "i1", "i2", "i3", "i4"), "x")
    one = replica(1, a, b)
    copies.arrange([one])
    assert workers.keepers() == {a: "i1", b: "i2"}
    copies.heard(a, m.CopyState(1, complete=True))
    copies.heard(b, m.CopyState(1, complete=True))
    assert copies.complete(one)
    workers.told.clear()
    workers.zones["i4"] = "y"
    copies.arrange([one])
    assert workers.keepers() == {a: "i4", b: "i4"}
    assert not copies.complete(one)  # until the new keeper has them; the former one's stay meanwhile
    workers.told.clear()
    copies.arrange([one])
    assert not workers.told


def test_a_zone_that_nobody_told_changes_nothing(workers: Workers) -> None:
    copies, (a, *_) = Copies(workers), workers.devices
    copies.arrange([replica(1, a)])
    workers.told.clear()
    workers.zones["i3"] = "y"
    copies.arrange([replica(1, a)])
    assert not workers.told
