"""The nastier scripts: bursts that strike while the fleet deals with what struck before; pure in the seed."""

from __future__ import annotations

import random

from benchmarks.chaos.script import ActionKind, Disturbance, Moment, Script, draw_requests

PHASES: tuple[Moment, ...] = (
    "reconfiguration_started",
    "reconfiguration_copying",
    "reconfiguration_prepared",
    "reconfiguration_paused",
    "layout",
)
CAUSES: tuple[ActionKind, ...] = (
    "notice",
    "notice_early",
    "notice_late",
    "notice_withdrawn",
    "notices",
    "kill",
    "kill_two",
    "kill_neighbours",
    "kill_holder",
    "kill_worker",
    "suspend",
    "suspend_worker",
    "controller",
    "controller_twice",
    "plan",
    "add",
    "add_leaving",
    "blackout",
)
FOLLOW_UPS: tuple[ActionKind, ...] = (
    "kill_ends",
    "kill",
    "kill_two",
    "kill_worker",
    "kill_neighbours",
    "kill_holder",
    "suspend_worker",
    "kill",
    "suspend",
    "notice",
    "notice_early",
    "controller",
    "controller_twice",
    "plan",
    "add",
)
_SINGLE: dict[int, tuple[str, ...]] = {
    1: ("1x1x1",),
    2: ("1x2x1", "1x1x2", "2x1x1"),
    3: ("1x3x1", "1x1x3", "1x1x2", "3x1x1"),
    4: ("1x2x2", "2x2x1", "2x1x2", "1x4x1", "1x1x4", "4x1x1"),
}
_DOUBLE: dict[int, tuple[str, ...]] = {  # instances of two devices
    1: ("1x1x2", "1x2x1", "2x1x1", "1x1x1"),
    2: ("1x2x2", "1x2x2", "2x1x2", "2x2x1", "1x1x4", "1x4x1", "1x3x1"),
    3: ("1x3x2", "3x1x2", "1x2x2", "2x1x2", "1x1x4"),
}
_GRACES_S = (0.0, 0.0, 0.05, 0.2, 0.5, 1.0, 3.0)
_SECONDS: dict[ActionKind, tuple[float, float]] = {
    "notice_early": (0.3, 4.0),
    "notice_late": (0.1, 0.6),
    "notice_withdrawn": (0.2, 3.0),
    "kill_holder": (0.0, 0.4),
    "suspend": (0.2, 3.0),
    "suspend_worker": (0.1, 3.0),
    "controller": (0.0, 0.8),
    "controller_twice": (0.0, 1.2),
    "add_leaving": (0.0, 1.0),
    "blackout": (0.0, 1.0),
}
_LOST: dict[ActionKind, int] = {  # instances that an action takes away at once
    "notice": 1,
    "notice_early": 1,
    "notice_late": 1,
    "notice_withdrawn": 1,
    "notices": 2,
    "kill": 1,
    "kill_two": 2,
    "kill_neighbours": 2,
    "kill_holder": 2,
    "kill_ends": 2,
    "add_leaving": 1,
}


def hard_script(seed: int, *, pool: int) -> Script:
    """The hard run of a seed over a pool of `pool` requests.

    The seed's number says what its first burst begins with and when that is followed up, so that any
    few dozen seeds in a row have been everywhere; the rest is drawn.
    """
    source = random.Random(seed + (1 << 32))
    devices = 2 if source.random() < 0.3 else 1
    choices = _DOUBLE if devices == 2 else _SINGLE
    most = max(choices)
    instances = source.randint(min(3, most - 1), most)
    return Script(
        seed=seed,
        instances=instances,
        layouts={count: source.choice(choices[count]) for count in choices},
        kv_blocks=source.choice((0, 96, 72)),
        requests=draw_requests(source, pool, count=(10, 14), within_s=3.0),
        disturbances=_bursts(source, seed, instances, most),
        devices_per_instance=devices,
        other_layouts={count: source.choice(choices[count]) for count in choices},
    )


def _bursts(source: random.Random, seed: int, live: int, most: int) -> tuple[Disturbance, ...]:
    """Three or four causes, each followed up once or twice; capacity returns when there is little left."""
    result: list[Disturbance] = []
    for burst in range(source.randint(3, 4)):
        cause = CAUSES[(seed + 7 * burst) % len(CAUSES)] if burst < 2 else source.choice(CAUSES)
        strikes = [_strike(source, cause, "prefill" if source.random() < 0.2 else "delay")]
        phase = PHASES[(seed // len(FOLLOW_UPS) + burst) % len(PHASES)] if burst < 2 else source.choice(PHASES)
        follow_up = FOLLOW_UPS[(seed + 4 * burst) % len(FOLLOW_UPS)] if burst < 2 else source.choice(FOLLOW_UPS)
        strikes.append(_strike(source, follow_up, phase))
        if source.random() < 0.4:
            strikes.append(_strike(source, source.choice(FOLLOW_UPS), source.choice((*PHASES, "delay"))))
        result += strikes
        live = max(0, live - sum(_LOST.get(item.kind, 0) for item in strikes))
        live += sum(item.kind in ("add", "blackout") for item in strikes)
        if live < most - 1 or (live < most and source.random() < 0.3):
            count = source.randint(max(1, most - 1 - live), max(1, most - live))
            result.append(Disturbance("add", after_s=_delay(source), count=count))
            live += count
    return tuple(result)


def _delay(source: random.Random) -> float:
    """Long enough, as a rule, for some tokens and their copies to be there."""
    return round(source.uniform(0.1, 1.2), 3)


def _strike(source: random.Random, kind: ActionKind, moment: Moment) -> Disturbance:
    seconds = round(source.uniform(*_SECONDS[kind]), 3) if kind in _SECONDS else 0.0
    if kind in ("notice", "notices"):
        seconds = source.choice(_GRACES_S)
    after_s = _delay(source) if moment in ("delay", "prefill") else source.choice((0.0, 0.0, 0.01, 0.04))
    count = {"blackout": source.randint(1, 3), "notices": source.randint(2, 3)}.get(kind, 1)
    return Disturbance(kind, moment, after_s, source.randrange(12), seconds, count)
