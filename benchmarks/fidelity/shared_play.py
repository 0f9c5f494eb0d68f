"""A script of several models played on real fleets: one is measured, the next is told its pace and serves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.fidelity.clients import Clients, Stream
from benchmarks.fidelity.drag import Drag
from benchmarks.fidelity.scripts import ENGINE
from benchmarks.fidelity.shared_profile import laws_of, paces_told, speeds_of
from benchmarks.fidelity.shared_scripts import MAX_BATCH, SharedScript
from benchmarks.fidelity.steps import StepSurvey
from benchmarks.fidelity.watch import Watch
from data.shared_plan import Speed
from perennial.processes import Start
from perennial.testing import fleet, given_groups
from planning.simulation.shared_fleet import Ask
from planning.step_laws import Observed
from serving.engine.weights import read_spec
from serving.lifeline import settle
from serving.settings import Capacity

_DEEP = (1, 2)  # requests for every stage, of models that keep all groups busy together
_PATIENCE_S = 60.0
_FINISH_S = 180.0


@dataclass(frozen=True, slots=True)
class SharedPlayed:
    """A run: requests as they were sent, what came back, the steps by model, and the paces that admission had.

    `foreign_cores`, `probe_ms` and `drag` are as for a run of one model.
    """

    asks: list[Ask]
    streams: list[Stream]
    steps: list[tuple[str, Observed]]
    speeds: list[Speed]
    foreign_cores: list[float] = field(default_factory=list)
    probe_ms: list[float] = field(default_factory=list)
    drag: list[tuple[float, float]] = field(default_factory=list)


class _Stage:
    """Starts fleets of a script and measures them."""

    def __init__(
        self, script: SharedScript, seed: int, checkpoints: Mapping[str, str], home: Path, start: Start
    ) -> None:
        self._script, self._seed, self._home, self._start = script, seed, home, start
        self._checkpoints = {model: checkpoints[model] for model in script.shapes}
        self._vocab = min(read_spec(path).vocab for path in self._checkpoints.values())
        self._steps: list[tuple[str, Observed]] = []

    async def fleet(self, stack: AsyncExitStack, speeds: Sequence[Speed] = ()) -> tuple[Clients, Clients]:
        """A fleet that serves; clients that are patient, and those that take no for an answer."""
        groups = self._script.groups
        devices = self._script.deployment.devices
        service = await stack.enter_async_context(
            fleet(
                self._checkpoints,
                instances=devices,
                plan=given_groups(self._checkpoints, {devices: groups}, speeds=speeds),
                home=self._home / ("told" if speeds else "measured"),
                engine=ENGINE,
                start=self._start,
                capacity=Capacity(admission="slo"),
            )
        )
        connections = [service.client(give_up_s=give_up_s) for give_up_s in (_PATIENCE_S, 0.0)]
        patient, hasty = [Clients(await stack.enter_async_context(one), self._vocab, self._seed) for one in connections]
        return patient, hasty

    async def survey(self, clients: Clients) -> None:
        """The steps of every model, one after the other, and then of some that keep all groups busy together."""
        surveys = {
            demand.model: StepSurvey(clients, ENGINE.step_tokens, ENGINE.block_tokens, demand.prompts, demand.outputs)
            for demand in self._script.demands
        }
        for model, survey in surveys.items():
            stages = self._script.shapes[model][1]
            found = await survey.measure(self._script.hosting(model), stages, MAX_BATCH, model=model)
            self._steps += [(model, one) for one in found]
        if len(self._script.cover) > 1:
            for deep in _DEEP:
                self._steps += await self._together(surveys, deep)

    async def _together(self, surveys: Mapping[str, StepSurvey], deep: int) -> list[tuple[str, Observed]]:
        """Flows of models that share no group, at once: what a model does while groups without it are at work too."""
        script = self._script
        lines = {model: script.hosting(model) * script.shapes[model][1] for model in script.cover}
        flows = (
            surveys[model].flow(
                own * deep,
                script.hosting(model),
                script.shapes[model][1],
                beside=sum(lines.values()) - own,
                model=model,
            )
            for model, own in lines.items()
        )
        found = await asyncio.gather(*flows)
        return [(model, one) for model, some in zip(lines, found, strict=True) for one in some]

    def felt(self, drag: Drag) -> list[tuple[str, Observed]]:
        """What was measured, with how slow the processors were at each time."""
        return [(model, drag.felt(one)) for model, one in self._steps]


async def play_shared(
    script: SharedScript, seed: int, checkpoints: Mapping[str, str], home: Path, start: Start
) -> SharedPlayed:
    """Measure a fleet, play the script on another that knows how quick it is, and measure that again."""
    stage, watch, begun_s = _Stage(script, seed, checkpoints, home, start), Watch(), time.monotonic()
    watching = asyncio.create_task(watch.watch())
    async with AsyncExitStack() as stack:
        await stage.survey((await stage.fleet(stack))[0])
    speeds = speeds_of(script, laws_of(script, stage.felt(Drag.of(watch.probes))))
    async with AsyncExitStack() as stack:
        patient, hasty = await stage.fleet(stack, speeds)
        settle()  # the clients' own garbage collection is not the service's latency
        surveyed_s = time.monotonic()
        asks, streams = await _run(script, seed, speeds, hasty)
        played_s = time.monotonic()
        await stage.survey(patient)
    watching.cancel()
    drag = Drag.of(watch.probes)
    moments = begun_s, surveyed_s, played_s, time.monotonic()
    return SharedPlayed(
        asks,
        streams,
        stage.felt(drag),
        speeds,
        watch.foreign_cores(*moments),
        watch.probe_ms(*moments),
        drag.course(surveyed_s, played_s),
    )


async def _run(
    script: SharedScript, seed: int, speeds: Sequence[Speed], clients: Clients
) -> tuple[list[Ask], list[Stream]]:
    """Requests in the order in which they were sent, with their times, and their streams."""
    asks, began_s = script.asks(seed, paces_told(speeds)), time.monotonic()

    async def one(ask: Ask) -> tuple[Ask, Stream]:
        stream = await clients.send(ask.input_tokens, ask.output_tokens, model=ask.model, deadline_s=ask.deadline_s)
        return replace(ask, arrival_s=stream.sent_s - began_s), stream

    async with asyncio.timeout(asks[-1].arrival_s + _FINISH_S), asyncio.TaskGroup() as group:
        sent = []
        for ask in asks:
            await asyncio.sleep(max(0.0, began_s + ask.arrival_s - time.monotonic()))
            sent.append(group.create_task(one(ask)))
    pairs = [task.result() for task in sent]
    pairs.sort(key=lambda pair: pair[0].arrival_s)
    return [ask for ask, _ in pairs], [stream for _, stream in pairs]
