"""Which rank of a replica holds the others up, from what all ranks say of themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serving.messages import Heartbeat

_SILENT_LIMITS = 2  # a rank that does not say what it does gets so many times the limit


@dataclass(frozen=True, slots=True)
class Heard:
    """The last heartbeat of a rank, whether it is recent, and for how long nothing was heard since."""

    beat: Heartbeat
    recent: bool
    silent_s: float


@dataclass(frozen=True, slots=True)
class Standstill:
    """A replica that has work and does nothing: `rank` is to blame; None: its ranks wait for each other."""

    rank: int | None
    still_s: float


def standstill(replica: int, heard: Sequence[Heard | None], limit_s: float) -> Standstill | None:
    """Follow who waits for whom, from the leader on, as long as everyone on the way was still for `limit_s`.

    `heard` has an entry per rank, None for one that never spoke. A slow rank uses its processor and is not
    still; nor is a leader without work. So None is the answer wherever one link of the chain moves or runs
    another replica. A rank that others wait for and that is silent, too, cannot be excused for long.
    """
    rank, chain = 0, dict[int, float]()
    while rank not in chain:
        one = heard[rank]
        if one is None or one.beat.replica != replica:
            return None
        if not one.recent:
            return Standstill(rank, one.silent_s) if chain and one.silent_s >= _SILENT_LIMITS * limit_s else None
        if one.beat.still_s < limit_s:
            return None
        chain[rank] = one.beat.still_s
        if one.beat.awaits is None:
            return Standstill(rank, min(chain.values()))
        rank = one.beat.awaits
    return Standstill(None, min(chain.values()))
