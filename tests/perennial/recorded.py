"""A small recording with known numbers: two planned changes, one recovery, three streams."""

from typing import Any

from perennial.recording import ActionRecord, EventRecord, PlanPoint, Recording, StreamRecord


def event(time_s: float, kind: str, **data: Any) -> EventRecord:
    return EventRecord(time_s=time_s, kind=kind, data=data)


def layout(time_s: float, epoch: int, config: str, *, mode: str = "planned", stopped_s: float = 0.0) -> EventRecord:
    return event(
        time_s,
        "layout",
        epoch=epoch,
        config=config,
        mode=mode,
        positions=[{"replica": 0, "stage": 0, "shard": 0, "device": "i0/0"}],
        seconds={"prepare": 0.5, "copy": 0.1, "pause": 0.01, "transfer": stopped_s + 0.02},
        moved={"weights_inter_bytes": 2_000_000, "kv_bytes": 1000},
        requests_moved=2,
        requests_restored=0 if mode == "planned" else 3,
        requests_replayed=[] if mode == "planned" else ["a", "b"],
    )


def stream(name: str, times_s: list[float], *, delivered: list[int] | None = None) -> StreamRecord:
    expected = list(range(len(times_s)))
    tokens = expected if delivered is None else delivered
    return StreamRecord(
        request_id=name,
        submitted_s=times_s[0] - 0.25,
        prompt_tokens=4,
        max_tokens=len(times_s),
        temperature=0.7 if name == "b" else 0.0,
        positions=list(range(len(tokens))),
        tokens=tokens,
        times_s=times_s,
        ended_s=times_s[-1],
        finish="length",
        expected=expected,
    )


def recording() -> Recording:
    return Recording(
        title="test run </script>",
        seed=3,
        duration_s=20.0,
        exact=True,
        streams=[
            stream("a", [0.5, 1.0, 4.9, 5.4, 9.0, 12.4, 13.0]),
            stream("b", [1.0, 2.0, 3.0]),
            stream("late", [18.0, 19.0]),
        ],
        actions=[
            ActionRecord(time_s=4.0, kind="notice", instance="i1", grace_s=2.0),
            ActionRecord(time_s=7.0, kind="add", instance="i2"),
            ActionRecord(time_s=11.0, kind="kill", instance="i0"),
        ],
        events=[
            event(0.0, "instance_joined", instance="i0", type="local-cpu", devices=1),
            event(0.0, "instance_joined", instance="i1", type="local-cpu", devices=1),
            layout(0.0, 1, "D1·P1·T2·B8"),
            event(4.0, "notice", instance="i1", deadline_s=2.0, source="test"),
            event(4.1, "reconfiguration_started", epoch=2, mode="planned"),
            layout(5.0, 2, "D1·P1·T1·B8", stopped_s=0.07),
            event(5.1, "instance_dismissed", instance="i1"),
            event(7.5, "instance_joined", instance="i2", type="local-cpu", devices=1),
            event(7.6, "reconfiguration_started", epoch=3, mode="planned"),
            layout(8.0, 3, "D1·P2·T1·B8", stopped_s=0.17),
            event(11.1, "instance_lost", instance="i0", reason="the connection was closed"),
            event(11.2, "reconfiguration_started", epoch=4, mode="recovery"),
            event(11.3, "reconfiguration_failed", epoch=4, reason="timeout"),
            event(11.4, "reconfiguration_started", epoch=5, mode="recovery"),
            layout(12.0, 5, "D1·P1·T1·B8", mode="recovery"),
        ],
        plan=[
            PlanPoint(state="local-cpu=1", instances=1, config="D1·P1·T1", latency_s=0.5, throughput_rps=2.0),
            PlanPoint(state="local-cpu=2", instances=2, config="D1·P1·T2", latency_s=0.4, throughput_rps=3.0),
        ],
        plan_version="4",
        cost_model_error={"median": 0.05, "p90": 0.12},
        facts={"machine": "two <b>cores</b>"},
    )
