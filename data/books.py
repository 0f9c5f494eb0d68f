"""Plan books of either kind: of one model, or of several that share a fleet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data.cluster import ClusterState
from data.plan import Plan, PlanBook
from data.shared_plan import SharedPlan, SharedPlanBook, is_shared

Book = PlanBook | SharedPlanBook


def read_book(content: bytes) -> Book:
    """Read a plan book of either kind. Raises `CorruptData` for anything but an intact one."""
    return SharedPlanBook.from_bytes(content) if is_shared(content) else PlanBook.from_bytes(content)


@dataclass(frozen=True, slots=True)
class PlanChange:
    """The plans that two books give for one state; None where a book does not list it."""

    state: ClusterState
    before: Plan | SharedPlan | None
    after: Plan | SharedPlan | None


def difference(before: Book, after: Book) -> tuple[PlanChange, ...]:
    """The states in which two books choose differently, whatever runs, smallest state first."""
    old, new = ({plan.state: plan for plan in book.plans} for book in (before, after))
    states = sorted(old.keys() | new.keys(), key=lambda state: (state.instances, state.key))
    changes = (PlanChange(state, old.get(state), new.get(state)) for state in states)
    return tuple(change for change in changes if _chosen(change.before) != _chosen(change.after))


def _chosen(plan: Plan | SharedPlan | None) -> Any:
    if isinstance(plan, Plan):
        return plan.config, dict(plan.transitions)
    return plan and plan.deployment
