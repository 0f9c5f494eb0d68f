"""A study as a value: which systems are run on which traces with which arrivals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from data.availability import AvailabilityTrace
from data.errors import InvalidInput
from planning.spot_policy import Book
from planning.study.case import Case, Model, Times, gamma_times
from planning.study.results import Result
from planning.study.systems import on_demand, system


class Cell(NamedTuple):
    """One simulation of a study. `instances` is for systems that stay at a number: 0 is their default."""

    trace: str
    policy: str
    seed: int
    instances: int = 0


@dataclass(frozen=True, slots=True)
class Study:
    """`policies` (names of `planning.study.systems`) on `traces`, `seeds` times.

    Arrivals are `recorded_s`, or drawn with the model's rate and the given `cv`. `book` is our policy.
    Raises `InvalidInput` for a policy that is not known, and for a study of nothing.
    """

    model: Model
    traces: Mapping[str, AvailabilityTrace]
    policies: tuple[str, ...]
    seeds: int
    book: Book
    cv: float = 1.0
    recorded_s: Times | None = None

    def __post_init__(self) -> None:
        if not self.traces or not self.policies or self.seeds < 1:
            raise InvalidInput("a study needs at least one trace, one policy and one seed")
        for name in self.policies:
            system(name)

    def cells(self) -> list[Cell]:
        """Every simulation: by trace, policy and seed, then the on-demand fleets of the frontier."""
        cells = [
            Cell(trace, policy, seed) for trace in self.traces for policy in self.policies for seed in range(self.seeds)
        ]
        return cells + [Cell(trace, "on-demand", 0, count) for trace in self.traces for count in self.constants]

    @property
    def constants(self) -> list[int]:
        """Sizes of on-demand fleets to compare the cost with: all that keep up."""
        targets = self.book.layouts.targets
        least = min(shape.devices * count for shape, count in targets) // self.model.costs.gpus
        most = max(*(trace.most for trace in self.traces.values()), self.model.wanted)
        return list(range(max(least, 1), most + 1))

    def case(self, trace: str, seed: int) -> Case:
        """The inputs of a cell. Raises `InvalidInput` if no request arrives while the trace lasts."""
        fleet = self.traces[trace]
        times = self.recorded_s
        if times is None:
            times = gamma_times(self.model.rate_rps, self.cv, seed, fleet.duration_s)
        if not (times < fleet.duration_s).any():
            raise InvalidInput(f"no request arrives within the {fleet.duration_s:g} s of trace {trace}")
        return Case(self.model, fleet, times, self.book)

    def run(self, cell: Cell) -> Result:
        """Simulate one cell."""
        case = self.case(cell.trace, cell.seed)
        outcome = on_demand(case, cell.instances) if cell.instances else system(cell.policy).run(case)
        policy = f"{cell.policy} {cell.instances}" if cell.instances else cell.policy
        return Result.of(cell.trace, policy, cell.seed, outcome)
