from __future__ import annotations

import pytest

from serving.controller.seating import Seating
from serving.engine.blocks import BlockAllocator


def test_a_seat_grows_in_place_and_everyone_keeps_a_spare() -> None:
    seating = Seating(8, 4)
    assert seating.fit(1, 8, 100)
    before = list(seating.seats[1])
    assert seating.fit(2, 4, 100)
    assert seating.fit(1, 12, 100)
    assert seating.seats[1][:2] == before
    assert not seating.fit(2, 20, 100)  # four blocks would be left for two more tokens and four more blocks
    assert len(seating.seats[2]) == 1
    seating.leave(1)
    assert seating.fit(2, 20, 100)


def test_who_cannot_grow_needs_no_spare() -> None:
    seating = Seating(4, 4)
    assert seating.fit(1, 7, 8)
    assert not seating.fit(2, 7, 9)
    assert seating.fit(2, 7, 8)
    assert seating.fit(2, 8, 8)
    assert not seating.fit(3, 1, 1)


def test_exactly_these_blocks_or_none() -> None:
    allocator = BlockAllocator(4)
    allocator.claim([2, 0])
    with pytest.raises(ValueError, match=r"\[2\] are not free"):
        allocator.claim([2, 1])
    assert sorted(allocator.allocate(2)) == [1, 3]
