"""How many instances of which kind to hold: by hand, against the rules, and what prices do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from data.errors import InvalidInput
from data.placement import Shape
from planning.availability import Process, steady
from planning.mixing import Market, Mixing, Option, solve_mixing
from planning.policy import Problem, iterate
from planning.spot_policy import Book, Layouts

SMALL, LARGE = (Shape(shards=4, stages=1), 2), (Shape(shards=4, stages=1), 4)
MARKET = Market(spot_usd_s=1 / 3600, on_demand_usd_s=2 / 3600)
PROCESS = steady(6, 0.2 / 3600, 0.5 / 3600, along=0.05)


def _book(process: Process = PROCESS) -> Book:
    """Two instances serve at 20, four at 10 seconds of latency per second; a move costs 5 seconds."""
    moving = np.where(np.eye(3), 0.0, 5.0)
    fits = np.arange(process.most + 1)[:, None] >= np.array([0, 2, 4])[None, :]
    problem = Problem(process.rates(), fits, np.array([1000.0, 20.0, 10.0]), moving)
    return Book(Layouts((SMALL, LARGE), (20.0, 10.0), (20.0, 10.0)), problem, iterate(problem))


def solved_for(latency_usd: float, process: Process = PROCESS, market: Market = MARKET) -> Mixing:
    return solve_mixing(_book(process), process, market, latency_usd, 4)


def test_a_market_without_losses_is_a_sum_by_hand() -> None:
    """Four spot instances cost 4 dollars per hour, and serve at 10 seconds per second."""
    calm = steady(6, 1e-12, 4 / 3600)
    solved = solved_for(0.01, calm)
    assert solved.decide(6, 6, 0, 0) == Option(4, 0, 2)
    assert solved.average == pytest.approx(4 / 3600 + 0.01 * 10, rel=1e-3)
    # 10 seconds per second less are worth 2 dollars per hour from 2 / 3600 / 10 dollars a second on.
    assert solved_for(0.99 * 2 / 36000, calm).decide(6, 6, 0, 0) == Option(2, 0, 1)
    assert solved_for(1.01 * 2 / 36000, calm).decide(6, 6, 0, 0) == Option(4, 0, 2)


def test_what_the_market_lacks_is_hired_and_released_again() -> None:
    solved = solved_for(0.001)
    assert solved.decide(1, 1, 0, 1) == Option(1, 3, 2)
    assert solved.decide(6, 6, 3, 2) == Option(4, 0, 2)


def test_the_dearer_a_second_the_more_is_held_and_spares_are_kept() -> None:
    held = [solved_for(usd).decide(6, 6, 0, 0) for usd in (1e-5, 1e-3, 0.1, 10.0)]
    totals = [one.spot + one.on_demand for one in held]
    assert totals == sorted(totals)
    assert (totals[0], held[0].layout) == (2, 1)
    assert solved_for(0.003).decide(6, 6, 0, 0) == Option(5, 0, 2)  # one more than the layout needs


def test_no_fixed_rule_is_cheaper() -> None:
    """The average of the policy against those that hold one option whatever happens, where the market allows it."""
    solved = solved_for(0.003)
    for options in ([Option(0, 4, 2)], [Option(0, 2, 1)]):
        fixed = options[0].on_demand * MARKET.on_demand_usd_s + 0.003 * (10.0 if options[0].layout == 2 else 20.0)
        assert solved.average <= fixed + 1e-9


def test_a_free_market_holds_all_that_helps() -> None:
    free = replace(MARKET, spot_usd_s=0.0, on_demand_usd_s=0.0)
    assert solved_for(0.01, market=free).average <= solved_for(0.01).average


def test_spares_stay_spare_where_a_move_costs_more() -> None:
    solved = solved_for(0.01)
    assert solved.target(1, None) is None
    assert solved.target(2, SMALL) == SMALL
    assert solved.target(3, SMALL) == SMALL
    assert solved.target(5, LARGE) == LARGE
    assert solved.target(40, LARGE) == LARGE


def test_large_markets_are_refused() -> None:
    large = PROCESS.sized(49)
    with pytest.raises(InvalidInput, match="at most 48"):
        solve_mixing(_book(large), large, MARKET, 0.01)


def test_late_requests_buy_what_waiting_alone_does_not() -> None:
    """Two instances leave half of the requests late, four none: a price for that is worth two more instances."""
    book = replace(_book(), late_rps=(1.0, 0.5, 0.0))
    priced = {usd: solve_mixing(book, PROCESS, MARKET, 1e-5, 4, usd).decide(6, 6, 0, 0) for usd in (0.0, 0.01)}
    assert (priced[0.0].layout, priced[0.01].layout) == (1, 2)
    with pytest.raises(InvalidInput, match="without a limit"):
        solve_mixing(_book(), PROCESS, MARKET, 1e-5, 4, 0.01)
