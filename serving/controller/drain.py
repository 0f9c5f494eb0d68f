"""Planned moves to where a copy is kept already: what the copy holds needs no network, only the rest does.

A copy goes on growing, and may be given up, while it is read. So it is looked at again afterwards, and what has
changed hands meanwhile counts as not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from data.layout import Device
from serving.controller.orders import Heir, Source

Found = Mapping[int, Sequence[Source]]
"""What a survey found, by sequence."""


def beside(heirs: Sequence[Heir], found: Found) -> list[Heir]:
    """Heirs of which copies are kept on the instances that they go to, as far as these copies reach.

    What no such copy holds of the first tokens comes from where a sequence runs. Sequences that are restored from
    copies in any case are left out.
    """
    reduced = (_as_far_as_kept(heir, found.get(heir.key, ())) for heir in heirs)
    return [heir for heir in reduced if heir is not None]


def _as_far_as_kept(heir: Heir, found: Sequence[Source]) -> Heir | None:
    instances = {device.instance for device in heir.target.devices}
    homes = {source.replica for source in heir.sources if not source.kept}
    near = [one for one in found if one.kept and one.replica in homes and one.device.instance in instances]
    if not near or any(source.kept for source in heir.sources):
        return None
    tokens = min(heir.tokens, *(one.tokens for one in near))
    return replace(heir, tokens=tokens, sources=(*near, *heir.sources)) if tokens else None


def untouched(heirs: Sequence[Heir], found: Found) -> list[Heir]:
    """Those whose copies are, by a later survey, still where they were read."""
    return [heir for heir in heirs if all(_same(one, found.get(heir.key, ())) for one in heir.sources if one.kept)]


def _same(read: Source, found: Sequence[Source]) -> bool:
    return any((one.device, one.replica, one.table) == (read.device, read.replica, read.table) for one in found)


def crosses(heir: Heir, host: Callable[[Device], str]) -> bool:
    """Whether some of its KV is on another host than any of the devices that it goes to."""
    targets = {host(device) for device in heir.target.devices}
    return any(host(source.device) not in targets for source in heir.sources)
