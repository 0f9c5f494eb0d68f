"""A study as one HTML page, and the figures on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from math import isfinite

import numpy as np
from matplotlib.figure import Figure

from flows.pages import facts, figure, page, section, table, tiles
from flows.study_figures import Costs, Panel, bytes_moved, cost_frontier, latency_bars, latency_over_time
from planning.study.results import Pooled, Result, frontier, pooled
from planning.study.study import Study
from planning.study.systems import system

_FIGURES = {
    "p99": ("P99 by policy", "Means over the seeds with 95 % intervals. What is never served is infinitely late."),
    "over_time": (
        "Latency over time, with the instance count",
        "Mean latency of the requests that arrived around each moment (first seed); grey: usable spot instances.",
    ),
    "frontier": (
        "Cost and latency",
        "Dollars of the whole trace against the P99. Grey: our engine on on-demand fleets of every size that keeps up.",
    ),
    "bytes": (
        "Bytes moved by each change",
        "Weights that travelled between instances (first seed). SpotServe and its baselines are charged by time alone.",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Findings:
    """A study with its results and the seconds that it took."""

    study: Study
    results: tuple[Result, ...]
    seconds: float

    @cached_property
    def pooled(self) -> tuple[Pooled, ...]:
        """Means over seeds, one for every trace and policy, on-demand fleets of the frontier included."""
        ordered = sorted(self.results, key=self._place)
        return tuple(pooled(list(group)) for _, group in groupby(ordered, key=self._place))

    def of(self, trace: str, policy: str) -> Pooled:
        """The means of one policy on one trace."""
        return next(one for one in self.pooled if (one.trace, one.policy) == (trace, policy))

    def first(self, trace: str, policy: str) -> Result:
        """The result of the first seed."""
        return next(one for one in self.results if (one.trace, one.policy) == (trace, policy))

    def fleets(self, trace: str) -> list[Pooled]:
        """The on-demand fleets of the frontier, from small to large."""
        return [self.of(trace, f"on-demand {count}") for count in self.study.constants]

    def mixed(self, trace: str) -> list[Pooled]:
        """The mixing policies of the frontier, by the price of a second."""
        return [self.of(trace, f"perennial-mixed {usd:g}") for usd in sorted(self.study.mixings)]

    def _place(self, result: Result) -> tuple[int, int, str]:
        names = list(self.study.policies)
        known = names.index(result.policy) if result.policy in names else len(names)
        return list(self.study.traces).index(result.trace), known, result.policy


def study_figures(findings: Findings) -> dict[str, Figure]:
    """Name → figure, of `p99`, `over_time`, `frontier` and `bytes`."""
    study = findings.study
    bars = {
        system(policy).title: [_bar(findings.of(trace, policy)) for trace in study.traces] for policy in study.policies
    }
    return {
        "p99": latency_bars(list(study.traces), bars),
        "over_time": latency_over_time([trace_panel(findings, trace) for trace in study.traces]),
        "frontier": cost_frontier([trace_costs(findings, trace) for trace in study.traces]),
        "bytes": bytes_moved([trace_changes(findings, trace) for trace in study.traces]),
    }


def trace_panel(findings: Findings, trace: str) -> Panel:
    """Latency over time of the policies on one trace."""
    fleet = findings.study.traces[trace]
    lines = {system(policy).title: findings.first(trace, policy).over_time for policy in findings.study.policies}
    return Panel(trace, fleet.counts, fleet.duration_s, lines)


def trace_changes(findings: Findings, trace: str) -> Panel:
    """(seconds, GB) of the changes on one trace."""
    lines = {
        system(policy).title: [(at_s, gb) for at_s, _, gb in findings.first(trace, policy).changes]
        for policy in findings.study.policies
    }
    return replace(trace_panel(findings, trace), lines=lines)


def trace_costs(findings: Findings, trace: str) -> Costs:
    """Dollars and P99 of the policies on one trace, beside on-demand fleets of every size."""
    points = {system(policy).title: _point(findings.of(trace, policy)) for policy in findings.study.policies}
    lines = {"on demand, by size": [_point(one) for one in findings.fleets(trace)]}
    if findings.study.mixings:
        lines["Perennial, mixed, by the price of a second"] = frontier([_point(one) for one in findings.mixed(trace)])
    return Costs(trace, points, lines)


def study_page(findings: Findings) -> str:
    """The page: what was found, figures, every number, and how it was made."""
    study = findings.study
    drawn = study_figures(findings)
    parts = [tiles(_headline(findings))]
    parts += [
        section(_FIGURES[name][0], figure(one, _FIGURES[name][0]), about=_FIGURES[name][1])
        for name, one in drawn.items()
    ]
    parts.append(section("All numbers", _numbers(findings), about="Means over the seeds; dollars for the whole trace."))
    parts.append(section("The policies", facts({system(name).title: system(name).about for name in study.policies})))
    parts.append(
        section("What Perennial runs", _choices(study), about="The book: the layout for each number of instances.")
    )
    parts.append(section("How it was made", facts(_facts(findings))))
    counts = f"{len(study.traces)} fleets, {len(study.policies)} policies, {study.seeds} seeds"
    lead = f"{counts}: simulated, with one profile for everybody"
    return page(f"{study.model.name} on instances that come and go", lead, parts)


def _headline(findings: Findings) -> dict[str, str]:
    study, ours = findings.study, findings.study.policies[0]
    tiled = {
        f"P99 of {system(ours).title}, {trace}": _seconds(findings.of(trace, ours).p99_s) for trace in study.traces
    }
    rivals = [name for name in study.policies[1:] if not name.startswith(("perennial", "oracle", "on-demand"))]
    for rival in rivals[:2]:
        ratios = [findings.of(trace, rival).p99_s / findings.of(trace, ours).p99_s for trace in study.traces]
        if np.isfinite(ratios).all():
            tiled[f"P99 of {system(rival).title} over it"] = f"{float(np.exp(np.mean(np.log(ratios)))):.2f}×"
    saved = [_saved(findings, trace, ours) for trace in study.traces]
    known = [share for share in saved if share is not None]
    if known:
        tiled["fewer dollars than the on-demand fleet with no higher P99"] = f"{100 * float(np.mean(known)):.0f} %"
    return tiled


def _saved(findings: Findings, trace: str, policy: str) -> float | None:
    """Share of the dollars of the cheapest on-demand fleet that is as good; None if none is, or all is free."""
    ours = findings.of(trace, policy)
    able = [one.usd for one in findings.fleets(trace) if one.p99_s <= ours.p99_s and one.usd > 0]
    return 1 - ours.usd / min(able) if able else None


def _numbers(findings: Findings) -> str:
    head = [
        "fleet",
        "policy",
        "mean",
        "P50",
        "P90",
        "P99",
        "95 % interval",
        "unfinished",
        "dollars",
        "GB moved",
        "longest pause",
    ]
    rows = [
        [
            one.trace,
            system(one.policy).title,
            *(_seconds(value) for value in (one.mean_s, one.p50_s, one.p90_s, one.p99_s)),
            " – ".join(_seconds(end) for end in one.interval_s),
            f"{one.unfinished:.1f} of {one.requests:.0f}",
            f"${one.usd:.2f}",
            f"{one.moved_gb:.0f}" if one.moved_gb else "–",
            _seconds(one.longest_pause_s),
        ]
        for one in findings.pooled
        if one.policy in findings.study.policies
    ]
    return table(head, rows)


def _choices(study: Study) -> str:
    most = max(trace.most for trace in study.traces.values())
    return table(["instances", "choice"], [[count, study.book.explain(count)] for count in range(1, most + 1)])


def _facts(findings: Findings) -> Mapping[str, str]:
    study, kind = findings.study, findings.study.model.kind
    arrivals = "recorded" if study.recorded_s is not None else f"drawn, gaps with a CV of {study.cv:g}"
    return {
        "instances": f"{kind.name}: {kind.devices} × {kind.accelerator}",
        "dollars per hour": f"{kind.price_spot_usd_h:g} spot, {kind.price_on_demand_usd_h:g} on demand",
        "requests": f"{study.model.rate_rps:.3g} per second, {arrivals}",
        "fleets": "; ".join(
            f"{name}: {one.least} to {one.most} instances over {one.duration_s:g} s, {len(one.counts)} states"
            for name, one in study.traces.items()
        ),
        "simulations": f"{len(findings.results)} in {findings.seconds:.1f} s",
    }


def _bar(one: Pooled) -> tuple[float, float, float]:
    return one.p99_s, *one.interval_s


def _point(one: Pooled) -> tuple[float, float]:
    return one.usd, one.p99_s


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if isfinite(value) else "∞"
