"""A fleet of our own engine along a story: requests of any size, notices, kills, additions, and a plan book.

What the controller decides is decided here by the same functions or the same rules; what takes time is charged
as measured (`fleet_profile`). `serving_steps` simulates requests of one size on published tables, compiled, for
hours of a trace; here prompts are chunked, KV blocks run out, stages form pipelines and workers share
processors, so that a simulation can be held against a real run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from data.layout import Device
from data.plan import PlanBook
from data.workload import Workload
from planning.simulation.batching import Job
from planning.simulation.fleet_control import Controller
from planning.simulation.fleet_profile import FleetProfile
from planning.simulation.lines import Line
from planning.simulation.machine import Agenda, Machine, Queue, run
from planning.simulation.members import Members
from planning.simulation.processors import Processors
from planning.simulation.serving import Array
from planning.simulation.story import Happening, LayoutChange


@dataclass(frozen=True, slots=True)
class Served:
    """When requests arrived, had their first and their last token (infinite: never), and how the layout changed."""

    arrival_s: Array
    first_s: Array
    done_s: Array
    changes: tuple[LayoutChange, ...]

    @property
    def latency_s(self) -> Array:
        """Seconds from arrival to the last token, in order of arrival."""
        return self.done_s - self.arrival_s


def simulate_fleet(
    book: PlanBook,
    profile: FleetProfile,
    workload: Workload,
    happenings: Sequence[Happening],
    instances: Sequence[str],
    layout: Sequence[Sequence[Device]] = (),
    *,
    drag: Sequence[tuple[float, float]] = (),
    until_s: float = inf,
    seed: int = 0,
) -> Served:
    """Serve `workload` by `book` on `instances`, to which `happenings` happen.

    `layout` are the devices of the replicas in force at the beginning, by default those that the book asks for.
    `drag` are times and by how much all steps take longer from then on than the profile says; `seed` is for who stands
    still where the profile says that processors are short.
    Requests that are unfinished at `until_s`, or when nothing can happen any more, are never done.
    """
    jobs = [Job(key, one.input_tokens, one.output_tokens) for key, one in enumerate(workload.requests)]
    agenda, machine, queue = Agenda(), Machine[Line](processors=Processors(profile.processors, seed)), Queue()
    controller = Controller(Members(book, list(instances)), profile, agenda, machine, queue)
    controller.begin_with(layout)
    machine.follow(drag, agenda)
    for job, request in zip(jobs, workload.requests, strict=True):
        agenda.after(request.arrival_s + profile.overhead_s, lambda job=job: queue.jobs.append(job))  # type: ignore[misc]
    for one in happenings:
        agenda.after(one.time_s, lambda one=one: controller.happen(one))  # type: ignore[misc]
    first_s, done_s = np.full(len(jobs), inf), np.full(len(jobs), inf)

    def decide() -> None:
        controller.watch()
        queue.hand_out(list(machine.lines.values()))

    def told(job: Job) -> None:
        first_s[job.key] = min(first_s[job.key], agenda.now_s)
        done_s[job.key] = agenda.now_s if job.done else inf

    run(agenda, machine, decide, told, until_s)
    arrival_s = np.array([request.arrival_s for request in workload.requests])
    return Served(arrival_s, first_s, done_s, tuple(controller.changes))
