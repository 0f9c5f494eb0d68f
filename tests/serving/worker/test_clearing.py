"""When the groups of broken replicas are aborted."""

from __future__ import annotations

import time
from typing import Any

import pytest

from serving.worker import clearing
from serving.worker.clearing import BrokenLoops


class Place:
    def __init__(self, *, at_rest: bool) -> None:
        self.at_rest, self.aborts = at_rest, list[float]()

    def abort(self) -> None:
        self.aborts.append(time.monotonic())


class Loop:
    def __init__(self, *, at_rest: bool) -> None:
        self.position = Place(at_rest=at_rest)


def broken(*, on_gpu: bool, at_rest: bool) -> tuple[Any, Place]:
    loops, loop = BrokenLoops(on_gpu=on_gpu), Loop(at_rest=at_rest)
    loops.add(loop)  # type: ignore[arg-type]
    return loops, loop.position


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clearing, "_HUNG_S", 0.05)
    monkeypatch.setattr(clearing, "_BROKEN_S", 0.6)


@pytest.mark.parametrize(("at_rest", "least_s", "most_s"), [(False, 0.05, 0.5), (True, 0.6, 3.0)])
def test_a_device_that_waits_for_a_lost_peer_is_released_first(at_rest: bool, least_s: float, most_s: float) -> None:
    begun_s = time.monotonic()
    _, place = broken(on_gpu=True, at_rest=at_rest)
    while not place.aborts and time.monotonic() < begun_s + 5.0:
        time.sleep(0.01)
    assert least_s <= place.aborts[0] - begun_s < most_s
    time.sleep(0.8)
    assert len(place.aborts) == 1


def test_who_needs_the_device_does_not_wait() -> None:
    loops, place = broken(on_gpu=True, at_rest=True)
    loops.end_all()
    loops.end_all()
    assert len(place.aborts) == 1


def test_a_later_loop_has_its_own_time() -> None:
    loops, first = broken(on_gpu=True, at_rest=True)
    time.sleep(0.4)
    later = Loop(at_rest=True)
    loops.add(later)
    time.sleep(0.4)
    assert (len(first.aborts), len(later.position.aborts)) == (1, 0)


def test_without_a_gpu_nobody_has_to_be_waited_for() -> None:
    _, place = broken(on_gpu=False, at_rest=True)
    until_s = time.monotonic() + 5.0
    while not place.aborts and time.monotonic() < until_s:
        time.sleep(0.01)
    assert place.aborts
