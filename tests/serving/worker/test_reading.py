"""What ranks read of each other in place is what they would have been sent."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from planning.resharding import Box
from serving.engine.kv_cache import KvCache
from serving.messages import KvPieces, KvSpan, WeightPieces
from serving.worker import reading
from serving.worker.groups import Group, GroupBroken
from serving.worker.kv_movement import KvMover, meet_leader
from serving.worker.movement import HeldTensor, WeightMover, arenas
from serving.worker.reading import Way
from serving.worker.rounds import Traffic
from tests.serving.engine.cells import extract
from tests.serving.worker.lanes import everyone, meet

BLOCKS, BLOCK_TOKENS, WORLD = 12, 4, ("a/0", "b/0", "c/0")


def cache(layers: tuple[int, int], heads: tuple[int, int], seed: int) -> KvCache:
    made = KvCache(layers, heads, 8, BLOCKS, BLOCK_TOKENS, torch.float32, "cpu")
    cells = made.cells(layers, heads)
    cells.copy_(torch.randn(cells.shape, generator=torch.Generator().manual_seed(seed)))
    return made


def moved(
    groups: Sequence[Group], sources: Sequence[KvCache], target: KvCache, pieces: Sequence[tuple[KvPieces, KvPieces]]
) -> list[Traffic]:
    """Ranks 1, 2 … send what rank 0 needs."""
    traffic: list[Any] = [None] * len(groups)

    def run(rank: int) -> None:
        own = sources[rank - 1]
        mover = KvMover(groups[rank], WORLD, lambda _: own, lambda _: target, torch.float32, 1 << 20)
        sends = [out for out, into in pieces if into.peer == WORLD[rank]]
        receives = [into for _, into in pieces] if rank == 0 else []
        traffic[rank] = mover.run(sends, receives)

    everyone(len(groups), run)
    return traffic


def test_who_has_nothing_to_copy_does_not_touch_its_device() -> None:
    """It may hang, and what others read of it does not need it."""

    class Hanging:
        @property
        def device(self) -> torch.device:
            raise AssertionError("it would wait for ever")

    reading.pace(cast(Group, Hanging()), iter(()))
    with pytest.raises(AssertionError):
        reading.pace(cast(Group, Hanging()), [lambda: None])


class Quick:
    """A group on a CPU that is never aborted."""

    device = torch.device("cpu")

    def check(self) -> None:
        pass


class Stage:
    """Time that passes only while something is copied, and steps that make way, or do not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *clear: bool) -> None:
        self.now_s, self.turns, self.beside = 0.0, list[str](), ""
        self._clear, self._open = iter(clear), False
        monkeypatch.setattr(reading, "time", SimpleNamespace(monotonic=lambda: self.now_s))

    @contextmanager
    def way(self) -> Iterator[bool]:
        self.now_s += 1.0
        self._open = next(self._clear)
        self.turns.append("")
        yield self._open
        self._open = False

    def copies(self, names: str, lasts_s: float) -> list[Callable[[], None]]:
        return [partial(self._copy, name, lasts_s) for name in names]

    def _copy(self, name: str, lasts_s: float) -> None:
        self.now_s += lasts_s
        if self._open:
            self.turns[-1] += name
        else:
            self.beside += name


