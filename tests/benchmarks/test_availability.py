"""The study of availability processes: recordings in ticks, and that what is right is not rejected."""

from __future__ import annotations

from pathlib import Path

from benchmarks.availability import in_ticks, main, p_values, tick_s
from data.availability import AvailabilityTrace, Change
from planning.availability import generate, steady

STEPS = (("add", 0, "ab"), ("remove", 61, "a"), ("add", 70, "c"), ("add", 119, "d"))
TRACE = AvailabilityTrace("t", tuple(Change(at_s, kind, tuple(names)) for kind, at_s, names in STEPS), 200)


def test_what_comes_and_goes_between_ticks_is_not_seen() -> None:
    seen = in_ticks(TRACE, 60.0)
    assert seen.counts == ((0.0, 2), (120.0, 3))
    assert (seen.duration_s, tick_s(seen)) == (180.0, 120.0)


def test_the_right_process_is_not_rejected() -> None:
    process = steady(10, 1e-4, 1e-3, along=0.2)
    trace = in_ticks(generate(process, 1, 3e5, 9), 60.0)
    assert min(p_values(process, trace).values()) > 0.001
    assert p_values(steady(10, 3e-4, 1e-3, along=0.2), trace)["waits"] < 1e-3


def test_without_traces_the_way_out_is_told(tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path), "--shared", str(tmp_path)]) == 2
