"""What became of a chaos run, and what its layout events say about replication."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.chaos.script import Script
from perennial.comparison import Difference
from serving.requests import Event

MOST_REEXECUTED = 2  # tokens of a request whose copy survived
COUNTS = (
    "moved",
    "restored",
    "restored_uncopied",
    "replayed",
    "replayed_after_one_loss",
    "replayed_after_restart",
    "most_reexecuted",
    "most_reexecuted_uncopied",
    "most_replayed",
)


@dataclass(slots=True)
class Outcome:
    """What became of one script."""

    seed: int
    difference: Difference = field(default_factory=Difference)
    streams: int = 0
    cancelled: int = 0
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    layouts: int = 0
    recoveries: int = 0
    recovered: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def held(self) -> bool:
        """Nothing lost, duplicated, mismatched, failed or left behind."""
        return not self.difference and not self.errors


def recovered(events: Iterable[Event]) -> dict[str, int]:
    """How requests came through changes, over all layouts; fields that a controller does not tell count as 0.

    `replayed` had no KV left, be it that its copy went in a double failure or that it had none yet;
    `replayed_after_one_loss` is the part of it where no more than one instance was hit since the layout
    before. `replayed_after_restart` met a new controller. `most_reexecuted` is the most tokens generated again
    of a restored request whose copy was complete when it was hit, by one loss; `restored_uncopied` were hit
    before that. `most_replayed` is the same of requests that were replayed although the copy of their replica was
    complete: of those that had no KV when it broke, because they waited for a place or had given it up.
    """
    counts = dict.fromkeys(COUNTS, 0)
    hit: set[str] = set()
    controllers, restarted = 0, False
    for event in events:
        data: Any = event.data
        match event.kind:
            case "controller_started":
                controllers += 1
                restarted = controllers > 1
            case "instance_lost":
                hit.add(str(data["instance"]))
            case "worker_lost":
                hit.add(str(data["device"]).rpartition("/")[0])
            case "layout":
                _count(counts, data, restarted=restarted, hit=len(hit))
                restarted = False
                hit.clear()
    return counts


def _count(counts: dict[str, int], layout: Any, *, restarted: bool, hit: int) -> None:
    counts["moved"] += int(layout.get("requests_moved", 0))
    counts["restored"] += int(layout.get("requests_restored", 0))
    replayed = int(layout.get("requests_replayed", 0))
    counts["replayed_after_restart" if restarted else "replayed"] += replayed
    counts["replayed_after_one_loss"] += 0 if restarted or hit > 1 else replayed
    copied, uncopied = layout.get("tokens_reexecuted", ()), layout.get("tokens_reexecuted_uncopied", ())
    counts["restored_uncopied"] += len(uncopied)
    if hit <= 1:
        again = layout.get("tokens_replayed", {}).get("copied", ())
        counts["most_replayed"] = max([counts["most_replayed"], *map(int, again)])
    for name, again in {"most_reexecuted": copied, "most_reexecuted_uncopied": uncopied}.items():
        worst = name if hit <= 1 else "most_reexecuted_uncopied"  # the copy may have been what the second loss took
        counts[worst] = max([counts[worst], *map(int, again)])


def totals(outcomes: Sequence[Outcome], *, wall_s: float) -> dict[str, float]:
    """The sums over all seeds, and how long they took together."""
    parts: dict[str, int] = {}
    for name in COUNTS:
        values = [outcome.recovered.get(name, 0) for outcome in outcomes]
        parts[name if name.startswith("most") else f"requests_{name}"] = (
            max(values, default=0) if name.startswith("most") else sum(values)
        )
    return {
        "seeds": len(outcomes),
        "held": sum(outcome.held for outcome in outcomes),
        "streams": sum(outcome.streams for outcome in outcomes),
        "tokens": sum(outcome.tokens for outcome in outcomes),
        "lost_tokens": sum(outcome.difference.lost for outcome in outcomes),
        "duplicated_tokens": sum(outcome.difference.duplicated for outcome in outcomes),
        "mismatched_tokens": sum(outcome.difference.mismatched for outcome in outcomes),
        "layouts": sum(outcome.layouts for outcome in outcomes),
        "recoveries": sum(outcome.recoveries for outcome in outcomes),
        **parts,
        "seconds": round(sum(outcome.seconds for outcome in outcomes), 1),
        "wall_seconds": round(wall_s, 1),
    }


def record(script: Script, outcome: Outcome) -> dict[str, Any]:
    """Script and outcome as JSON values; events only of a run that did not hold."""
    return {
        "script": asdict(script),
        "outcome": {**asdict(outcome), "events": [] if outcome.held else outcome.events, "held": outcome.held},
    }
