"""A fleet whose plans depend on what runs: it stays where it is to stay, and what it reaches it does not leave."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from data.cluster import ClusterState
from data.explanation import Candidate, Estimate
from data.layout import ParallelConfig
from data.plan import Plan, PlanBook
from serving.requests import Event
from serving.settings import dump
from tests.serving.live import LiveFleet, tokens_of

ONE, LINE, THREE = ParallelConfig(1, 1, 1, 4), ParallelConfig(1, 2, 1, 4), ParallelConfig(3, 1, 1, 4)


def journey(book: PlanBook) -> PlanBook:
    """Three replicas on three instances, unless a pipeline of two runs already."""
    frontier = tuple(Candidate(config, Estimate(1.0, 1.0, 1000, residency="model")) for config in (ONE, LINE, THREE))

    def plan(count: int, transitions: tuple[tuple[ParallelConfig, ParallelConfig], ...]) -> Plan:
        state, best = ClusterState.of({"local-cpu": count}), frontier[count - 1]
        return Plan(state, best.config, best.estimate, "for a test", frontier, "", transitions)

    return replace(book, plans=(plan(1, ()), plan(2, ()), plan(3, ((LINE, LINE), (ONE, LINE)))))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveFleet]:
    home: Path = tmp_path_factory.mktemp("journey")
    one = LiveFleet(home, {3: (3, 1, 1)}, instances=2)
    one.plan.write_bytes(journey(PlanBook.from_bytes(one.plan.read_bytes())).to_bytes())
    engine = msgspec.structs.replace(one.settings.engine, residency="plan")
    one.settings = msgspec.structs.replace(one.settings, engine=engine)
    (home / "settings.json").write_bytes(dump(one.settings))
    one.start_controller()
    try:
        yield one
    finally:
        assert one.end() == []


async def layouts(fleet: LiveFleet) -> list[Event]:
    return [event for event in await fleet.events() if event.kind == "layout"]


@pytest.mark.slow
async def test_what_runs_decides_and_changes_come_to_an_end(fleet: LiveFleet) -> None:
    await fleet.ready(2)
    assert [event.data["config"] for event in await layouts(fleet)] == [str(LINE)]
    async with fleet.client() as client:
        undisturbed = await tokens_of(client, 1, "before")
    fleet.add()
    await fleet.until(lambda info: sum(one.state == "ready" for one in info.instances) == 3)
    assert len(await layouts(fleet)) == 1  # the third is a spare

    busy = next(name for name in fleet.processes if name != "controller")
    fleet.kill(busy)
    await fleet.ready(2)
    last = (await layouts(fleet))[-1]
    assert last.data["config"] == str(LINE)

    async with fleet.client() as client:
        await client.notify(next(name for name in fleet.processes if name != "controller"), 10.0)
    await fleet.until(lambda info: len(info.instances) == 1 and len(info.positions) == 1)
    last = (await layouts(fleet))[-1]
    assert last.data["config"] == str(ONE)
    moved = last.data["moved"]  # nothing: every device kept the whole model, as the plan said
    assert moved["weights_intra_bytes"] == moved["weights_inter_bytes"] == moved["weights_disk_bytes"] == 0

    (left,) = (name for name in fleet.processes if name != "controller" and fleet.processes[name].poll() is None)
    fleet.kill(left)
    await fleet.until(lambda info: info.state != "serving")
    await fleet.ready(3)
    await fleet.until(lambda info: len(info.positions) >= 2)  # they may come one by one
    assert (await layouts(fleet))[-1].data["config"] in (str(THREE), str(LINE))
    async with fleet.client() as client:
        assert await tokens_of(client, 1, "after") == undisturbed
