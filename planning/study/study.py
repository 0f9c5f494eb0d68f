"""A study as a value: which systems are run on which traces with which arrivals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from data.availability import AvailabilityTrace
from data.errors import InvalidInput
from planning.mixing import Mixing
from planning.spot_policy import Book
from planning.study.case import Case, Model, Times, gamma_times
from planning.study.results import Result
from planning.study.systems import on_demand, system


class Cell(NamedTuple):
    """One simulation of a study. `instances` is for on-demand fleets, `latency_usd` for mixing; 0 is the default."""

    trace: str
    policy: str
    seed: int
    instances: int = 0
    latency_usd: float = 0.0

    @property
    def name(self) -> str:
        """The policy, with what is not its default."""
        if self.instances:
            return f"{self.policy} {self.instances}"
        return f"{self.policy} {self.latency_usd:g}" if self.latency_usd else self.policy


@dataclass(frozen=True, slots=True)
class Study:
    """`policies` (names of `planning.study.systems`) on `traces`, `seeds` times.

    Arrivals are `recorded_s`, or drawn with the model's rate and the given `cv`. `book` is our policy, `mixings` those
    that also decide how many instances to hold, by the price of a second of latency; the first is the default.
    Raises `InvalidInput` for a policy that is not known, and for a study of nothing.
    """

    model: Model
    traces: Mapping[str, AvailabilityTrace]
    policies: tuple[str, ...]
    seeds: int
    book: Book
    cv: float = 1.0
    recorded_s: Times | None = None
    mixings: Mapping[float, Mixing] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.traces or not self.policies or self.seeds < 1:
            raise InvalidInput("a study needs at least one trace, one policy and one seed")
        for name in self.policies:
            system(name)

    def cells(self) -> list[Cell]:
        """Every simulation by trace, policy and seed, the lines of the frontier included."""
        shown = [(policy, 0, 0.0) for policy in self.policies]
        shown += [("on-demand", count, 0.0) for count in self.constants]
        shown += [("perennial-mixed", 0, usd) for usd in self.mixings]
        return [
            Cell(trace, policy, seed, instances, latency_usd)
            for trace in self.traces
            for policy, instances, latency_usd in shown
            for seed in range(self.seeds)
        ]

    @property
    def constants(self) -> list[int]:
        """Sizes of on-demand fleets to compare the cost with: all that keep up."""
        targets = self.book.layouts.targets
        least = min(shape.devices * count for shape, count in targets) // self.model.costs.gpus
        most = max(*(trace.most for trace in self.traces.values()), self.model.wanted)
        return list(range(max(least, 1), most + 1))

    def case(self, trace: str, seed: int, latency_usd: float = 0.0) -> Case:
        """The inputs of a cell. Raises `InvalidInput` if no request arrives while the trace lasts."""
        fleet = self.traces[trace]
        times = self.recorded_s
        if times is None:
            times = gamma_times(self.model.rate_rps, self.cv, seed, fleet.duration_s)
        if not (times < fleet.duration_s).any():
            raise InvalidInput(f"no request arrives within the {fleet.duration_s:g} s of trace {trace}")
        mixing = self.mixings.get(latency_usd) or next(iter(self.mixings.values()), None)
        return Case(self.model, fleet, times, self.book, mixing)

    def run(self, cell: Cell) -> Result:
        """Simulate one cell."""
        case = self.case(cell.trace, cell.seed, cell.latency_usd)
        outcome = on_demand(case, cell.instances) if cell.instances else system(cell.policy).run(case)
        return Result.of(cell.trace, cell.name, cell.seed, outcome)
