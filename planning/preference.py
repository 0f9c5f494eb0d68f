"""Which devices a target may use while some of them are likely to go, and what spares get ready for."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from data.deployment import Deployment
from data.layout import Device
from planning.sharing import live_groups
from planning.transition import LiveReplica


def dependable(
    usable: Sequence[Device], advised: Collection[Device], *, live: Sequence[LiveReplica], target: Deployment
) -> tuple[Device, ...]:
    """Usable devices without the advised ones, as far as `target` can do without them.

    A group that the target wants stays where it is, on advised devices too: an advice is no notice.
    Where the others do not suffice, whole advised instances are added until they do.
    """
    intact = [one for one in live_groups(live) if one.group in target.groups and set(one.devices) <= set(usable)]
    staying = {device for one in intact for device in one.devices}
    chosen = [device for device in usable if device not in advised or device in staying]
    for instance in dict.fromkeys(device.instance for device in usable if device in advised):
        if len(chosen) >= target.devices:
            break
        chosen += [device for device in usable if device.instance == instance and device not in chosen]
    return tuple(sorted(chosen))


def spare_ranks(spares: int, ranks: int, advised: Sequence[int]) -> tuple[int, ...]:
    """Which of `ranks` ranks each of `spares` spare devices gets ready for.

    First those whose devices are likely to go (`advised`), each once, then all in turn.
    """
    first = tuple(dict.fromkeys(advised))[:spares]
    return first + tuple(index % ranks for index in range(spares - len(first)))
