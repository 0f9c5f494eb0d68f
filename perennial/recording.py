"""What a run leaves behind: streams with the time of every token, what the fleet did, and the facts."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

ActionKind = Literal["notice", "kill", "add"]


class StreamRecord(msgspec.Struct, kw_only=True):
    """One request. Times are seconds since the recording began; `expected` is the undisturbed stream.

    `positions[i]`, `tokens[i]` and `times_s[i]` belong to the i-th delivered token.
    """

    request_id: str
    submitted_s: float
    prompt_tokens: int
    max_tokens: int
    temperature: float
    positions: list[int] = []
    tokens: list[int] = []
    times_s: list[float] = []
    ended_s: float | None = None
    finish: str = ""
    error: str = ""
    expected: list[int] = []


class ActionRecord(msgspec.Struct, kw_only=True, frozen=True):
    """What was done to the fleet from outside; `grace_s` is how long a notice gave."""

    time_s: float
    kind: ActionKind
    instance: str
    grace_s: float = 0.0


class EventRecord(msgspec.Struct, kw_only=True, frozen=True):
    """An event of the controller, its time relative to the recording."""

    time_s: float
    kind: str
    data: dict[str, Any]


class PlanPoint(msgspec.Struct, kw_only=True, frozen=True):
    """What the plan book runs in one cluster state and what it predicts of it."""

    state: str
    instances: int
    config: str  # empty: nothing fits this state
    latency_s: float | None = None
    throughput_rps: float | None = None
    reason: str = ""


class Recording(msgspec.Struct, kw_only=True):
    """A whole run. `facts` are label → text pairs for the reader."""

    title: str
    seed: int
    duration_s: float
    exact: bool  # whether streams must be identical (fp32) or their agreement is reported (bf16)
    streams: list[StreamRecord]
    actions: list[ActionRecord]
    events: list[EventRecord]
    plan: list[PlanPoint] = []
    plan_version: str = ""
    plan_sha256: str = ""
    cost_model_error: dict[str, float] = {}
    facts: dict[str, str] = {}
    machine: dict[str, Any] = {}  # its fingerprint
    leftovers: list[str] = []  # processes that outlived the run


def save(recording: Recording, path: str) -> None:
    """Write the recording as JSON."""
    with open(path, "wb") as file:
        file.write(msgspec.json.encode(recording))


def load(path: str) -> Recording:
    """Read what `save` wrote."""
    with open(path, "rb") as file:
        return msgspec.json.decode(file.read(), type=Recording)
