from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.availability import (
    AvailabilityTrace,
    Change,
    in_zone,
    read_availability,
    read_parcae,
    read_skypilot,
    read_spotserve,
    read_spotserve_cases,
    zone_of,
)
from data.errors import CorruptData, InvalidInput

SHARED = Path(__file__).parents[2] / ".." / "shared"
CASES, TRACES = SHARED / "reference" / "cases" / "spotserve", SHARED / "data"
shared = pytest.mark.skipif(not SHARED.exists(), reason=f"the public traces are not at {SHARED}")

SEGMENT = """[0, "add", {"nodes": ["n0", "n1", "n2"]}]
[60000, "remove", {"nodes": ["n1"]}]
[90000, "other", {"nodes": [], "required_tpt": 0.8}]
[120000, "add", {"nodes": ["n3"], "required_tpt": 0.6}]
[180000, "DONE", {"nodes": []}]
"""
RECORDING = "60000,add,a\n60000,add,b\n120000,remove,a\n120000,remove,b\n120000,add,c\n"
SKYPILOT = """kind,nodes,run,zone,instance,gap_seconds,t_seconds,value
availability,1-node,r,z1,v100_1,60,0,0
availability,1-node,r,z1,v100_1,60,60,3
availability,1-node,r,z1,v100_1,60,120,1
availability,1-node,r,z2,v100_1,60,0,5
"""


def write(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def test_a_segment_of_spotserve(tmp_path: Path) -> None:
    trace = read_spotserve(write(tmp_path / "trace_x.txt", SEGMENT))
    assert trace.name == "trace_x"
    assert trace.changes == (
        Change(0, "add", ("n0", "n1", "n2"), 0),
        Change(60, "remove", ("n1",), 30),
        Change(90, "rate", (), 30, 0.8),
        Change(120, "add", ("n3",), 30),
        Change(120, "rate", (), 30, 0.6),
    )
    assert trace.counts == ((0, 3), (60, 2), (90, 2), (120, 3))
    assert (trace.instance_minutes, trace.least, trace.most, trace.duration_s) == (3 + 2 + 3, 2, 3, 180)


def test_a_recording_of_spotserve(tmp_path: Path) -> None:
    trace = read_spotserve(write(tmp_path / "g4dn.csv", RECORDING), notice_s=0)
    assert [(change.time_s, change.kind, change.instances) for change in trace.changes] == [
        (60, "add", ("a", "b")),
        (120, "remove", ("a", "b")),
        (120, "add", ("c",)),
    ]
    assert trace.counts == ((0, 0), (60, 2), (120, 1))


def test_who_is_usable_when(tmp_path: Path) -> None:
    trace = read_spotserve(write(tmp_path / "t.txt", SEGMENT))
    assert [sorted(trace.usable(time_s)) for time_s in (0, 59.9, 60, 1e9)] == [
        ["n0", "n1", "n2"],
        ["n0", "n1", "n2"],
        ["n0", "n2"],
        ["n0", "n2", "n3"],
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no events"),
        (SEGMENT + "[1, 2]\n", "line 6: not"),
        (SEGMENT + '[200000, "explode", {}]\n', "line 6: .*unknown operation 'explode'"),
        (SEGMENT + '["x", "add", {}]\n', "line 6: not"),
        (SEGMENT + '[1, "add"\n', "line 6: not JSON"),
        (SEGMENT + '[1000, "DONE", {}]\n', "must be in order"),
        (SEGMENT + '[200000, "add", {"nodes": ["n0"]}]\n', "cannot add n0 at 200 s"),
        (SEGMENT + '[200000, "remove", {"nodes": ["n1"]}]\n', "cannot remove n1"),
        (RECORDING + "180000,explode,a\n", "line 6: unknown operation"),
        (RECORDING + "x,add,a\n", "line 6: ms is not a number"),
        (RECORDING + "180000,add\n", "line 6: 2 fields"),
    ],
)
def test_a_bad_event_is_named(tmp_path: Path, content: str, words: str) -> None:
    with pytest.raises(CorruptData, match=words):
        read_spotserve(write(tmp_path / "t.txt", content))


@shared
@pytest.mark.parametrize("name", ["traces.json", "traces_extra.json"])
def test_the_case_files_have_the_known_statistics(name: str) -> None:
    known: dict[str, Any] = json.loads((CASES / name).read_text())["traces"]
    traces = read_spotserve_cases(CASES / name)
    assert traces.keys() == known.keys()
    for label, trace in traces.items():
        expected = known[label]
        assert (trace.instance_minutes, trace.least, trace.most, trace.duration_s) == (
            expected["instance_minutes"],
            expected["min"],
            expected["max"],
            expected["duration_s"],
        )
        counts = {event["t_s"]: event["available_after"] for event in expected["events"] if event["op"] != "end"}
        assert dict(trace.counts) == counts


@shared
def test_rates_come_with_the_trace() -> None:
    changes = read_spotserve_cases(CASES / "traces.json")["B'_S+O"].changes
    assert [(change.time_s, change.value) for change in changes if change.kind == "rate"] == [(300, 0.8), (600, 0.6)]


