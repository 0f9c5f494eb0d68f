from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from data.books import difference, read_book
from data.canonical import canonical_json, checksum
from data.catalog import instance_type, model_shape
from data.cluster import ClusterSpec, ClusterState
from data.demand import Demand
from data.deployment import Deployment, Hosted, SharedGroup
from data.errors import CorruptData, InvalidInput
from data.shared_plan import Forecast, SharedPlan, SharedPlanBook, Speed, fleet_title, is_shared

A, B = model_shape("opt-6.7b"), replace(model_shape("opt-6.7b"), name="b")
TYPE = instance_type("local-cpu")
FLEET = ClusterSpec("fleet", (TYPE,), (4,))
TOGETHER = SharedGroup(1, 1, (Hosted(A.name, 4, 0.5), Hosted("b", 2, 0.5)))
PIPELINE = SharedGroup(2, 1, (Hosted("b", 4),))


def plan(count: int, *groups: SharedGroup) -> SharedPlan:
    state = ClusterState.of({TYPE.name: count})
    return SharedPlan(state, Deployment(groups) if groups else None, "for a test")


BOOK = SharedPlanBook(
    (A, B),
    FLEET,
    "given",
    (plan(0), plan(1, TOGETHER), plan(3, TOGETHER, PIPELINE)),
    (Speed(A.name, 1, 1, 1e-4, 0.01), Speed("b", 1, 1, 1e-4, 0.02), Speed("b", 2, 1, 1e-4, 0.015)),
)

DEMANDS = (Demand(A.name, 5.0, 2.0, 1.5, 60.5, 40.0, 300), Demand("b", 3.0, 0.5, 1.0, 10, 20))

NOTHING = {"state": "local-cpu=1", "groups": None, "reason": "", "forecast": None}


def rewritten(*less: str, **change: Any) -> bytes:
    body = {**json.loads(BOOK.to_bytes()), **change}
    for name in ("sha256", *less):
        del body[name]
    return canonical_json({**body, "sha256": checksum(body)})


def test_bytes_round_trip() -> None:
    assert SharedPlanBook.from_bytes(BOOK.to_bytes()) == BOOK
    assert SharedPlanBook.from_bytes(BOOK.to_bytes()).sha256 == BOOK.sha256
    assert is_shared(BOOK.to_bytes())


def test_demands_forecasts_and_the_occasion_are_kept() -> None:
    forecast = Forecast(0.9, 0.95, (0.8, 1.0))
    plans = (*BOOK.plans[:-1], replace(BOOK.plans[-1], forecast=forecast))
    book = replace(BOOK, plans=plans, demands=DEMANDS, occasion="there is more to do")
    assert SharedPlanBook.from_bytes(book.to_bytes()) == book
    assert forecast.gap == pytest.approx(0.05)
    with pytest.raises(InvalidInput, match="a demand for every one"):
        replace(book, demands=DEMANDS[:1])


def test_a_book_of_the_first_version_is_read() -> None:
    plans = [
        {name: plan[name] for name in ("state", "groups", "reason")} for plan in json.loads(BOOK.to_bytes())["plans"]
    ]
    old = rewritten("demands", "occasion", schema_version=1, plans=plans)
    assert SharedPlanBook.from_bytes(old) == BOOK


def test_a_fleet_is_called_by_its_models() -> None:
    assert BOOK.title == fleet_title(["b", A.name]) == f"b+{A.name}"
    many = fleet_title([f"model-{number}" for number in range(40)])
    assert many.startswith("40-models-")
    assert many != fleet_title([f"model-{number}" for number in range(1, 41)])


def test_books_of_either_kind_are_read_and_compared() -> None:
    assert read_book(BOOK.to_bytes()) == BOOK
    other = replace(BOOK, plans=(*BOOK.plans[:2], plan(3, TOGETHER, TOGETHER)))
    (change,) = difference(BOOK, other)
    assert (change.state.instances, change.after.deployment.groups) == (3, (TOGETHER, TOGETHER))
    assert difference(BOOK, replace(BOOK, policy="another")) == ()


def test_a_state_between_two_gets_the_largest_listed_part_of_it() -> None:
    assert [plan.deployment for plan in map(BOOK.plan_for, [p.state for p in BOOK.plans])] == [
        None,
        Deployment((TOGETHER,)),
        Deployment((TOGETHER, PIPELINE)),
    ]
    assert BOOK.plan_for(ClusterState.of({TYPE.name: 2})) == BOOK.plans[1]
    empty = SharedPlanBook((A,), FLEET, "given", ())
    assert "no plan" in empty.plan_for(ClusterState.of({TYPE.name: 2})).reason


@pytest.mark.parametrize(
    ("plans", "why"),
    [
        ((plan(1, PIPELINE),), "takes 2 devices of 1"),
        ((plan(1, SharedGroup(1, 1, (Hosted("c", 1),))),), "'c', which is none of"),
        ((plan(1, TOGETHER), plan(1)), "one plan for each state"),
    ],
)
def test_impossible_books_are_refused(plans: tuple[SharedPlan, ...], why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        replace(BOOK, plans=plans)
    with pytest.raises(InvalidInput, match=r"no speed is given for 'opt-6\.7b' at P1·T1"):
        replace(BOOK, speeds=BOOK.speeds[1:])
    with pytest.raises(InvalidInput, match="is negative"):
        replace(BOOK.speeds[0], step_s=-1.0)
    with pytest.raises(InvalidInput, match="name of its own"):
        replace(BOOK, models=(A, A))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"{", "no plan book of several models"),
        (b'{"kind": "other"}', "no plan book of several models"),
        (rewritten(schema_version=3), "newer version"),
        (BOOK.to_bytes().replace(b'"given"', b'"taken"'), "checksum is wrong"),
        (rewritten(speeds=[{"model": "b"}]), "lacks the field"),
        (rewritten(models=[{**A.to_json(), "layers": 0}, B.to_json()]), "layers must be at least 1"),
        (
            rewritten(plans=[{"state": "local-cpu=1", "groups": [], "reason": "", "forecast": None}]),
            "at least one group",
        ),
        (rewritten(demands=[{**DEMANDS[0].to_json(), "slo_s": 0}]), "needs an SLO above 0"),
        (rewritten(schema_version=1, plans=[1]), "plans cannot be read"),
    ],
)
def test_damage_is_said(content: bytes, why: str) -> None:
    with pytest.raises(CorruptData, match=why):
        SharedPlanBook.from_bytes(content)
