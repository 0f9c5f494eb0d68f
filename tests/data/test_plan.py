from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.canonical import canonical_json, checksum
from data.catalog import instance_type, model_shape
from data.cluster import ClusterSpec, ClusterState
from data.errors import CorruptData, InvalidInput
from data.layout import ParallelConfig
from data.plan import Candidate, Estimate, Objective, Plan, PlanBook, difference

SMALL, LARGE = instance_type("local-cpu"), replace(instance_type("local-cpu"), name="large", devices=4)
FLEET = ClusterSpec("fleet", (SMALL, LARGE), (4, 2))
ESTIMATE = Estimate(1.5, 2.25, 1 << 30)


def plan(counts: dict[str, int], replicas: int) -> Plan:
    config = ParallelConfig(replicas, 1, 1, 4, partition=(32,))
    frontier = (Candidate(config, ESTIMATE), Candidate(ParallelConfig(1, 2, 1, 4), ESTIMATE, dominated_by=str(config)))
    return Plan(ClusterState.of(counts), config, ESTIMATE, "lowest latency — φ ≥ α", frontier, "one replica less")


NOTHING = Plan(ClusterState(()), None, None, "no devices")
BOOK = PlanBook(
    model_shape("opt-6.7b"),
    FLEET,
    Objective(1.5, 512, 128, slo_s=20.0),
    "spotserve",
    "0" * 64,
    (NOTHING, plan({"local-cpu": 1}, 1), plan({"local-cpu": 3}, 3), plan({"large": 1}, 4)),
)


def rewritten(change: dict[str, Any]) -> bytes:
    """The book with other fields, under a checksum that fits them."""
    body = {name: value for name, value in {**json.loads(BOOK.to_bytes()), **change}.items() if value is not ...}
    del body["sha256"]
    return canonical_json({**body, "sha256": checksum(body)})


def test_bytes_round_trip_and_are_canonical() -> None:
    content = BOOK.to_bytes()
    assert PlanBook.from_bytes(content) == BOOK
    assert PlanBook.from_bytes(content).to_bytes() == content
    assert json.loads(content)["sha256"] == BOOK.sha256
    assert (
        content == json.dumps(json.loads(content), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    )


def test_formatting_does_not_change_the_checksum() -> None:
    pretty = json.dumps(json.loads(BOOK.to_bytes()), indent=4).encode()
    assert PlanBook.from_bytes(pretty) == BOOK


@given(st.data())
def test_any_changed_byte_is_noticed(data: st.DataObject) -> None:
    content = BOOK.to_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != content[place]))
    changed = content[:place] + bytes([byte]) + content[place + 1 :]
    with pytest.raises(CorruptData):
        PlanBook.from_bytes(changed)


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_a_truncated_book_is_not_json(length: int) -> None:
    with pytest.raises(CorruptData, match="not JSON"):
        PlanBook.from_bytes(BOOK.to_bytes()[:length])


@pytest.mark.parametrize("content", [b"[]", b"null", b"3", b'"x"'])
def test_other_json_is_refused(content: bytes) -> None:
    with pytest.raises(CorruptData, match="not a JSON mapping"):
        PlanBook.from_bytes(content)


def test_a_newer_schema_is_told_apart_from_damage() -> None:
    newer = json.dumps({"schema_version": 2, "shape": "unknown"}).encode()
    with pytest.raises(CorruptData, match="made by a newer version; upgrade or republish"):
        PlanBook.from_bytes(newer)


@pytest.mark.parametrize("version", [..., 0, "1", None])
def test_a_book_without_a_version_is_refused(version: Any) -> None:
    with pytest.raises(CorruptData, match="no schema version"):
        PlanBook.from_bytes(rewritten({"schema_version": version}))


def test_a_wrong_checksum_is_named() -> None:
    document = {**json.loads(BOOK.to_bytes()), "policy": "another"}
    with pytest.raises(CorruptData, match="checksum is wrong"):
        PlanBook.from_bytes(json.dumps(document).encode())
    del document["sha256"]
    with pytest.raises(CorruptData, match="checksum is wrong"):
        PlanBook.from_bytes(json.dumps(document).encode())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policy": ...}, "lacks the field policy"),
        ({"colour": "red"}, "unknown field colour"),
        ({"objective": {"required_rps": 1}}, "the objective lacks the field input_tokens"),
        ({"objective": {"required_rps": "x", "input_tokens": 1, "output_tokens": 1, "slo_s": None}}, "cannot be read"),
        ({"plans": [{}]}, "a plan lacks the field"),
        ({"plans": 3}, "cannot be read"),
        ({"plans": None}, "cannot be read"),
        ({"model": {}}, "cannot be read"),
        ({"cluster": []}, "cannot be read"),
    ],
)
def test_fields_are_checked(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CorruptData, match=words):
        PlanBook.from_bytes(rewritten(change))


@pytest.mark.parametrize(
    ("counts", "listed"),
    [
        ({"local-cpu": 3}, {"local-cpu": 3}),
        ({"local-cpu": 2}, {"local-cpu": 1}),
        ({"local-cpu": 4}, {"local-cpu": 3}),
        ({"local-cpu": 3, "large": 1}, {"large": 1}),
        ({"local-cpu": 1, "unknown": 7}, {"local-cpu": 1}),
        ({}, {}),
    ],
)
def test_the_plan_of_the_largest_part(counts: dict[str, int], listed: dict[str, int]) -> None:
    assert BOOK.plan_for(ClusterState.of(counts)).state == ClusterState.of(listed)


def test_a_state_without_a_plan_says_so() -> None:
    book = replace(BOOK, plans=BOOK.plans[2:])
    missing = book.plan_for(ClusterState.of({"local-cpu": 1}))
    assert missing.config is None
    assert missing.estimate is None
    assert "no plan for local-cpu=1" in missing.reason


def test_the_difference_of_two_books() -> None:
    changed = plan({"local-cpu": 3}, 2)
    other = replace(BOOK, plans=(NOTHING, replace(BOOK.plans[1], reason="another"), changed, plan({"large": 2}, 8)))
    changes = difference(BOOK, other)
    assert [change.state.key for change in changes] == ["large=1", "large=2", "local-cpu=3"]
    assert [change.before is None for change in changes] == [False, True, False]
    assert changes[0].after is None
    assert changes[2].after == changed
    assert difference(BOOK, BOOK) == ()


def test_books_that_cannot_be() -> None:
    with pytest.raises(InvalidInput, match="one plan for each state"):
        replace(BOOK, plans=(NOTHING, NOTHING))
    with pytest.raises(InvalidInput, match="no instance type huge"):
        replace(BOOK, plans=(plan({"huge": 1}, 1),))
    with pytest.raises(InvalidInput, match="both a configuration and its estimate"):
        replace(NOTHING, estimate=ESTIMATE)
    with pytest.raises(InvalidInput, match="at least one token"):
        Objective(1.0, 0, 1)
