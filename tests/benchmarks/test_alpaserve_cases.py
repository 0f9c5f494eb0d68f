"""The checker of planning cases: every recorded figure is met, and a changed one is missed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.cases import check_folder

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference" / "cases" / "alpaserve"
pytestmark = pytest.mark.skipif(not REFERENCE.is_dir(), reason="reference cases are not beside the repository")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    for file in REFERENCE.glob("c02_*"):
        shutil.copyfile(file, tmp_path / file.name)
    return next(tmp_path.glob("*.json"))


def test_recorded_figures_are_met(copied: Path) -> None:
    report = check_folder(copied.parent)[0]
    assert len(report.verdicts) == 45
    assert not report.missed


def test_a_changed_figure_is_missed(copied: Path) -> None:
    document = json.loads(copied.read_text())
    document["results"]["mp-search"]["heldout"][1]["attainment_warmup10"] += 2e-4
    document["results"]["mp-search"]["train"]["group_num_requests"][0] += 1
    copied.write_text(json.dumps(document))
    missed = {verdict.case.split()[-1]: verdict for verdict in check_folder(copied.parent)[0].missed}
    assert set(missed) == {"train", "heldout1"}
    assert missed["heldout1"].miss == pytest.approx(2e-4)


def test_another_schema_is_named(copied: Path) -> None:
    document = json.loads(copied.read_text()) | {"schema": 3}
    copied.write_text(json.dumps(document))
    assert "schema 3" in check_folder(copied.parent)[0].missed[0].detail
