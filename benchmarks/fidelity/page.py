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

from benchmarks.fidelity.compare import TRACE

Result = dict[str, Any]

_HEAD = ("run", "requests", "mean: measured, simulated, error", "P99: measured, simulated, error", "bars")
_SHARED_HEAD = ("run", "requests", "answered in time: measured, simulated, error", "by model", "bar")
_STYLE = (
    "body{font:15px sans-serif;margin:2em;max-width:75em}"
    "td,th{padding:2px 9px;border-bottom:1px solid #ddd;text-align:left}"
)


def rows(runs: Sequence[Result]) -> list[list[str]]:
    """One row for each run of one model."""
    return [
        [
            f"{run['name']}, {' → '.join(run['layouts'].values())}",
            str(run["requests"]),
            _cell(run, "mean_s"),
            _cell(run, "p99_s"),
            _verdict(run),
        ]
        for run in runs
    ]


def shared_rows(runs: Sequence[Result]) -> list[list[str]]:
    """One row for each run of several models."""
    return [
        [
            f"{run['name']}, {run['groups']}",
            str(run["requests"]),
            f"{_attained(run, 'all')}, {100 * run['error']:+.1f} points",
            "; ".join(f"{model} {_attained(run, model)}" for model in run["slo_s"]),
            _verdict(run),
        ]
        for run in runs
    ]


def _verdict(run: Result) -> str:
    return "met" if run["met"] else "MISSED"


def _cell(run: Result, key: str) -> str:
    return f"{run['measured'][key]:.2f} s, {run['simulated'][key]:.2f} s, {100 * run['errors'][key]:+.1f} %"


def _attained(run: Result, which: str) -> str:
    return f"{100 * run['measured'][which]:.1f} %, {100 * run['simulated'][which]:.1f} %"


def _sections(results: Result) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """Title, head and rows of every table that has some."""
    one = "Latency of real runs of one model and of their simulations", _HEAD, rows(results["runs"])
    several = "SLO attainment of several models", _SHARED_HEAD, shared_rows(results["shared_runs"])
    return [section for section in (one, several) if section[2]]


def tables(results: Result) -> list[Table]:
    """For the console."""
    found = []
    for title, head, lines in _sections(results):
        found.append(Table(*head, title=title))
        for line in lines:
            found[-1].add_row(*line)
    return found


def markdown(results: Result) -> str:
    """For the documentation."""
    sections = ([head, ["---"] * len(head), *lines] for _, head, lines in _sections(results))
    return "\n".join("".join(f"| {' | '.join(line)} |\n" for line in lines) for lines in sections)


def write_page(path: Path, results: Result) -> None:
    """One self-contained HTML page; its figures need matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    body = "".join(_section(*section) for section in _sections(results))
    figures = "".join(f"<h2>{html.escape(run['name'])}</h2>{_figure(run)}" for run in results["runs"])
    page = (
        f"<!doctype html><meta charset=utf-8><title>Fidelity</title><style>{_STYLE}</style>"
        f"<h1>Real runs and their simulations</h1>{body}{figures}"
    )
    path.write_text(page, encoding="utf-8")


def _section(title: str, head: Sequence[str], lines: list[list[str]]) -> str:
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<h2>{html.escape(title)}</h2><table><tr>{cells}</tr>{body}</table>"


def _figure(run: Result) -> str:
    """Latency by arrival with what happened, and its distribution."""
    from matplotlib import pyplot

    figure, (over_time, spread) = pyplot.subplots(1, 2, figsize=(14, 3.4), width_ratios=(3, 2))
    for kind, colour in (("measured", "tab:blue"), ("simulated", "tab:orange")):
        trace = run[TRACE]
        latency_s = np.array([np.nan if value is None else value for value in trace[f"{kind}_s"]])
        over_time.plot(trace["arrival_s"], latency_s, ".-", color=colour, linewidth=0.6, markersize=3, label=kind)
        spread.step(np.sort(latency_s), np.arange(1, len(latency_s) + 1) / len(latency_s), color=colour, label=kind)
    for one in run["happenings"]:
        over_time.axvline(one["time_s"], color="grey", linewidth=0.7)
        over_time.annotate(one["kind"], (one["time_s"], over_time.get_ylim()[1]), fontsize=7, rotation=90, va="top")
    over_time.set(xlabel="arrival, s", ylabel="latency, s", ylim=(0, None))
    spread.set(xlabel="latency, s", ylabel="share of requests", xlim=(0, None))
    spread.legend()
    buffer = BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", dpi=90)  # hundreds of marks: smaller than SVG
    pyplot.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img style="max-width:100%" src="data:image/png;base64,{data}">'
