"""Fleets that a mixing policy holds along a trace: which spot instances it takes, and when it hires on demand."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby

from data.availability import AvailabilityTrace, Change
from planning.mixing import Mixing, Option
from planning.simulation.serving import FleetEvent, events_of

_OVERLAP_S = 60.0  # for which a released instance stays beside those that take over


@dataclass(frozen=True, slots=True)
class MixedFleet:
    """What is held over time, and how many instance-seconds of each kind that was."""

    trace: AvailabilityTrace
    spot_s: float
    on_demand_s: float


@dataclass(slots=True)
class _Stay:
    name: str
    from_s: float
    to_s: float


@dataclass(slots=True)
class _Walk:
    mixing: Mixing
    end_s: float
    there: list[str] = field(default_factory=list)
    held: list[_Stay] = field(default_factory=list)
    hired: list[_Stay] = field(default_factory=list)
    past: list[_Stay] = field(default_factory=list)
    layout: int = 0
    born: int = 0

    def handle(self, event: FleetEvent) -> None:
        """Lose what is lost, decide, then take, hire and release."""
        self.there = [name for name in [*self.there, *event.added] if name not in event.removed]
        for stay in [one for one in self.held if one.name in event.removed]:
            self._end(self.held, stay, event.time_s)
        at_hand = len(self.held) + len(event.added)
        option = self.mixing.decide(len(self.there), at_hand, len(self.hired), self.layout)
        self.layout = option.layout
        self._take(event, option)
        self._hire(event, option)

    def _take(self, event: FleetEvent, option: Option) -> None:
        """New instances first, which are there at once; then those that were there and not taken."""
        names = {one.name for one in self.held}
        free = sorted((name for name in self.there if name not in names), key=lambda name: name not in event.added)
        for name in free[: max(option.spot - len(self.held), 0)]:
            from_s = event.time_s if name in event.added else self._ordered_s(event)
            self.held.append(_Stay(name, from_s, self.end_s))
        for stay in self.held[option.spot :]:
            self._end(self.held, stay, event.time_s + _OVERLAP_S)

    def _hire(self, event: FleetEvent, option: Option) -> None:
        while len(self.hired) < option.on_demand:
            self.born += 1
            self.hired.append(_Stay(f"on-demand-{self.born}", self._ordered_s(event), self.end_s))
        for stay in self.hired[option.on_demand :]:
            self._end(self.hired, stay, event.time_s + _OVERLAP_S)

    def _ordered_s(self, event: FleetEvent) -> float:
        """When it is there if it is ordered as the event becomes known; at the very start all is there."""
        market = self.mixing.market
        return max(event.time_s - market.grace_s + market.launch_s, 0.0) if event.time_s else 0.0

    def _end(self, stays: list[_Stay], stay: _Stay, at_s: float) -> None:
        stays.remove(stay)
        stay.to_s = min(at_s, self.end_s)
        self.past.append(stay)


def mixed_fleet(trace: AvailabilityTrace, mixing: Mixing) -> MixedFleet:
    """Walk along a trace of what the market has, with the policy's decisions at every change."""
    walk = _Walk(mixing, trace.duration_s)
    for event in events_of(trace):
        if event.added or event.removed:
            walk.handle(event)
    spot = [one for one in [*walk.past, *walk.held] if not one.name.startswith("on-demand-") and one.from_s < one.to_s]
    hired = [one for one in [*walk.past, *walk.hired] if one.name.startswith("on-demand-") and one.from_s < one.to_s]
    fleet = AvailabilityTrace(f"{trace.name}, mixed", _changes([*spot, *hired], trace.duration_s), trace.duration_s)
    return MixedFleet(fleet, _seconds(spot), _seconds(hired))


def _seconds(stays: list[_Stay]) -> float:
    return sum(one.to_s - one.from_s for one in stays)


def _changes(stays: list[_Stay], end_s: float) -> tuple[Change, ...]:
    """Losses and additions in order of time, those of one moment together."""
    points = [(one.from_s, "add", one.name) for one in stays]
    points += [(one.to_s, "remove", one.name) for one in stays if one.to_s < end_s]
    # An instance that is released and taken again at one moment has to go before it comes.
    points.sort(key=lambda point: (point[0], point[1] == "add"))
    found = []
    for (at_s, kind), group in groupby(points, key=lambda point: point[:2]):
        names = tuple(name for _, _, name in group)
        found.append(Change(at_s, "add" if kind == "add" else "remove", names, min(30.0, at_s)))
    return tuple(found)
