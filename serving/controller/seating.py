"""Which blocks of a new replica's cache each sequence gets, while nobody schedules there yet."""

from __future__ import annotations

from serving.engine.blocks import BlockAllocator, blocks_for


class Seating:
    """Block tables of sequences that will be adopted by one new replica."""

    def __init__(self, blocks: int, block_tokens: int) -> None:
        self._allocator = BlockAllocator(blocks)
        self._block_tokens = block_tokens
        self._most: dict[int, int] = {}  # blocks that a sequence can come to need
        self.seats: dict[int, list[int]] = {}

    def fit(self, key: int, tokens: int, most_tokens: int) -> bool:
        """Give sequence `key` room for `tokens` tokens; what it had stays where it is.

        False if there is too little: each sequence seated must still be able to take its next token, unless
        it has all the blocks that its `most_tokens` need.
        """
        seat, most = self.seats.get(key, []), blocks_for(most_tokens, self._block_tokens)
        missing = max(0, blocks_for(tokens, self._block_tokens) - len(seat))
        growing = sum(len(other) < self._most[one] for one, other in self.seats.items() if one != key)
        if self._allocator.available < missing + growing + (len(seat) + missing < most):
            return False
        self.seats[key], self._most[key] = seat + self._allocator.allocate(missing), most
        return True

    def leave(self, key: int) -> None:
        """Sequence `key` does not come after all."""
        self._allocator.free(self.seats.pop(key, []))
