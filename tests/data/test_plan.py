from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.books import difference
from data.canonical import canonical_json, checksum
from data.catalog import instance_type, model_shape
from data.cluster import ClusterSpec, ClusterState
from data.errors import CorruptData, InvalidInput
from data.explanation import Candidate, Estimate, Move
from data.layout import ParallelConfig
from data.plan import Objective, Plan, PlanBook, stated_sha256

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
    newer = json.dumps({"schema_version": 3, "shape": "unknown"}).encode()
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


SIZES = {name: ParallelConfig(replicas, 1, 1, 4) for name, replicas in (("one", 1), ("two", 2), ("three", 3))}


def journey(instances: int) -> Plan:
    """With two replicas in force a third is not worth its way."""
    one, two, three = SIZES.values()
    frontier = tuple(Candidate(config, replace(ESTIMATE, latency_s=1 / config.replicas)) for config in SIZES.values())
    chosen = min(instances, 3) - 1
    transitions = ((two, two), (one, two)) if instances >= 3 else ((three, two), (two, two))[: instances - 1]
    state = ClusterState.of({"local-cpu": instances})
    return Plan(state, frontier[chosen].config, frontier[chosen].estimate, "least", frontier, "", transitions)


def test_what_runs_decides_too() -> None:
    one, two, three = SIZES.values()
    moves = (Move(three, two, 7, 1.5, 0.25),)
    book = replace(BOOK, plans=tuple(journey(count) for count in (1, 2, 3)), moves=moves, assumptions="none")
    full = ClusterState.of({"local-cpu": 3})
    assert PlanBook.from_bytes(book.to_bytes()) == book
    assert [book.plan_for(full, now).config for now in (None, one, two, three)] == [three, two, two, three]
    assert book.plan_for(full, ParallelConfig(1, 2, 1, 4)).config == three
    staying = book.plan_for(full, two)
    assert staying.estimate is not None
    assert staying.estimate.latency_s == 0.5
    assert "the way to D3·P1·T1·B4 costs more" in staying.reason
    (loss,) = book.losses(book.plan_for(full))
    assert (loss.type, loss.state.instances, loss.config, loss.move) == ("local-cpu", 2, two, moves[0])
    (loss,) = book.losses(staying)
    assert (loss.config, loss.move) == (two, None)


def test_a_plan_that_goes_round_is_refused() -> None:
    one, two, three = SIZES.values()
    with pytest.raises(InvalidInput, match="does not stay with D2"):
        replace(journey(3), transitions=((one, two), (two, three)))
    with pytest.raises(InvalidInput, match="does not stay with D3"):
        replace(journey(3), transitions=((three, two), (two, two)))
    with pytest.raises(InvalidInput, match="which its frontier lacks"):
        replace(journey(3), frontier=journey(3).frontier[:1])


def first_version(book: PlanBook) -> bytes:
    """A book as version 1 wrote it."""
    document = json.loads(book.to_bytes())
    names = ("model", "cluster", "objective", "policy", "profile_sha256")
    body = {"schema_version": 1, **{name: document[name] for name in names}}
    numbers = ("latency_s", "throughput_rps", "memory_bytes")
    body["plans"] = [
        {
            **{name: plan[name] for name in ("state", "config", "reason", "fewer")},
            "estimate": plan["estimate"] and {name: plan["estimate"][name] for name in numbers},
            "frontier": [
                {**one, "estimate": {name: one["estimate"][name] for name in numbers}} for one in plan["frontier"]
            ],
        }
        for plan in document["plans"]
    ]
    return canonical_json({**body, "sha256": checksum(body)})


def test_a_book_of_the_first_version_is_read() -> None:
    content = first_version(BOOK)
    assert PlanBook.from_bytes(content) == BOOK
    assert stated_sha256(content) == json.loads(content)["sha256"] != BOOK.sha256
    with pytest.raises(CorruptData, match="checksum is wrong"):
        PlanBook.from_bytes(content.replace(b"lowest", b"lowish"))
    body = {**json.loads(content), "plans": [{"state": "empty"}]}
    del body["sha256"]
    with pytest.raises(CorruptData, match="plans cannot be read"):
        PlanBook.from_bytes(canonical_json({**body, "sha256": checksum(body)}))


@pytest.mark.parametrize(("small", "large"), [(256, 0), (64, 64)])
def test_a_lookup_takes_less_than_a_millisecond(small: int, large: int) -> None:
    fleet = ClusterSpec("many", (SMALL, LARGE), (small, large))
    configs = [ParallelConfig(replicas, 1, 1, 4) for replicas in range(1, 101)]
    frontier = tuple(Candidate(config, ESTIMATE) for config in configs)
    staying = tuple((config, config) for config in configs)
    plans = tuple(
        Plan(state, configs[0], ESTIMATE, "", frontier, "", staying) for state in fleet.states() if state.counts
    )
    book = replace(BOOK, cluster=fleet, plans=plans)
    states = [ClusterState.of({"local-cpu": 3 * count, "large": count}) for count in range(1, 100)]
    begun = time.perf_counter()
    for state in states:
        assert book.plan_for(state, configs[50]).config == configs[50]
    assert (time.perf_counter() - begun) / len(states) < 1e-3


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), max_size=8), st.integers(0, 9), st.integers(0, 9))
def test_the_index_finds_what_a_search_finds(listed: list[tuple[int, int]], small: int, large: int) -> None:
    states = {ClusterState.of({"local-cpu": few, "large": many}) for few, many in listed}
    book = replace(BOOK, plans=tuple(Plan(state, None, None, "") for state in sorted(states, key=lambda one: one.key)))
    parts = [(few + 4 * many, few, many) for few, many in listed if few <= small and many <= large]
    found = book.plan_for(ClusterState.of({"local-cpu": small, "large": large}))
    if not parts:
        assert "no plan for" in found.reason
    else:
        assert FLEET.devices(found.state) == max(parts)[0]
        assert any(ClusterState.of({"local-cpu": few, "large": many}) == found.state for _, few, many in parts)


def test_the_difference_of_two_books() -> None:
    changed = plan({"local-cpu": 3}, 2)
    other = replace(BOOK, plans=(NOTHING, replace(BOOK.plans[1], reason="another"), changed, plan({"large": 2}, 8)))
    changes = difference(BOOK, other)
    assert [change.state.key for change in changes] == ["large=1", "large=2", "local-cpu=3"]
    assert [change.before is None for change in changes] == [False, True, False]
    assert changes[0].after is None
    assert changes[2].after == changed
    assert difference(BOOK, BOOK) == ()
    before, after = (replace(BOOK, plans=(plan,)) for plan in (journey(3), replace(journey(3), transitions=())))
    assert [change.state.instances for change in difference(before, after)] == [3]


def test_books_that_cannot_be() -> None:
    with pytest.raises(InvalidInput, match="one plan for each state"):
        replace(BOOK, plans=(NOTHING, NOTHING))
    with pytest.raises(InvalidInput, match="no instance type huge"):
        replace(BOOK, plans=(plan({"huge": 1}, 1),))
    with pytest.raises(InvalidInput, match="both a configuration and its estimate"):
        replace(NOTHING, estimate=ESTIMATE)
    with pytest.raises(InvalidInput, match="at least one token"):
        Objective(1.0, 0, 1)
