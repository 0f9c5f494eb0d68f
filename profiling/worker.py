"""One measuring process per shard: `python -m profiling.worker CAMPAIGN.json RANK`.

Rank 0 writes answers to standard output, one JSON line each; anything else that is printed goes to
standard error. The process ends when its standard input does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from time import perf_counter

import msgspec
import torch
import torch.distributed as dist

from data.errors import PerennialError
from profiling.campaign import Answer, Campaign, Finished, Progress, Refused
from profiling.latency import Meter, count_points, measure_steps
from profiling.links import measure_disk, measure_host, measure_pair
from serving import lifeline
from serving.worker.groups import Group


def measure_all(campaign: Campaign, rank: int) -> Iterator[Answer]:
    """Follow a campaign; on rank 0 what it yields is the result."""
    device = _device(campaign, rank)
    store = dist.FileStore(campaign.store, campaign.world)
    _meet(campaign, store, rank)
    yield Progress("links", 0, 0)
    if campaign.world > 1 and rank < 2:
        yield from measure_pair(campaign, _group(campaign, store, "links", rank, 2, device), device)
    if rank == 0:
        yield from measure_host(campaign, device)
        yield from measure_disk(campaign)
    deadline_s = perf_counter() + campaign.budget_s
    total, done, skipped = count_points(campaign), 0, 0
    for shards in campaign.grid.shards:
        if rank < shards:
            group = _group(campaign, store, f"shards{shards}", rank, shards, device)
            meter = Meter(group, device, deadline_s, total, done)
            yield from measure_steps(campaign, group, device, meter)
            done, skipped = meter.done, skipped + meter.skipped
    yield Finished(skipped)


def _device(campaign: Campaign, rank: int) -> torch.device:
    torch.set_num_threads(campaign.threads)
    if campaign.device == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    return device


def _meet(campaign: Campaign, store: dist.Store, rank: int) -> None:
    """Wait until all processes have started: those that still do would slow the others down."""
    store.set(f"up{rank}", "")
    store.wait([f"up{peer}" for peer in range(campaign.world)], timedelta(seconds=campaign.timeout_s))


def _group(campaign: Campaign, store: dist.Store, name: str, rank: int, size: int, device: torch.device) -> Group:
    return Group(store, name, rank, size, device=device, host=campaign.host, timeout_s=campaign.timeout_s)


def main() -> int:
    """Exit code 0 if the campaign was followed to its end."""
    lifeline.watch_stdin()
    campaign = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Campaign)
    rank = int(sys.argv[2])
    say = _speaker() if rank == 0 else _silent
    try:
        with torch.inference_mode():
            for answer in measure_all(campaign, rank):
                say(answer)
    except (PerennialError, torch.OutOfMemoryError) as error:
        say(Refused(str(error)))
        return 1
    return 0


def _speaker() -> Callable[[Answer], None]:
    """Writes answers to what standard output is now; prints of libraries are sent to standard error."""
    output = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    return lambda answer: _write_line(output.fileno(), answer)


def _write_line(descriptor: int, answer: Answer) -> None:
    os.write(descriptor, msgspec.json.encode(answer) + b"\n")


def _silent(answer: Answer) -> None:
    pass


if __name__ == "__main__":
    code = main()
    # Threads of a group whose peers are gone may never return.
    os._exit(code)
