"""Our system along a trace: replicas of one shape, prepared in the background, switched at a step boundary.

Only replicas that change pause. Weights travel beside the serving at a share of the links, from any
holder, one copy for an instance; requests go on with their KV, or are computed again where that was
lost. Every loss is enforced at its deadline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import linear_sum_assignment

from data.availability import AvailabilityTrace
from data.placement import Shape
from planning.simulation.serving import DRAIN_S, Array, FleetEvent, Outcome, Transition, before, events_of
from planning.simulation.serving_residency import Residency
from planning.simulation.serving_steps import Service
from planning.step_costs import INPUT_TOKENS, Cells, StepCosts

MOST_REPLICAS = 32

Target = tuple[Shape, int]  # shape and replicas
Policy = Callable[[int, Target | None], Target | None]  # (instances, what runs) -> what to run


@dataclass(frozen=True, slots=True)
class Charges:
    """What a transition costs beside bytes, and which parts of the system are at work.

    `cut_s` is the pause of a switch without its KV, `prepare_s` what preparing takes beside bytes, and
    `slowdown` how much longer steps of replicas that take part in it need meanwhile; weights then get
    `background` of a link. What is fetched in advance gets `trickle` of it, and slows everybody in
    proportion, as sending does. `start_s` is for the workers of a new instance, `disk_bytes_per_s` for
    weights that nobody holds. The switches are those of the ablation. Defaults are our own measurements
    on GPUs: the longest pause and preparation, the median slowdown (docs/spot.md).
    """

    start_s: float = 5.0
    cut_s: float = 0.49
    prepare_s: float = 2.8
    slowdown: float = 1.12
    background: float = 0.5
    trickle: float = 0.1
    disk_bytes_per_s: float = 1e9
    margin_s: float = 1.0
    mapping: bool = True
    arranger: bool = True
    continuous: bool = True
    residency: bool = True


@dataclass(slots=True)
class _Replica:
    number: int
    shape: Shape
    instances: tuple[str, ...]


@dataclass(slots=True)
class _Move:
    """A planned change: who stays, who ends, the instances of each new replica, and when all is prepared."""

    shape: Shape
    keep: list[_Replica]
    retire: list[_Replica]
    new: list[tuple[str, ...]]
    begin_s: float = 0.0
    prepared_s: float = 0.0
    moved_bytes: float = 0.0
    excess_s: float = 0.0


def simulate_perennial(
    costs: StepCosts,
    trace: AvailabilityTrace,
    arrival_s: Sequence[float] | Array,
    policy: Policy,
    charges: Charges | None = None,
) -> Outcome:
    """Our system on `trace`, with what `policy` says to run on so many instances."""
    service = Service(before(arrival_s, trace.duration_s), most=MOST_REPLICAS)
    charges = charges or Charges()
    run = _Run(costs, charges, policy, service, Residency(costs, charges.residency))
    for event in events_of(trace):
        run.handle(event)
    run.finish(trace.duration_s)
    return Outcome(service.arrival_s, service.line.done_s, trace.duration_s, tuple(run.transitions))


@dataclass(slots=True)
class _Run:
    costs: StepCosts
    charges: Charges
    policy: Policy
    service: Service
    weights: Residency
    instances: list[str] = field(default_factory=list)
    there_s: dict[str, float] = field(default_factory=dict)  # when the workers of an instance are up
    replicas: list[_Replica] = field(default_factory=list)
    transitions: list[Transition] = field(default_factory=list)
    busy: set[str] = field(default_factory=set)
    busy_s: float = 0.0  # until then these instances prepare

    def handle(self, event: FleetEvent) -> None:
        """Plan at the notice, switch when it is prepared, and enforce the deadline."""
        if event.time_s > 0:
            self._advance(max(event.notice_s, self.service.now_s))
        self.weights.arrive(self.service.now_s)
        start_s = event.time_s + self.charges.start_s if event.time_s > 0 else 0.0
        self.there_s.update(dict.fromkeys(event.added, start_s))
        after = [name for name in [*self.instances, *event.added] if name not in event.removed]
        now = (self.replicas[0].shape, len(self.replicas)) if self.replicas else None
        target = self.policy(len(after), now)
        move = self._plan(event, target, after)
        self._execute(event, move)
        self._advance(max(event.time_s, self.service.now_s) if event.removed else self.service.now_s)
        self.instances = after
        for name in event.removed:
            self.weights.drop(name)
        self._prefetch()

    def finish(self, end_s: float) -> None:
        """To the end of the trace, then on until all is done or nothing can be."""
        self._advance(end_s)
        while not self.service.all_done and self.service.now_s < end_s + DRAIN_S:
            self.service.advance(self.service.now_s + 600.0)

    def _advance(self, until_s: float) -> None:
        """Serve, slower while weights are prepared or fetched."""
        charges, service = self.charges, self.service
        gentle = 1 + (charges.slowdown - 1) * charges.trickle / charges.background
        busy = np.full(service.most, gentle)
        busy[[one.number for one in self.replicas if set(one.instances) & self.busy]] = charges.slowdown
        service.advance(min(until_s, self.busy_s), busy)
        service.advance(min(until_s, self.weights.fetching_s), gentle)
        service.advance(until_s)

    def _plan(self, event: FleetEvent, target: Target | None, after: Sequence[str]) -> _Move:
        if target is None:
            return _Move(Shape(shards=1, stages=1), [], list(self.replicas), [])
        shape, wanted = target
        able = [one for one in self.replicas if one.shape == shape and set(one.instances) <= set(after)]
        able.sort(key=lambda one: -int(self.service.replicas.held[one.number]))
        keep = able[:wanted]
        retire = [one for one in self.replicas if one not in keep]
        busy = {name for one in keep for name in one.instances}
        free = [name for name in after if name not in busy]
        move = _Move(shape, keep, retire, self._bind(shape, wanted - len(keep), free))
        if event.time_s > 0:
            self._time(event, move)
        return move

    def _bind(self, shape: Shape, count: int, free: Sequence[str]) -> list[tuple[str, ...]]:
        """Instances of every new replica in the order of its roles; those that hold most of a role take it."""
        roles = self.costs.roles(shape)
        slots = count * len(roles)
        if not slots:
            return []
        if self.charges.mapping:
            empty = np.zeros_like(roles[0])
            held = np.array([self.weights.held.get(name, empty).ravel() for name in free], dtype=np.float64)
            value = np.tile(held @ np.array([role.ravel() for role in roles], dtype=np.float64).T, count)
            rows, columns = linear_sum_assignment(value, maximize=True)
            chosen = {int(column): free[int(row)] for row, column in zip(rows, columns, strict=True)}
        else:
            chosen = dict(enumerate(free[:slots]))
        return [tuple(chosen[one * len(roles) + role] for role in range(len(roles))) for one in range(count)]

    def _time(self, event: FleetEvent, move: _Move) -> None:
        """When every new role is where it has to be, and what did not fit beside the old one."""
        costs, charges, now_s = self.costs, self.charges, self.service.now_s
        link = costs.link_bytes_per_s * charges.background
        move.prepared_s = now_s + charges.prepare_s if move.new else now_s
        longest_s = 0.0
        for names in move.new:
            for name, role in zip(names, costs.roles(move.shape), strict=True):
                missing = self.weights.missing(name, role)
                lost = self.weights.lost(missing) * costs.cell_bytes
                size = float(missing.sum()) * costs.cell_bytes
                size += 0.0 if name in self.weights.held else costs.embedding_bytes
                begin_s = max(now_s, self.there_s[name]) + charges.prepare_s
                ready_s = begin_s + (size - lost) / link + lost / charges.disk_bytes_per_s
                move.prepared_s = max(move.prepared_s, ready_s)
                move.moved_bytes += size
                longest_s = max(longest_s, size / link)
                move.excess_s = max(move.excess_s, self._excess(name, role) / costs.link_bytes_per_s)
        sources = max(len(self.weights.held), 1)
        move.prepared_s = max(move.prepared_s, now_s + move.moved_bytes / (link * sources))
        move.begin_s = max(move.prepared_s - longest_s - charges.prepare_s, now_s)

    def _excess(self, name: str, role: Cells) -> float:
        """Bytes of a new role that do not fit beside the one in use and its KV."""
        for one in self.replicas:
            if name in one.instances:
                own = self.costs.roles(one.shape)[one.instances.index(name)]
                held = int(self.service.replicas.held[one.number])
                kv = held * self.costs.kv_bytes / len(one.instances)
                return max(float((own | role).sum()) * self.costs.cell_bytes + kv - self.costs.instance_bytes, 0.0)
        return 0.0

    def _execute(self, event: FleetEvent, move: _Move) -> None:
        """Start, or switch as late as a loss allows and as early as an addition does."""
        service, charges = self.service, self.charges
        if event.time_s == 0:
            self._start(move, charges.start_s)
            return
        if not move.new and not move.retire:
            return
        doomed = [one for one in move.retire if set(one.instances) & set(event.removed)]
        moment_s = move.prepared_s
        if doomed and charges.arranger:
            lead_s = charges.margin_s + charges.cut_s + self._kv_s(move)
            moment_s = max(moment_s, event.time_s - lead_s)
        if doomed and moment_s > event.time_s:
            self._advance(event.time_s)
            for one in doomed:
                service.give_up(one.number)
        if move.new:
            self._advance(move.begin_s)
            self.busy, self.busy_s = {name for names in move.new for name in names}, move.prepared_s
        self._advance(moment_s)
        pause_s = charges.cut_s + move.excess_s + self._kv_s(move) if move.retire else 0.0
        running: list[int] = []
        for one in move.retire:
            if not charges.arranger:
                service.give_up(one.number)
                continue
            moved, waiting = service.stop(one.number)
            service.give_back(waiting)
            running += moved
        self._start(move, service.now_s + pause_s)
        self._rehome(running, service.now_s + pause_s)
        shape = len(self.replicas), move.shape.stages, move.shape.shards
        now_s = service.now_s
        self.transitions.append(Transition(event.time_s, now_s, now_s + pause_s, shape, move.moved_bytes))

    def _kv_s(self, move: _Move) -> float:
        """Seconds to bring the KV of the requests of ending replicas to where they go on."""
        line, it = self.service.line, self.service.replicas
        size = 0.0
        for one in move.retire:
            requests = it.ids[one.number, : it.running[one.number]]
            tokens = float(sum(INPUT_TOKENS + int(line.tokens[request]) for request in requests))
            heirs = [names for names in move.new if one.shape == move.shape and set(names) & set(one.instances)]
            stays = max((len(set(names) & set(one.instances)) for names in heirs), default=0) / len(one.instances)
            size += tokens / 640 * self.costs.kv_bytes * (1 - stays)
        receivers = {name for names in move.new for name in names} or {name for r in move.keep for name in r.instances}
        return size / (self.costs.link_bytes_per_s * max(len(receivers), 1))

    def _start(self, move: _Move, at_s: float) -> None:
        """The new replicas, on numbers that are free; what a device holds beside its role stays if there is room."""
        self.replicas = list(move.keep)
        times = self.costs.times(move.shape) if move.new else None
        roles = self.costs.roles(move.shape)
        for names in move.new:
            assert times is not None
            taken = {one.number for one in self.replicas}
            number = next(index for index in range(self.service.most) if index not in taken)
            self.service.start(number, at_s, times, whole=not self.charges.continuous)
            self.replicas.append(_Replica(number, move.shape, names))
            for name, role in zip(names, roles, strict=True):
                self.weights.place(name, role, move.shape)

    def _rehome(self, requests: Sequence[int], at_s: float) -> None:
        """Requests with their KV go to the replicas with most room; without room they are computed again."""
        left = sorted(requests)
        held = self.service.replicas.held
        while left and self.replicas:
            open_ = [one for one in self.replicas if held[one.number] < self.service.replicas.room[one.number]]
            if not open_:
                break
            least = min(open_, key=lambda one: int(held[one.number]))
            left = self.service.adopt(least.number, left[:1], at_s) + left[1:]
        self.service.give_back(left)

    def _prefetch(self) -> None:
        """Fetch what the layouts of one or two instances more or less would need."""
        if not self.replicas:
            return
        now = self.replicas[0].shape, len(self.replicas)
        roles: dict[str, Cells | None] = dict.fromkeys(self.instances)
        for one in self.replicas:
            roles.update(zip(one.instances, self.costs.roles(one.shape), strict=True))
        link = self.costs.link_bytes_per_s * self.charges.trickle
        from_s = {name: max(self.service.now_s, self.there_s[name]) for name in self.instances}
        self.weights.prefetch(from_s, roles, now[0], self._neighbours(now), link)

    def _neighbours(self, now: Target) -> list[list[Cells]]:
        targets = [now]
        for change in (-1, 1, -2, 2):
            target = self.policy(len(self.instances) + change, now)
            if target is not None and target[0] not in [shape for shape, _ in targets]:
                targets.append(target)
        return [self.costs.roles(shape) for shape, _ in targets]
