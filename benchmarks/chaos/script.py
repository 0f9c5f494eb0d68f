"""What happens in one chaos run: a pure function of the seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal

ActionKind = Literal[
    "notice",
    "kill",
    "kill_worker",
    "suspend",
    "add",
    "controller",
    "blackout",
    # the hard scripts only
    "notice_early",  # the machine ends before the deadline that was said
    "notice_late",  # it lives on for a while after it
    "notice_withdrawn",  # it is not taken away at all
    "notices",  # several at once
    "kill_two",
    "kill_neighbours",
    "kill_ends",  # the source and the destination of a transfer
    "kill_holder",  # the next instance of the ring, which keeps the KV's copy, and then this one
    "suspend_worker",
    "controller_twice",
    "plan",  # another plan book
    "add_leaving",  # an instance that is given notice before it has joined
]
Moment = Literal[
    "delay",
    "prefill",
    "reconfiguration_started",
    "reconfiguration_copying",
    "reconfiguration_prepared",
    "reconfiguration_paused",
    "layout",
]

_LAYOUTS: dict[int, tuple[str, ...]] = {
    1: ("1x1x1", ""),
    2: ("1x2x1", "1x1x2", "2x1x1"),
    3: ("1x3x1", "1x1x3", "1x1x2", "3x1x1"),
    4: ("1x2x2", "2x2x1", "2x1x2", "1x4x1", "1x1x4", "4x1x1"),
}
_GRACES_S = (0.0, 0.05, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class Disturbance:
    """One thing done to the fleet: at which moment, how long after it, and to whom.

    `victim` counts through the instances that live at that time. `seconds` is the grace of a notice,
    the length of a suspension, how long the controller or all capacity stays away, or the time between
    the two halves of a double failure. `count` instances are added, noticed, or returned after a blackout.
    """

    kind: ActionKind
    moment: Moment = "delay"
    after_s: float = 0.0
    victim: int = 0
    seconds: float = 0.0
    count: int = 1


@dataclass(frozen=True, slots=True)
class Script:
    """One run: the fleet at the start, the plan for each size, the requests, the disturbances.

    `requests` are (arrival, index into the pool, cancel after so many tokens or None).
    """

    seed: int
    instances: int
    layouts: dict[int, str]
    kv_blocks: int
    requests: tuple[tuple[float, int, int | None], ...]
    disturbances: tuple[Disturbance, ...]
    devices_per_instance: int = 1
    other_layouts: dict[int, str] = field(default_factory=dict)  # of the book that `plan` changes to


def script(seed: int, *, pool: int) -> Script:
    """The run of a seed over a pool of `pool` requests."""
    source = random.Random(seed)
    layouts = {count: source.choice(choices) for count, choices in _LAYOUTS.items()}
    instances = source.randint(2, 4)
    disturbances = _disturbances(source, instances)
    return Script(
        seed=seed,
        instances=instances,
        layouts={count: layout for count, layout in layouts.items() if layout},
        kv_blocks=source.choice((0, 0, 96)),
        requests=draw_requests(source, pool),
        disturbances=disturbances,
    )


def draw_requests(
    source: random.Random, pool: int, *, count: tuple[int, int] = (9, 14), within_s: float = 6.0
) -> tuple[tuple[float, int, int | None], ...]:
    """Some of the pool's requests in order of arrival; about one in seven is cancelled by its client."""
    chosen = source.sample(range(pool), source.randint(*count))
    arrivals = sorted(round(source.uniform(0.0, within_s), 3) for _ in chosen)
    return tuple(
        (at_s, index, source.randint(1, 60) if source.random() < 0.15 else None)
        for at_s, index in zip(arrivals, chosen, strict=True)
    )


def _disturbances(source: random.Random, live: int) -> tuple[Disturbance, ...]:
    """Three to five causes, some with a follow-up that strikes while the fleet still deals with them.

    `live` is tracked so that capacity comes back often enough; what is alive when it happens decides.
    """
    result: list[Disturbance] = []
    for _ in range(source.randint(3, 5)):
        strikes = [_cause(source, live)]
        if source.random() < 0.6:
            strikes.append(_follow_up(source))
        result += strikes
        live += sum(_effect(item, live) for item in strikes)
        if live < 1 or (live < 4 and source.random() < 0.5):
            count = source.randint(1, 4 - max(live, 0))
            result.append(Disturbance("add", after_s=_delay(source), count=count))
            live = max(live, 0) + count
    return tuple(result)


def _delay(source: random.Random) -> float:
    return round(source.uniform(0.1, 1.2), 3)


def _cause(source: random.Random, live: int) -> Disturbance:
    kinds: list[ActionKind] = ["notice", "notice", "notice", "kill", "kill", "kill_worker", "suspend", "controller"]
    kinds += ["add"] if live < 4 else []
    kinds += ["blackout"] if source.random() < 0.3 else []
    moment: Moment = "prefill" if source.random() < 0.2 else "delay"
    return _disturbance(source, source.choice(kinds), moment, _delay(source))


def _follow_up(source: random.Random) -> Disturbance:
    kinds: tuple[ActionKind, ...] = ("kill", "kill", "notice", "notice", "controller", "kill_worker", "suspend")
    moments: tuple[Moment, ...] = ("reconfiguration_started", "reconfiguration_prepared", "layout", "delay")
    return _disturbance(source, source.choice(kinds), source.choice(moments), round(source.uniform(0.0, 0.08), 3))


def _disturbance(source: random.Random, kind: ActionKind, moment: Moment, after_s: float) -> Disturbance:
    seconds = {
        "notice": source.choice(_GRACES_S),
        "suspend": round(source.uniform(0.3, 4.0), 2),
        "controller": round(source.uniform(0.0, 1.5), 2),
        "blackout": round(source.uniform(0.0, 1.5), 2),
    }.get(kind, 0.0)
    count = source.randint(1, 4) if kind == "blackout" else 1
    return Disturbance(kind, moment, after_s, source.randrange(12), seconds, count)


def _effect(item: Disturbance, live: int) -> int:
    """How the number of live instances changes."""
    if item.kind == "blackout":
        return item.count - live
    return {"notice": -1, "kill": -1, "add": item.count}.get(item.kind, 0)
