"""The bars of the comparison: what was asked, what was measured, and how far a bound allows to get."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

Result = dict[str, Any]

_SLACK = 1.005  # two simulations of one layout with other arrivals differ by less
_MODES = ("SpotServe, old batching", "SpotServe, new batching")


def _p99(panel: Result, *names: str) -> float:
    return min(float(panel["systems"][name]["p99_s"]) for name in names)


def _scripted(panel: Result) -> float:
    return _p99(panel, f"SpotServe, {panel['scripted']} batching")


def _better(panel: Result) -> float:
    return _p99(panel, *_MODES)


def _published_baselines(panel: Result) -> float:
    """The better of the two as configured and in the mode that was scripted."""
    return _p99(panel, f"Reparallelization, {panel['scripted']}", f"Rerouting pinned, {panel['scripted']}")


def _pinned_baselines(panel: Result) -> float:
    kinds = ("Reparallelization", "Rerouting pinned")
    return _p99(panel, *(f"{kind}, {mode}" for kind in kinds for mode in ("old", "new")))


def _best_baselines(panel: Result) -> float:
    kinds = ("Reparallelization", "Rerouting pinned", "Rerouting best")
    return _p99(panel, *(f"{kind}, {mode}" for kind in kinds for mode in ("old", "new")))


def geometric(values: Sequence[float]) -> float:
    """Geometric mean."""
    return float(np.exp(np.mean(np.log(values))))


def _against(panels: Sequence[Result], theirs: Callable[[Result], float]) -> tuple[float, float, float]:
    """Geometric mean of their P99 over ours, over the oracle's, and over a single request's least time."""
    pairs = [(theirs(panel), _p99(panel, "ours"), _p99(panel, "oracle"), panel["least_request_s"]) for panel in panels]
    return (
        geometric([them / ours for them, ours, _, _ in pairs]),
        geometric([them / free for them, _, free, _ in pairs]),
        geometric([them / least for them, _, _, least in pairs]),
    )


def _bar(what: str, limit: float, value: float, bound: float | None = None, oracle: float | None = None) -> Result:
    return {"what": what, "limit": limit, "value": value, "met": value >= limit, "oracle": oracle, "bound": bound}


def bars(result: Result) -> list[Result]:
    """Every bar; `bound` is what a system would reach that serves each request alone on the fastest layout."""
    return [*_panel_bars(result["panels"]), *_burst_bars(result["bursts"]), *_other_bars(result)]


def _panel_bars(panels: Sequence[Result]) -> Iterator[Result]:
    worst = min(_better(panel) / _p99(panel, "ours") for panel in panels)
    yield _bar("P99 of SpotServe's better mode over ours, worst panel", 1.0, worst)
    for what, limit, theirs in (
        ("SpotServe's better mode, geometric mean of 12 panels", 1.6, _better),
        ("the mode that SpotServe's scripts ran", 2.2, _scripted),
        ("better of Reparallelization and Rerouting, as configured and scripted", 2.5, _published_baselines),
        ("the same, pinned, in the better of both batching modes", 2.5, _pinned_baselines),
        ("the same, Rerouting with the best shape in hindsight, better mode", 2.5, _best_baselines),
    ):
        value, oracle, bound = _against(panels, theirs)
        yield _bar(what, limit, value, bound, oracle)


def _burst_bars(bursts: Sequence[Result]) -> Iterator[Result]:
    for cv in sorted({row["cv"] for row in bursts}):
        rows = [row for row in bursts if row["cv"] == cv]
        for mode in ("better", "new", "old"):
            value = geometric([row[f"ratio_{mode}"][0] for row in rows])
            yield _bar(f"true CV {cv:g}: SpotServe's {mode} mode over ours, geometric mean", 2.0, value)
        worst = min(row["ratio_better"][1] for row in rows)
        yield _bar(f"true CV {cv:g}: better mode, worst panel, lower end of its interval", 1.0, worst)


def _other_bars(result: Result) -> Iterator[Result]:
    for key, what in (("mean_s", "average"), ("p99_s", "P99")):
        ratios = [
            min(row["systems"][name][key] for name in _MODES) / row["systems"]["ours"][key]
            for row in result["full_trace"]
        ]
        yield _bar(f"whole recording: {what} of SpotServe's better mode over ours, worst model", 1.0, min(ratios))
    slowest = max(took for row in result["full_trace"] for took in row["seconds"].values())
    yield _bar("whole recording: 10 s over the slowest simulation", 1.0, 10.0 / slowest)
    for what, limit_s in _on_demand_limits(result["on_demand"]).items():
        best = [_saving(result["cost"], trace, limit_s) for trace in sorted({row["trace"] for row in result["cost"]})]
        words = f"dollars saved at the P99 of 8 on-demand instances ({what}, {limit_s:.1f} s), least"
        yield _bar(words, 0.6, min(best), _most_saved(result["on_demand"], limit_s))
    divided = result["robustness"]["ours with prefill not divided"]
    for cv in sorted({row["cv"] for row in divided}):
        value = geometric([row["ratio_better"][0] for row in divided if row["cv"] == cv])
        limit = 1.6 if cv < 1 else 2.0
        yield _bar(f"CV {cv:g}, better mode, if prefill is divided for SpotServe alone", limit, value)
    for most, limit in ((12, 60.0), (256, 600.0)):
        took = sum(row["seconds"] for row in result["books"] if row["instances"] == most)
        yield _bar(f"books of three models for {most} instances: {limit:g} s over the time", 1.0, limit / took)
    lookup = max(row["lookup_ms"] for row in result["books"])
    yield _bar("1 ms over the slowest lookup", 1.0, 1.0 / lookup)


def _on_demand_limits(on_demand: Result) -> dict[str, float]:
    return {name: row["p99_s"] for name, row in on_demand.items() if isinstance(row, dict) and "p99_s" in row}


def _most_saved(on_demand: Result, limit_s: float) -> float:
    """With the fewest spot instances on which any layout keeps the limit while nothing changes."""
    able = (int(count) for count, p99 in on_demand["p99_by_instances"].items() if p99 <= limit_s * _SLACK)
    fewest = min(able, default=8)
    return 1 - fewest / 8 * (1 - float(on_demand["price_ratio_saves"]))


def _saving(rows: Sequence[Result], trace: str, limit_s: float) -> float:
    """The most that is saved on a trace while P99 is no higher than the limit."""
    return max((row["saved"] for row in rows if row["trace"] == trace and row["p99_s"] <= limit_s), default=-1.0)
