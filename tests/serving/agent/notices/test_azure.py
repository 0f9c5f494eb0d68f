from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from serving.agent.notices.azure import Azure
from serving.agent.notices.base import Notice, SourceFailed
from tests.serving.agent.notices.listening import listening
from tests.serving.agent.notices.metadata import AzureMetadata, running


@pytest.fixture
async def imds() -> AsyncIterator[AzureMetadata]:
    server = AzureMetadata()
    async with running(server):
        yield server


def source(imds: AzureMetadata, *, enabling_s: float = 0.0) -> Azure:
    return Azure(imds.url, period_s=0.02, timeout_s=0.3, enabling_s=enabling_s)


async def test_an_eviction_of_this_vm_is_a_notice_and_others_are_not(imds: AzureMetadata) -> None:
    imds.schedule(40.0, "spot-vmss_4", event="e-other")
    imds.schedule(600.0, kind="Freeze", event="e-freeze")
    async with listening(source(imds)) as heard:
        await heard.until(lambda: len(imds.requests) > 4)
        assert heard.signals == []
        imds.schedule(30.0, "spot-vmss_4", "SPOT-VMSS_3", event="e-both")
        await heard.count(1)
        asked = len(imds.requests)
        await heard.until(lambda: len(imds.requests) > asked + 4)
    (notice,) = heard.notices
    assert notice.source == "azure"
    assert 27.0 < notice.deadline_s <= 31.0


async def test_an_event_that_has_begun_leaves_no_time(imds: AzureMetadata) -> None:
    imds.schedule(None)
    async with listening(source(imds)) as heard:
        await heard.count(1)
    assert heard.notices == [Notice(0.0, "azure")]


@pytest.mark.parametrize("not_before", [None, "", "soon", 7])
async def test_an_unreadable_time_is_no_time_or_a_failure(
    imds: AzureMetadata, not_before: object, caplog: pytest.LogCaptureFixture
) -> None:
    imds.schedule(30.0)
    imds.events[0]["NotBefore"] = not_before
    async with listening(source(imds)) as heard:
        await heard.until(lambda: heard.signals or "unintelligible" in caplog.text)
    assert heard.notices == ([] if not_before == 7 else [Notice(0.0, "azure")])


async def test_a_scheduled_event_that_begins_early_is_a_second_notice(imds: AzureMetadata) -> None:
    imds.schedule(300.0)
    async with listening(source(imds)) as heard:
        await heard.count(1)
        imds.events[0].update(EventStatus="Started", NotBefore="")
        await heard.count(2)
    assert heard.notices[1] == Notice(0.0, "azure")


@pytest.mark.parametrize("skew_s", [-3600.0, 3600.0])
async def test_the_servers_clock_counts(imds: AzureMetadata, skew_s: float) -> None:
    imds.skew_s = skew_s
    imds.schedule(30.0)
    async with listening(source(imds)) as heard:
        await heard.count(1)
    assert 27.0 < heard.notices[0].deadline_s <= 31.0


async def test_the_first_request_may_take_as_long_as_azure_needs_to_begin(imds: AzureMetadata) -> None:
    imds.enabling_s = 0.6
    imds.schedule(30.0)
    async with listening(source(imds, enabling_s=5.0)) as heard:
        await heard.count(1)


@pytest.mark.parametrize("fault", [400, 401, 404, 500, 503, "hang", "cut", "drop", "garbage", "drip", "malformed"])
async def test_faults_are_outlived_and_logged_once(
    imds: AzureMetadata, fault: int | str, caplog: pytest.LogCaptureFixture
) -> None:
    async with listening(source(imds)) as heard:
        await heard.until(lambda: len(imds.requests) >= 3)
        asked, imds.fault = len(imds.requests), fault
        await heard.until(lambda: len(imds.requests) >= asked + 3)
        imds.fault = ""
        imds.schedule(30.0)
        await heard.count(1)
        await heard.until(lambda: "answers again" in caplog.text)
    assert len(heard.notices) == 1
    assert caplog.text.count("no notices from azure") == 1
    assert "Traceback" not in caplog.text


async def test_released_events_are_acknowledged(imds: AzureMetadata) -> None:
    imds.schedule(30.0, event="e-mine")
    azure = source(imds)
    async with listening(azure) as heard:
        await heard.count(1)
        assert imds.acknowledged == []  # the instance is still at work
    await azure.release()
    assert imds.acknowledged == ["e-mine"]


async def test_what_must_not_be_acknowledged_is_not(imds: AzureMetadata) -> None:
    imds.schedule(30.0, "spot-vmss_3", "spot-vmss_4", event="e-shared")
    imds.schedule(None, event="e-begun")
    imds.schedule(30.0, "spot-vmss_9", event="e-foreign")
    imds.schedule(30.0, event="e-withdrawn")
    azure = source(imds)
    async with listening(azure) as heard:
        await heard.count(3)
        asked = len(imds.requests)
        imds.events.pop()
        await heard.until(lambda: len(imds.requests) > asked + 2)
    await azure.release()
    assert imds.acknowledged == []


@pytest.mark.parametrize("fault", [500, "hang", "drop"])
async def test_an_acknowledgement_that_fails_says_so(imds: AzureMetadata, fault: int | str) -> None:
    imds.schedule(30.0)
    azure = source(imds)
    async with listening(azure) as heard:
        await heard.count(1)
    imds.fault = fault
    with pytest.raises(SourceFailed):
        await azure.release()
