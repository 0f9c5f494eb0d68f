"""A study of the published profile on a fleet made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from data.availability import AvailabilityTrace, Change
from data.catalog import instance_type, published_profile
from data.errors import InvalidInput
from planning.availability import steady
from planning.mixing import Market, solve_mixing
from planning.spot_policy import Load, build
from planning.study.measured import published_model
from planning.study.results import Result
from planning.study.study import Cell, Study
from planning.study.systems import SYSTEMS

pytestmark = pytest.mark.slow  # compiles the kernels of both simulations

FLEET = AvailabilityTrace(
    "lossy",
    (
        Change(0.0, "add", ("a", "b", "c", "d")),
        Change(120.0, "remove", ("a",), 30.0),
        Change(240.0, "add", ("e",), 30.0),
    ),
    360.0,
)


@pytest.fixture(scope="module")
def study() -> Study:
    load = Load(1.5, 1.0)
    model = published_model(published_profile("6.7B"), instance_type("g4dn.12xlarge"), load, 4)
    process = steady(4, 1e-4, 1e-3)
    book = build(model.costs, process, load)
    mixings = {usd: solve_mixing(book, process, Market(1.9046 / 3600, 3.912 / 3600), usd) for usd in (0.01, 0.0001)}
    return Study(model, {"lossy": FLEET}, tuple(SYSTEMS), 1, book, mixings=mixings)


@pytest.fixture(scope="module")
def results(study: Study) -> dict[str, Result]:
    found = [study.run(cell) for cell in study.cells()]
    return {one.policy: one for one in found}


def test_every_system_serves_the_same_requests(study: Study, results: dict[str, Result]) -> None:
    assert results.keys() >= SYSTEMS.keys()
    assert {one.requests for one in results.values()} == {results["perennial"].requests}
    assert results["perennial"].requests > 400
    assert study.run(Cell("lossy", "perennial", 0)) == results["perennial"]
    assert study.run(Cell("lossy", "perennial", 1)) != results["perennial"]


def test_dollars_are_those_of_the_instances(results: dict[str, Result]) -> None:
    spot = FLEET.instance_minutes / 60 * 1.9046
    for name in ("perennial", "spotserve-new", "rerouting-old", "oracle"):
        assert results[name].usd == pytest.approx(spot)
    assert results["on-demand 4"].usd == pytest.approx(4 * 360 / 3600 * 3.912)
    assert results["perennial-fallback"].usd > spot
    assert results["perennial-mixed 0.0001"].usd < results["perennial-mixed 0.01"].usd
    assert replace(results["perennial-mixed 0.01"], policy="perennial-mixed") == results["perennial-mixed"]


def test_free_transitions_are_no_worse_and_a_stable_fleet_moves_nothing(results: dict[str, Result]) -> None:
    assert results["oracle"].p99_s <= results["perennial"].p99_s * 1.01
    assert results["on-demand"].changes == []
    assert results["spotserve-new"].longest_pause_s > results["perennial"].longest_pause_s


def test_what_makes_no_sense_is_refused(study: Study) -> None:
    with pytest.raises(InvalidInput, match="known are perennial"):
        Study(study.model, study.traces, ("best",), 1, study.book)
    with pytest.raises(InvalidInput, match="at least one trace"):
        Study(study.model, {}, ("perennial",), 1, study.book)
    with pytest.raises(InvalidInput, match="give --profile"):
        published_model(published_profile("6.7B"), instance_type("local-cpu"), Load(1.0, 1.0), 4)
