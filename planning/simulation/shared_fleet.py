"""A fleet of several models at work: groups of devices that models share, deadlines, and admission by them.

Step by step as the engine does it: every step of a group belongs to one of its models, whose turn it is by the
earliest deadline; requests go to the group with the least work left, and one that no group can answer in time is
refused. The layout does not change; `simulate_fleet` has what changes of one model take. Whole requests on the
tables of a placement are `earliest_deadline`'s: it is quicker by far, and knows nothing of batches.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

import numpy as np

from data.deployment import SharedGroup
from planning.load import IN_TOKENS, Pace, Server, done_in_s
from planning.simulation.batching import Batcher, BatchLimits, Job
from planning.simulation.lines import Stages, Step
from planning.simulation.machine import Agenda, Machine, run
from planning.simulation.processors import Processors
from planning.simulation.serving import Array
from planning.simulation.turns import Turns
from planning.step_laws import StepLaw

Shape = tuple[str, int, int]
"""A model, and the stages and shards that it runs on."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request for a model, and within how many seconds it is to be answered."""

    arrival_s: float
    model: str
    input_tokens: int
    output_tokens: int
    deadline_s: float = inf


@dataclass(frozen=True, slots=True)
class SharedProfile:
    """What has to be known of a fleet: the law and the KV blocks of every shape, and what admission takes its pace for.

    Without `paces` nobody is refused, and dispatch counts tokens. `processors` as for `FleetProfile`.
    """

    laws: Mapping[Shape, StepLaw]
    kv_blocks: Mapping[Shape, int]
    paces: Mapping[Shape, Pace]
    step_tokens: int
    block_tokens: int
    processors: int = 0


@dataclass(slots=True, eq=False)
class Host:
    """A model's replica in a group."""

    batcher: Batcher
    law: StepLaw
    pace: Pace
    max_batch: int

    @property
    def room(self) -> int:
        """How many more requests it takes."""
        most = self.max_batch + max(1, self.max_batch // 4)
        return most - sum(not job.late for job in self.batcher.jobs)

    @property
    def outstanding_s(self) -> float:
        """Seconds of the devices that its requests still take."""
        return sum(self.pace.device_s(job.work) for job in self.batcher.jobs)


@dataclass(slots=True, eq=False)
class Group(Stages):
    """Devices with the replicas of one or more models, which take turns."""

    group: SharedGroup
    hosts: Mapping[str, Host]
    agenda: Agenda
    turns: Turns = field(init=False)

    def __post_init__(self) -> None:
        self.turns = Turns(len(self.hosts))

    @property
    def stages(self) -> int:
        """Of all of its replicas."""
        return self.group.stages

    def schedule(self) -> Step | None:
        """Of the model whose turn it is and that can compute something."""
        now_s, hosts = self.agenda.now_s, list(self.hosts.values())
        for host in hosts:
            host.batcher.expire(now_s)
        due_s = [host.batcher.due_s if host.batcher.jobs else None for host in hosts]
        for part in self.turns.order(now_s, due_s):
            parts = hosts[part].batcher.schedule()
            if parts:
                self.turns.took(part, now_s)
                return Step(hosts[part].batcher, parts, hosts[part].law)
        return None

    @property
    def outstanding_s(self) -> float:
        """Seconds that it needs for all that it has."""
        return sum(host.outstanding_s for host in self.hosts.values())

    def pace_beside_others(self, model: str, due_s: float) -> Pace:
        """The pace of a model while others that are due earlier take turns with it."""
        rivals = [
            host.pace
            for name, host in self.hosts.items()
            if name != model and any(job.due_s < due_s and not job.late for job in host.batcher.jobs)
        ]
        return self.hosts[model].pace.beside(rivals)


@dataclass(slots=True, eq=False)
class Desk:
    """Takes requests in or refuses them, and deals them out."""

    groups: Sequence[Group]
    agenda: Agenda
    queues: dict[str, deque[Job]] = field(default_factory=lambda: defaultdict(deque))

    def ask(self, job: Job, model: str, deadline_s: float, *, admission: bool) -> None:
        """A request arrives; one that no group can answer in time is gone at once."""
        job.due_s = self.agenda.now_s + deadline_s
        if admission and deadline_s < inf and self._done_in_s(job, model) > deadline_s:
            return
        self.queues[model].append(job)

    def _done_in_s(self, job: Job, model: str) -> float:
        servers = [
            Server(
                group.pace_beside_others(model, job.due_s), tuple(one.work for one in group.hosts[model].batcher.jobs)
            )
            for group in self._hosting(model)
        ]
        return done_in_s(servers, [one.work for one in self.queues[model]], job.work)

    def hand_out(self) -> None:
        """Fill what room there is, each time of the group with the least work left."""
        for model, queue in self.queues.items():
            while queue and queue[0].due_s <= self.agenda.now_s:
                queue.popleft()
            while queue and (having_room := [one for one in self._hosting(model) if one.hosts[model].room > 0]):
                chosen = min(having_room, key=lambda one: (one.outstanding_s, -one.hosts[model].room, one.number))
                chosen.hosts[model].batcher.add(queue.popleft())

    def _hosting(self, model: str) -> list[Group]:
        return [group for group in self.groups if model in group.hosts]


def simulate_shared(
    groups: Sequence[SharedGroup],
    profile: SharedProfile,
    asks: Sequence[Ask],
    *,
    drag: Sequence[tuple[float, float]] = (),
    seed: int = 0,
) -> Array:
    """When each request was answered in full, in their order; infinite for those that were refused or late.

    `asks` are in order of arrival; what a request spends outside of steps is spent before it is taken in.
    `drag` are times and by how much all steps take longer from then on than the profile says; `seed` as for
    `simulate_fleet`.
    """
    agenda, machine = Agenda(), Machine[Group](processors=Processors(profile.processors, seed))
    machine.follow(drag, agenda)
    for number, group in enumerate(groups):
        machine.lines[number] = _group(number, group, profile, agenda)
    desk = Desk(list(machine.lines.values()), agenda)
    overhead_s = {shape[0]: law.overhead_s for shape, law in profile.laws.items()}
    for key, ask in enumerate(asks):
        job = Job(key, ask.input_tokens, ask.output_tokens)
        taken = _taking(desk, job, ask, admission=bool(profile.paces))
        agenda.after(ask.arrival_s + overhead_s[ask.model], taken)
    done_s = np.full(len(asks), inf)

    def told(job: Job) -> None:
        done_s[job.key] = agenda.now_s if job.done else inf

    run(agenda, machine, desk.hand_out, told)
    return done_s


def _taking(desk: Desk, job: Job, ask: Ask, *, admission: bool) -> Callable[[], None]:
    return lambda: desk.ask(job, ask.model, ask.deadline_s, admission=admission)


def _group(number: int, group: SharedGroup, profile: SharedProfile, agenda: Agenda) -> Group:
    hosts = {}
    for hosted in group.hosted:
        shape = hosted.model, group.stages, group.shards
        limits = BatchLimits(
            hosted.max_batch, profile.step_tokens, profile.block_tokens, profile.kv_blocks[shape], group.stages
        )
        pace = profile.paces.get(shape, IN_TOKENS)
        hosts[hosted.model] = Host(Batcher(limits), profile.laws[shape], pace, hosted.max_batch)
    return Group(number, group, hosts, agenda)
