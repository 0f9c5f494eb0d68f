"""Waiting for a free server: known cases, and a simulated queue."""

from __future__ import annotations

from math import exp, inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planning.queueing import erlang_c, late_share, waiting_s


def test_one_server_waits_as_in_mm1() -> None:
    assert waiting_s(0.8, 1.0, 1) == pytest.approx(0.8 / (1 - 0.8))
    assert late_share(0.8, 1.0, 1, 3.0) == pytest.approx(0.8 * exp(-0.2 * 3.0))


def test_overload_waits_for_ever() -> None:
    assert waiting_s(2.0, 1.0, 2) == inf
    assert late_share(2.0, 1.0, 2, 1e9) == late_share(0.5, 1.0, 2, -0.1) == 1.0
    assert late_share(0.0, 1.0, 2, 0.0) == 0.0


def test_very_many_servers_are_never_all_busy() -> None:
    assert erlang_c(10_000, 3.0) == 0.0
    assert waiting_s(3.0, 1.0, 10_000) == late_share(3.0, 1.0, 10_000, 1.0) == 0.0


@given(st.floats(0.1, 0.95), st.integers(1, 40), st.floats(0.0, 10.0), st.floats(0.0, 10.0))
def test_patience_helps(utilisation: float, servers: int, patience_s: float, more_s: float) -> None:
    rate = utilisation * servers
    share = late_share(rate, 1.0, servers, patience_s)
    assert 0 <= late_share(rate, 1.0, servers, patience_s + more_s) <= share <= erlang_c(servers, rate)


def test_shares_of_a_simulated_queue() -> None:
    """M/M/3 at 80 %, first come first served: the formula is exact."""
    random, count = np.random.default_rng(1), 200_000
    arrivals, service = np.cumsum(random.exponential(1 / 2.4, count)), random.exponential(1.0, count)
    free, late = [0.0] * 3, 0
    for arrival_s, service_s in zip(arrivals, service, strict=True):
        first = min(range(3), key=free.__getitem__)
        begun_s = max(arrival_s, free[first])
        free[first] = begun_s + service_s
        late += begun_s - arrival_s > 1.5
    assert late / count == pytest.approx(late_share(2.4, 1.0, 3, 1.5), rel=0.05)
