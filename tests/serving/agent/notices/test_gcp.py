from __future__ import annotations

import time
from collections.abc import AsyncIterator

import pytest

from serving.agent.notices.base import Notice
from serving.agent.notices.gcp import Gcp
from tests.serving.agent.notices.listening import listening
from tests.serving.agent.notices.metadata import ComputeEngine, running


@pytest.fixture
async def gce() -> AsyncIterator[ComputeEngine]:
    server = ComputeEngine()
    async with running(server):
        yield server


def source(gce: ComputeEngine, *, hold_s: int = 20) -> Gcp:
    return Gcp(gce.url, grace_s=30.0, period_s=0.02, hold_s=hold_s, timeout_s=0.3)


async def test_a_preemption_ends_a_long_poll_at_once(gce: ComputeEngine) -> None:
    async with listening(source(gce)) as heard:
        await heard.until(lambda: len(gce.requests) == 2)  # the second one is held
        gce.set("TRUE")
        changed = time.monotonic()
        await heard.count(1)
        assert time.monotonic() - changed < 1.0
        await heard.until(lambda: len(gce.requests) == 3)
    assert heard.notices == [Notice(30.0, "gcp")]
    first, second, third = (request.query for request in gce.requests)
    assert first == {"wait_for_change": "true", "timeout_sec": "20", "last_etag": "0"}
    assert (second["last_etag"], third["last_etag"]) == ("a0", "b1")


async def test_polls_that_end_without_a_change_are_repeated_quietly(
    gce: ComputeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    async with listening(source(gce, hold_s=1)) as heard:
        await heard.until(lambda: len(gce.requests) == 3)
        assert heard.signals == []
        gce.set("TRUE")
        await heard.count(1)
        gce.set("FALSE")  # it has not been seen to happen
        await heard.until(lambda: "withdrew the preemption" in caplog.text)
        gce.set("TRUE")
        await heard.count(2)
    assert "no notices" not in caplog.text


async def test_a_server_that_holds_no_polls_is_not_asked_without_pause(gce: ComputeEngine) -> None:
    gce.holds = False
    began = time.monotonic()
    async with listening(Gcp(gce.url, grace_s=30.0, period_s=0.1, hold_s=20)) as heard:
        await heard.until(lambda: len(gce.requests) == 5)
        assert time.monotonic() - began >= 0.4
        gce.set("TRUE")
        await heard.count(1)


@pytest.mark.parametrize("fault", [401, 404, 500, 503, "hang", "cut", "drop", "garbage", "drip", "malformed"])
async def test_faults_are_outlived_and_logged_once(
    gce: ComputeEngine, fault: int | str, caplog: pytest.LogCaptureFixture
) -> None:
    gce.fault = fault
    async with listening(source(gce, hold_s=0)) as heard:
        await heard.until(lambda: len(gce.requests) >= 3)
        gce.fault = ""
        gce.set("TRUE")
        await heard.count(1)
        await heard.until(lambda: "answers again" in caplog.text)
    assert heard.notices == [Notice(30.0, "gcp")]
    assert caplog.text.count("no notices from gcp") == 1
    assert "Traceback" not in caplog.text


async def test_an_answer_that_is_not_googles_is_not_believed(
    gce: ComputeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    gce.flavor = "Vanilla"
    gce.set("TRUE")
    async with listening(source(gce)) as heard:
        await heard.until(lambda: "not answered by Google" in caplog.text)
        assert heard.signals == []
