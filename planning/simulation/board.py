"""A placement being changed: after a change only what it can reach is simulated again.

Models and groups form a graph, a model being joined to the groups that hold it. Groups that no path joins never
see each other's requests, so what is known of one connected component outlives any change in another.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data.placement import Arrivals, Group, Placement
from planning.simulation.compiled import compiled, inlined
from planning.simulation.requests import (
    OVERHEAD_S,
    Bytes,
    Indices,
    Serve,
    earliest,
    serve_deep,
    serve_short,
    serve_single,
)
from planning.simulation.tables import SHORT_STAGES, Floats, Ints, Tables


class Trace(NamedTuple):
    """Requests in order of arrival; `requests[begin[m]:begin[m + 1]]` are the numbers of those for model m."""

    times_s: Floats
    models: Indices
    begin: Ints
    requests: Indices


class Costs(NamedTuple):
    """`Tables` as the kernels take them: see there; `rows` and `weights` are models × shapes.

    `stages` is per shape, `line_s` and `slowest_s` are the sum and the largest of a row's stage times.
    """

    slo_s: Floats
    kinds: Ints
    rows: Ints
    stage_s: Floats
    line_s: Floats
    slowest_s: Floats
    stages: Ints
    weights: Floats


class Board(NamedTuple):
    """Groups in use with what is known of them; everything after `sent` is working memory.

    `line_s` and `slowest_s` the stage times that `run_alike` uses.
    `order` lists the groups as dispatch sees them (ties go to the first). `good` is per model (requests that met
    their SLO), `sent` per group (requests it was asked to serve). `latency_s` sums the response times of a component
    of the graph at its first model.
    """

    shape: Ints
    members: Bytes
    order: Ints
    good: Ints
    latency_s: Floats
    sent: Ints
    clock: Floats
    last: Floats
    busy: Ints
    line_s: Floats
    slowest_s: Floats
    begin: Indices
    holders: Indices
    holder_rows: Indices
    chosen: Indices
    model_on: Bytes
    group_on: Bytes


def trace_of(arrivals: Arrivals, models: int) -> Trace:
    """The arrivals, indexed by model."""
    begin = np.zeros(models + 1, dtype=np.int64)
    begin[1:] = np.cumsum(arrivals.counts(models))
    requests = np.argsort(arrivals.models, kind="stable").astype(np.uint32)
    return Trace(arrivals.times_s, arrivals.models.view(np.uint32), begin, requests)


def costs_of(tables: Tables) -> Costs:
    """The part of the tables that simulations look up."""
    return Costs(
        slo_s=tables.slo_s,
        kinds=tables.kinds,
        rows=tables.rows(),
        stage_s=tables.stage_s,
        line_s=tables.stage_s.sum(axis=1),
        slowest_s=tables.stage_s.max(axis=1),
        stages=tables.stages,
        weights=tables.weights(),
    )


def board_of(costs: Costs, trace: Trace, shapes: Ints, members: Bytes | None = None) -> Board:
    """A board of groups with these shape numbers; nothing is simulated yet."""
    groups, models = len(shapes), len(costs.slo_s)
    last = np.zeros(groups)
    held = np.zeros((groups, models), dtype=np.uint8) if members is None else members.copy()
    return Board(
        shape=shapes.astype(np.int64),
        members=held,
        order=np.arange(groups),
        good=np.zeros(models, dtype=np.int64),
        latency_s=np.zeros(models),
        sent=np.zeros(groups, dtype=np.int64),
        clock=np.zeros((groups, costs.stage_s.shape[1])),
        last=last,
        busy=last.view(np.int64),
        line_s=np.zeros(groups),
        slowest_s=np.zeros(groups),
        begin=np.zeros(models + 1, dtype=np.uint32),
        holders=np.zeros(groups * models, dtype=np.uint32),
        holder_rows=np.zeros(groups * models, dtype=np.uint32),
        chosen=np.zeros(len(trace.times_s), dtype=np.uint32),
        model_on=np.zeros(models, dtype=np.uint8),
        group_on=np.zeros(groups, dtype=np.uint8),
    )


def placement_of(tables: Tables, board: Board) -> Placement:
    """The board as a value, groups in their order."""
    groups = (
        Group(tables.shapes[board.shape[group]], tuple(np.flatnonzero(board.members[group]).tolist()))
        for group in board.order
    )
    return Placement(tuple(groups))


@compiled
def clear_marks(board: Board) -> None:
    """Mark nothing for simulation."""
    board.model_on[:] = 0
    board.group_on[:] = 0


@compiled
def mark_component(board: Board, group: int) -> None:
    """Mark the group, and every group and model that a path joins to it."""
    if board.group_on[group]:
        return
    groups, models = board.members.shape
    stack = np.empty(groups, dtype=np.int64)
    stack[0] = group
    board.group_on[group] = 1
    depth = 1
    while depth:
        depth -= 1
        row = board.members[stack[depth]]
        for model in range(models):
            if row[model] and not board.model_on[model]:
                board.model_on[model] = 1
                for other in range(groups):
                    if board.members[other, model] and not board.group_on[other]:
                        board.group_on[other] = 1
                        stack[depth] = other
                        depth += 1


@compiled
def gather(trace: Trace, board: Board) -> int:
    """Put the requests of all marked models into `chosen`, in order of arrival; returns how many there are."""
    models, chosen, on = trace.models, board.chosen, board.model_on
    count = 0
    for request in range(models.shape[0]):
        chosen[count] = request
        count += on[models[request]]
    return count


@compiled
def seat(costs: Costs, board: Board) -> None:
    """Idle the marked groups, forget what is known of what is marked, and list who holds which marked model."""
    groups, models = board.members.shape
    count = 0
    for model in range(models):
        board.begin[model] = count
        if board.model_on[model]:
            board.good[model] = 0
            board.latency_s[model] = 0.0
            for place in range(groups):
                group = board.order[place]
                if board.members[group, model]:
                    row = costs.rows[model, board.shape[group]]
                    board.holders[count] = group
                    board.holder_rows[count] = row
                    board.line_s[group] = costs.line_s[row]
                    board.slowest_s[group] = costs.slowest_s[row]
                    count += 1
    board.begin[models] = count
    for group in range(groups):
        if board.group_on[group]:
            board.sent[group] = 0
            board.last[group] = 0.0
            board.clock[group] = 0.0


@inlined
def _run(
    serve: Serve, costs: Costs, trace: Trace, board: Board, requests: Indices, begin: int, end: int, final: int
) -> float:  # fmt: skip
    # Arrays are named once, outside the loop: taking one out of a tuple counts a reference.
    times_s, models = trace.times_s, trace.models
    slo_s, stage_s = costs.slo_s, costs.stage_s
    begins, holders, holder_rows = board.begin, board.holders, board.holder_rows
    clock, last, busy, sent, good = board.clock, board.last, board.busy, board.sent, board.good
    latency_s = 0.0
    for number in range(begin, end):
        request = requests[number]
        model = models[request]
        pick = earliest(busy, holders, begins[model], begins[model + 1])
        group = holders[pick]
        sent[group] += 1
        took_s = serve(times_s[request], slo_s[model], clock, group, stage_s, holder_rows[pick])
        if took_s >= 0.0:
            last[group] = clock[group, final]
            good[model] += 1
            latency_s += took_s
    return latency_s


@compiled
def run(costs: Costs, trace: Trace, board: Board, requests: Indices, begin: int, end: int) -> float:
    """Serve `requests[begin:end]`, all of marked models, adding to what is known; returns the sum of response times."""
    stages = 1
    for group in range(board.group_on.shape[0]):
        if board.group_on[group]:
            stages = max(stages, costs.stages[board.shape[group]])
    if stages == 1:
        return _run(serve_single, costs, trace, board, requests, begin, end, 0)
    if stages <= SHORT_STAGES:
        return _run(serve_short, costs, trace, board, requests, begin, end, SHORT_STAGES - 1)
    return _run(serve_deep, costs, trace, board, requests, begin, end, costs.stage_s.shape[1] - 1)


@compiled
def run_alike(costs: Costs, trace: Trace, board: Board, requests: Indices, begin: int, end: int) -> float:
    """`run` for models of one kind, whose requests are alike, with one clock per group; equal but for rounding.

    Alike jobs leave a line of stages as they would leave its slowest stage alone: finish(n) =
    max(arrival(n) + all stages, finish(n - 1) + slowest stage) (H. D. Friedman, Operations Research 13, 1965).
    """
    times_s, models, slo_s = trace.times_s, trace.models, costs.slo_s
    begins, holders, line_s, slowest_s = board.begin, board.holders, board.line_s, board.slowest_s
    last, busy, sent, good = board.last, board.busy, board.sent, board.good
    latency_s = 0.0
    for number in range(begin, end):
        request = requests[number]
        model = models[request]
        pick = earliest(busy, holders, begins[model], begins[model + 1])
        group = holders[pick]
        sent[group] += 1
        now = times_s[request]
        finish = max(now + line_s[group], last[group] + slowest_s[group])
        took_s = finish + OVERHEAD_S - now
        if took_s <= slo_s[model]:
            last[group] = finish
            good[model] += 1
            latency_s += took_s
    return latency_s


@compiled
def simulate_marked(costs: Costs, trace: Trace, board: Board) -> int:
    """Bring what is known of everything marked up to date; returns the requests simulated."""
    marked, only, alike = 0, -1, True
    for model in range(board.model_on.shape[0]):
        if board.model_on[model]:
            alike = alike and (marked == 0 or costs.kinds[model] == costs.kinds[only])
            only = model if marked == 0 else only
            marked += 1
    seat(costs, board)
    requests, begin, end = board.chosen, 0, 0
    if marked == 0:
        return 0
    if marked == 1:
        requests, begin, end = trace.requests, trace.begin[only], trace.begin[only + 1]
    else:
        end = gather(trace, board)
    if alike:
        board.latency_s[only] = run_alike(costs, trace, board, requests, begin, end)
    else:
        board.latency_s[only] = run(costs, trace, board, requests, begin, end)
    return end - begin


@compiled
def simulate_around(costs: Costs, trace: Trace, board: Board, group: int) -> int:
    """Bring the component of a group up to date after a change in it; returns the requests simulated."""
    clear_marks(board)
    mark_component(board, group)
    return simulate_marked(costs, trace, board)


@compiled
def simulate_all(costs: Costs, trace: Trace, board: Board) -> int:
    """Simulate every component; models that nobody holds have nothing good. Returns the requests simulated."""
    board.good[:] = 0
    board.latency_s[:] = 0.0
    done = np.zeros(board.members.shape[0], dtype=np.uint8)
    simulated = 0
    for group in range(board.members.shape[0]):
        if not done[group]:
            simulated += simulate_around(costs, trace, board, group)
            done |= board.group_on
    return simulated


@compiled
def score(trace: Trace, board: Board) -> float:
    """AlpaServe's objective over all requests: attainment - mean latency / 10⁴ + replicas / 10⁶.

    A rejected request counts as latency 0, so the tie-break slightly favours rejecting.
    """
    requests = max(trace.times_s.shape[0], 1)
    replicas = 0
    for group in range(board.members.shape[0]):
        for model in range(board.members.shape[1]):
            replicas += board.members[group, model]
    value: float = board.good.sum() / requests - board.latency_s.sum() / requests / 1e4 + replicas / 1e6
    return value
