"""When the old layout decodes on, and who is not moved."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from data.models import ModelSpec
from planning.arrangement import Timing
from serving.controller.grace import Grace, timing_of
from serving.controller.records import Record
from serving.requests import GenerationRequest, Limits
from serving.settings import Replication

TIMING = Timing(step_s=0.01, change_s=0.1, move_s=0.001, replay_s=0.01)


def record(key: int, prompt: int, tokens: int = 100) -> Record:
    request = GenerationRequest(request_id=str(key), prompt=(1,) * prompt, limits=Limits(max_tokens=tokens))
    return Record(key, request, 0.0, None, None)


@pytest.mark.parametrize(
    ("leaving_s", "crowded", "waits"),
    [(math.inf, True, False), (5.0, True, True), (5.0, False, False), (1.05, True, False), (-1.0, True, False)],
)
def test_waiting_needs_a_notice_with_time_and_a_crowd(leaving_s: float, crowded: bool, waits: bool) -> None:
    grace = Grace(lambda: leaving_s, lambda: crowded, TIMING, margin_s=1.0)
    assert grace.waits([record(1, 50)]) == waits
    grace.urge()
    assert not grace.waits([record(1, 50)])


@pytest.mark.parametrize(
    ("leaving_s", "behind"), [(math.inf, set()), (9.0, set()), (0.5, {1}), (0.2, {1, 2}), (0.05, set()), (-3.0, set())]
)
def test_who_cannot_be_moved_in_time_stays_behind_unless_nothing_is_lost_by_trying(
    leaving_s: float, behind: set[int]
) -> None:
    grace = Grace(lambda: leaving_s, lambda: False, TIMING, margin_s=1.0)
    assert grace.stay_behind([record(1, 200), record(2, 300)]) == behind


@pytest.mark.parametrize(("promised_s", "step_s"), [(0.01, 0.01), (1.0, 0.1), (0.0, 0.1)])
def test_the_pace_is_what_the_plan_promises(spec: ModelSpec, promised_s: float, step_s: float) -> None:
    timing = timing_of(promised_s, [spec], Replication())
    assert timing.step_s == pytest.approx(step_s)
    wider = timing_of(promised_s, [spec, replace(spec, layers=2 * spec.layers)], Replication())
    assert wider.move_s == 2 * timing.move_s, "of several models the one with most KV counts"
