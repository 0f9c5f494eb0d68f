"""SpotServe along a trace, as published: its optimizer at every event, its arranger, its restart of every pipeline.

X. Miao et al., ASPLOS'24, §3 and §4, in the form of its artifact. Nothing checks a deadline there, and no
instance is really taken away before the switch is over; that is kept, to its advantage.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from data.availability import AvailabilityTrace
from data.layout import ParallelConfig
from planning.edge_weights import GptShape, InterruptedBatches
from planning.simulation.serving import (
    DRAIN_S,
    GRACE_S,
    Array,
    FleetEvent,
    Outcome,
    Transition,
    before,
    events_of,
    merged,
)
from planning.simulation.serving_static import Pipelines, Requests, advance
from planning.simulation.serving_static_kernel import BatchTimes
from planning.spotserve_switch import RESTART_S, Placement, Switch, first_placement, place, transfer_s
from planning.static_batch import OUTPUT_TOKENS, StaticBatchProfile, StaticConfig

MOST_BATCH = 4
TOKENS = 640
_LONGEST_STOP_S = 600.0


@dataclass(frozen=True, slots=True)
class StaticFleet:
    """What the published system runs on: profile and shape of the model, devices per instance, and delays.

    `engine_start_s` is charged at every start of a pipeline, `load_s` when nobody holds the weights.
    `addresses` is the order in which free hosts are taken (default: by number).
    """

    profile: StaticBatchProfile
    model: GptShape
    gpus_per_host: int = 4
    engine_start_s: float = 5.0
    load_s: float = 30.0
    addresses: Sequence[int] = ()

    def in_order(self, hosts: Sequence[int]) -> list[int]:
        """Hosts by address."""
        known = {host: rank for rank, host in enumerate(self.addresses)}
        return sorted(hosts, key=lambda host: (known.get(host, len(known)), host))

    def choose(self, hosts: int, rate_rps: float) -> StaticConfig | None:
        """The published configuration; deployed with the largest batch, whatever was chosen."""
        chosen = self.profile.choose(hosts * self.gpus_per_host, MOST_BATCH, rate_rps)
        if chosen is None:
            return None
        one = chosen.config
        return StaticConfig(one.replicas, one.stages, one.shards, MOST_BATCH, one.prefill_micro, one.decode_micro)


@dataclass(slots=True)
class Hosts:
    """Which host is behind which instance: a freed one is used again last."""

    free: deque[int]
    of: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of_trace(cls, events: Sequence[FleetEvent], least: int = 12) -> Hosts:
        """Enough hosts for all that are ever there at once."""
        count = most = 0
        for event in events:
            count += len(event.added) - len(event.removed)
            most = max(most, count + len(event.removed))
        return cls(deque(range(max(most, least))))

    def take(self, event: FleetEvent) -> list[int]:
        """Apply an event; the hosts that leave."""
        for name in event.added:
            self.of[name] = self.free.popleft()
        gone = [self.of.pop(name) for name in event.removed]
        self.free.extend(gone)
        return gone


def simulate_spotserve(
    fleet: StaticFleet,
    trace: AvailabilityTrace,
    arrival_s: Sequence[float] | Array,
    rate_rps: float,
    *,
    fill: bool,
) -> Outcome:
    """SpotServe on `trace`; `fill` is the old dispatcher, which keeps a second batch in the engines."""
    run = _Run(fleet, Requests(before(arrival_s, trace.duration_s)), rate_rps, fill)
    events = merged(events_of(trace))
    run.hosts = Hosts.of_trace(events)
    for event in events:
        run.handle(event)
    run.finish(trace.duration_s)
    return Outcome(run.requests.arrival_s, run.requests.done_s, trace.duration_s, tuple(run.transitions))


def simulate_constant(
    fleet: StaticFleet,
    config: StaticConfig,
    arrival_s: Sequence[float] | Array,
    duration_s: float,
    *,
    fill: bool,
    pool: int = MOST_BATCH,
) -> Outcome:
    """Pipelines of one configuration that start at 0 and stay, such as on-demand instances."""
    requests = Requests(before(arrival_s, duration_s))
    pipelines = Pipelines(config.replicas, BatchTimes.of(fleet.profile, config), pool, fill)
    for slot in range(pipelines.count):
        pipelines.start(slot, fleet.engine_start_s)
    drain(pipelines, requests, 0.0, duration_s)
    return Outcome(requests.arrival_s, requests.done_s, duration_s)


def drain(pipelines: Pipelines, requests: Requests, now_s: float, end_s: float) -> None:
    """To the end of the trace, then on until everything that arrived is done or nothing can be."""
    advance(pipelines, requests, now_s, end_s)
    now_s = end_s
    if not pipelines.any_up:
        return
    while not requests.all_done and now_s < end_s + DRAIN_S:
        advance(pipelines, requests, now_s, now_s + 60.0)
        now_s += 60.0


@dataclass(slots=True)
class _Run:
    fleet: StaticFleet
    requests: Requests
    rate_rps: float
    fill: bool
    hosts: Hosts = field(default_factory=lambda: Hosts(deque()))
    now_s: float = 0.0
    config: StaticConfig | None = None
    placement: Placement = field(default_factory=dict)
    pipelines: Pipelines | None = None
    transitions: list[Transition] = field(default_factory=list)

    def handle(self, event: FleetEvent) -> None:
        """Decide at the notice, or when the last switch is over; act when the pipelines have stopped."""
        if event.time_s > 0:
            self._advance(max(event.notice_s, self.now_s))
        if event.rate_rps is not None:
            self.rate_rps = event.rate_rps
        gone = self.hosts.take(event)
        usable = self.fleet.in_order(list(self.hosts.of.values()))
        target = self.fleet.choose(len(usable), self.rate_rps)
        lost = any(host in gone for host, _ in self.placement)
        if target is None:
            self._give_up(event)
        elif self.config is None:
            self._begin(event, target, usable)
        elif lost or target != self.config:
            self._switch(event, target, usable)

    def finish(self, end_s: float) -> None:
        """See `drain`."""
        if self.pipelines is not None:
            drain(self.pipelines, self.requests, self.now_s, end_s)

    def _advance(self, until_s: float, watched: Sequence[int] = ()) -> None:
        if self.pipelines is not None:
            until_s = advance(self.pipelines, self.requests, self.now_s, until_s, watched)
        self.now_s = max(until_s, self.now_s)

    def _new_pipelines(self, config: StaticConfig) -> Pipelines:
        return Pipelines(config.replicas, BatchTimes.of(self.fleet.profile, config), MOST_BATCH, self.fill)

    def _begin(self, event: FleetEvent, target: StaticConfig, usable: Sequence[int]) -> None:
        """Nothing runs. At the very start the weights are there; later they are loaded."""
        wait_s = max(self.fleet.engine_start_s, self.fleet.load_s if event.time_s > 0 else 0.0)
        self.placement = first_placement(_parallel(target), usable, self.fleet.gpus_per_host)
        self._up(event, target, [None] * target.replicas, event.time_s, event.time_s + wait_s, 0.0)

    def _give_up(self, event: FleetEvent) -> None:
        """Fewer devices than the model needs: what runs goes on to the deadline, then everything is lost."""
        self._advance(max(event.time_s, self.now_s))
        if self.pipelines is not None:
            for slot in range(self.pipelines.count):
                self.requests.give_back(self.pipelines.remove(slot))
        self.config, self.pipelines, self.placement = None, None, {}

    def _switch(self, event: FleetEvent, target: StaticConfig, usable: Sequence[int]) -> None:
        pipelines, config = self.pipelines, self.config
        assert pipelines is not None
        assert config is not None
        full = InterruptedBatches([MOST_BATCH] * config.replicas, TOKENS, range(target.replicas))
        switch = Switch(
            self.fleet.model, _parallel(config), _parallel(target), self.placement, usable,
            self.fleet.gpus_per_host, full,
        )  # fmt: skip
        after = place(switch)
        moving_s = transfer_s(switch, after)
        if switch.grows_only:
            self._grow(event, target, after, moving_s)
            return
        estimate_s = moving_s + RESTART_S
        if event.rate_rps is None:
            estimate_s += max(GRACE_S - (event.time_s - self.now_s), 0.0)
        in_use = config.replicas * config.stages * config.shards
        if len(usable) * self.fleet.gpus_per_host > in_use:
            estimate_s = -estimate_s
        for slot in range(pipelines.count):
            pipelines.signal(slot, self.now_s, estimate_s)
        self._advance(self.now_s + _LONGEST_STOP_S, range(pipelines.count))
        self.placement = after
        carried = _carried(pipelines, target.replicas, self.requests)
        stop_s = self.now_s
        self._up(event, target, carried, stop_s, stop_s + max(self.fleet.engine_start_s, moving_s), moving_s)

    def _grow(self, event: FleetEvent, target: StaticConfig, after: Placement, moving_s: float) -> None:
        """New pipelines start when the instances are there; the others are not disturbed."""
        old = self.pipelines
        assert old is not None
        self._advance(self.now_s + GRACE_S)
        grown = old.grown(target.replicas)
        ready_s = self.now_s + max(self.fleet.engine_start_s, moving_s)
        for slot in range(old.count, grown.count):
            grown.start(slot, ready_s)
        self.pipelines, self.config, self.placement = grown, target, after
        self.transitions.append(Transition(event.time_s, self.now_s, ready_s, _shape(target)))

    def _up(
        self,
        event: FleetEvent,
        target: StaticConfig,
        carried: Sequence[tuple[list[int], int] | None],
        stop_s: float,
        ready_s: float,
        moving_s: float,
    ) -> None:
        self.pipelines, self.config = self._new_pipelines(target), target
        for slot, batch in enumerate(carried):
            self.pipelines.start(slot, ready_s)
            if batch is not None:
                self.pipelines.resume(slot, *batch)
        if event.time_s > 0:
            self.transitions.append(Transition(event.time_s, stop_s, ready_s, _shape(target)))


def _carried(pipelines: Pipelines, replicas: int, requests: Requests) -> list[tuple[list[int], int] | None]:
    """Interrupted batches by new pipeline: they keep their number if all fit, else the furthest survive."""
    left = {slot: pipelines.left_over(slot) for slot in range(pipelines.count)}
    cut = {slot: batch for slot, batch in left.items() if batch[0] and batch[1] < OUTPUT_TOKENS}
    kept = sorted(cut, key=lambda slot: (-cut[slot][1], slot))[:replicas]
    for slot in cut.keys() - set(kept):
        requests.give_back(cut[slot][0])
    stay = sorted([*kept, *(slot for slot in range(replicas) if slot not in kept)][:replicas])
    return [cut[slot] if slot in kept else None for slot in stay]


def _parallel(config: StaticConfig) -> ParallelConfig:
    return ParallelConfig(config.replicas, config.stages, config.shards, MOST_BATCH)


def _shape(config: StaticConfig) -> tuple[int, int, int]:
    return config.replicas, config.stages, config.shards
