"""What models could attain if no two of them shared a device: memory alone then limits them.

The more devices a model has to itself, the more of its requests meet their SLO, and sharing can only take from that.
Dealing out replicas by what they add per byte, the last one in part, bounds any placement in groups of one shape.
"""

from __future__ import annotations

import numpy as np

from planning.simulation.board import Costs, Trace
from planning.simulation.compiled import compiled
from planning.simulation.requests import OVERHEAD_S, Bytes
from planning.simulation.tables import Ints


@compiled
def good_alone(costs: Costs, trace: Trace, model: int, shape: int, replicas: int) -> int:
    """Requests of the model that meet their SLO on `replicas` groups of the shape that serve nothing else.

    Groups that are alike and serve alike requests take turns, so the one to be free first is the one used longest ago.
    """
    row = costs.rows[model, shape]
    line_s, slowest_s = costs.line_s[row], costs.slowest_s[row]
    last = np.zeros(replicas)
    turn, good = 0, 0
    for number in range(trace.begin[model], trace.begin[model + 1]):
        now = trace.times_s[trace.requests[number]]
        finish = max(now + line_s, last[turn] + slowest_s)
        if finish + OVERHEAD_S - now <= costs.slo_s[model]:
            last[turn] = finish
            good += 1
            turn = turn + 1 if turn + 1 < replicas else 0
    return good


@compiled
def _known_alone(costs: Costs, trace: Trace, known: Ints, model: int, shape: int, replicas: int) -> int:
    if known[model, shape, replicas] < 0:
        known[model, shape, replicas] = good_alone(costs, trace, model, shape, replicas)
    return int(known[model, shape, replicas])


@compiled
def dedicated_bound(
    costs: Costs, trace: Trace, known: Ints, allowed: Bytes, shape: int, groups: int, budget_bytes: float
) -> float:  # fmt: skip
    """Most requests of the allowed models that `groups` groups of one shape can serve in time, by memory.

    `known[model, shape, replicas]` are earlier results of `good_alone`, -1 where there is none; it is added to.
    Takes the gain of a further replica to shrink with every one, as it does for all but contrived traces.
    """
    models = allowed.shape[0]
    replicas = np.zeros(models, dtype=np.int64)
    good = np.zeros(models, dtype=np.int64)
    gain = np.zeros(models, dtype=np.int64)
    for model in range(models):
        if allowed[model] and costs.weights[model, shape] <= budget_bytes:
            gain[model] = _known_alone(costs, trace, known, model, shape, 1)
    room, total = groups * budget_bytes, 0.0
    while room > 0.0:
        best, density = -1, 0.0
        for model in range(models):
            if gain[model] and gain[model] / costs.weights[model, shape] > density:
                best, density = model, gain[model] / costs.weights[model, shape]
        if best < 0:
            break
        weight = costs.weights[best, shape]
        total += gain[best] * min(1.0, room / weight)
        room -= weight
        good[best] += gain[best]
        replicas[best] += 1
        gain[best] = 0
        if replicas[best] < groups and good[best] < trace.begin[best + 1] - trace.begin[best]:
            more = _known_alone(costs, trace, known, best, shape, replicas[best] + 1)
            gain[best] = max(0, more - good[best])
    return total


@compiled
def most_served(costs: Costs, trace: Trace, allowed: Bytes, shape: int) -> float:
    """Most requests that one group of the shape can serve in time, whatever it holds: the quickest ones first."""
    models = allowed.shape[0]
    requests = trace.times_s.shape[0]
    if requests == 0:
        return 0.0
    slowest_s = np.array([costs.slowest_s[costs.rows[model, shape]] for model in range(models)])
    left_s = trace.times_s[requests - 1] - trace.times_s[0] + costs.slo_s.max()
    total = 0.0
    for model in np.argsort(slowest_s):
        row = costs.rows[model, shape]
        if allowed[model] and costs.line_s[row] + OVERHEAD_S <= costs.slo_s[model]:
            count = min(float(trace.begin[model + 1] - trace.begin[model]), left_s / slowest_s[model])
            total += count
            left_s -= count * slowest_s[model]
            if left_s <= 0.0:
                break
    return total


@compiled
def most_replicas(costs: Costs, allowed: Bytes, shapes: Ints, budget_bytes: float) -> float:
    """At least as many replicas as groups of these shapes have room for."""
    total = 0.0
    for shape in shapes:
        lightest, models = np.inf, 0
        for model in range(allowed.shape[0]):
            if allowed[model]:
                lightest = min(lightest, costs.weights[model, shape])
                models += 1
        total += min(float(models), budget_bytes // lightest)
    return total


@compiled
def partition_bound(
    costs: Costs, trace: Trace, known: Ints, allowed: Bytes, shapes: Ints, budget_bytes: float
) -> float:  # fmt: skip
    """A score (see `score`) that no placement of the allowed models in groups of these shapes exceeds.

    The first shape is that of most groups. They serve no more than memory allows and no more than time allows; each
    group of another shape is granted whatever time allows.
    """
    alike, others = 0, 0.0
    for shape in shapes:
        if shape == shapes[0]:
            alike += 1
        else:
            others += most_served(costs, trace, allowed, shape)
    by_time = alike * most_served(costs, trace, allowed, shapes[0])
    by_memory = dedicated_bound(costs, trace, known, allowed, shapes[0], alike, budget_bytes)
    good: float = min(by_time, by_memory) + others
    replicas: float = most_replicas(costs, allowed, shapes, budget_bytes)
    bound: float = good / max(trace.times_s.shape[0], 1) + replicas / 1e6
    return bound


def nothing_known(costs: Costs, devices: int) -> Ints:
    """The table that `dedicated_bound` adds to, for groups of up to `devices` devices."""
    return np.full((*costs.rows.shape, devices + 1), -1, dtype=np.int64)
