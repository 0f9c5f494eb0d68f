"""Steps and whoever wants a device to himself take turns, and nobody waits for ever."""

from __future__ import annotations

import threading
import time

import pytest

from serving.worker.replica import StepLoop
from serving.worker.turn import Turn

LONG_S = 5.0


class Steps(threading.Thread):
    """Launches step after step."""

    def __init__(self, turn: Turn) -> None:
        super().__init__(daemon=True)
        self.turn, self.count, self.inside = turn, 0, False
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.is_set():
            with self.turn.step():
                self.inside = True
                self.count += 1
                time.sleep(0.001)
                self.inside = False

    def __enter__(self) -> Steps:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join(LONG_S)
        assert not self.is_alive()


def test_no_step_is_launched_while_somebody_is_alone() -> None:
    with Steps(turn := Turn(LONG_S)) as steps:
        for _ in range(20):
            with turn.alone():
                assert not steps.inside
                before = steps.count
                time.sleep(0.003)
                assert not steps.inside
                assert steps.count == before


def test_a_step_that_waited_comes_between_two_who_are_alone() -> None:
    with Steps(turn := Turn(LONG_S)) as steps:
        for _ in range(10):
            with turn.alone():
                while not turn._step_waits:
                    time.sleep(0.001)
                before = steps.count
            with turn.alone():
                assert steps.count > before


def test_who_hangs_holds_nobody_up() -> None:
    turn, began = Turn(0.02), time.monotonic()
    with turn.alone() as alone, turn.step():
        assert alone
        assert 0.02 <= time.monotonic() - began < LONG_S
    began = time.monotonic()
    with turn.step(), turn.alone() as alone:
        assert not alone
        assert 0.02 <= time.monotonic() - began < LONG_S


def test_what_fails_gives_its_turn_back() -> None:
    turn = Turn(LONG_S)
    for kind in (turn.alone, turn.step):
        with pytest.raises(KeyError), kind():
            raise KeyError
    began = time.monotonic()
    with turn.alone():
        pass
    with turn.step():
        pass
    assert time.monotonic() - began < LONG_S


def test_way_is_made_once_the_device_is_done_with_the_step() -> None:
    class Position:
        """Its device is done when it has been looked at often enough."""

        number, looks = 1, 0

        @property
        def at_rest(self) -> bool:
            self.looks += 1
            return self.looks > 5

    class Loop(StepLoop):
        runs = True

        def is_alive(self) -> bool:
            return self.runs

        def _loop(self) -> None:
            raise AssertionError

    loop = Loop(position := Position(), fail=pytest.fail)  # type: ignore[arg-type]
    with loop.make_way() as clear:
        assert clear
        assert position.looks >= 6
    position.looks = -1_000_000
    with loop.make_way() as clear:
        assert not clear, "it would have to be beside the step"
    loop.runs = False
    with loop.make_way() as clear:
        assert clear, "a loop that has ended launches nothing"
