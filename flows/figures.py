"""Pictures of a plan book and of the profile under it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from data.plan import PlanBook
from data.profile import Profile
from data.shared_plan import SharedPlanBook
from flows.summary import curve

_SIZE_INCHES = (7.0, 4.0)
_MOST_LABELS = 40
_MOST_LINES = 10


def figures(book: PlanBook, profile: Profile | None) -> dict[str, Figure]:
    """File name → figure: latency and throughput by instances, the frontier, what follows what, and the step times."""
    made = {"curve.png": _curve(book), "frontier.png": _frontier(book)}
    if any(plan.transitions for plan in book.plans):
        made["transitions.png"] = _transitions(book)
    if profile is not None:
        made["steps.png"] = _steps(profile)
    return made


def shared_figures(book: SharedPlanBook) -> dict[str, Figure]:
    """File name → figure: what every number of instances attains, of all models and of each, and the bound."""
    figure, axes = _figure(1)
    known = [(plan.state.instances, plan.forecast) for plan in book.plans if plan.forecast]
    counts = [count for count, _ in known]
    axes.plot(
        counts, [forecast.bound for _, forecast in known], linestyle="--", color="gray", label="no placement above"
    )
    axes.plot(counts, [forecast.attainment for _, forecast in known], marker="o", linewidth=2, label="all models")
    for number, spec in enumerate(book.models[:_MOST_LINES]):
        axes.plot(counts, [forecast.by_model[number] for _, forecast in known], alpha=0.6, label=spec.name)
    _label(axes, "Requests that meet their SLO", "instances", "share")
    axes.legend(fontsize="small")
    return {"attainment.png": figure}


def _figure(columns: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)


def _curve(book: PlanBook) -> Figure:
    figure, (left, right) = _figure(2)
    plans = [(plan.state.instances, plan.estimate) for plan in curve(book) if plan.estimate]
    counts = [count for count, _ in plans]
    left.plot(counts, [estimate.latency_s for _, estimate in plans], marker="o")
    right.plot(counts, [estimate.throughput_rps for _, estimate in plans], marker="o", color="tab:green")
    right.axhline(book.objective.required_rps, linestyle="--", color="gray")
    _label(left, "Latency of the reference request", "instances", "s")
    _label(right, "Throughput (dashed: required)", "instances", "requests/s")
    return figure


def _frontier(book: PlanBook) -> Figure:
    figure, axes = _figure(1)
    for plan in curve(book):
        if not plan.frontier:
            continue
        latency = [candidate.estimate.latency_s for candidate in plan.frontier]
        rate = [candidate.estimate.throughput_rps for candidate in plan.frontier]
        dots = axes.scatter(rate, latency, s=14, alpha=0.6, label=plan.state.key)
        if plan.estimate:
            color = dots.get_facecolor()[0]
            axes.scatter([plan.estimate.throughput_rps], [plan.estimate.latency_s], s=90, marker="*", color=color)
    _label(axes, "Candidates by state (star: chosen)", "requests/s", "latency, s")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    return figure


def _transitions(book: PlanBook) -> Figure:
    """What runs on so many instances (colour) while another layout is in force (row)."""
    figure, axes = _figure(1)
    plans = curve(book)
    layouts = list(dict.fromkeys(move.now for move in book.moves))
    chosen = [[plan.given(now).config for plan in plans] for now in layouts]
    numbers = [[layouts.index(one) if one in layouts else -1 for one in row] for row in chosen]
    axes.imshow(numbers, cmap="nipy_spectral", aspect="auto", interpolation="nearest")
    _label(axes, "What runs next, by what runs (colour)", "instances", "in force")
    axes.set_xticks(range(len(plans)), [str(plan.state.instances) for plan in plans], fontsize="x-small")
    if len(layouts) <= _MOST_LABELS:
        axes.set_yticks(range(len(layouts)), [str(one) for one in layouts], fontsize="xx-small")
    axes.grid(visible=False)
    return figure


def _steps(profile: Profile) -> Figure:
    figure, panels = _figure(2)
    for axes, phase, x in zip(panels, ("prefill", "decode"), ("tokens", "batch"), strict=True):
        points: dict[int, list[tuple[int, float]]] = defaultdict(list)
        for row in profile.steps.to_pylist():
            if row["phase"] == phase and row["part"] == "layers":
                extent = row["batch"] * row["tokens"] if x == "tokens" else row["batch"]
                points[row["shards"]].append((extent, row["time_ms"] / row["layers"]))
        for shards, line in sorted(points.items()):
            axes.plot(*zip(*sorted(line), strict=True), "o", alpha=0.6, label=f"{shards} shards")
        _label(axes, f"{phase}: ms per layer", x, "ms")
        if points:
            axes.legend(fontsize="small")
    return figure
