"""The baselines of SpotServe's evaluation, along a trace (ASPLOS'24, §6.1, as its artifact configures them)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from data.availability import AvailabilityTrace
from data.placement import Shape
from planning.simulation.serving import GRACE_S, Array, FleetEvent, Outcome, Transition, before, events_of, merged
from planning.simulation.serving_spotserve import MOST_BATCH, Hosts, StaticFleet, drain
from planning.simulation.serving_static import Pipelines, Requests, advance
from planning.simulation.serving_static_kernel import BatchTimes
from planning.static_batch import StaticConfig

_ESTIMATE_S = 0.5  # what the artifact tells their engines that a change takes
_POOL = 2 * MOST_BATCH
_LONGEST_STOP_S = 600.0


def simulate_reparallelization(
    fleet: StaticFleet, trace: AvailabilityTrace, arrival_s: Sequence[float] | Array, rate_rps: float, *, fill: bool
) -> Outcome:
    """SpotServe's optimizer, but every change restarts everything: weights from disk, requests from scratch."""
    requests = Requests(before(arrival_s, trace.duration_s))
    hosts, config, used = Hosts.of_trace(events_of(trace)), None, set[int]()
    pipelines = Pipelines(1, BatchTimes.of(fleet.profile, StaticConfig(1, 1, 1, MOST_BATCH, 1, 1)), _POOL, fill)
    changes, now_s = [], 0.0
    for event in merged(events_of(trace)):
        if event.time_s > 0:
            now_s = advance(pipelines, requests, now_s, max(event.notice_s, now_s))
        rate_rps = event.rate_rps if event.rate_rps is not None else rate_rps
        gone = hosts.take(event)
        usable = fleet.in_order(list(hosts.of.values()))
        target = fleet.choose(len(usable), rate_rps)
        if target == config and not used & set(gone):
            continue
        if config is not None:
            now_s = _stopped(pipelines, requests, now_s, growing=bool(event.added))
        begin_s = max(now_s, event.time_s) if event.added else now_s
        ready_s = begin_s + fleet.engine_start_s + (fleet.load_s if event.time_s > 0 else 0.0)
        if target is not None:
            pipelines = Pipelines(target.replicas, BatchTimes.of(fleet.profile, target), _POOL, fill)
            for slot in range(target.replicas):
                pipelines.start(slot, ready_s)
            used = set(usable[: -(-target.replicas * target.stages * target.shards // fleet.gpus_per_host)])
            if event.time_s > 0:
                shape = target.replicas, target.stages, target.shards
                changes.append(Transition(event.time_s, now_s, ready_s, shape))
        config = target
    drain(pipelines, requests, now_s, trace.duration_s)
    return Outcome(requests.arrival_s, requests.done_s, trace.duration_s, tuple(changes))


def _stopped(pipelines: Pipelines, requests: Requests, now_s: float, *, growing: bool) -> float:
    """All pipelines stop; what they had begun is thrown away."""
    for slot in range(pipelines.count):
        pipelines.signal(slot, now_s, -_ESTIMATE_S if growing else _ESTIMATE_S)
    now_s = advance(pipelines, requests, now_s, now_s + _LONGEST_STOP_S, range(pipelines.count))
    for slot in range(pipelines.count):
        requests.give_back(pipelines.remove(slot))
    return now_s


@dataclass(slots=True)
class _Routing:
    """Pipelines of a pinned shape by slot, with their hosts."""

    fleet: StaticFleet
    config: StaticConfig
    pipelines: Pipelines
    requests: Requests
    extra_s: float
    members: dict[int, tuple[int, ...]] = field(default_factory=dict)
    now_s: float = 0.0
    changes: list[Transition] = field(default_factory=list)

    def handle(self, event: FleetEvent, hosts: Hosts) -> None:
        """Pipelines that lose a host end, free hosts form new ones."""
        if event.time_s > 0:
            self.now_s = advance(self.pipelines, self.requests, self.now_s, max(event.notice_s, self.now_s))
        gone = set(hosts.take(event))
        self._end([slot for slot, members in self.members.items() if gone & set(members)])
        if event.time_s > 0 and (event.added or gone):
            self.now_s = advance(self.pipelines, self.requests, self.now_s, max(event.time_s, self.now_s))
        busy = {host for members in self.members.values() for host in members}
        self._begin(event, [host for host in self.fleet.in_order(list(hosts.of.values())) if host not in busy])

    def _end(self, broken: Sequence[int]) -> None:
        for slot in broken:
            self.pipelines.signal(slot, self.now_s, _ESTIMATE_S)
        if broken:
            deadline_s = self.now_s + GRACE_S
            self.now_s = advance(self.pipelines, self.requests, self.now_s, deadline_s, broken)
        for slot in broken:
            self.requests.give_back(self.pipelines.remove(slot))
            del self.members[slot]

    def _begin(self, event: FleetEvent, free: list[int]) -> None:
        size = -(-self.config.stages * self.config.shards // self.fleet.gpus_per_host)
        while len(free) >= size:
            slot = next(number for number in range(self.pipelines.count) if number not in self.members)
            self.members[slot], free = tuple(free[:size]), free[size:]
            wait_s = self.fleet.engine_start_s
            if event.time_s > 0:
                wait_s += self.fleet.load_s + self.extra_s
                shape = len(self.members), self.config.stages, self.config.shards
                self.changes.append(Transition(event.time_s, self.now_s, self.now_s + wait_s, shape))
            self.pipelines.start(slot, self.now_s + wait_s)


def simulate_rerouting(
    fleet: StaticFleet,
    trace: AvailabilityTrace,
    arrival_s: Sequence[float] | Array,
    pinned: StaticConfig,
    *,
    fill: bool,
    as_published: bool = True,
) -> Outcome:
    """Pipelines of one shape come and go, the others keep running; new ones load from disk.

    `as_published`: their engines sleep their start-up time once more, as the artifact's do.
    """
    events = events_of(trace)
    requests = Requests(before(arrival_s, trace.duration_s))
    hosts = Hosts.of_trace(events, least=1)
    most = len(hosts.free) * fleet.gpus_per_host // (pinned.stages * pinned.shards)
    pipelines = Pipelines(max(most, 1), BatchTimes.of(fleet.profile, pinned), _POOL, fill)
    routing = _Routing(fleet, pinned, pipelines, requests, fleet.engine_start_s if as_published else 0.0)
    for event in events:
        routing.handle(event, hosts)
    drain(pipelines, requests, routing.now_s, trace.duration_s)
    return Outcome(requests.arrival_s, requests.done_s, trace.duration_s, tuple(routing.changes))


def pinned_config(fleet: StaticFleet, hosts: int, rate_rps: float) -> StaticConfig:
    """What Rerouting is pinned to: the optimizer's choice on all hosts that there will ever be."""
    chosen = fleet.choose(hosts, rate_rps)
    assert chosen is not None
    return chosen


def pinnable(fleet: StaticFleet, hosts: int) -> list[StaticConfig]:
    """Every shape that Rerouting could have been pinned to, with the micro-batches that the optimizer prefers."""
    profile, found = fleet.profile, []
    for shards in (size for size in (1, 2, 4, 8, 16) if size <= profile.most_shards):
        for stages in range(1, hosts * fleet.gpus_per_host // shards + 1):
            shape = Shape(shards=shards, stages=stages)
            whole = shape.devices % fleet.gpus_per_host == 0 and profile.stored_layers % stages == 0
            if whole and shape.devices >= profile.least_devices:
                found.append(StaticConfig(1, stages, shards, MOST_BATCH, MOST_BATCH, 1))
    return found
