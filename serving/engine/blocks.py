"""Which KV blocks are free: plain bookkeeping, kept by the leader of a replica, and by whoever keeps copies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def blocks_for(tokens: int, block_tokens: int) -> int:
    """Number of blocks that hold `tokens` tokens."""
    return -(-tokens // block_tokens)


class BlockAllocator:
    """Hands out block numbers 0 … `blocks` - 1; a block has one owner at a time."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._free = list(range(blocks - 1, -1, -1))
        self._used: set[int] = set()

    @property
    def available(self) -> int:
        """Number of free blocks."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Fraction of blocks in use, 0 to 1."""
        return len(self._used) / self.blocks if self.blocks else 0.0

    def can_allocate(self, count: int) -> bool:
        """Whether `count` blocks are free."""
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks. Raises `ValueError` if fewer are free: ask `can_allocate` first."""
        if not self.can_allocate(count):
            raise ValueError(f"{count} KV blocks wanted, {len(self._free)} free")
        taken = [self._free.pop() for _ in range(count)]
        self._used.update(taken)
        return taken

    def claim(self, blocks: Sequence[int]) -> None:
        """Take exactly these blocks. Raises `ValueError` if one is not free."""
        wanted = set(blocks)
        if len(wanted) != len(blocks) or not wanted <= set(self._free):
            raise ValueError(f"KV blocks {sorted(wanted - set(self._free))} are not free")
        self._free = [block for block in self._free if block not in wanted]
        self._used |= wanted

    def free(self, blocks: Iterable[int]) -> None:
        """Give blocks back. Raises `ValueError` for a block that is not in use."""
        for block in blocks:
            if block not in self._used:
                raise ValueError(f"KV block {block} is not in use")
            self._used.remove(block)
            self._free.append(block)