def test_copies_take_turns_with_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock starts when the way is clear."""
    stage = Stage(monkeypatch, True, True)
    began_s = reading.bring(cast(Group, Quick()), stage.copies("abcde", 0.006), Way(stage.way, 0.015))
    assert (began_s, stage.turns, stage.beside) == (1.0, ["abc", "de"], "")


def test_without_time_for_more_there_is_one_copy_in_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, True, True, True)
    reading.bring(cast(Group, Quick()), stage.copies("abc", 0.006), Way(stage.way, 0.0))
    assert stage.turns == ["a", "b", "c"]


def test_a_step_that_takes_long_is_not_waited_for_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, True, False)
    reading.bring(cast(Group, Quick()), stage.copies("abcde", 0.006), Way(stage.way, 0.015))
    assert (stage.turns, stage.beside) == (["abc", ""], "de")


def test_without_copies_nobody_has_to_make_way(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch)
    reading.bring(cast(Group, Quick()), [], Way(stage.way, 0.015))
    assert stage.turns == []


@pytest.mark.parametrize("apart", [(), (0, 2)])
def test_kv_arrives_where_it_belongs(apart: tuple[int, ...]) -> None:
    """From two shards into one cache; those that are `apart` send it in messages."""
    groups = meet(3, apart=apart)
    sources = [cache((2, 6), (0, 2), 1), cache((2, 6), (2, 4), 2)]
    target = cache((0, 6), (0, 4), 3)
    theirs, ours = [3, 7, 1], [9, 0, 4]
    for start, stop in ((0, 6), (6, 11)):
        pieces = []
        for rank, source in enumerate(sources, start=1):
            into = KvPieces(WORLD[rank], 1, False, (3, 6), source.heads, [KvSpan(5, start, stop, ours)])
            out = KvPieces(WORLD[0], 0, False, (3, 6), source.heads, [KvSpan(5, start, stop, theirs)])
            pieces.append((out, into))
        traffic = moved(groups, sources, target, pieces)
        assert traffic[0].received_bytes == sum(one.sent_bytes for one in traffic[1:])
        assert traffic[0].received_bytes == 2 * 3 * 4 * 8 * 4 * (stop - start)
    for source in sources:
        found = extract(target, ours, 11, (3, 6), source.heads)
        assert torch.equal(found, extract(source, theirs, 11, (3, 6), source.heads))
    untouched = cache((0, 6), (0, 4), 3)
    assert torch.equal(target.cells((0, 3), (0, 4)), untouched.cells((0, 3), (0, 4)))


def test_what_was_abandoned_is_not_copied() -> None:
    groups = meet(2, timeout_s=1.0)  # as long as the other rank waits for who has given up
    source, target = cache((0, 2), (0, 2), 1), cache((0, 2), (0, 2), 2)
    before = target.cells((0, 2), (0, 2)).clone()
    groups[0].give_up()
    span = KvSpan(5, 0, 3, [2])
    pair = KvPieces(WORLD[0], 0, False, (0, 2), (0, 2), [span]), KvPieces(WORLD[1], 1, False, (0, 2), (0, 2), [span])
    with pytest.raises(GroupBroken):
        moved(groups, [source], target, [pair])
    assert torch.equal(target.cells((0, 2), (0, 2)), before)


@pytest.mark.parametrize("apart", [(), (0, 2)])
def test_weights_arrive_where_they_belong(apart: tuple[int, ...]) -> None:
    groups, draw = meet(3, apart=apart), torch.Generator().manual_seed(1)
    whole = {"w": torch.randn(6, 8, generator=draw), "b": torch.randn(6, generator=draw)}
    part = {1: ((0, 0), (6, 4)), 2: ((0, 4), (6, 8))}
    boxes = {rank: Box("w", *corners) for rank, corners in part.items()}
    bias = Box("b", (0,), (6,))
    results: list[Any] = [None] * 3

    def run(rank: int) -> None:
        held = {"w": HeldTensor(boxes[rank], whole["w"][:, boxes[rank].start[1] : boxes[rank].stop[1]])} if rank else {}
        if rank == 1:
            held["b"] = HeldTensor(bias, whole["b"])
        mover = WeightMover(groups[rank], WORLD, held, cast(Any, None), torch.float32, torch.device("cpu"), 1 << 20)
        offers = {1: [boxes[1], bias], 2: [boxes[2]]}
        if rank:
            results[rank] = mover.run([], [WeightPieces(WORLD[0], offers[rank])], [])
        else:
            needed = [Box("w", (0, 0), (6, 8)), bias]
            results[0] = mover.run(needed, [], [WeightPieces(WORLD[peer], some) for peer, some in offers.items()])

    everyone(3, run)
    for name, tensor in whole.items():
        assert torch.equal(results[0].tensors[name].data, tensor)
    assert results[0].traffic.received_bytes == 4 * 54
    assert results[1].traffic.sent_bytes + results[2].traffic.sent_bytes == 4 * 54


@pytest.mark.parametrize("apart", [(), (0, 2), (1, 2)])
def test_what_has_come_is_passed_on(apart: tuple[int, ...]) -> None:
    """One rank has the tensor, the second gets half of it and the third the other half, and each passes its own on."""
    groups, whole = meet(3, apart=apart), torch.randn(6, 8, generator=torch.Generator().manual_seed(2))
    box = Box("w", (0, 0), (6, 8))
    halves = {1: Box("w", (0, 0), (3, 8)), 2: Box("w", (3, 0), (6, 8))}
    results: list[Any] = [None] * 3

    def run(rank: int) -> None:
        held = {} if rank else {"w": HeldTensor(box, whole)}
        mover = WeightMover(groups[rank], WORLD, held, cast(Any, None), torch.float32, torch.device("cpu"), 1 << 20)
        if not rank:
            results[0] = mover.run([], [WeightPieces(WORLD[peer], [half]) for peer, half in halves.items()], [])
            return
        other = 3 - rank
        sends = [WeightPieces(WORLD[other], [halves[rank]], relayed=True)]
        receives = [WeightPieces(WORLD[0], [halves[rank]]), WeightPieces(WORLD[other], [halves[other]], relayed=True)]
        results[rank] = mover.run([box], sends, receives)

    everyone(3, run)
    for result in results[1:]:
        assert torch.equal(result.tensors["w"].data, whole)
        assert (result.traffic.received_bytes, result.traffic.sent_bytes) == (4 * 48, 4 * 24)
    assert results[0].traffic.sent_bytes == 4 * 48


def test_a_leader_waits_for_all_other_ranks_and_they_for_nobody() -> None:
    groups, ended = meet(3), [0.0] * 3
    began = time.monotonic()

    def work(rank: int) -> None:
        if rank == 2:
            time.sleep(0.4)
        meet_leader(groups[rank], [1, 0, 2])
        ended[rank] = time.monotonic() - began

    everyone(3, work)
    assert ended[0] < 0.3
    assert ended[1] >= 0.4


def test_arenas_hold_consecutive_tensors() -> None:
    draw = random.Random(3)
    for _ in range(50):
        sizes = [draw.randint(1, 9) for _ in range(draw.randint(0, 12))]
        ranges = list(arenas(sizes, 10))
        assert [at for low, high in ranges for at in range(low, high)] == list(range(len(sizes)))
        assert all(sum(sizes[low:high]) <= 10 or high - low == 1 for low, high in ranges)
