"""What must hold, and whether it does: a pure function of the records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

GAP_MS = 50.0
PREPARING_SHARE = 0.90
EXCESS = 0.02
LINK_SHARE = 0.60
STALL_MS = 700.0
OTHERS_STEPS = 1.0
REPLICATION_COST = 0.02
CRASH_P50_MS, CRASH_P99_MS = 500.0, 1000.0
PAUSE_STEPS, PAUSE_MS = 3.0, 20.0


@dataclass(frozen=True, slots=True)
class Bar:
    """One requirement: `value` must be at most (`least` false) or at least (`least` true) `limit`.

    A value of None was not seen; that is a miss.
    """

    case: str
    what: str
    value: float | None
    limit: float
    least: bool = False

    @property
    def met(self) -> bool:
        """Whether it holds."""
        if self.value is None:
            return False
        return self.value >= self.limit if self.least else self.value <= self.limit

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return {**asdict(self), "met": self.met}


def bars(record: Mapping[str, Any]) -> list[Bar]:
    """The requirements that a record answers; none if its case was skipped."""
    if "skipped" in record:
        return []
    if "failed" in record:
        return [Bar(f"{record['case']}, {record['name']}", "ran to its end", 0.0, 1.0, least=True)]
    found = {"planned": _planned, "kill": _kill, "replication": _replication, "fleet": _fleet}[record["case"]](record)
    return [*found, *_whole(record)]


def missed(records: Iterable[Mapping[str, Any]]) -> list[Bar]:
    """What does not hold."""
    return [bar for record in records for bar in bars(record) if not bar.met]


def _name(record: Mapping[str, Any]) -> str:
    residency = f", residency {record['residency']}" if "residency" in record else ""
    return f"{record['name']}{residency}"


def _planned(record: Mapping[str, Any]) -> Sequence[Bar]:
    if not record["asked"]:
        return []
    name, moved = _name(record), record["bytes"]
    rates = [moved[key] for key in ("weights_link_share", "kv_link_share") if key in moved]
    shares = [record["preparing_share"]] if record["preparing_share"] is not None else []  # it was too short
    return [
        Bar(name, "longest gap, ms", record["gap_ms"]["longest"], GAP_MS),
        *(Bar(name, "throughput while preparing", share, PREPARING_SHARE, least=True) for share in shares),
        Bar(name, "bytes above the minimum", moved["excess"], EXCESS),
        *(Bar(name, "transfer rate of the link", rate, LINK_SHARE, least=True) for rate in sorted(rates)[:1]),
    ]


def _kill(record: Mapping[str, Any]) -> Sequence[Bar]:
    name = _name(record)
    return [
        Bar(name, "longest stall, ms", record["stall_ms"]["longest"], STALL_MS),
        Bar(name, "stall of the other replica, steps", record["others_stall_steps"], OTHERS_STEPS),
    ]


def _replication(record: Mapping[str, Any]) -> Sequence[Bar]:
    return [Bar(f"replication, {record['name']}", "decode throughput given up", record["cost"], REPLICATION_COST)]


def _fleet(record: Mapping[str, Any]) -> Sequence[Bar]:
    if record["name"] != "summary":
        return []
    allowed = round(PAUSE_STEPS * record["step_ms"] + PAUSE_MS, 2)
    return [
        Bar("fleet", "crash stall P50, ms", record["stall_ms"].get("p50"), CRASH_P50_MS),
        Bar("fleet", "crash stall P99, ms", record["stall_ms"].get("p99"), CRASH_P99_MS),
        Bar("fleet", "planned pause P99 (controller), ms", record["pause_ms"].get("p99"), allowed),
        Bar("fleet", "planned gap P99 (clients), ms", record["gap_ms"].get("p99"), allowed),
    ]


def _whole(record: Mapping[str, Any]) -> Sequence[Bar]:
    """No token lost, none delivered twice, no request refused."""
    counts = {name: record[name] for name in ("lost_tokens", "duplicated_tokens") if name in record}
    counts["errors"] = len(record.get("errors", ()))
    return [Bar(_name(record), name.replace("_", " "), float(count), 0.0) for name, count in counts.items() if count]
