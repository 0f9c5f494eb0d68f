from __future__ import annotations

from dataclasses import replace
from itertools import count, pairwise

import numpy as np
import pytest

from data.cluster import ClusterState
from data.deployment import Deployment, Hosted, SharedGroup
from data.errors import Infeasible, InvalidInput
from data.placement import Arrivals
from data.shared_plan import SharedPlanBook
from planning.hosting import Tenant, placement_of
from planning.shared_book import SharedInputs, attained, build_shared_book, told_arrivals
from tests.planning.tenants import MIB, cluster, tenant

pytestmark = pytest.mark.slow  # on a machine that has not compiled the kernels yet

_moments = count(0.0, 1000.0)


def inputs(*tenants: Tenant, **changes: object) -> SharedInputs:
    arrivals = told_arrivals([one.demand for one in tenants])
    return replace(SharedInputs(tenants, cluster(), arrivals, budget_s=0.0), **changes)


def book_of(given: SharedInputs) -> SharedPlanBook:
    return build_shared_book(given, lambda: next(_moments))  # time is always over


@pytest.fixture(scope="module")
def book() -> SharedPlanBook:
    return book_of(inputs(tenant("a", rate_rps=8.0, slo_s=1.0), tenant("b", rate_rps=4.0, slo_s=1.0)))


def test_every_number_of_instances_has_groups_and_what_they_attain(book: SharedPlanBook) -> None:
    assert [plan.state.instances for plan in book.plans] == [0, 1, 2, 3]
    assert book.plans[0].deployment is None
    forecasts = [plan.forecast for plan in book.plans[1:]]
    assert all(0 <= one.attainment <= one.bound <= 1 and len(one.by_model) == 2 for one in forecasts)
    assert all(less.attainment <= more.attainment + 0.01 for less, more in pairwise(forecasts))
    assert {hosted for plan in book.plans[1:] for hosted in plan.deployment.models} == {"a", "b"}
    assert SharedPlanBook.from_bytes(book.to_bytes()) == book
    assert [one.model for one in book.demands] == [spec.name for spec in book.models] == ["a", "b"]
    assert "in time (a " in book.plans[1].reason


def test_what_runs_with_more_instances_stays_where_that_costs_nothing(book: SharedPlanBook) -> None:
    for less, more in pairwise(book.plans[1:]):
        if less.reason.startswith("what is left"):
            assert not less.deployment.counts - more.deployment.counts


def test_what_serves_now_stays_where_nothing_is_better() -> None:
    given = inputs(tenant("a", rate_rps=0.5), tenant("b", rate_rps=0.5))
    both = (Hosted("a", 8, 0.5), Hosted("b", 8, 0.5))
    now = Deployment((SharedGroup(1, 1, both), SharedGroup(2, 1, both)))
    state = ClusterState.of({"box": 3})
    plan = book_of(replace(given, incumbent={state: now})).plan_for(state)
    assert plan.reason.startswith("as before")
    assert [(group.shape, group.models) for group in plan.deployment.groups] == [
        (group.shape, group.models) for group in now.groups
    ]


def test_a_model_that_hardly_anyone_asks_for_has_a_place_all_the_same() -> None:
    book = book_of(inputs(tenant("a", rate_rps=8.0, slo_s=1.0), tenant("b", rate_rps=0.0)))
    assert all(plan.deployment.models == ("a", "b") for plan in book.plans[1:])
    assert book.plans[-1].forecast.by_model[1] == 1.0


def test_a_model_that_one_instance_has_no_room_for_is_named() -> None:
    given = inputs(tenant("a"), tenant("b"), cluster=cluster(memory_mib=25))
    plan = book_of(given).plans[1]
    assert len(plan.deployment.models) == 1
    assert "no place for" in plan.reason


def test_every_model_that_cannot_be_served_is_named_at_once() -> None:
    given = inputs(tenant("a", slo_s=0.01), tenant("b"), tenant("c", slo_s=0.02))
    with pytest.raises(Infeasible, match=r"a takes .* its SLO is 0\.010 s.*; c takes .* its SLO is 0\.020 s"):
        book_of(given)
    with pytest.raises(Infeasible, match=r"a fits nowhere.*; b fits nowhere"):
        book_of(inputs(tenant("a"), tenant("b"), reserve_bytes=255 * MIB))


def test_what_says_too_little_is_refused() -> None:
    short = Arrivals.of(np.arange(10.0), np.zeros(10))
    with pytest.raises(InvalidInput, match="a history of 9 s says too little"):
        inputs(tenant("a"), arrivals=short)
    with pytest.raises(InvalidInput, match="one type"):
        inputs(tenant("a"), cluster=cluster(0))
    with pytest.raises(InvalidInput, match="no model has a rate"):
        told_arrivals([tenant(rate_rps=0.0).demand])


def test_told_rates_are_those_of_the_arrivals() -> None:
    arrivals = told_arrivals([tenant("a", rate_rps=3.0).demand, tenant("b", rate_rps=1.0, cv=2.0).demand])
    assert arrivals.counts(2) / arrivals.span_s == pytest.approx([3.0, 1.0], rel=0.15)


def test_attainment_is_that_of_the_groups() -> None:
    given = inputs(tenant("a", rate_rps=8.0, slo_s=1.0), tenant("b", rate_rps=4.0, slo_s=1.0))
    problem = given.problem(1)
    alone = placement_of(Deployment((SharedGroup(1, 1, (Hosted("b", 8),)),)), ["a", "b"])
    share, (of_a, of_b) = attained(problem, alone)
    assert of_a == 0 < of_b
    assert share < of_b
