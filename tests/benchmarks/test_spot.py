"""The bars of the comparison, and its page."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.spot.bars import geometric
from benchmarks.spot.page import write_page

_RESULT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "cpu-2-cores" / "spot.json"


def test_geometric_means() -> None:
    assert abs(geometric([1.0, 4.0]) - 2.0) < 1e-12


def test_the_page_holds_every_figure_and_loads_nothing(tmp_path: Path) -> None:
    write_page(tmp_path / "spot.html", json.loads(_RESULT.read_text(encoding="utf-8")))
    page = (tmp_path / "spot.html").read_text(encoding="utf-8")
    assert page.count("<figure") == 4
    assert "GPT-20B" in page
    assert "src=" not in page
    assert "url(http" not in page
