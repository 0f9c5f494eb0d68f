"""What is kept beside where a sequence goes: how far it reaches, and what has changed hands while it was read."""

from __future__ import annotations

from dataclasses import replace

from data.layout import Device, ParallelConfig
from serving import messages as m
from serving.controller.dispatch import Replica
from serving.controller.drain import beside, crosses, untouched
from serving.controller.orders import Heir, Source, extents, found_sources, kv_pieces, live_sources
from tests.planning.fleets import SPEC

PAIR, ONE = ParallelConfig(1, 1, 2, 4), ParallelConfig(1, 1, 1, 4)
A, B, C, D = (Device(name, 0) for name in "abcd")
OLD = Replica(1, 1, PAIR, (A, B), 8)
NEW = Replica(2, 2, ONE, (C,), 8)


def heir(key: int = 7, tokens: int = 20) -> Heir:
    return Heir(key, tokens, live_sources(SPEC, OLD, m.Resident(key, tokens, [3, 4])), NEW, (0, 1))


def kept(
    at: Device, of: Device, tokens: int, *, replica: int = 1, table: int = 5, key: int = 7
) -> dict[int, list[Source]]:
    box = extents(SPEC, OLD)[of]
    holding = m.Holding(replica, key, tokens, box.layers, box.heads, True, [6, 7], table)
    return found_sources({at: [holding]})


def test_what_a_copy_holds_does_not_travel_and_the_rest_comes_from_where_it_runs() -> None:
    (one,) = beside([heir()], kept(C, B, 18))
    assert one.tokens == 18
    sends, receives = kv_pieces({"": SPEC}, [one], {})
    boxes = extents(SPEC, OLD)
    assert [(piece.kept, piece.heads, piece.peer) for piece in sends[C]] == [(True, boxes[B].heads, "c/0")]
    assert [(piece.kept, piece.heads) for piece in sends[A]] == [(False, boxes[A].heads)]
    assert B not in sends
    assert sum(len(piece.spans) for piece in receives[C]) == 2


def test_the_shortest_copy_says_how_far_copies_reach() -> None:
    both = {7: [*kept(C, A, 12)[7], *kept(C, B, 30)[7]]}
    (one,) = beside([heir()], both)
    assert one.tokens == 12
    (one,) = beside([heir(tokens=9)], both)
    assert one.tokens == 9  # a sequence that lost its KV has less than its copy


def test_what_is_kept_elsewhere_or_of_another_replica_does_not_help() -> None:
    assert beside([heir()], kept(D, B, 18)) == []
    assert beside([heir()], kept(C, B, 18, replica=9)) == []
    assert beside([heir()], kept(C, B, 18, key=8)) == []
    assert beside([heir()], {}) == []


def test_what_is_restored_from_copies_anyway_is_left_alone() -> None:
    found = kept(C, B, 18)
    restored = replace(heir(), sources=(*heir().sources, *found[7]))
    assert beside([restored], found) == []


def test_a_copy_that_was_given_up_meanwhile_counts_as_not_read() -> None:
    read = beside([heir()], kept(C, B, 18))
    assert untouched(read, kept(C, B, 20)) == read  # it has grown, that is all
    assert untouched(read, kept(C, B, 20, table=6)) == []
    assert untouched(read, kept(D, B, 20)) == []
    assert untouched(read, {}) == []


def test_hosts_decide_what_crosses_a_network() -> None:
    assert not crosses(heir(), lambda device: "10.0.0.1")
    assert crosses(heir(), {A: "10.0.0.1", B: "10.0.0.2", C: "10.0.0.2"}.__getitem__)
