"""What a plan book says, as a table, as Markdown and as curves over the number of instances."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from data.explanation import Candidate
from data.layout import ParallelConfig
from data.plan import Plan, PlanBook


@dataclass(frozen=True, slots=True)
class FitError:
    """Relative error of the cost model on points held out of its fit: median and 90th percentile, 0 … 1."""

    median: float
    p90: float


def curve(book: PlanBook) -> tuple[Plan, ...]:
    """One plan per number of instances, ascending: of equal counts, the state with most devices."""
    best: dict[int, Plan] = {}
    for plan in sorted(book.plans, key=lambda plan: (book.cluster.devices(plan.state), plan.state.key)):
        best[plan.state.instances] = plan
    return tuple(best[count] for count in sorted(best))


def spot_price_usd_h(book: PlanBook, plan: Plan) -> float:
    """What the instances of a plan's state cost together on the spot market, US dollars per hour."""
    return book.cluster.price_usd_h(plan.state)


def curve_metrics(book: PlanBook) -> Iterator[tuple[str, float, int]]:
    """`(metric, value, number of instances)` of every plan on the curve."""
    for plan in curve(book):
        count = plan.state.instances
        yield "devices_used", float(plan.config.devices if plan.config else 0), count
        yield "price_spot_usd_h", spot_price_usd_h(book, plan), count
        if plan.estimate:
            yield "latency_s", plan.estimate.latency_s, count
            yield "throughput_rps", plan.estimate.throughput_rps, count
            yield "memory_gb", plan.estimate.memory_bytes / 1e9, count


def frontier_rows(book: PlanBook) -> list[dict[str, Any]]:
    """Every candidate that was looked at, one row each; `chosen` marks the plan of its state."""
    return [_row(plan, candidate) for plan in book.plans for candidate in plan.frontier]


def transition_rows(book: PlanBook) -> list[dict[str, Any]]:
    """What runs in a state while something else than its plan is in force, where that makes a difference."""
    return [_transition(book, plan, now) for plan in book.plans for now, _ in plan.transitions]


def transition_table(book: PlanBook) -> pa.Table:
    """`transition_rows` as an Arrow table."""
    return pa.Table.from_pylist(transition_rows(book), schema=_TRANSITIONS)


def frontier_table(book: PlanBook) -> pa.Table:
    """`frontier_rows` as an Arrow table."""
    return pa.Table.from_pylist(frontier_rows(book), schema=_FRONTIER)


def summary_markdown(book: PlanBook, error: FitError | None = None) -> str:
    """What runs in every state and why, for people."""
    lines = [
        f"# Plan for {book.model.name} on {book.cluster.name}",
        "",
        f"Policy `{book.policy}`; {_objective(book)}.",
        *([f"It takes for granted: {book.assumptions}."] if book.assumptions else []),
        *([f"Cost model error on held-out points: median {error.median:.1%}, P90 {error.p90:.1%}."] if error else []),
        f"Plan book `{book.sha256[:12]}`, from profile `{book.profile_sha256[:12]}`.",
        "",
        "| state | configuration | latency s | requests/s | GB/device | $/h used | of | why | with one instance less |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_markdown_row(book, plan) for plan in book.plans),
    ]
    return "\n".join(lines) + "\n"


_FRONTIER = pa.schema(
    [
        pa.field("state", pa.string()),
        pa.field("config", pa.string()),
        pa.field("replicas", pa.int32()),
        pa.field("stages", pa.int32()),
        pa.field("shards", pa.int32()),
        pa.field("max_batch", pa.int32()),
        pa.field("latency_s", pa.float64()),
        pa.field("throughput_rps", pa.float64()),
        pa.field("memory_bytes", pa.int64()),
        pa.field("price_usd_h", pa.float64()),
        pa.field("residency", pa.string()),
        pa.field("dominated_by", pa.string()),
        pa.field("chosen", pa.bool_()),
    ]
)


_TRANSITIONS = pa.schema(
    [
        pa.field("state", pa.string()),
        pa.field("in_force", pa.string()),
        pa.field("config", pa.string()),
        pa.field("latency_s", pa.float64()),
        pa.field("moved_bytes", pa.int64()),
        pa.field("prepare_s", pa.float64()),
        pa.field("pause_s", pa.float64()),
    ]
)


def _transition(book: PlanBook, plan: Plan, now: ParallelConfig) -> dict[str, Any]:
    chosen = plan.given(now)
    move = book.move(now, chosen.config) if chosen.config else None
    return {
        "state": plan.state.key,
        "in_force": now.key,
        "config": chosen.config.key if chosen.config else None,
        "latency_s": chosen.estimate.latency_s if chosen.estimate else None,
        "moved_bytes": move.moved_bytes if move else 0,
        "prepare_s": move.prepare_s if move else 0.0,
        "pause_s": move.pause_s if move else 0.0,
    }


def _row(plan: Plan, candidate: Candidate) -> dict[str, Any]:
    config, estimate = candidate.config, candidate.estimate
    return {
        "state": plan.state.key,
        "config": str(config),
        "replicas": config.replicas,
        "stages": config.stages,
        "shards": config.shards,
        "max_batch": config.max_batch,
        "latency_s": estimate.latency_s,
        "throughput_rps": estimate.throughput_rps,
        "memory_bytes": estimate.memory_bytes,
        "price_usd_h": estimate.price_usd_h,
        "residency": estimate.residency,
        "dominated_by": candidate.dominated_by,
        "chosen": config == plan.config,
    }


def _objective(book: PlanBook) -> str:
    goal = book.objective
    limit = f", latency at most {goal.slo_s:g} s" if goal.slo_s is not None else ""
    return f"{goal.required_rps:g} requests/s of {goal.input_tokens} + {goal.output_tokens} tokens{limit}"


def _markdown_row(book: PlanBook, plan: Plan) -> str:
    estimate = plan.estimate
    numbers = (
        f"{estimate.latency_s:.3f} | {estimate.throughput_rps:.2f} | {estimate.memory_bytes / 1e9:.2f} "
        f"| {estimate.price_usd_h:.2f} | {spot_price_usd_h(book, plan):.2f}"
        if estimate
        else f"– | – | – | – | {spot_price_usd_h(book, plan):.2f}"
    )
    words = " | ".join(text.replace("|", "\\|") for text in (plan.reason, plan.fewer))
    return f"| {plan.state.key} | {plan.config or '–'} | {numbers} | {words} |"
