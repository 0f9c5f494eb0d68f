"""The results as a table on the console and as one HTML page with figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from flows.pages import figure, page, section, table
from flows.study_figures import Costs, Panel, bytes_moved, cost_frontier, latency_bars, latency_over_time

Result = dict[str, Any]

_COLUMNS = 4
_SHOWN = (
    "SpotServe, old batching",
    "SpotServe, new batching",
    "Reparallelization, new",
    "Rerouting pinned, new",
    "Rerouting best, new",
    "SkyServe-like",
    "ours",
    "ours, with on-demand",
    "oracle",
)


_FRONTIER = "Ours on at most 3 to 10 spot instances, beside 8 on-demand instances."


def panel_table(panels: Sequence[Result]) -> Table:
    """P99 (mean) in seconds of every system on every panel."""
    shown = Table("panel", *_SHOWN, title="P99 (mean) in seconds")
    for panel in panels:
        cells = (panel["systems"][name] for name in _SHOWN)
        row = (f"{one['p99_s']:.1f} ({one['mean_s']:.1f})" for one in cells)
        shown.add_row(_name(panel), *row)
    return shown


def bar_table(bars: Sequence[Result]) -> Table:
    """Asked, measured, and what a bound allows."""
    shown = Table("bar", "at least", "measured", "met", "free transitions", "bound")
    for bar in bars:
        limits = ("" if bar[key] is None else f"{bar[key]:.2f}" for key in ("oracle", "bound"))
        value = f"{bar['value']:.3g}"
        shown.add_row(bar["what"], f"{bar['limit']:g}", value, "yes" if bar["met"] else "NO", *limits)
    return shown


def write_page(path: Path, result: Result) -> None:
    """One self-contained HTML page."""
    panels = result["panels"]
    parts = [
        section("Bars", _bars_html(result["bars"])),
        section("P99 by panel", figure(_p99_bars(panels), "P99 by panel")),
        section("Latency over time, with the instance count", figure(_over_time(panels), "Latency over time")),
        section("Cost and P99, GPT-20B", figure(_frontier(result), "Cost and P99"), about=_FRONTIER),
        section("Bytes moved per change", figure(_bytes(panels), "Bytes moved per change")),
        section("Ablation (P99, s)", _ablation_html(result["ablation"])),
        section("Bursts", _bursts_html(result["bursts"])),
        section("The book", _book_html(result["books"])),
    ]
    title = "Serving on instances that come and go: against SpotServe on its own traces"
    path.write_text(page(title, "python -m benchmarks.spot; docs/spot.md explains it", parts), encoding="utf-8")


def _name(row: Result) -> str:
    return f"{row['model']} {row['trace']}"


def _bars_html(bars: Sequence[Result]) -> str:
    rows = [
        [
            bar["what"],
            bar["limit"],
            f"{bar['value']:.3g}",
            "yes" if bar["met"] else "no",
            *("" if bar[key] is None else f"{bar[key]:.2f}" for key in ("oracle", "bound")),
        ]
        for bar in bars
    ]
    return table(["bar", "at least", "measured", "met", "with free transitions", "bound: a request alone"], rows)


def _ablation_html(rows: Sequence[Result]) -> str:
    names = list(rows[0]["systems"])
    cells = [[_name(row), *(f"{row['systems'][name]['p99_s']:.1f}" for name in names)] for row in rows]
    return table(["panel", *names], cells)


def _bursts_html(rows: Sequence[Result]) -> str:
    head = ["panel", "CV", "SpotServe old / new, ours: P99 s", "better mode over ours, 95 % interval"]
    cells = [
        [
            _name(row),
            f"{row['cv']:g}",
            " / ".join(f"{value:.0f}" for value in row["p99_s"]),
            "{:.2f} ({:.2f} … {:.2f})".format(*row["ratio_better"]),
        ]
        for row in rows
    ]
    return table(head, cells)


def _book_html(books: Sequence[Result]) -> str:
    cells = [
        [book["model"], count, words]
        for book in books
        if book["instances"] == 12
        for count, words in book["choices"].items()
    ]
    return table(["model", "instances", "choice"], cells)


def _p99_bars(panels: Sequence[Result]) -> Figure:
    values = {name: [float(panel["systems"][name]["p99_s"]) for panel in panels] for name in _SHOWN}
    bars = {name: [(value, value, value) for value in row] for name, row in values.items()}
    return latency_bars([f"{panel['model']}\n{panel['trace']}" for panel in panels], bars)


def _over_time(panels: Sequence[Result]) -> Figure:
    drawn = [Panel(_name(panel), panel["counts"], _end_s(panel), panel["over_time"]) for panel in panels]
    return latency_over_time(drawn, columns=_COLUMNS)


def _frontier(result: Result) -> Figure:
    """Shares of what 8 on-demand instances cost."""
    lines = {
        f"ours, {trace}": [(1 - row["saved"], row["p99_s"]) for row in result["cost"] if row["trace"] == trace]
        for trace in sorted({row["trace"] for row in result["cost"]})
    }
    on_demand = {
        f"8 on demand: {name}": (1.0, float(row["p99_s"]))
        for name, row in result["on_demand"].items()
        if isinstance(row, dict) and "p99_s" in row
    }
    return cost_frontier([Costs("", on_demand, lines, "dollars, of 8 on-demand instances")])


def _bytes(panels: Sequence[Result]) -> Figure:
    drawn = [
        Panel(
            _name(panel), panel["counts"], _end_s(panel), {"ours": [(e["t_s"], e["moved_gb"]) for e in panel["events"]]}
        )
        for panel in panels
    ]
    return bytes_moved(drawn, columns=_COLUMNS)


def _end_s(panel: Result) -> float:
    """The end of a panel's trace, as far as its bins say."""
    return max(float(points[-1][0]) for points in panel["over_time"].values())
