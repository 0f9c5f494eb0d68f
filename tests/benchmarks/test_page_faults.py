"""The summary of fleets that were measured in turn."""

from __future__ import annotations

import pytest

from benchmarks.page_faults import Served, _summary


def test_means_of_both_are_compared() -> None:
    rates = [("patient", 300.0), ("hasty", 240.0), ("hasty", 260.0), ("patient", 350.0)]
    summary = _summary([Served(name, rate, 1.0, 0.1) for name, rate in rates])
    assert summary["faster"] == pytest.approx(1.3)
    assert [one["tokens_per_s"] for one in summary["fleets"]] == [300.0, 240.0, 260.0, 350.0]
