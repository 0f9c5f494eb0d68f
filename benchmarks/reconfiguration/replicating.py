"""What replicating every token costs: decode throughput with and without it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from benchmarks.reconfiguration.options import replication
from benchmarks.reconfiguration.planned import Report
from benchmarks.reconfiguration.stage import Bench, Stage, copies_s, stage
from benchmarks.reconfiguration.timeline import rate, step_s

_INSTANCES = 2  # one works, the other keeps the copies
_MOST_TOKENS = 1536  # for KV of the largest batch beside the weights
_PREFILL_S = 240.0
_ONE_STREAM = 1.5  # how much longer all of a batch takes by one stream, beside steps, than usual
_ORDER = (False, True, True, False)


async def measure(bench: Bench, report: Report) -> None:
    """Every batch size, off, on, on and off again: services differ by more than what is asked for, and drift."""
    if replication(enabled=True) is None:
        report({"case": "replication", "name": "KV replication", "skipped": "the service has no setting for it"})
        return
    played = [(enabled, await _throughputs(bench, enabled=enabled)) for enabled in _ORDER]
    for batch in bench.options.batches:
        off, on = ([found[batch] for was, found in played if was is enabled] for enabled in (False, True))
        cost = round(1 - _mean_rate(on) / _mean_rate(off), 4)
        report({"case": "replication", "name": f"B = {batch}", "batch": batch, "cost": cost, "off": off, "on": on})


def _mean_rate(found: Sequence[dict[str, Any]]) -> float:
    return fmean(one["tokens_per_s"] for one in found)


async def _throughputs(bench: Bench, *, enabled: bool) -> dict[int, dict[str, Any]]:
    """One service, one batch size after the other; requests need not outlast more than one of them."""
    options, found = bench.options, {}
    settings = replication(enabled=enabled) or {}
    name = f"replication-{'on' if enabled else 'off'}"
    async with stage(
        bench,
        name,
        instances=_INSTANCES,
        layouts={1: "1x1x1", _INSTANCES: "1x1x1"},
        requests=options.batches[0],
        batch=max(options.batches),
        prompt_tokens=options.replication_context,
        max_tokens=min(_MOST_TOKENS, options.max_tokens),
        **settings,
    ) as play:
        for batch in options.batches:
            if batch != options.batches[0]:
                await play.load.renew(timeout_s=_PREFILL_S, requests=batch)
            # Without copies too: what is compared are steps over contexts of the same length.
            await play.watch(_ONE_STREAM * copies_s(bench, batch, options.replication_context))
            found[batch] = await _throughput(play)
    return found


async def _throughput(play: Stage) -> dict[str, Any]:
    options = play.bench.options
    interval = await play.watch(options.before_s + options.after_s)
    timelines = play.load.recent(interval[0])
    return {
        "tokens_per_s": round(rate(timelines, *interval), 1),
        "step_ms": round(1e3 * step_s(timelines, *interval), 3),
        "errors": list(play.load.errors),
    }
