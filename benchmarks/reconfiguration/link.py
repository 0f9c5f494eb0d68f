"""How fast this machine's devices exchange bytes: the measure for every transfer of the same run."""

from __future__ import annotations

import msgspec

from benchmarks.reconfiguration.options import Options
from data.models import ModelSpec
from profiling.campaign import Campaign, LinkTime
from profiling.grid import Grid
from profiling.processes import follow

_TIMEOUT_S = 120.0


def measure_link(options: Options, spec: ModelSpec) -> float | None:
    """Bytes per second of one message in one direction between two worker processes; None with one GPU.

    Raises `PerennialError` if the processes fail.
    """
    if options.gpus < 2:
        return None
    grid = msgspec.structs.replace(
        Grid.of(spec, max_shards=1, cuda=options.device == "cuda"), shards=(), message_bytes=(options.link_bytes,)
    )
    campaign = Campaign(
        model=spec.to_json(),
        checkpoint="",
        device=options.device,
        dtype=options.dtype,
        numerics="auto",
        threads=1,
        block_tokens=16,
        grid=grid,
        world=2,
        store="",
        host="127.0.0.1",
        budget_s=1.0,
        timeout_s=_TIMEOUT_S,
    )
    for answer in follow(campaign, timeout_s=_TIMEOUT_S):
        if isinstance(answer, LinkTime) and answer.kind == "local":
            return answer.bytes / (1e-3 * answer.time_ms)
    return None
