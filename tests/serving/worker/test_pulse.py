from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from serving.messages import Hosted, Role
from serving.worker.groups import Group
from serving.worker.position import Position
from serving.worker.pulse import Pulse
from serving.worker.replica import StepLoop

BEAT_S = 0.02
ROLE = Role(["i/0"], 0, 1, 1, [Hosted(7, "", 4, [2], 8)])


class Loop(StepLoop):
    """A step loop that does one thing over and over."""

    def __init__(self, work: Callable[[Loop], object]) -> None:
        group = Group(None, "", 0, 1, device=torch.device("cpu"), host="", timeout_s=1.0)  # type: ignore[arg-type]
        super().__init__(Position(ROLE, (), group), lambda reason: None)  # type: ignore[arg-type]
        self._work = work
        self.released = threading.Event()

    def _loop(self) -> None:
        while not self._stopped.is_set():
            self._work(self)


@contextmanager
def running(work: Callable[[Loop], object]) -> Iterator[Loop]:
    loop = Loop(work)
    loop.start()
    try:
        yield loop
    finally:
        loop.discard()
        loop.released.set()
        loop.join(5.0)
        assert not loop.is_alive()


def beats(pulse: Pulse, loop: StepLoop | None, count: int = 12) -> list[float]:
    """What `still_s` is at each of so many heartbeats."""
    found = []
    for _ in range(count):
        found.append(pulse.take(loop).still_s)
        time.sleep(BEAT_S)
    return found


def hang(loop: Loop) -> None:
    loop.released.wait(30.0)


def hang_for_a_peer(loop: Loop) -> None:
    with loop.waiting.on(3):
        hang(loop)


def rest(loop: Loop) -> None:
    loop.resting = True
    hang(loop)


def compute(loop: Loop) -> None:
    sum(range(1000))


def step_now_and_then(loop: Loop) -> None:
    with loop.waiting.on(3):
        loop.released.wait(2 * BEAT_S)


@pytest.mark.parametrize(("work", "awaits"), [(hang, None), (hang_for_a_peer, 3)])
def test_a_loop_that_hangs_is_still_for_longer_and_longer(work: Callable[[Loop], object], awaits: int | None) -> None:
    with running(work) as loop:
        time.sleep(0.1)
        pulse = Pulse(BEAT_S)
        found = beats(pulse, loop)
        assert found[0] == 0.0
        assert found == sorted(set(found))
        assert found[-1] >= 11 * BEAT_S
        last = pulse.take(loop)
        assert (last.replica, last.awaits) == (7, awaits)


@pytest.mark.parametrize("work", [rest, compute])
def test_a_loop_that_rests_or_computes_is_not_still(work: Callable[[Loop], object]) -> None:
    with running(work) as loop:
        time.sleep(0.1)
        # Another process may have the processor for the time of a beat.
        assert sorted(beats(Pulse(BEAT_S), loop))[6] == 0.0


def test_waiting_again_begins_anew() -> None:
    with running(step_now_and_then) as loop:
        assert max(beats(Pulse(BEAT_S), loop, 40)) < 20 * BEAT_S


def test_a_late_beat_counts_no_more_than_two() -> None:
    """The process may have been stopped as a whole."""
    with running(hang) as loop:
        time.sleep(0.1)
        pulse = Pulse(BEAT_S)
        beats(pulse, loop, 1)
        time.sleep(1.0)
        assert pulse.take(loop).still_s == 2 * BEAT_S


def test_no_loop_and_one_that_has_ended_are_not_still() -> None:
    pulse = Pulse(BEAT_S)
    assert beats(pulse, None, 3) == [0.0, 0.0, 0.0]
    with running(hang) as loop:
        pass
    assert beats(pulse, loop, 3) == [0.0, 0.0, 0.0]
    with running(hang) as other:
        assert pulse.take(other).still_s == 0.0


def test_a_loop_that_everybody_else_let_go_of_is_gone_whatever_the_pulse_has_seen() -> None:
    pulse = Pulse(BEAT_S)
    with running(rest) as loop:
        pulse.take(loop)
        seen = weakref.ref(loop)
    del loop
    gc.collect()
    assert seen() is None, "the heartbeat after it would take a replica down"
    assert pulse.take(None).still_s == 0.0
