"""Figures of a study: latency by system, over time, against dollars, and what every change moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, isfinite
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from flows.pages import FAINT, GRID, INK, SERIES, SOFT

Point = tuple[float, float]
Bar = tuple[float, float, float]  # value, and the ends of its interval

_MARKS = "osD^vP*X"
_WIDE = 11.0
_TALL = 3.6
_COLUMNS = 2


@dataclass(frozen=True, slots=True)
class Panel:
    """One trace: instances from each moment on, and lines of (seconds, latency)."""

    title: str
    counts: Sequence[tuple[float, int]]
    end_s: float
    lines: Mapping[str, Sequence[Point]]


@dataclass(frozen=True, slots=True)
class Costs:
    """Dollars (or what `unit` says) and P99 of `systems` on one trace, and `lines` of them, such as fleets by size."""

    title: str
    systems: Mapping[str, Point]
    lines: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    unit: str = "dollars"


def latency_bars(groups: Sequence[str], systems: Mapping[str, Sequence[Bar]]) -> Figure:
    """P99 of every system in every group, with intervals; on a logarithmic axis, for they differ by far."""
    figure, (axes,) = _figure(1, 1)
    width, at = 0.84 / len(systems), np.arange(len(groups))
    for index, (name, bars) in enumerate(systems.items()):
        value, low, high = np.array(bars, dtype=float).T
        middle = at + (index + 0.5) * width - 0.42
        known = np.isfinite(value)
        axes.bar(middle[known], value[known], width * 0.88, color=_colour(index), alpha=_alpha(index), label=name)
        spread = np.stack([value[known] - low[known], high[known] - value[known]])
        axes.errorbar(middle[known], value[known], spread, fmt="none", ecolor=SOFT, elinewidth=0.8)
        for place in middle[~known]:
            axes.text(place, 0.02, "∞", transform=axes.get_xaxis_transform(), ha="center", color=SOFT)
    _seconds(axes)
    axes.set_xticks(at, groups)
    _finish(figure, [axes], 1)
    return figure


def latency_over_time(panels: Sequence[Panel], most: int = 4, columns: int = _COLUMNS) -> Figure:
    """Mean latency of what arrived around each moment, over the instance count as steps in the background."""
    figure, grid = _figure(ceil(len(panels) / columns), min(len(panels), columns))
    for panel, axes in zip(panels, grid, strict=False):
        counts = [*panel.counts, (panel.end_s, panel.counts[-1][1])]
        below = axes.twinx()
        moments, sizes = zip(*counts, strict=True)
        below.fill_between(moments, sizes, step="post", color=FAINT, linewidth=0)
        below.set_ylim(0, 1.6 * max(count for _, count in counts))
        below.set_ylabel("instances", color=SOFT)
        _bare(below)
        axes.set_zorder(below.get_zorder() + 1)
        axes.patch.set_visible(False)
        for index, (name, points) in enumerate(list(panel.lines.items())[:most]):
            axes.plot(*zip(*points, strict=True), color=_colour(index), linewidth=1.6, label=name)
        axes.set_ylim(0)
        axes.set_title(panel.title, fontsize=10, color=INK, loc="left")
        axes.set_xlabel("s", color=SOFT)
        axes.set_ylabel("mean latency, s", color=SOFT)
    _finish(figure, grid, len(panels))
    return figure


def cost_frontier(costs: Sequence[Costs]) -> Figure:
    """P99 against dollars: systems as marks; fleets by size and policies by price as lines, the first one in grey."""
    figure, grid = _figure(ceil(len(costs) / _COLUMNS), min(len(costs), _COLUMNS))
    for one, axes in zip(costs, grid, strict=False):
        for index, (name, points) in enumerate(one.lines.items()):
            finite = [point for point in points if isfinite(point[1])]
            if finite:
                axes.plot(
                    *zip(*finite, strict=True),
                    color=_colour(index - 1) if index else SOFT,
                    linewidth=1.2,
                    marker=".",
                    label=name,
                )
        for index, (name, (usd, seconds)) in enumerate(one.systems.items()):
            if isfinite(seconds):
                axes.scatter(
                    [usd],
                    [seconds],
                    s=52,
                    color=_colour(index),
                    marker=_MARKS[index % len(_MARKS)],
                    label=name,
                    zorder=3,
                )
        _seconds(axes)
        axes.set_title(one.title, fontsize=10, color=INK, loc="left")
        axes.set_xlabel(one.unit, color=SOFT)
        axes.set_xlim(0)
    _finish(figure, grid, len(costs))
    return figure


def bytes_moved(panels: Sequence[Panel], columns: int = _COLUMNS) -> Figure:
    """GB that every change of the layout moved, by its moment; systems that moved nothing are left out."""
    figure, grid = _figure(ceil(len(panels) / columns), min(len(panels), columns), tall=2.6)
    for panel, axes in zip(panels, grid, strict=False):
        width = panel.end_s / 150
        for index, (name, points) in enumerate(panel.lines.items()):
            if any(size for _, size in points):
                at = [at_s + index * width for at_s, _ in points]
                axes.bar(at, [size for _, size in points], width, color=_colour(index), label=name)
        axes.set_xlim(0, panel.end_s)
        axes.set_title(panel.title, fontsize=10, color=INK, loc="left")
        axes.set_xlabel("s", color=SOFT)
        axes.set_ylabel("GB", color=SOFT)
    _finish(figure, grid, len(panels))
    return figure


def _figure(rows: int, columns: int, tall: float = _TALL) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_WIDE, tall * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        _bare(axes)
        axes.grid(axis="y", color=GRID, linewidth=1.0)
        axes.set_axisbelow(True)
    return figure, list(grid.flat)


def _seconds(axes: Axes) -> None:
    """A logarithmic axis of seconds with the ticks 1, 2, 5."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("P99, s", color=SOFT)


def _bare(axes: Axes) -> None:
    """No frame; ticks in the quiet colour."""
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(FAINT)
    axes.tick_params(colors=SOFT, length=0, labelsize=9)


def _finish(figure: Figure, grid: Sequence[Axes], used: int) -> None:
    """Hide what is not used, and explain the colours once."""
    for axes in grid[used:]:
        axes.set_visible(False)
    named: dict[str, Any] = {}
    for axes in grid[:used]:
        handles, names = axes.get_legend_handles_labels()
        named = dict(zip(names, handles, strict=True)) | named
    if named:
        figure.legend(
            named.values(), named.keys(), loc="outside upper center", ncols=4, frameon=False, fontsize=9,
            labelcolor=SOFT, handlelength=1.2,
        )  # fmt: skip


def _colour(index: int) -> str:
    return SERIES[index % len(SERIES)]


def _alpha(index: int) -> float:
    """A second round of the colours is paler."""
    return 1.0 if index < len(SERIES) else 0.5
