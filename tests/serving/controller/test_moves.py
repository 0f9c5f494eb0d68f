"""Sequences of two models on their way to other replicas."""

from __future__ import annotations

from dataclasses import replace

import pytest

from data.layout import Device, ParallelConfig
from serving import messages as m
from serving.controller.dispatch import Replica
from serving.controller.moves import Moves
from serving.controller.records import Record
from serving.requests import GenerationRequest, Limits
from serving.worker.groups import GroupBroken
from serving.worker.leader import complete
from tests.planning.fleets import SPEC

SPECS = {"a": replace(SPEC, name="a"), "b": replace(SPEC, name="b", layers=2)}
ONE = ParallelConfig(1, 1, 1, 4)
BLOCK_TOKENS = 4


def replica(number: int, model: str, device: int, *keys: int, blocks: int = 20) -> Replica:
    made = Replica(number, 1, ONE, (Device("i", device),), blocks, model, 0.5)
    for key in keys:
        request = GenerationRequest(request_id=str(key), prompt=(1,) * 6, model=model, limits=Limits(max_tokens=8))
        made.records[key] = Record(key, request, 0.0, None, None, replica=number)
    return made


def residents(*keys: int, tokens: int = 7) -> list[m.Resident]:
    return [m.Resident(key, tokens, [key, key + 1]) for key in keys]


@pytest.fixture
def moves() -> Moves:
    return Moves(SPECS, BLOCK_TOKENS)


def test_each_sequence_goes_to_a_new_replica_of_its_model_and_its_heir_if_it_can(moves: Moves) -> None:
    retired = [replica(1, "a", 0, 10, 12), replica(2, "b", 0, 11, 13)]
    new = [replica(3, "a", 1), replica(4, "b", 1), replica(5, "b", 2)]
    for one, inherits in zip(new, ((1,), (), (2,)), strict=True):
        moves.offer(one, inherits)
    moves.take_in(retired, residents(10, 11, 12, 13, 99))
    homes = {heir.key: heir.target.number for heir in moves.heirs()}
    assert homes == {10: 3, 12: 3, 11: 5, 13: 4}, "the heir of b's first, but no more than its share"
    sends, receives = moves.pieces(moves.heirs())
    layers = {(piece.replica, piece.layers) for pieces in receives.values() for piece in pieces}
    assert layers == {(3, (0, 4)), (4, (0, 2)), (5, (0, 2))}, "KV has the geometry of its model"
    assert {piece.replica for piece in sends[Device("i", 0)]} == {1, 2}
    adopted = moves.adoptions(moves.heirs(), now=0.0)
    assert {one.replica for one in adopted[Device("i", 1)]} == {3, 4}, "one leader takes on for both of its models"


def test_what_has_been_copied_is_not_sent_again_unless_the_cache_was_lost_meanwhile(moves: Moves) -> None:
    retired = [replica(1, "a", 0, 10, 12)]
    moves.offer(replica(3, "a", 1), ())
    moves.take_in(retired, residents(10, 12))
    moves.arrived(moves.heirs())
    moves.take_in(retired, [m.Resident(10, 9, [1, 2, 3]), m.Resident(12, 9, [4, 5, 6], life=1)])
    (piece,), _ = (
        pieces[Device("i", device)] for pieces, device in zip(moves.pieces(moves.heirs()), (0, 1), strict=True)
    )
    assert {span.key: span.start for span in piece.spans} == {10: 7, 12: 0}


def test_what_was_announced_is_not_said_again_when_everybody_waits(moves: Moves) -> None:
    retired = [replica(1, "a", 0, 10, 12)]
    moves.offer(replica(3, "a", 1), ())
    moves.take_in(retired, residents(10))
    told = moves.announce(moves.heirs(), now=0.0)[Device("i", 1)]
    for record in retired[0].records.values():
        record.output += [5, 6]
    moves.take_in(retired, residents(10, 12))
    told += moves.announce(moves.heirs(), now=0.0)[Device("i", 1)]
    assert [(one.key, one.output) for one in told] == [(10, []), (12, [5, 6])]
    retired[0].records[12].output.append(7)
    first, second = moves.adoptions(moves.heirs(), now=0.0)[Device("i", 1)]
    assert (first.assignment.prompt, first.assignment.output, second.assignment.output) == ([], [5, 6], [7])
    known = {one.key: one for one in told}
    for adoption in (first, second):
        record = retired[0].records[adoption.assignment.key]
        assert complete(adoption, known).assignment == record.assignment(0.0)
    with pytest.raises(GroupBroken, match="was not announced with 0 tokens"):
        complete(first, {})


def test_running_replicas_are_asked_for_room_for_their_own_model_only(moves: Moves) -> None:
    retired = [replica(1, "a", 0, 10), replica(2, "b", 0, 11)]
    joined = [replica(6, "a", 1), replica(7, "a", 2, 20)]
    moves.take_in(retired, residents(10, 11))
    assert moves.models == {"a", "b"}
    wanted = moves.wanted(joined)
    assert [(one.key, one.replica) for one in wanted[Device("i", 1)]] == [(10, 6)]
    assert list(wanted) == [Device("i", 1)]
    moves.reserve(joined, [m.Seat(10, 6, [0, 1])])
    assert moves.joins(10)
    assert not moves.joins(11)
    assert moves.reserved(joined[0]) == [10]
    assert [heir.key for heir in moves.heirs()] == [10], "nobody runs the other one's model: it will be computed again"


def test_a_seat_in_a_running_replica_grows_with_its_sequence(moves: Moves) -> None:
    """Copying may take longer than what was added in advance lasts."""
    retired, joined = [replica(1, "a", 0, 10)], [replica(6, "a", 1)]
    moves.take_in(retired, residents(10))
    ((one,),) = moves.wanted(joined).values()
    blocks = list(range(-(-one.tokens // BLOCK_TOKENS)))
    moves.reserve(joined, [m.Seat(10, 6, blocks)])
    assert not moves.wanted(joined)
    moves.take_in(retired, residents(10, tokens=7 + BLOCK_TOKENS))
    ((more,),) = moves.wanted(joined).values()
    assert (more.key, more.replica, more.tokens) == (10, 6, one.tokens + BLOCK_TOKENS)
    moves.reserve(joined, [m.Seat(10, 6, [*blocks, 99])])
    (heir,) = moves.heirs()
    assert heir.blocks == (*blocks, 99)


def test_who_ends_leaves_its_seat(moves: Moves) -> None:
    retired = [replica(1, "a", 0, 10, 12)]
    moves.offer(replica(3, "a", 1, blocks=4), ())
    moves.take_in(retired, residents(10, 12))
    assert [heir.key for heir in moves.heirs()] == [10], "the other one does not fit"
    moves.take_in(retired, residents(12))
    assert [heir.key for heir in moves.heirs()] == [12]
