"""What a checked reference case looks like, and the sums over a file of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Verdict:
    """`miss` is how far a case is from its expectation: 0 if met, a relative error, or infinite if simply wrong."""

    case: str
    miss: float
    detail: str = ""


@dataclass(frozen=True, slots=True)
class FileReport:
    """The verdicts on one file, or why it was not checked."""

    file: str
    verdicts: tuple[Verdict, ...]
    note: str = ""

    @property
    def missed(self) -> tuple[Verdict, ...]:
        """Verdicts that are not met."""
        return tuple(verdict for verdict in self.verdicts if verdict.miss > 0)

    @property
    def worst(self) -> Verdict | None:
        """The verdict furthest from its expectation, None if all are met."""
        return max(self.missed, key=lambda verdict: verdict.miss, default=None)


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of reference cases, of which `file` is being checked; `load` reads any of its JSON files."""

    path: Path
    file: str
    load: Callable[[str], Document]


Checker = Callable[[Document, Folder], Iterator[Verdict]]


def exact(case: str, **pairs: tuple[Any, Any]) -> Verdict:
    """Met if in every pair what was found equals what was expected."""
    wrong = [f"{name} {found} instead of {wanted}" for name, (found, wanted) in pairs.items() if found != wanted]
    return Verdict(case, inf if wrong else 0.0, "; ".join(wrong))


def close(case: str, tolerance: float, **pairs: tuple[float, float]) -> Verdict:
    """Met if in every pair what was found is within the relative `tolerance` of what was expected."""
    misses = {name: _relative(found, wanted) for name, (found, wanted) in pairs.items()}
    wrong = {name: miss for name, miss in misses.items() if not miss <= tolerance}
    detail = "; ".join(f"{name} {pairs[name][0]:.9g} instead of {pairs[name][1]:.9g}" for name in wrong)
    return Verdict(case, max(wrong.values(), default=0.0), detail)


def at_least(case: str, tolerance: float, **pairs: tuple[float, float]) -> Verdict:
    """Met if in every pair what was found is not below what was expected by more than the relative `tolerance`."""
    return close(case, tolerance, **{name: (min(found, wanted), wanted) for name, (found, wanted) in pairs.items()})


def together(case: str, verdicts: Iterable[Verdict]) -> Verdict:
    """One verdict on a case of several checks: the largest miss, all details."""
    missed = [verdict for verdict in verdicts if verdict.miss > 0]
    detail = "; ".join(f"{verdict.case}: {verdict.detail}" for verdict in missed)
    return Verdict(case, max((verdict.miss for verdict in missed), default=0.0), detail)


def _relative(found: float, wanted: float) -> float:
    if found == wanted:
        return 0.0
    return abs(found - wanted) / abs(wanted) if wanted else inf
