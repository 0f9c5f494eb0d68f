"""What the demo shows on a terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from data.plan import PlanBook
from perennial.demo.play import Play
from perennial.fleet import Fleet
from perennial.recording import ActionRecord, EventRecord
from perennial.report.reconfigurations import config_label, layouts

_SHOWN = 7
_ACTIONS = {"notice": "yellow", "kill": "red", "add": "green"}


def plan_table(book: PlanBook) -> Table:
    """What the plan book runs in every state."""
    table = Table("instances", "runs", "latency", "requests/s", "memory", box=box.SIMPLE, title_justify="left")
    for plan in book.plans:
        row = ["nothing fits", "–", "–", "–"]
        if plan.config and plan.estimate:
            estimate = plan.estimate
            row = [str(plan.config), f"{estimate.latency_s:.2f} s", f"{estimate.throughput_rps:.2f}"]
            row.append(f"{estimate.memory_bytes / 1e6:.1f} MB")
        table.add_row(str(plan.state.instances), *row)
    return table


def view(playing: Play, fleet: Fleet, *, requests: int, tokens: int) -> RenderableType:
    """The state of the run right now."""
    events = playing.events()
    in_force = layouts(events)
    layout = config_label(in_force[-1].data.get("config")) if in_force else "none"
    head = Table.grid(padding=(0, 2))
    head.add_row("layout", Text(layout, style="bold cyan"), "instances", _instances(fleet))
    head.add_row("streams", f"{playing.finished} of {requests} ended", "time", f"{playing.now_s:.0f} s")
    head.add_row("tokens", ProgressBar(total=tokens, completed=playing.tokens, width=28), "", f"{playing.tokens:,}")
    lines = sorted([*map(_action, playing.actions), *map(_layout, in_force[1:])], key=lambda line: line[0])
    return Panel(Group(head, Text(""), *(text for _, text in lines[-_SHOWN:])), title="serving", border_style="green")


def _instances(fleet: Fleet) -> Text:
    text = Text()
    for item in fleet.instances.values():
        if item.group.alive:
            text.append(f"{item.name} ", style="yellow" if item.leaving else "green")
    return text


def _action(action: ActionRecord) -> tuple[float, Text]:
    what = {
        "notice": f"{action.instance} has {action.grace_s:.1f} s left",
        "kill": f"{action.instance} killed without notice",
        "add": f"{action.instance} added",
    }[action.kind]
    return action.time_s, Text(f"{action.time_s:6.1f} s  {what}", style=_ACTIONS[action.kind])


def _layout(event: EventRecord) -> tuple[float, Text]:
    stopped = sum(event.data.get("seconds", {}).get(phase, 0.0) for phase in ("pause", "transfer"))
    mode = event.data.get("mode", "")
    line = f"{event.time_s:6.1f} s  → {config_label(event.data.get('config'))}, {mode}, stopped {stopped * 1e3:.0f} ms"
    return event.time_s, Text(line, style="cyan")


def outcome_table(numbers: dict[str, Any]) -> Table:
    """The numbers of a run."""
    table = Table("", "", box=box.SIMPLE, show_header=False)
    clean = "bold green" if not (numbers["lost_tokens"] or numbers["duplicated_tokens"]) else "bold red"
    pauses, mends, latency = numbers["pauses_ms"], numbers["recoveries_ms"], numbers["latency_ms"]
    rows: list[tuple[str, RenderableType]] = [
        ("streams", f"{numbers['requests']} with {numbers['tokens']:,} tokens, {numbers['tokens_per_s']:.0f} a second"),
        ("lost, duplicated", Text(f"{numbers['lost_tokens']}, {numbers['duplicated_tokens']}", style=clean)),
        _agreement(numbers),
        ("notices, kills, additions", f"{numbers['notices']}, {numbers['kills']}, {numbers['additions']}"),
        ("reconfigurations", f"{numbers['reconfigurations']}, {numbers['recoveries']} of them recoveries"),
        ("planned pause", _spread(pauses)),
        ("kill to next token", _spread(mends)),
        ("time to first token", _spread(latency["ttft"])),
        ("between tokens", _spread(latency["inter_token"])),
        ("cost model error", _error(numbers["cost_model_error"])),
    ]
    for name, value in rows:
        table.add_row(Text(name, style="dim"), value)
    return table


def _agreement(numbers: dict[str, Any]) -> tuple[str, RenderableType]:
    if not numbers["exact"]:
        return "agreement", f"{100 * (numbers['agreement'] or 0.0):.1f} % before the first difference"
    different = numbers["mismatched_streams"]
    return "streams that differ", Text(str(different), style="bold red" if different else "bold green")


def _spread(values: dict[str, float | None]) -> str:
    if values["p50"] is None:
        return "–"
    return f"median {values['p50']:.0f} ms, p99 {values['p99']:.0f} ms, max {values['max']:.0f} ms"


def _error(error: dict[str, float | None]) -> str:
    if error["median"] is None or error["p90"] is None:
        return "–"
    return f"median {error['median']:.1%}, p90 {error['p90']:.1%} on points held out"
