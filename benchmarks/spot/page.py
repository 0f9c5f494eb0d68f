"""The results as a table on the console and as one HTML page with figures."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

Result = dict[str, Any]

_STYLE = (
    "body{font:15px sans-serif;margin:2em;max-width:75em}"
    "td,th{padding:2px 9px;border-bottom:1px solid #ddd;text-align:left}"
)

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


def panel_table(panels: Sequence[Result]) -> Table:
    """P99 (mean) in seconds of every system on every panel."""
    table = Table("panel", *_SHOWN, title="P99 (mean) in seconds")
    for panel in panels:
        cells = (panel["systems"][name] for name in _SHOWN)
        row = (f"{one['p99_s']:.1f} ({one['mean_s']:.1f})" for one in cells)
        table.add_row(f"{panel['model']} {panel['trace']}", *row)
    return table


def bar_table(bars: Sequence[Result]) -> Table:
    """Asked, measured, and what a bound allows."""
    table = Table("bar", "at least", "measured", "met", "free transitions", "bound")
    for bar in bars:
        limits = ("" if bar[key] is None else f"{bar[key]:.2f}" for key in ("oracle", "bound"))
        value = f"{bar['value']:.3g}"
        table.add_row(bar["what"], f"{bar['limit']:g}", value, "yes" if bar["met"] else "NO", *limits)
    return table


def write_page(path: Path, result: Result) -> None:
    """One self-contained HTML page."""
    import matplotlib

    matplotlib.use("Agg")
    parts = ["<h1>Serving on instances that come and go: against SpotServe on its own traces</h1>"]
    parts += [_bars_html(result["bars"]), "<h2>P99 by panel</h2>", _figure(_p99_bars(result["panels"]))]
    parts += ["<h2>Latency over time with the instance count</h2>", _figure(_over_time(result["panels"]))]
    parts += ["<h2>Cost and P99, GPT-20B</h2>", _figure(_frontier(result))]
    parts += ["<h2>Bytes moved per change</h2>", _figure(_bytes(result["panels"]))]
    parts += ["<h2>Ablation (P99, s)</h2>", _ablation_html(result["ablation"])]
    parts += ["<h2>Bursts</h2>", _bursts_html(result["bursts"])]
    parts += ["<h2>The book</h2>", _book_html(result["books"])]
    page = f"<!doctype html><meta charset=utf-8><title>Spot study</title><style>{_STYLE}</style>{''.join(parts)}"
    path.write_text(page, encoding="utf-8")


def _rows(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"


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
    return _rows(["bar", "at least", "measured", "met", "with free transitions", "bound: a request alone"], rows)


def _ablation_html(rows: Sequence[Result]) -> str:
    names = list(rows[0]["systems"])
    table = [
        [f"{row['model']} {row['trace']}", *(f"{row['systems'][name]['p99_s']:.1f}" for name in names)] for row in rows
    ]
    return _rows(["panel", *names], table)


def _bursts_html(rows: Sequence[Result]) -> str:
    head = ["panel", "CV", "SpotServe old / new, ours: P99 s", "better mode over ours, 95 % interval"]
    table = [
        [
            f"{row['model']} {row['trace']}",
            f"{row['cv']:g}",
            " / ".join(f"{value:.0f}" for value in row["p99_s"]),
            "{:.2f} ({:.2f} … {:.2f})".format(*row["ratio_better"]),
        ]
        for row in rows
    ]
    return _rows(head, table)


def _book_html(books: Sequence[Result]) -> str:
    table = [
        [book["model"], count, words]
        for book in books
        if book["instances"] == 12
        for count, words in book["choices"].items()
    ]
    return _rows(["model", "instances", "choice"], table)


def _figure(figure: Any) -> str:
    from matplotlib import pyplot

    buffer = BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    pyplot.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img style="max-width:100%" src="data:image/svg+xml;base64,{data}">'


def _p99_bars(panels: Sequence[Result]) -> Any:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(14, 4))
    width = 0.9 / len(_SHOWN)
    at = np.arange(len(panels))
    for index, name in enumerate(_SHOWN):
        axes.bar(at + index * width, [panel["systems"][name]["p99_s"] for panel in panels], width, label=name)
    axes.set_xticks(at + 0.4, [f"{panel['model']}\n{panel['trace']}" for panel in panels])
    axes.set_ylabel("P99, s")
    axes.legend(ncol=4, fontsize=8)
    return figure


def _over_time(panels: Sequence[Result]) -> Any:
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(3, 4, figsize=(16, 9))
    for panel, axes in zip(panels, grid.flat, strict=True):
        for name, points in panel["over_time"].items():
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
        count = axes.twinx()
        count.step(*zip(*panel["counts"], strict=True), where="post", color="grey", linewidth=0.8)
        count.set_ylim(0, 12)
        axes.set_ylim(0)
        axes.set_title(f"{panel['model']} {panel['trace']}", fontsize=9)
    grid.flat[0].legend(fontsize=7)
    figure.tight_layout()
    return figure


def _frontier(result: Result) -> Any:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for trace in sorted({row["trace"] for row in result["cost"]}):
        rows = [row for row in result["cost"] if row["trace"] == trace]
        axes.plot(
            [1 - row["saved"] for row in rows], [row["p99_s"] for row in rows], marker="o", label=f"ours, {trace}"
        )
    for name, row in result["on_demand"].items():
        if isinstance(row, dict) and "p99_s" in row:
            axes.scatter([1.0], [row["p99_s"]], marker="x", label=f"8 on demand: {name}")
    axes.axvline(0.4, color="grey", linewidth=0.6)
    axes.set_xlabel("dollars, of 8 on-demand instances")
    axes.set_ylabel("P99, s")
    axes.set_ylim(0, 60)
    axes.legend(fontsize=7)
    return figure


def _bytes(panels: Sequence[Result]) -> Any:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(14, 3.5))
    events = [
        (f"{panel['model']}\n{panel['trace']}\n{e['t_s']:g} s", e["moved_gb"])
        for panel in panels
        for e in panel["events"]
    ]
    axes.bar(range(len(events)), [size for _, size in events])
    axes.set_xticks(range(len(events)), [name for name, _ in events], fontsize=5)
    axes.set_ylabel("GB of weights")
    return figure
