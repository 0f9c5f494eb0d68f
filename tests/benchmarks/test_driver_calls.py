"""What of a record is counted around a kill; the rest needs a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.driver_calls import Found, found, main


def test_what_was_under_way_at_a_kill_counts_on_both_sides() -> None:
    steps = [(8.5, 0.005), (9.2, 0.006), (9.99, 0.02), (10.5, 0.12), (11.6, 0.5)]
    calls = [(9.5, 0.001), (10.55, 0.118)]
    assert found("host memory", 10.0, steps, calls) == Found("host memory", 20.0, 1.0, 120.0, 118.0)
    assert found("nothing", 99.0, steps, []) == Found("nothing", 0.0, 0.0, 0.0, 0.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path)]) == 2
    assert "no GPU" in capsys.readouterr().err
