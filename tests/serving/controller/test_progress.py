from __future__ import annotations

import pytest

from serving.controller.progress import Heard, Standstill, standstill
from serving.messages import Heartbeat

LIMIT_S = 1.0


def still(seconds: float, awaits: int | None = None, *, replica: int = 7) -> Heard:
    return Heard(Heartbeat(5, replica, seconds, awaits), recent=True, silent_s=0.0)


def silent(seconds: float, awaits: int | None = None) -> Heard:
    return Heard(Heartbeat(5, 7, 0.0, awaits), recent=False, silent_s=seconds)


MOVES = still(0.0)


@pytest.mark.parametrize(
    ("heard", "verdict"),
    [
        ([still(1.2)], Standstill(0, 1.2)),
        ([still(1.5, 2), still(9.0, 0), still(1.1)], Standstill(2, 1.1)),
        ([still(1.5, 1), still(1.4, 3), still(9.0, 0), still(1.3)], Standstill(3, 1.3)),
        ([still(1.5, 1), still(1.2, 0)], Standstill(None, 1.2)),
        ([still(1.5, 2), still(1.2, 0), still(1.3, 1)], Standstill(None, 1.2)),
        ([still(1.5, 1), silent(2.0)], Standstill(1, 2.0)),
    ],
    ids=["the leader alone", "the tail", "along a chain", "each other", "in a circle", "one that is silent"],
)
def test_who_is_to_blame(heard: list[Heard], verdict: Standstill) -> None:
    assert standstill(7, heard, LIMIT_S) == verdict


@pytest.mark.parametrize(
    "heard",
    [
        [MOVES, still(900.0, 0)],
        [still(0.9, 1), still(5.0)],
        [still(1.5, 1), MOVES],
        [still(1.5, 1), still(0.9)],
        [still(1.5, 1), still(1.5, 2), MOVES],
        [still(1.5, 1), silent(1.9)],
        [silent(4.0), still(9.0, 0)],
        [still(1.5, 1), None],
        [None, still(9.0, 0)],
        [still(1.5, 1), still(1.5, replica=6)],
        [still(1.5, replica=8)],
    ],
    ids=[
        *("no work", "not yet", "a slow follower", "a follower that began late", "slow at the end of the chain"),
        *("silent, but not for long", "a silent leader", "never heard", "a leader never heard"),
        *("a late message of an old replica", "another replica"),
    ],
)
def test_nobody_is_to_blame(heard: list[Heard | None]) -> None:
    assert standstill(7, heard, LIMIT_S) is None
