"""Two models served from a registry: the challenger is adopted by promotion, and no stream notices."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from data.deployment import Hosted, SharedGroup
from data.shared_plan import SharedPlanBook
from flows.publish import publish
from flows.registry import CHALLENGER, CHAMPION, Registry, Release
from perennial.scenario import Shape, scenario
from perennial.serve import ServeOptions, _only_plan
from perennial.settings import Settings
from perennial.testing import collect, compare, fleet, given_groups, reference_streams
from serving.engine.checkpoint import create_checkpoint
from serving.settings import Timeouts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("checkpoints")
    create_checkpoint(str(home / "a"), family="llama", layers=4, hidden=64, heads=8, kv_heads=4, ffn=128)
    create_checkpoint(str(home / "b"), family="qwen3", seed=1, layers=3, hidden=48, heads=4, kv_heads=2, ffn=96)
    return {"chat": str(home / "a"), "code": str(home / "b")}


def books(checkpoints: dict[str, str]) -> tuple[SharedPlanBook, SharedPlanBook]:
    """Both on one device each, and both in an uneven pipeline."""
    alone = [SharedGroup(1, 1, (Hosted(name, 4),)) for name in checkpoints]
    together = SharedGroup(2, 1, (Hosted("chat", 4, 0.5, (3, 1)), Hosted("code", 4, 0.5, (1, 2))))
    old, new = (given_groups(checkpoints, {1: alone[:1], 2: groups}) for groups in (alone, [together]))
    return old, replace(new, occasion="more is asked of code")


async def test_the_challenger_is_adopted_under_live_streams(checkpoints: dict[str, str], tmp_path: Path) -> None:
    requests = [
        msgspec.structs.replace(arrival.request, model=list(checkpoints)[index % 2])
        for index, arrival in enumerate(
            scenario(5, Shape(requests=6, prompt_tokens=(4, 40), output_tokens=(200, 240))).arrivals
        )
    ]
    expected: dict[str, list[int]] = {}
    for name, path in checkpoints.items():
        expected |= reference_streams(path, [one for one in requests if one.model == name])
    registry = await asyncio.to_thread(Registry, f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "artifacts")
    champion, challenger = books(checkpoints)
    await asyncio.to_thread(publish, registry, Release(champion), CHAMPION)
    name = Release(champion).name
    timeouts = Timeouts(plan_poll_s=0.2)
    async with (
        fleet(checkpoints, instances=2, registry=registry.uri, registry_model=name, timeouts=timeouts) as service,
        service.client() as client,
    ):
        assert (await service.wait_serving()).plan_sha256 == champion.sha256
        streams = [asyncio.create_task(collect(client, request)) for request in requests]
        await asyncio.sleep(0.3)
        since = len(service.events)
        await asyncio.to_thread(publish, registry, Release(challenger), CHALLENGER)
        assert await asyncio.to_thread(registry.promote, name, CHALLENGER) == "2"
        layout = await service.wait_event(lambda event: event.kind == "layout", since=since)
        assert layout.data["config"] == str(challenger.plans[-1].deployment)
        async with asyncio.timeout(90):
            delivered = await asyncio.gather(*streams)
        assert (await service.wait_serving()).plan_sha256 == challenger.sha256
    assert not any(compare(expected[request.request_id], got) for request, got in zip(requests, delivered, strict=True))


def test_serve_finds_the_only_plan_for_its_models(checkpoints: dict[str, str], tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    registry = Registry(settings.registry_uri, tmp_path / "mlflow-artifacts")
    publish(registry, Release(books(checkpoints)[0]), CHAMPION)
    named = [f"{name}={path}" for name, path in reversed(checkpoints.items())]
    options = ServeOptions(named, None, "", "", 0, 1, "", "cpu", "", 1 << 20, "127.0.0.1", 0, 0, 0, "", False)
    assert _only_plan(options, settings) == "plan.chat-code.given"
