"""Which rank of a replica holds the others up, from what all ranks say of themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serving.messages import Heartbeat


@dataclass(frozen=True, slots=True)
class Standstill:
    """A replica that has work and does nothing: `rank` is to blame; None: they wait for each other."""

    rank: int | None
    still_s: float


def standstill(replica: int, pulses: Sequence[Heartbeat | None], limit_s: float) -> Standstill | None:
    """Follow who waits for whom, from the leader on, as long as everyone on the way was still for `limit_s`.

    `pulses` are the recent heartbeats of the ranks in order; None for a rank that has not spoken lately.
    A slow rank uses its processor and is not still; nor is a leader without work. So None is the answer
    wherever one link of the chain moves, is not heard, or runs another replica.
    """
    rank, chain = 0, dict[int, float]()
    while rank not in chain:
        pulse = pulses[rank]
        if pulse is None or pulse.replica != replica or pulse.still_s < limit_s:
            return None
        chain[rank] = pulse.still_s
        if pulse.awaits is None:
            return Standstill(rank, min(chain.values()))
        rank = pulse.awaits
    return Standstill(None, min(chain.values()))
