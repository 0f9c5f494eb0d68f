from __future__ import annotations

from benchmarks.books import bars, measure


def test_a_book_is_timed() -> None:
    row = measure("opt-6.7b", 2, "journey")
    assert row["layouts"] > 0
    assert 0 < row["lookup_ms"]["median"] <= row["lookup_ms"]["slowest"]
    found = bars([{**row, "instances": 12, "made_s": 61.0}])
    assert [bar["met"] for bar in found if "journey books for 12" in bar["what"]] == [False]
