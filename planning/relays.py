"""One copy over the network for an instance: what several of its devices need from outside, one of them fetches."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from data.layout import Device

P = TypeVar("P", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Route(Generic[P]):
    """A piece that goes from a device (None: from disk) to another."""

    source: Device | None
    destination: Device
    piece: P

    @property
    def from_outside(self) -> bool:
        """Whether the destination's instance does not hold the piece."""
        return self.source is None or self.source.instance != self.destination.instance


def relay(routes: Iterable[Route[P]], size: Callable[[P], int]) -> tuple[list[Route[P]], list[Route[P]]]:
    """Split routes into those of a first wave, and of a second one that starts from where the first has brought it.

    Every destination gets the same pieces as before. A piece that several devices of an instance are to get from
    outside comes from there once, to the one that has fetched least, and goes on from it. Pieces are the same if
    they are equal: those that merely overlap come from outside each.
    """
    first: list[Route[P]] = []
    second: list[Route[P]] = []
    wanted: dict[tuple[str, P], list[Route[P]]] = defaultdict(list)
    for route in routes:
        if route.from_outside:
            wanted[route.destination.instance, route.piece].append(route)
        else:
            first.append(route)
    fetched: Counter[Device] = Counter()
    for (_, piece), alike in wanted.items():
        chosen = min(alike, key=lambda one: (fetched[one.destination], one.destination))
        fetched[chosen.destination] += size(piece)
        first.append(chosen)
        second += [Route(chosen.destination, one.destination, piece) for one in alike if one is not chosen]
    return first, second
