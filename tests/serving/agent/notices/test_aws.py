from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from serving.agent.notices.aws import Aws
from serving.agent.notices.base import Advice, Notice
from tests.serving.agent.notices.listening import listening
from tests.serving.agent.notices.metadata import Ec2, running

PUT = "/latest/api/token"


@pytest.fixture
async def ec2() -> AsyncIterator[Ec2]:
    server = Ec2()
    async with running(server):
        yield server


def source(ec2: Ec2) -> Aws:
    return Aws(ec2.url, period_s=0.02, timeout_s=0.3)


@pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
async def test_an_interruption_is_said_once_with_the_seconds_that_are_left(ec2: Ec2, action: str) -> None:
    async with listening(source(ec2)) as heard:
        await heard.until(lambda: len(ec2.requests) > 6)
        assert heard.signals == []  # nothing but 404 so far
        ec2.interrupt(120.0, action)
        await heard.count(1)
        asked = len(ec2.requests)
        await heard.until(lambda: len(ec2.requests) > asked + 6)
    (notice,) = heard.notices
    assert notice.source == "aws"
    assert 118.0 < notice.deadline_s <= 120.0
    assert [request.path for request in ec2.requests].count(PUT) == 1


async def test_a_recommendation_is_an_advice_and_no_notice(ec2: Ec2) -> None:
    ec2.rebalance = True
    async with listening(source(ec2)) as heard:
        await heard.count(1)
        ec2.interrupt(60.0)
        await heard.count(2)
    assert heard.signals[0] == Advice("aws")
    assert isinstance(heard.signals[1], Notice)


async def test_tokens_are_renewed_before_they_end_and_when_they_are_refused(ec2: Ec2) -> None:
    ec2.ttl_s = 1
    async with listening(source(ec2)) as heard:
        await heard.until(lambda: len(ec2.tokens) >= 2)
        ec2.ttl_s = 21600
        await heard.until(lambda: len(ec2.tokens) >= 3)
        ec2.tokens.clear()  # as if the instance had been stopped and started elsewhere
        ec2.interrupt(90.0)
        await heard.count(1)
        assert len(ec2.tokens) == 1
    assert len(heard.notices) == 1


@pytest.mark.parametrize("skew_s", [-3600.0, -5.0, 0.0, 5.0, 3600.0])
async def test_the_servers_clock_counts(ec2: Ec2, skew_s: float) -> None:
    ec2.skew_s = skew_s
    ec2.interrupt(100.0)
    async with listening(source(ec2)) as heard:
        await heard.count(1)
    assert 97.5 < heard.notices[0].deadline_s <= 101.0


async def test_without_a_date_the_local_clock_has_to_do(ec2: Ec2) -> None:
    ec2.date, ec2.skew_s = False, 30.0
    ec2.interrupt(100.0)
    async with listening(source(ec2)) as heard:
        await heard.count(1)
    assert 127.5 < heard.notices[0].deadline_s <= 131.0


@pytest.mark.parametrize("moment", ["soon", "", "2001-01-01T00:00:00Z"])
async def test_a_time_that_is_past_or_unreadable_leaves_no_time(ec2: Ec2, moment: str) -> None:
    ec2.action = b'{"action": "terminate", "time": "%b"}' % moment.encode()
    async with listening(source(ec2)) as heard:
        await heard.count(1)
    assert heard.notices == [Notice(0.0, "aws")]


@pytest.mark.parametrize(
    "fault", [401, 403, 404, 429, 500, 503, 302, "hang", "cut", "drop", "garbage", "drip", "endless"]
)
async def test_faults_are_outlived_and_logged_once(
    ec2: Ec2, fault: int | str, caplog: pytest.LogCaptureFixture
) -> None:
    ec2.fault = fault
    async with listening(source(ec2)) as heard:
        await heard.until(lambda: len(ec2.requests) >= 3)
        ec2.interrupt(120.0)
        ec2.fault = ""
        await heard.count(1)
        await heard.until(lambda: "answers again" in caplog.text)
    assert len(heard.notices) == 1
    assert caplog.text.count("no notices from aws") == 1
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"time": "2026-01-01T00:00:00Z"}', b'{"action": 5}', b"\xff\xfe"])
async def test_what_is_no_action_is_no_notice_but_a_failure(
    ec2: Ec2, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    ec2.action = body
    async with listening(source(ec2)) as heard:
        await heard.until(lambda: "unintelligible" in caplog.text)
        assert heard.signals == []
        ec2.interrupt(50.0)
        await heard.count(1)
    assert len(heard.notices) == 1


async def test_nobody_listening_is_a_failure_like_others(caplog: pytest.LogCaptureFixture) -> None:
    ec2 = Ec2()
    async with running(ec2):
        pass
    async with listening(source(ec2)) as heard:
        await heard.until(lambda: "cannot be asked" in caplog.text)
        ec2.interrupt(50.0)
        async with running(ec2):
            await heard.count(1)


async def test_an_interruption_that_is_withdrawn_and_comes_back_is_said_again(
    ec2: Ec2, caplog: pytest.LogCaptureFixture
) -> None:
    ec2.interrupt(100.0)
    async with listening(source(ec2)) as heard:
        await heard.count(1)
        said, ec2.action = ec2.action, None
        await heard.until(lambda: "withdrew" in caplog.text)
        ec2.action = said
        await heard.count(2)
        ec2.interrupt(40.0)  # and one that replaces another
        await heard.count(3)
    assert [round(one.deadline_s, -1) for one in heard.notices] == [100.0, 100.0, 40.0]


async def test_chunked_answers_are_understood(ec2: Ec2) -> None:
    ec2.chunked = True
    ec2.interrupt(100.0)
    async with listening(source(ec2)) as heard:
        await heard.count(1)


async def test_a_hanging_recommendation_does_not_hold_a_notice_back(ec2: Ec2) -> None:
    ec2.interrupt(100.0)
    ec2.faults = ["", "", "hang"]  # the token, the action, the recommendation
    async with listening(Aws(ec2.url, period_s=0.02, timeout_s=20.0)) as heard:
        await heard.count(1)


async def test_a_failing_source_is_asked_less_and_less(ec2: Ec2) -> None:
    ec2.fault = 500
    async with listening(Aws(ec2.url, period_s=0.01, timeout_s=0.3)):
        await asyncio.sleep(1.0)
    assert 3 <= len(ec2.requests) <= 8  # at 10, 30, 70, 150, 310, 630 ms; without backoff it would be ninety
