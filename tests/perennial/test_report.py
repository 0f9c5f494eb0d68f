import json
import re
from pathlib import Path

import pytest

from perennial import recording as recordings
from perennial.recording import ActionRecord
from perennial.report import render, summary
from perennial.report.lanes import instance_lanes
from perennial.report.reconfigurations import reconfigurations, recoveries
from perennial.report.summary import failures
from tests.perennial.recorded import event, recording, stream

PROMISED = {
    "requests",
    "tokens",
    "notices",
    "kills",
    "additions",
    "reconfigurations",
    "lost_tokens",
    "duplicated_tokens",
    "mismatched_streams",
    "plan_version",
    "cost_model_error",
    "pauses_ms",
    "recoveries_ms",
}


def test_the_summary_counts_what_happened() -> None:
    numbers = summary(recording())
    assert numbers.keys() >= PROMISED
    counted = {name: numbers[name] for name in ("requests", "tokens", "notices", "kills", "additions")}
    assert counted == {"requests": 3, "tokens": 12, "notices": 1, "kills": 1, "additions": 1}
    assert numbers["reconfigurations"] == 3
    assert numbers["layouts"] == {"stages": ["1", "2"], "shards": ["1", "2"]}
    assert numbers["pauses_ms"] == {"p50": 150.0, "p99": 199.0, "max": 200.0}
    assert numbers["latency_ms"]["ttft"]["p50"] == 250.0
    assert failures(numbers) == []
    json.dumps(numbers)


def test_the_four_clocks_of_a_recovery() -> None:
    (mend,) = recoveries(recording())
    assert mend.lost_s == 11.0
    clocks = (mend.detected_s, mend.restored_s, mend.served_s, mend.stall_s)
    assert clocks == pytest.approx((0.1, 1.0, 1.4, 3.4))


def test_a_loss_that_nobody_caused_counts_from_its_detection() -> None:
    run = recording()
    run.actions = []
    (mend,) = recoveries(run)
    assert mend.lost_s == 11.1


def test_reconfigurations_name_their_causes_and_cost() -> None:
    first, second, third = reconfigurations(recording())
    assert [change.reason for change in (first, second, third)] == ["i1 got a notice", "i2 joined", "i0 lost"]
    assert (first.source, first.target, first.stopped_s) == ("D1·P1·T2", "D1·P1·T1", pytest.approx(0.1))
    assert first.stall_s == pytest.approx(3.9)
    assert (third.mode, third.started_s) == ("recovery", 11.4)
    assert (third.requests_restored, third.requests_replayed) == (3, 2)


def test_lanes_end_as_the_instances_did() -> None:
    lanes = {lane["name"]: lane for lane in instance_lanes(recording())}
    assert (lanes["i0"]["to"], lanes["i0"]["end"]) == (11.0, "killed")
    assert (lanes["i1"]["leaving"], lanes["i1"]["end"]) == (4.0, "dismissed")
    assert (lanes["i2"]["to"], lanes["i2"]["end"]) == (20.0, "")


@pytest.mark.parametrize(
    ("delivered", "key", "count"), [([0, 1], "lost_tokens", 1), ([0, 1, 9], "mismatched_streams", 1)]
)
def test_a_wrong_stream_fails_the_run(delivered: list[int], key: str, count: int) -> None:
    run = recording()
    run.streams[1] = stream("b", [1.0, 2.0, 3.0], delivered=delivered)
    run.streams[1].times_s = run.streams[1].times_s[: len(delivered)]
    numbers = summary(run)
    assert numbers[key] == count
    assert failures(numbers)


def test_other_tokens_are_agreement_where_bits_may_differ() -> None:
    run = recording()
    run.exact = False
    run.streams = [stream("b", [1.0, 2.0, 3.0, 4.0], delivered=[0, 1, 9, 9])]
    numbers = summary(run)
    assert numbers["agreement"] == 0.5
    assert failures(numbers) == []


def test_a_process_left_behind_fails_the_run() -> None:
    run = recording()
    run.leftovers = ["17 serving.worker"]
    assert failures(summary(run)) == ["processes left behind: 17 serving.worker"]


def test_the_page_is_one_file_that_fetches_nothing() -> None:
    page = render(recording())
    addresses = set(re.findall(r"https?://[^\"'\s)]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<link|<img|@import|src=", page)
    assert "prefers-color-scheme: dark" in page


def test_the_page_holds_the_run_and_its_text_cannot_break_out() -> None:
    page = render(recording())
    assert page.count("</script>") == 2
    embedded = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert embedded
    payload = json.loads(embedded[1])
    assert payload["title"] == "test run </script>"
    assert [block["config"] for block in payload["layouts"]] == ["D1·P1·T2", "D1·P1·T1", "D1·P2·T1", "D1·P1·T1"]
    assert len(payload["streams"]) == 3
    assert all(item["ok"] for item in payload["streams"])
    assert payload["summary"]["plan_version"] == "4"


def test_an_empty_run_and_unknown_events_are_drawn_too() -> None:
    run = recording()
    run.streams, run.plan = [], []
    run.actions = [ActionRecord(time_s=1.0, kind="kill", instance="unknown")]
    run.events = [event(1.0, "from_the_future", anything=1)]
    assert summary(run)["pauses_ms"] == {"p50": None, "p99": None, "max": None}
    assert "Perennial" in render(run)


def test_a_recording_survives_its_file(tmp_path: Path) -> None:
    path = str(tmp_path / "run.json")
    recordings.save(recording(), path)
    assert recordings.load(path) == recording()
