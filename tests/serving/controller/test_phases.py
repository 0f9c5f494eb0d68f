from __future__ import annotations

import asyncio
import gc
import logging

import pytest

from data.layout import Device
from serving.controller.phases import Phase, TransitionFailed

A, B, C = (Device("i", index) for index in range(3))


async def test_it_ends_with_the_last_answer_and_ignores_strangers() -> None:
    phase: Phase[int] = Phase("prepare", [A, B])
    waiting = asyncio.create_task(phase.wait(5.0))
    for device, value in ((C, 0), (A, 1), (A, 2)):
        phase.answer(device, value)
        await asyncio.sleep(0)
        assert not waiting.done()
    phase.answer(B, 3)
    assert await waiting == {A: 1, B: 3}


async def test_nobody_to_wait_for() -> None:
    assert await Phase("move", []).wait(0.0) == {}


async def test_a_failure_ends_it_and_says_what_it_was_at() -> None:
    phase: Phase[int] = Phase("prepare", [A, B])
    phase.answer(A, 1)
    assert not phase.expects(A)
    assert phase.expects(B)
    waiting = asyncio.create_task(phase.wait(5.0))
    await asyncio.sleep(0)
    phase.fail("i/1 was lost (gone)")
    with pytest.raises(TransitionFailed, match=r"prepare: i/1 was lost \(gone\)"):
        await waiting


async def test_a_timeout_names_who_is_missing() -> None:
    phase: Phase[int] = Phase("pause", [A, B])
    phase.answer(A, 1)
    with pytest.raises(TransitionFailed, match=r"pause: no answer from i/1 within 0.01 s"):
        await phase.wait(0.01)


async def test_a_failure_nobody_waits_for_makes_no_noise(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        phase: Phase[int] = Phase("prepare", [A])
        phase.fail("too late")
        phase.fail("and again")
        phase.answer(A, 1)
        del phase
        gc.collect()
        await asyncio.sleep(0)
    assert not caplog.records
