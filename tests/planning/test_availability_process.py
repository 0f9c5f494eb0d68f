"""The availability process: its rates by hand and in what it generates, with zones and regimes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.availability import zone_of
from data.errors import InvalidInput
from planning.availability import Process, Zone, generate, generator, steady
from planning.shocks import Shocks

CALM, STORMY = Shocks(1e-5, 0.1, 5.0), Shocks(4e-4, 0.1, 5.0)
BACK = Shocks(1e-3, 0.2, 4.0)
TWO = Process(
    (Zone("a", 3, (CALM, STORMY), (BACK, BACK)), Zone("b", 2, (CALM, STORMY), (BACK, BACK))),
    ((0.0, 1e-4), (3e-4, 0.0)),
)


def test_one_zone_by_hand() -> None:
    rates = steady(3, 0.5, 2.0).rates()
    assert rates == pytest.approx(np.array([[0, 6, 0, 0], [0.5, 0, 4, 0], [0, 1, 0, 2], [0, 0, 1.5, 0]]), abs=1e-6)


def test_regimes_last_as_they_are_left() -> None:
    assert TWO.weights == pytest.approx([0.75, 0.25])
    assert TWO.loss_s == pytest.approx(0.75 * 1e-5 + 0.25 * 4e-4)
    assert TWO.gain_s == pytest.approx(1e-3)


def _together(process: Process) -> tuple[np.ndarray, np.ndarray]:
    """The whole chain (regime, count of a, count of b) without any approximation: its long run, and totals."""
    a, b = process.zones
    shape = 2, a.most + 1, b.most + 1
    states = [tuple(int(part) for part in np.unravel_index(index, shape)) for index in range(int(np.prod(shape)))]
    rates = np.zeros((len(states), len(states)))
    for row, (regime, here, there) in enumerate(states):
        for column, (other, then, later) in enumerate(states):
            if (then, later) == (here, there):
                rates[row, column] = process.switching[regime][other]
            elif other == regime and later == there:
                rates[row, column] = a.rates(regime)[here, then]
            elif other == regime and then == here:
                rates[row, column] = b.rates(regime)[there, later]
    system = generator(rates).T
    system[-1] = 1.0
    return np.linalg.solve(system, np.eye(len(states))[-1]), np.array([here + there for _, here, there in states])


def test_rates_of_all_zones_give_the_long_run_of_the_whole_chain() -> None:
    """But for what is left out: that zones remember a regime together."""
    share, totals = _together(TWO)
    exact = np.bincount(totals, share)
    system = generator(TWO.rates()).T
    system[-1] = 1.0
    found = np.linalg.solve(system, np.eye(TWO.most + 1)[-1])
    assert found == pytest.approx(exact, abs=1e-2)
    alone = TWO.alone(0).rates()
    assert alone.shape == (4, 4)


def test_a_generated_trace_has_the_long_run_of_its_process() -> None:
    trace = generate(TWO, 3, 4e6, 4)
    up_s = np.zeros(TWO.most + 1)
    for (start, count), (end, _) in pairwise([*trace.counts, (trace.duration_s, 0)]):
        up_s[count] += end - start
    share, totals = _together(TWO)
    assert up_s / up_s.sum() == pytest.approx(np.bincount(totals, share), abs=0.03)
    assert set(trace.zones) == {"a", "b"}
    assert trace.zones["a"].most <= 3
    assert all(0 <= change.notice_s <= min(30, change.time_s) for change in trace.changes)
    assert trace.changes == generate(TWO, 3, 4e6, 4).changes


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 30), st.integers(1, 4), st.integers(0, 99), st.floats(0, 1))
def test_generated_fleets_keep_to_their_zones(most: int, zones: int, seed: int, along: float) -> None:
    process = steady(most, 1e-3, 3e-3, along, zones=zones)
    assert process.most == most
    assert max(zone.most for zone in process.zones) - min(zone.most for zone in process.zones) <= 1
    trace = generate(process, seed, 3000.0, most // 2)
    assert trace.most <= most
    assert trace.counts[0] == (0.0, most // 2)
    named = {zone_of(name) for change in trace.changes for name in change.instances}
    assert named <= {zone.name for zone in process.zones}


def test_losses_of_a_zone_go_together_and_of_others_do_not() -> None:
    process = steady(8, 1e-4, 1e-3, along=1.0, zones=2)
    for change in generate(process, 5, 1e6, 8).changes[1:]:
        assert len({zone_of(name) for name in change.instances}) == 1
    sizes = [len(one.instances) for one in generate(process, 5, 1e6, 8).changes if one.kind == "remove"]
    assert max(sizes) == 4


def test_impossible_processes_are_refused() -> None:
    with pytest.raises(InvalidInput, match="in every regime"):
        Process((Zone("", 3, (CALM,), (BACK, BACK)),), ((0.0,),))
    with pytest.raises(InvalidInput, match="in every regime"):
        Process(())
    with pytest.raises(InvalidInput, match="cannot start with 4"):
        generate(steady(3, 1.0, 1.0), 0, 10.0, 4)
