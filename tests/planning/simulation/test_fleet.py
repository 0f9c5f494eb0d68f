"""A fleet along a story: times by hand, and that every request is served whole whatever happens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.cluster import ClusterSpec, ClusterState, InstanceType
from data.errors import InvalidInput
from data.layout import Device, ParallelConfig
from data.plan import Estimate, Objective, Plan, PlanBook
from data.synthesis import Uniform, synthetic_workload
from data.workload import Request, Workload
from planning.simulation.fleet import Served, simulate_fleet
from planning.simulation.fleet_profile import Charges, Duration, FleetProfile, fit_duration
from planning.simulation.story import Happening
from planning.step_laws import StepLaw
from tests.planning.fleets import SPEC

BASE_S, TOKEN_S, OVERHEAD_S = 0.1, 0.01, 0.02
DECODE_S = BASE_S + TOKEN_S
LAW = StepLaw((BASE_S, TOKEN_S, TOKEN_S, 0.0, 0.0, 0.0, 0.0), (1.0,) * 8, OVERHEAD_S)
CHARGES = Charges(
    prepare=Duration(0.5, 0.25),
    transfer=Duration(0.2, 0.1),
    slowdown=1.0,
    start_s=2.0,
    start_slowdown=1.0,
    detect_s=0.1,
)
DEGREES = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)]
PROFILE = FleetProfile(dict.fromkeys(DEGREES, LAW), dict.fromkeys(DEGREES, 64), CHARGES, 64, 4)
LADDER = {1: (1, 1, 1), 2: (1, 1, 2), 3: (1, 3, 1), 4: (2, 2, 1)}
NAMES = ["i0", "i1", "i2", "i3"]


def _book(layouts: dict[int, tuple[int, int, int]], max_batch: int = 4) -> PlanBook:
    kind = InstanceType("cpu", 1, "cpu", 1 << 30, 1e9, 1e10, 0.0, 0.0)
    plans = [Plan(ClusterState.of({}), None, None, "nothing is left")]
    for count, (replicas, stages, shards) in layouts.items():
        config = ParallelConfig(replicas, stages, shards, max_batch)
        plans.append(Plan(ClusterState.of({"cpu": count}), config, Estimate(0.0, 0.0, 0), "given"))
    return PlanBook(SPEC, ClusterSpec("f", (kind,), (max(layouts),)), Objective(0.0, 1, 1), "given", "", tuple(plans))


def _workload(*requests: tuple[float, int, int]) -> Workload:
    return Workload("by hand", tuple(Request(*one) for one in requests))


def _alone_s(prompt: int, output: int) -> float:
    return OVERHEAD_S + BASE_S + prompt * TOKEN_S + (output - 1) * DECODE_S


def test_one_request_on_one_replica() -> None:
    served = simulate_fleet(_book({1: (1, 1, 1)}), PROFILE, _workload((1.0, 8, 10)), [], ["i0"])
    assert served.latency_s == pytest.approx([_alone_s(8, 10)])
    assert served.first_s == pytest.approx([1.0 + OVERHEAD_S + BASE_S + 8 * TOKEN_S])


def test_steps_take_as_long_as_the_processors_of_the_moment() -> None:
    """Half of the first of ten steps, and everything after it, at half the speed."""
    work = _workload((0.0, 1, 10))
    at_s = OVERHEAD_S + DECODE_S / 2
    served = simulate_fleet(_book({1: (1, 1, 1)}), PROFILE, work, [], ["i0"], drag=[(0.0, 1.0), (at_s, 2.0)])
    assert served.latency_s == pytest.approx([at_s + 2 * 9.5 * DECODE_S])


def test_requests_go_to_the_replica_with_the_least_work_left() -> None:
    """Both have one request and room for one more; the third goes to the one whose request is shorter."""
    book, work = _book({2: (2, 1, 1)}, max_batch=1), _workload((0.0, 8, 90), (0.0, 8, 10), (0.0, 8, 10))
    served = simulate_fleet(book, PROFILE, work, [], NAMES[:2])
    alone_s = _alone_s(8, 10) - OVERHEAD_S
    assert served.latency_s == pytest.approx([_alone_s(8, 90), _alone_s(8, 10), _alone_s(8, 10) + alone_s])


def test_one_place_serves_in_order_and_is_never_idle() -> None:
    book, work = _book({1: (1, 1, 1)}, max_batch=1), _workload(*((0.0, 8, 10) for _ in range(9)))
    served = simulate_fleet(book, PROFILE, work, [], ["i0"])
    alone_s = _alone_s(8, 10) - OVERHEAD_S
    assert served.done_s == pytest.approx([OVERHEAD_S + alone_s * (index + 1) for index in range(9)])


def test_a_kill_stalls_requests_until_their_kv_is_restored() -> None:
    book, work = _book({1: (1, 1, 1), 2: (1, 1, 1)}), _workload((0.0, 8, 20))
    busy = [[Device("i0", 0)]]
    at_s = OVERHEAD_S + BASE_S + 8 * TOKEN_S + 4.5 * DECODE_S  # half of a step is lost
    served = simulate_fleet(book, PROFILE, work, [Happening(at_s, "kill", "i0")], NAMES[:2], busy)
    stall_s = CHARGES.detect_s + CHARGES.settle_s + CHARGES.prepare.of(1) + CHARGES.transfer.of(1)
    assert served.latency_s == pytest.approx([_alone_s(8, 20) + stall_s + 0.5 * DECODE_S])
    (change,) = served.changes
    assert (change.recovery, change.moved, change.replayed) == (True, 1, 0)


def test_a_request_without_kv_is_computed_from_the_start() -> None:
    book, work = _book({1: (1, 1, 1), 2: (1, 1, 1)}), _workload((0.0, 8, 20))
    at_s = OVERHEAD_S + 0.5 * BASE_S  # within its prefill
    served = simulate_fleet(book, PROFILE, work, [Happening(at_s, "kill", "i0")], NAMES[:2], [[Device("i0", 0)]])
    stall_s = CHARGES.detect_s + CHARGES.settle_s + CHARGES.prepare.of(1) + CHARGES.transfer.of(1)
    assert served.done_s == pytest.approx([at_s + stall_s + _alone_s(8, 20) - OVERHEAD_S])


def test_a_notice_costs_one_pause_at_a_step_boundary() -> None:
    book, work = _book({1: (1, 1, 1), 2: (1, 1, 1)}), _workload((0.0, 8, 40))
    served = simulate_fleet(book, PROFILE, work, [Happening(1.0, "notice", "i0", 2.0)], NAMES[:2], [[Device("i0", 0)]])
    assert served.latency_s == pytest.approx([_alone_s(8, 40) + CHARGES.transfer.of(1)])
    (change,) = served.changes
    assert change.started_s == pytest.approx(1.0 + CHARGES.settle_s)
    assert (change.recovery, change.moved, change.replayed) == (False, 1, 0)


def test_a_notice_that_is_too_short_ends_as_a_kill() -> None:
    book, work = _book({1: (1, 1, 1), 2: (1, 1, 1)}), _workload((0.0, 8, 40))
    served = simulate_fleet(book, PROFILE, work, [Happening(1.0, "notice", "i0", 0.5)], NAMES[:2], [[Device("i0", 0)]])
    (change,) = served.changes
    assert change.recovery
    assert change.started_s == pytest.approx(1.5 + CHARGES.detect_s + CHARGES.retry_s + CHARGES.settle_s)


def test_an_addition_is_used_once_it_has_started_and_pauses_nobody_who_stays() -> None:
    book, work = _book({1: (1, 1, 1), 2: (2, 1, 1)}), _workload((0.0, 8, 60))
    served = simulate_fleet(book, PROFILE, work, [Happening(1.0, "add", "i1")], ["i0"])
    assert served.latency_s == pytest.approx([_alone_s(8, 60)])
    (change,) = served.changes
    assert change.started_s == pytest.approx(1.0 + CHARGES.start_s + CHARGES.settle_s)
    assert change.config.replicas == 2


def test_a_duration_is_fitted_whatever_one_slow_moment_says() -> None:
    samples = [(devices, 0.1 + 0.2 * devices) for devices in (0, 1, 1, 2, 4)]
    found = fit_duration([*samples, (1, 5.0)])
    assert (found.base_s, found.device_s) == pytest.approx((0.1, 0.2))
    assert fit_duration([(2, 0.3), (2, 0.5), (2, 9.0)]) == Duration(0.5)
    with pytest.raises(InvalidInput, match="measure some changes"):
        fit_duration([])


def test_what_is_left_without_instances_is_never_done() -> None:
    served = simulate_fleet(
        _book({1: (1, 1, 1)}), PROFILE, _workload((0.0, 8, 40)), [Happening(1.0, "kill", "i0")], ["i0"]
    )
    assert served.done_s == pytest.approx([np.inf])


def test_shapes_that_were_not_measured_are_named() -> None:
    profile = replace(PROFILE, laws={(1, 2): LAW})
    with pytest.raises(InvalidInput, match="1 stages and 1 shards"):
        simulate_fleet(_book({1: (1, 1, 1)}), profile, _workload((0.0, 8, 4)), [], ["i0"])


@st.composite
def stories(draw: st.DrawFn) -> list[Happening]:
    """Losses and additions, some in the middle of changes, that leave one instance at least."""
    live, born, at_s, found = list(NAMES), len(NAMES), 0.0, []
    for _ in range(draw(st.integers(0, 6))):
        at_s += draw(st.floats(0.0, 6.0))
        kind = draw(st.sampled_from(["add"] if len(live) < 2 else ["notice", "kill", "add"]))
        if kind == "add":
            name, born = f"i{born}", born + 1
            live.append(name)
        else:
            name = live.pop(draw(st.integers(0, len(live) - 1)))
        found.append(Happening(at_s, kind, name, draw(st.floats(0.0, 4.0)) if kind == "notice" else 0.0))
    return found


def _serve(seed: int, story: list[Happening]) -> tuple[Workload, Served]:
    lengths = {"inputs": Uniform(1, 80), "outputs": Uniform(1, 30)}
    work = synthetic_workload(seed, requests=40, rate_rps=2.0, cv=1.5, **lengths)  # type: ignore[arg-type]
    return work, simulate_fleet(_book(LADDER), PROFILE, work, story, NAMES)


@given(st.integers(0, 10_000), stories())
@settings(deadline=None, max_examples=60)
def test_every_request_is_served_whole_whatever_happens(seed: int, story: list[Happening]) -> None:
    work, served = _serve(seed, story)
    least_s = [_alone_s(one.input_tokens, one.output_tokens) - 1e-9 for one in work.requests]
    survivors = 4 + sum(1 if one.kind == "add" else -1 for one in story)
    assert survivors >= 1
    assert np.isfinite(served.done_s).all()
    assert (served.latency_s >= least_s).all()
    assert (served.first_s <= served.done_s).all()
    again = _serve(seed, story)[1]
    assert (again.done_s == served.done_s).all()


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=20)
def test_what_takes_longer_makes_requests_later(seed: int) -> None:
    work, served = _serve(seed, [])
    law = replace(LAW, coefficients=tuple(2 * one for one in LAW.coefficients), overhead_s=0.0)
    slow = replace(PROFILE, laws=dict.fromkeys(DEGREES, law))
    later = simulate_fleet(_book(LADDER), slow, work, [], NAMES)
    assert later.latency_s.mean() > served.latency_s.mean()
