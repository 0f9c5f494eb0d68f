"""What a plan book of several models says, as tags, as a table, as Markdown and as curves over instances."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pyarrow as pa

from data.demand import Demand
from data.shared_plan import Forecast, SharedPlan, SharedPlanBook
from flows.summary import FitError

_GROUPS = pa.schema(
    [
        pa.field("state", pa.string()),
        pa.field("group", pa.int32()),
        pa.field("stages", pa.int32()),
        pa.field("shards", pa.int32()),
        pa.field("model", pa.string()),
        pa.field("max_batch", pa.int32()),
        pa.field("kv_share", pa.float64()),
        pa.field("partition", pa.string()),
    ]
)


def tags(book: SharedPlanBook) -> dict[str, str]:
    """The policy, and of the largest fleet what it attains, of all models and of each."""
    found = {"policy": book.policy, "models": ", ".join(spec.name for spec in book.models)}
    forecast = max(book.plans, key=lambda plan: plan.state.instances).forecast if book.plans else None
    if forecast is not None:
        found |= {name: f"{value:.4f}" for name, value in _figures(book, forecast)}
    return found | ({"occasion": book.occasion} if book.occasion else {})


def metrics(book: SharedPlanBook) -> Iterator[tuple[str, float, int]]:
    """`(metric, value, number of instances)` of every plan."""
    for plan in book.plans:
        count = plan.state.instances
        yield "devices_used", float(plan.deployment.devices if plan.deployment else 0), count
        yield "price_spot_usd_h", book.cluster.price_usd_h(plan.state), count
        if plan.forecast is not None:
            for name, value in _figures(book, plan.forecast):
                yield name, value, count


def group_table(book: SharedPlanBook) -> pa.Table:
    """Who is hosted where: a row for every model of every group of every state."""
    rows = [
        {
            "state": plan.state.key,
            "group": number,
            "stages": group.stages,
            "shards": group.shards,
            "model": hosted.model,
            "max_batch": hosted.max_batch,
            "kv_share": hosted.kv_share,
            "partition": "+".join(map(str, hosted.partition)),
        }
        for plan in book.plans
        if plan.deployment is not None
        for number, group in enumerate(plan.deployment.groups)
        for hosted in group.hosted
    ]
    return pa.Table.from_pylist(rows, schema=_GROUPS)


def markdown(book: SharedPlanBook, error: FitError | None = None) -> str:
    """What runs in every state and why, for people."""
    lines = [
        f"# Plan for {book.title} on {book.cluster.name}",
        "",
        f"Policy `{book.policy}`; plan book `{book.sha256[:12]}`.",
        *([f"{book.occasion}."] if book.occasion else []),
        *(
            [f"Cost models' worst error on held-out points: P50 {error.median:.1%}, P90 {error.p90:.1%}."]
            if error
            else []
        ),
        "",
        "| model | SLO s | requests/s | CV | tokens in | tokens out | measured on |",
        "|---|---|---|---|---|---|---|",
        *(_demand_row(demand) for demand in book.demands),
        "",
        "| state | groups | in time | at most | why |",
        "|---|---|---|---|---|",
        *(_plan_row(plan) for plan in book.plans),
    ]
    return "\n".join(lines) + "\n"


def _figures(book: SharedPlanBook, forecast: Forecast) -> Iterator[tuple[str, float]]:
    yield "attainment", forecast.attainment
    yield "attainment_bound", forecast.bound
    yield "attainment_gap", forecast.gap
    for spec, share in zip(book.models, forecast.by_model, strict=True):
        yield f"attainment.{re.sub(r'[^A-Za-z0-9_. /-]', '-', spec.name)}", share  # MLflow allows no others


def _demand_row(one: Demand) -> str:
    measured = f"{one.requests} requests" if one.requests else "told"
    lengths = f"{one.input_tokens:.0f} | {one.output_tokens:.0f}"
    return f"| {one.model} | {one.slo_s:g} | {one.rate_rps:.3g} | {one.cv:.2g} | {lengths} | {measured} |"


def _plan_row(plan: SharedPlan) -> str:
    shares = f"{plan.forecast.attainment:.1%} | {plan.forecast.bound:.1%}" if plan.forecast else "– | –"
    return f"| {plan.state.key} | {plan.deployment or '–'} | {shares} | {plan.reason} |"
