"""Which weights every instance holds: those of its role, and as many more as memory leaves room for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from data.placement import Shape
from planning.step_costs import Cells, StepCosts


@dataclass(slots=True)
class Residency:
    """`held` cells by instance, and those that are `coming` with the moment they are there.

    Without `keeps`, an instance holds its role and nothing else, and a spare one nothing new.
    """

    costs: StepCosts
    keeps: bool
    held: dict[str, Cells] = field(default_factory=dict)
    coming: dict[str, tuple[float, Cells]] = field(default_factory=dict)

    @property
    def fetching_s(self) -> float:
        """Until when something is fetched in advance."""
        return max((at_s for at_s, _ in self.coming.values()), default=0.0)

    def place(self, name: str, role: Cells, shape: Shape) -> None:
        """An instance takes a role over; what it holds beside it stays if there is room."""
        before = self.held.get(name)
        if before is None or not self.keeps:
            self.held[name] = role.copy()
        else:
            self.held[name] = role | first_cells(before & ~role, self.spare_cells(role, shape))

    def drop(self, name: str) -> None:
        """An instance is gone."""
        self.held.pop(name, None)
        self.coming.pop(name, None)

    def arrive(self, now_s: float) -> None:
        """What was fetched in advance by now is there."""
        for name, (at_s, cells) in list(self.coming.items()):
            if at_s <= now_s:
                self.held[name] = self.held.get(name, np.zeros_like(cells)) | cells
                del self.coming[name]

    def missing(self, name: str, role: Cells) -> Cells:
        """What an instance lacks of a role."""
        before = self.held.get(name)
        return role & ~before if before is not None else role

    def lost(self, cells: Cells) -> int:
        """How many of the cells nobody holds."""
        anywhere = np.zeros_like(cells)
        for held in self.held.values():
            anywhere |= held
        return int((cells & ~anywhere).sum())

    def spare_cells(self, role: Cells | None, shape: Shape) -> int:
        """Cells that fit on an instance beside its role and the KV of a full batch."""
        left = self.costs.instance_bytes
        if role is not None:
            kv = self.costs.room(shape) * self.costs.kv_bytes * self.costs.gpus / shape.devices
            left -= float(role.sum()) * self.costs.cell_bytes + kv
        return max(int(left / self.costs.cell_bytes), 0)

    def prefetch(
        self,
        from_s: Mapping[str, float],
        roles: Mapping[str, Cells | None],
        shape: Shape,
        wanted: Sequence[Sequence[Cells]],
        bytes_per_s: float,
    ) -> None:
        """Fetch what likely layouts (`wanted`, their roles) would need of every instance, as far as memory goes.

        Each instance begins `from_s`; `roles` are those in force, None for a spare instance.
        """
        if not self.keeps or not wanted:
            return
        for turn, (name, role) in enumerate(roles.items()):
            held = self.held.get(name, np.zeros_like(wanted[0][0]))
            beside = held & ~role if role is not None else held
            room = self.spare_cells(role, shape) - int(beside.sum())
            extra = np.zeros_like(held)
            chosen = (likely[_closest(turn, held, likely)] for likely in wanted)
            for cells in sorted(chosen, key=lambda one: int(one.sum())):
                extra |= first_cells(cells & ~held & ~extra, room - int(extra.sum()))
            if extra.any():
                self.coming[name] = (from_s[name] + float(extra.sum()) * self.costs.cell_bytes / bytes_per_s, extra)


def _closest(turn: int, held: Cells, roles: Sequence[Cells]) -> int:
    """The role that most of is held; among equals instances take turns."""
    own = turn % len(roles)
    return max(range(len(roles)), key=lambda index: (int((held & roles[index]).sum()), index == own))


def first_cells(cells: Cells, count: int) -> Cells:
    """The first `count` cells that are set."""
    kept = np.zeros_like(cells)
    kept.flat[np.flatnonzero(cells)[: max(count, 0)]] = True
    return kept
