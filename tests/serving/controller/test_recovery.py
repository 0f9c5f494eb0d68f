from __future__ import annotations

from typing import Any

import pytest

from data.layout import Device, ParallelConfig
from serving.controller.copies import Copies
from serving.controller.dispatch import Dispatcher, Replica
from serving.controller.records import Record
from serving.controller.recovery import Recovery, lost_with
from serving.errors import Aborted
from serving.requests import GenerationRequest
from serving.telemetry import Metrics

ONE = ParallelConfig(1, 1, 1, 4)


class Ledger:
    """Ends records as the real one does, without a journal."""

    def end(self, record: Record, reason: Any) -> None:
        record.close(reason)


class NoWorkers:
    def send(self, device: Device, message: Any) -> None:
        raise AssertionError("nobody is to be told anything")

    def connected_devices(self) -> tuple[Device, ...]:
        return ()

    usable_devices = connected_devices

    def kv_address(self, device: Device) -> str:
        return ""

    zone = kv_address


@pytest.fixture
def dispatcher() -> Dispatcher:
    return Dispatcher()


@pytest.fixture
def recovery(dispatcher: Dispatcher) -> Recovery:
    ledger: Any = Ledger()
    return Recovery(dispatcher, ledger, Metrics(), Copies(NoWorkers()), most_recoveries=2)


def broken(dispatcher: Dispatcher, number: int, *keys: int) -> Replica:
    replica = Replica(number, 1, ONE, (Device(f"i{number}", 0),), 8)
    dispatcher.replicas[number] = replica
    for key in keys:
        request = GenerationRequest(request_id=f"r{key}", prompt=(1, 2))
        dispatcher.bind(Record(key, request, 0.0, None, None, output=[5, 6]), replica)
    return replica


async def test_stranded_requests_wait_for_two_attempts_and_are_then_replayed(
    dispatcher: Dispatcher, recovery: Recovery
) -> None:
    recovery.strand(broken(dispatcher, 1, 11, 12))
    for _ in range(2):
        recovery.failed(list(recovery.stranded))
        assert (dispatcher.waiting, recovery.replayed()) == (0, [])
    recovery.failed(list(recovery.stranded))
    assert (dispatcher.waiting, recovery.replayed(), recovery.replayed()) == (2, [("uncopied", 2)] * 2, [])
    assert not recovery.stranded


async def test_what_an_attempt_did_not_restore_is_replayed_and_others_wait_on(
    dispatcher: Dispatcher, recovery: Recovery
) -> None:
    for number, keys in ((1, (11, 12)), (2, (21,))):
        recovery.strand(broken(dispatcher, number, *keys))
    first, second = recovery.stranded
    first.records.pop(11)  # restored
    first.copied = True
    assert recovery.settle([first], tried=True) == [1]
    second.copied = True
    assert recovery.replayed() == [("unseated", 2)]
    assert lost_with(second) == "copied"
    assert (dispatcher.waiting, recovery.stranded) == (1, [second])


async def test_the_unlucky_are_given_up_with_a_sentence_and_the_ended_left_alone(
    dispatcher: Dispatcher, recovery: Recovery
) -> None:
    (record,) = broken(dispatcher, 1, 11).records.values()
    for _ in range(2):
        recovery.replay([record], "copied")
        assert record.replayed == 2
    recovery.replay([record], "copied")
    assert isinstance(record.failure, Aborted)
    assert "after 2 recoveries with 2 tokens" in str(record.failure)
    recovery.replay([record], "copied")
    assert recovery.replayed() == [("copied", 2), ("copied", 0)], "what was being computed again counts once"
    assert record.recoveries == 3
