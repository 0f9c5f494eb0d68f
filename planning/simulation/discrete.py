"""AlpaServe's discrete-event simulator, which mirrors its runtime (Li et al., OSDI 2023, simulator of the artifact).

A request travels to the controller (2.5 ms), which sends it to the group with the fewest requests in flight (lowest
index first, counted from dispatch to completion or rejection); after another 2.5 ms the group predicts its finish from
the clocks it has booked, with the profile's own latencies, and rejects it if that plus 4 ms is too late; otherwise it
books, and 5 ms later the stages take it first come, first served. Delays are |normal(mean, 0.5 ms)|.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count, cycle

import numpy as np
import numpy.typing as npt

from data.errors import InvalidInput
from data.placement import Arrivals, Placement, SharedFleet

_HOP_S, _LAUNCH_S, _DEVIATION_S = 0.0025, 0.005, 0.0005
_MARGIN_S = 0.004
_DRAWN = 2048  # delays of dispatch and launch are drawn once and used in turn
_SENT, _AT_CONTROLLER, _AT_GROUP, _ON_STAGE = range(4)

Event = tuple[float, int, int, int, int, int]  # time, order of creation, request, where, group, stage


@dataclass(slots=True)
class _Group:
    latency_s: dict[int, tuple[float, ...]]
    booked_s: list[float]
    stream_s: list[float]
    launch_s: Iterator[float]
    in_flight: int = 0

    def admit(self, model: int, now_s: float, deadline_s: float) -> bool:
        """Book the stages if the predicted finish leaves the margin."""
        ends: list[float] = []
        end_s = now_s
        for clock_s, takes_s in zip(self.booked_s, self.latency_s[model], strict=True):
            end_s = max(clock_s, end_s) + takes_s
            ends.append(end_s)
        if end_s + _MARGIN_S > deadline_s:
            return False
        self.booked_s = ends
        return True


def discrete_replay(
    fleet: SharedFleet, placement: Placement, arrivals: Arrivals, seed: int = 0
) -> npt.NDArray[np.bool_]:
    """Which requests meet their SLO. Raises `InvalidInput` if a group holds a model that has no profile in its shape.

    Equal seeds give equal results: delays come from numpy's legacy generator, in the order dispatch, launch for each
    group in turn, and the way to the controller for every request.
    """
    return _Discrete(fleet, placement, arrivals, seed).run()


class _Discrete:
    def __init__(self, fleet: SharedFleet, placement: Placement, arrivals: Arrivals, seed: int) -> None:
        draws = np.random.RandomState(seed)
        self._dispatch_s = cycle(_delays(draws, _HOP_S, _DRAWN))
        self._groups = [
            _Group(
                {model: _latency_s(fleet, model, placement, index) for model in group.models},
                [0.0] * group.shape.stages,
                [0.0] * group.shape.stages,
                cycle(_delays(draws, _LAUNCH_S, _DRAWN)),
            )
            for index, group in enumerate(placement.groups)
        ]
        self._way_s = _delays(draws, _HOP_S, len(arrivals))
        self._arrival_s, self._model = arrivals.times_s.tolist(), arrivals.models.tolist()
        self._slo_s = [model.slo_s for model in fleet.models]
        self._holders = [
            [g for g in self._groups if model in g.latency_s] for model in range(len(fleet.models))
        ]  # fmt: skip
        self._events: list[Event] = [(at_s, n, n, _SENT, -1, 0) for n, at_s in enumerate(self._arrival_s)]
        self._order = count(len(self._events))
        self._number = {id(group): index for index, group in enumerate(self._groups)}

    def run(self) -> npt.NDArray[np.bool_]:
        good = np.zeros(len(self._arrival_s), dtype=bool)
        heapify(self._events)
        while self._events:
            now_s, _, request, where, number, stage = heappop(self._events)
            if where == _SENT:
                self._push(now_s + self._way_s[request], request, _AT_CONTROLLER, -1, 0)
            elif where == _AT_CONTROLLER:
                self._dispatch(now_s, request)
            elif where == _AT_GROUP:
                self._admit(now_s, request, number)
            elif stage < len(self._groups[number].stream_s):
                self._run_stage(now_s, request, number, stage)
            else:
                self._groups[number].in_flight -= 1
                good[request] = now_s - self._arrival_s[request] <= self._slo_s[self._model[request]]
        return good

    def _push(self, at_s: float, request: int, where: int, group: int, stage: int) -> None:
        heappush(self._events, (at_s, next(self._order), request, where, group, stage))

    def _dispatch(self, now_s: float, request: int) -> None:
        holders = self._holders[self._model[request]]
        if holders:
            group = min(holders, key=lambda one: one.in_flight)
            group.in_flight += 1
            self._push(now_s + next(self._dispatch_s), request, _AT_GROUP, self._number[id(group)], 0)

    def _admit(self, now_s: float, request: int, number: int) -> None:
        group, model = self._groups[number], self._model[request]
        if group.admit(model, now_s, self._arrival_s[request] + self._slo_s[model]):
            self._push(now_s + next(group.launch_s), request, _ON_STAGE, number, 0)
        else:
            group.in_flight -= 1

    def _run_stage(self, now_s: float, request: int, number: int, stage: int) -> None:
        group = self._groups[number]
        end_s = max(group.stream_s[stage], now_s) + group.latency_s[self._model[request]][stage]
        group.stream_s[stage] = end_s
        self._push(now_s + (end_s - now_s), request, _ON_STAGE, number, stage + 1)


def _delays(draws: np.random.RandomState, mean_s: float, number: int) -> list[float]:
    delays: list[float] = np.abs(draws.normal(mean_s, _DEVIATION_S, number)).tolist()
    return delays


def _latency_s(fleet: SharedFleet, model: int, placement: Placement, index: int) -> tuple[float, ...]:
    shape = placement.groups[index].shape
    profile = fleet.profile(model, shape)
    if profile is None:
        raise InvalidInput(f"group {index} holds {fleet.models[model].name}, which was not profiled in shape {shape}")
    return profile.latency_s
