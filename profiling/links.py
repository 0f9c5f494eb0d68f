"""How fast bytes move: between two workers, from the checkpoint's disk, between host and device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from profiling.campaign import Campaign, LinkTime
from profiling.timing import Sample, elapsed_s, settle
from serving.worker.groups import Group

_REPEATS = 15
_LARGE_BYTES = 4 << 20
_LARGE_REPEATS = 3
_WARM_UP = 3  # the first message connects


def measure_pair(campaign: Campaign, group: Group, device: torch.device) -> Iterator[LinkTime]:
    """One-way times between ranks 0 and 1 of `group`: half a round trip; collective.

    On the CPU the workers of one instance and those of two talk over the same sockets, so both kinds
    are measured here; between hosts with accelerators the network is not in reach of one machine.
    """
    for kind in ("local", "network") if device.type == "cpu" else ("local",):
        for size in campaign.grid.message_bytes:
            sample = _round_trips(group, torch.zeros(size, dtype=torch.uint8, device=device))
            yield LinkTime(kind, size, sample.median_ms / 2, sample.repeats)


def measure_host(campaign: Campaign, device: torch.device) -> Iterator[LinkTime]:
    """Copies from pinned host memory to the device; nothing on a CPU."""
    if device.type != "cuda":
        return
    for size in campaign.grid.message_bytes:
        source = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
        target = torch.empty(size, dtype=torch.uint8, device=device)
        yield _link("host", size, partial(target.copy_, source), device)


def measure_disk(campaign: Campaign) -> Iterator[LinkTime]:
    """Reads of the checkpoint's largest file, past the page cache where the system lets us; none without one."""
    files = sorted(Path(campaign.checkpoint).glob("*.safetensors"), key=lambda path: path.stat().st_size)
    if not campaign.checkpoint or not files:
        return
    whole = files[-1].stat().st_size
    for size in sorted({min(size, whole) for size in campaign.grid.message_bytes}):
        times_s = [_read_s(files[-1], size) for _ in range(_LARGE_REPEATS)]
        yield LinkTime("disk", size, Sample.of(times_s).median_ms, len(times_s))


def _repeats(size: int) -> int:
    return _REPEATS if size < _LARGE_BYTES else _LARGE_REPEATS


def _link(kind: str, size: int, action: Callable[[], object], device: torch.device) -> LinkTime:
    action()
    times_s = [elapsed_s(action, device) for _ in range(_repeats(size))]
    return LinkTime(kind, size, Sample.of(times_s).median_ms, len(times_s))


def _round_trips(group: Group, tensor: Tensor) -> Sample:
    def there_and_back() -> None:
        if group.rank == 0:
            group.send(tensor, 1).wait()
            group.receive(tensor, 1)
        else:
            group.receive(tensor, 0)
            settle(tensor.device)
            group.send(tensor, 0).wait()

    for _ in range(_WARM_UP):
        there_and_back()
    return Sample.of([elapsed_s(there_and_back, tensor.device) for _ in range(_repeats(tensor.numel()))])


def _read_s(path: Path, size: int) -> float:
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = perf_counter()
        remaining = size
        while remaining > 0 and (piece := file.read(min(remaining, _LARGE_BYTES))):
            remaining -= len(piece)
        return perf_counter() - started
