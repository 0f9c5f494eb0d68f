from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data.demand import Demand, History, gap_cv, read_history
from data.errors import CorruptData, InvalidInput

TOLD = Demand("a", 5.0, 1.0, 1.0, 60, 40)
ROW = st.tuples(st.floats(0, 1e4), st.sampled_from(["a", "b"]), st.integers(1, 100), st.integers(1, 100))


@given(st.lists(ROW, min_size=1))
@example([(0.0, "a", 1, 1), (5e-324, "a", 1, 1)])
def test_a_history_is_in_order_and_loses_nothing(rows: list[tuple[float, str, int, int]]) -> None:
    history = History.of(["a", "b"], rows)
    assert len(history) == len(rows)
    assert history.arrivals.times_s[0] == 0
    measured = [history.measured(Demand(name, 5.0, 1.0, 1.0, 60, 40)) for name in ("a", "b")]
    assert sum(one.requests for one in measured) == len(rows)
    assert sum(one.rate_rps for one in measured) * history.window_s == pytest.approx(len(rows) * (history.window_s > 0))
    for one in measured:
        inputs = [row[2] for row in rows if row[1] == one.model]
        assert one.input_tokens == pytest.approx(np.mean(inputs) if inputs else 60)


def test_the_rate_of_one_model_is_the_reciprocal_of_its_mean_gap() -> None:
    history = History.of(["a"], [(at_s, "a", 10, 20) for at_s in (0.0, 1.0, 3.0, 6.0)])
    measured = history.measured(TOLD)
    assert (measured.rate_rps, measured.requests, measured.slo_s) == (pytest.approx(0.5), 4, 5.0)
    assert measured.cv == gap_cv(np.array([0.0, 1.0, 3.0, 6.0])) == pytest.approx(np.std([1, 2, 3]) / 2)
    assert gap_cv(np.zeros(3)) == 0


def test_a_model_that_nobody_asks_for_keeps_what_was_told() -> None:
    measured = History.of(["a", "b"], [(0.0, "b", 1, 1), (9.0, "b", 1, 1)]).measured(TOLD)
    assert measured == Demand("a", 5.0, 0.0, 1.0, 60, 40)


def test_files_are_read_and_bad_rows_named(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    header = "arrival_s,model,input_tokens,output_tokens\n"
    path.write_text(f"{header}7.5,a,3,4\n5,b,1,2\n")
    history = read_history(path, ["a", "b"])
    assert history.arrivals.times_s.tolist() == [0.0, 2.5]
    assert history.lengths(0) == (np.array([3]), np.array([4]))
    for row, why in (("1,c,1,1", "model is 'c'"), ("1,a,0,1", "input_tokens must be"), ("x,a,1,1", "arrival_s is not")):
        path.write_text(f"{header}{row}\n")
        with pytest.raises(CorruptData, match=f"line 2: {why}"):
            read_history(path, ["a", "b"])
    path.write_text(header)
    with pytest.raises(CorruptData, match="no requests"):
        read_history(path, ["a"])


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(InvalidInput, match="SLO above 0"):
        Demand("a", 0.0, 1.0, 1.0, 1, 1)
    with pytest.raises(InvalidInput, match="at least one token"):
        Demand("a", 1.0, 1.0, 1.0, 0, 1)
    with pytest.raises(InvalidInput, match="'c', which is none of the models a"):
        History.of(["a"], [(0.0, "c", 1, 1)])
    with pytest.raises(InvalidInput, match="length in and out"):
        History(("a",), History.of(["a"], [(0.0, "a", 1, 1)]).arrivals, np.zeros(2, int), np.zeros(1, int))
    assert Demand.from_json(TOLD.to_json()) == TOLD
    with pytest.raises(CorruptData, match="lacks the field"):
        Demand.from_json({"model": "a"})
