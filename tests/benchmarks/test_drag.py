"""How quick processors were: found again from what probes took, and felt by simulations."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.fidelity.drag import Drag, summary
from planning.step_laws import Mix, Observed

_SPAN_S = 60


def _probes(slow_from_s: float, factor: float, noise: float = 0.2) -> list[tuple[float, float]]:
    """Eight probes a second, which take `factor` times as long from some time on."""
    source = np.random.default_rng(0)
    times = np.arange(0, _SPAN_S, 1 / 8)
    took = np.where(times < slow_from_s, 1.0, factor) * source.uniform(1 - noise, 1 + noise, len(times))
    return list(zip(times.tolist(), took.tolist(), strict=True))


def test_the_drag_is_what_probes_say_in_units_of_their_mean() -> None:
    drag = Drag.of(_probes(30.0, 2.0))
    assert drag.at(10.0) == pytest.approx(1 / 1.5, rel=0.05)
    assert drag.at(50.0) == pytest.approx(2 / 1.5, rel=0.05)
    assert drag.at(-100.0) == pytest.approx(1 / 1.5, rel=0.05)  # as at the first probe
    assert drag.felt(Observed(0.5, (Mix(1, 1, 1, 0, 0),), 1, at_s=50.0)).drag == drag.at(50.0)


def test_one_wild_probe_says_little() -> None:
    calm = _probes(_SPAN_S, 1.0)
    wild = [(at_s, 500.0 if at_s == 30.0 else took) for at_s, took in calm]
    assert Drag.of(wild).at(30.0) == pytest.approx(Drag.of(calm).at(30.0), rel=0.06)


def test_a_course_has_a_factor_for_every_second() -> None:
    course = Drag.of(_probes(30.0, 2.0)).course(20.0, 40.0)
    assert [time_s for time_s, _ in course] == [float(second) for second in range(21)]
    assert course[0][1] < 0.75
    assert course[-1][1] > 1.25
    told = summary(course)
    assert told["least"] < told["mean"] < told["most"]


def test_without_probes_there_is_no_drag() -> None:
    assert Drag.of([]).at(5.0) == 1.0
    assert summary([]) == {"mean": 1.0, "least": 1.0, "most": 1.0}