@shared
def test_the_full_recording() -> None:
    trace = read_spotserve_cases(CASES / "trace_g4dn_full.json")["trace_g4dn_full"]
    removed = sum(len(change.instances) for change in trace.changes if change.kind == "remove")
    assert (trace.most, removed, trace.counts[-1][1]) == (24, 74, 5)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"traces": {"x": {"events": [{"t_s": 1, "op": "explode"}]}}}'])
def test_a_bad_case_file_is_corrupt(tmp_path: Path, content: str) -> None:
    with pytest.raises(CorruptData):
        read_spotserve_cases(write(tmp_path / "t.json", content))


def test_counts_become_changes(tmp_path: Path) -> None:
    trace = read_parcae(write(tmp_path / "t.csv", "t_ms,instances\n0,2\n1000,4\n2000,1\n3000,1\n4000,3\n"))
    assert trace.counts == ((0, 2), (1, 4), (2, 1), (4, 3))
    assert trace.duration_s == 4
    assert {change.notice_s for change in trace.changes} == {0.0}


@shared
def test_parcae() -> None:
    trace = read_parcae(TRACES / "parcae" / "p3_instance_count.csv")
    assert (trace.least, trace.most) == (10, 32)
    assert trace.duration_s / 3600 == pytest.approx(11.4, abs=0.05)


def test_one_trace_of_skypilot(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", SKYPILOT)
    trace = read_skypilot(path, zone="z1")
    assert trace.name == "availability/1-node/r/z1/v100_1"
    assert trace.counts == ((0, 0), (60, 3), (120, 1))
    with pytest.raises(InvalidInput, match="selects 2 traces"):
        read_skypilot(write(tmp_path / "u.csv", SKYPILOT + "availability,4-node,r,z1,v100_1,60,0,5\n"), zone="z1")
    with pytest.raises(InvalidInput, match="selects 0 traces"):
        read_skypilot(path, zone="nowhere")
    with pytest.raises(InvalidInput, match="colour cannot select"):
        read_skypilot(path, colour="red")


def test_zones_of_one_run_are_one_trace(tmp_path: Path) -> None:
    trace = read_skypilot(write(tmp_path / "t.csv", SKYPILOT))
    assert trace.name == "availability/1-node/r/v100_1"
    assert trace.counts == ((0, 5), (60, 8), (120, 6))
    zones = trace.zones
    assert {zone: one.counts for zone, one in zones.items()} == {"z1": ((0, 0), (60, 3), (120, 1)), "z2": ((0, 5),)}
    assert {zone_of(name) for name in trace.usable(60)} == {"z1", "z2"}
    assert trace.duration_s == zones["z2"].duration_s == 120


@given(st.text("ab/-1"), st.text("ab-1", min_size=1))
def test_names_tell_zones(zone: str, instance: str) -> None:
    assert zone_of(in_zone(zone, instance)) == zone


@shared
def test_skypilot() -> None:
    path = TRACES / "skypilot_spot_traces_changepoints.csv.gz"
    keys = {"kind": "availability", "nodes": "1-node", "run": "aws-02-15-2023", "instance": "v100_1"}
    trace = read_skypilot(path, **keys, zone="us-east-1c")
    assert trace.most == 1
    assert sum(len(change.instances) for change in trace.changes if change.kind == "remove") == 343
    mean = trace.instance_minutes * 60 / trace.duration_s
    assert mean == pytest.approx(0.4665, abs=0.01)


def test_traces_that_cannot_be() -> None:
    with pytest.raises(InvalidInput, match="must be in order"):
        AvailabilityTrace("t", (Change(5, "add", ("a",)),), 4)
    with pytest.raises(InvalidInput, match="cannot add a"):
        AvailabilityTrace("t", (Change(0, "add", ("a", "a")),), 4)


def test_an_empty_trace_has_no_instances() -> None:
    trace = AvailabilityTrace("t", (), 60)
    assert (trace.counts, trace.instance_minutes, trace.least, trace.most) == (((0.0, 0),), 0, 0, 0)


def test_formats_are_told_apart_by_the_first_line(tmp_path: Path) -> None:
    files = {
        "segment.txt": '[0, "add", {"nodes": ["a", "b"]}]\n[5000, "remove", {"nodes": ["a"]}]\n[9000, "DONE", {}]\n',
        "recorded.csv": "0,add,a\n0,add,b\n5000,remove,a\n",
        "counts.csv": "t_ms,instances\n0,2\n5000,1\n",
        "cases.json": '{"traces": {"cases": {"events": [{"t_s": 0, "op": "add", "nodes": [1, 2]}, '
        '{"t_s": 5, "op": "remove", "nodes": [1]}]}}}',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        (trace,) = read_availability(tmp_path / name).values()
        assert trace.counts == ((0.0, 2), (5.0, 1)), name
    (tmp_path / "points.csv").write_text("kind,nodes,run,zone,instance,t_seconds,value\nk,1,1,z,i,0,1\nk,4,1,z,i,0,2\n")
    with pytest.raises(InvalidInput, match="select one"):
        read_availability(tmp_path / "points.csv")
    (trace,) = read_availability(tmp_path / "points.csv", nodes="4").values()
    assert trace.counts == ((0.0, 2),)
