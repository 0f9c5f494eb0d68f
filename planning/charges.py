"""What changes of a journey are charged, by name: for those who know their fleet better than our measurements do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from data.errors import InvalidInput
from planning.simulation.serving_perennial import Charges

_OF_CHANGES = ("start_s", "cut_s", "prepare_s", "slowdown", "background", "disk_bytes_per_s")
_OF_TRAFFIC = ("link_bytes_per_s", "usd_per_gb")
_POSITIVE = ("background", "disk_bytes_per_s", "link_bytes_per_s")  # what bytes are divided by


@dataclass(frozen=True, slots=True)
class Traffic:
    """How quickly the bytes of a change travel (None: as measured, or as the instance type says), and their price."""

    link_bytes_per_s: float | None = None
    usd_per_gb: float = 0.0


def charged(values: Mapping[str, float]) -> tuple[Charges, Traffic]:
    """The measured charges, but for those named. Raises `InvalidInput` for a name or a value that cannot be."""
    unknown = sorted(set(values) - {*_OF_CHANGES, *_OF_TRAFFIC})
    if unknown:
        raise InvalidInput(
            f"changes are not charged for {unknown[0]}; known are {', '.join(_OF_CHANGES + _OF_TRAFFIC)}"
        )
    for name, value in values.items():
        least = 1.0 if name == "slowdown" else 0.0
        if not value >= least or (name in _POSITIVE and not value > 0) or (name == "background" and value > 1):
            raise InvalidInput(f"{name} cannot be {value:g}; {_allowed(name)}")
    of_changes = {name: value for name, value in values.items() if name in _OF_CHANGES}
    of_traffic = {name: value for name, value in values.items() if name in _OF_TRAFFIC}
    return replace(Charges(), **of_changes), replace(Traffic(), **of_traffic)  # type: ignore[arg-type]


def _allowed(name: str) -> str:
    if name == "background":
        return "give the share of a link, above 0 and at most 1"
    if name == "slowdown":
        return "give how many times as long steps take, at least 1"
    return "give more than 0" if name in _POSITIVE else "give at least 0"
