"""Requests over time, and readers of the public formats they are recorded in.

Every reader takes a path (`.gz` allowed), counts arrivals from the first request, sorts by arrival, and
raises `CorruptData` naming file and line.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np

from data.errors import CorruptData, InvalidInput
from data.records import Record, csv_records, first_line, json_lines

FilePath = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Request:
    """One request: seconds since the start of its workload, tokens in and tokens out."""

    arrival_s: float
    input_tokens: int
    output_tokens: int

    def __post_init__(self) -> None:
        if not self.arrival_s >= 0 or self.input_tokens < 1 or self.output_tokens < 1:
            raise InvalidInput(f"a request arrives at 0 s or later with at least one token in and out, not {self}")


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Distribution of a quantity over requests."""

    mean: float
    p50: float
    p90: float
    p99: float
    most: float


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival."""

    name: str
    requests: tuple[Request, ...]

    def __post_init__(self) -> None:
        arrivals = [request.arrival_s for request in self.requests]
        if any(later < earlier for earlier, later in pairwise(arrivals)):
            raise InvalidInput(f"the requests of workload {self.name} must be sorted by arrival")

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last."""
        return self.requests[-1].arrival_s - self.requests[0].arrival_s if self.requests else 0.0

    @property
    def rate_rps(self) -> float:
        """Requests per second: the reciprocal of the mean gap between arrivals; 0 if there is no gap."""
        return (len(self.requests) - 1) / self.duration_s if self.duration_s else 0.0

    @property
    def cv(self) -> float:
        """Coefficient of variation of the gaps (population standard deviation over mean); 0 if there is no gap."""
        gaps = np.diff([request.arrival_s for request in self.requests])
        return float(gaps.std() / gaps.mean()) if gaps.any() else 0.0

    @property
    def input_tokens(self) -> Percentiles:
        """Distribution of prompt lengths."""
        return _percentiles([request.input_tokens for request in self.requests], self.name)

    @property
    def output_tokens(self) -> Percentiles:
        """Distribution of output lengths."""
        return _percentiles([request.output_tokens for request in self.requests], self.name)

    def first(self, duration_s: float) -> Workload:
        """The requests that arrive before `duration_s`."""
        return replace(self, requests=tuple(one for one in self.requests if one.arrival_s < duration_s))

    def scaled(self, factor: float) -> Workload:
        """The same requests at `factor` times the rate; the CV of the gaps stays."""
        if not factor > 0:
            raise InvalidInput(f"the rate of a workload can be scaled by a positive factor only, not {factor}")
        return replace(self, requests=tuple(replace(one, arrival_s=one.arrival_s / factor) for one in self.requests))


def read_workload(path: FilePath) -> Workload:
    """Read a workload in any of the formats below, told apart by the first line."""
    start = first_line(path).removeprefix("\ufeff").strip()
    if start.startswith("{") or "prefix_blocks_512" in start:
        return read_mooncake(path)
    if start.startswith("Timestamp,"):
        return read_burstgpt(path)
    return read_azure(path)


def read_azure(path: FilePath) -> Workload:
    """Azure LLM inference traces: `TIMESTAMP,ContextTokens,GeneratedTokens` as published
    (2023 and 2024), or compact with `arrival_s,input_tokens,output_tokens`.
    """
    return _workload(path, (_azure_request(record) for record in csv_records(path)))


def read_mooncake(path: FilePath, *, tick_s: float = 3.0) -> Workload:
    """Mooncake traces: JSONL with `timestamp` (ms), `input_length`, `output_length` as published,
    or compact CSV with `arrival_s,input_tokens,output_tokens`.

    A trace whose every arrival is within 10 ms of a multiple of `tick_s` was quantised when it was recorded;
    the requests of a tick are then spread over it, uniformly and always the same way. That makes the
    Poisson counts per tick Poisson arrivals again. Other traces stay as they are.
    """
    start = first_line(path).lstrip("\ufeff").strip()
    rows = _mooncake_lines(path) if start.startswith("{") else map(_compact_request, csv_records(path))
    return _spread(_workload(path, rows), tick_s)


def read_burstgpt(path: FilePath, *, model: str | None = None, log_type: str | None = None) -> Workload:
    """BurstGPT traces: `Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type`
    (seconds). Only rows of `model` and `log_type`, if given; requests without a response failed
    when they were recorded and are left out.
    """
    records = (
        record
        for record in csv_records(path)
        if model in (None, record.fields.get("Model")) and log_type in (None, record.fields.get("Log Type"))
    )
    rows = (
        _row(record, record.number("Timestamp"), "Request tokens", "Response tokens")
        for record in records
        if record.integer("Response tokens") and record.integer("Request tokens")
    )
    return _workload(path, rows)


Row = tuple[float, int, int]


def _row(record: Record, arrival_s: float, inputs: str, outputs: str) -> Row:
    return arrival_s, record.integer(inputs, least=1), record.integer(outputs, least=1)


def _compact_request(record: Record) -> Row:
    return _row(record, record.number("arrival_s"), "input_tokens", "output_tokens")


def _azure_request(record: Record) -> Row:
    if "TIMESTAMP" not in record.fields:
        return _compact_request(record)
    try:
        moment = datetime.fromisoformat(record.fields["TIMESTAMP"])
    except ValueError:
        record.reject(f"TIMESTAMP {record.fields['TIMESTAMP']!r} is not an ISO date and time")
    # Any fixed origin will do: arrivals are counted from the first request.
    origin = datetime(2000, 1, 1, tzinfo=moment.tzinfo)
    return _row(record, (moment - origin).total_seconds(), "ContextTokens", "GeneratedTokens")


def _mooncake_lines(path: FilePath) -> Iterator[Row]:
    for number, value in json_lines(path):
        record = Record(str(path), number, value if isinstance(value, dict) else {})
        yield _row(record, record.number("timestamp") / 1e3, "input_length", "output_length")


def _workload(path: FilePath, rows: Iterable[Row]) -> Workload:
    ordered = sorted(rows, key=lambda row: row[0])
    if not ordered:
        raise CorruptData(f"{path}, line 1: no requests in this file")
    start_s = ordered[0][0]
    name = Path(path).name.removesuffix(".gz").rsplit(".", 1)[0]
    return Workload(name, tuple(Request(arrival_s - start_s, *tokens) for arrival_s, *tokens in ordered))


def _spread(workload: Workload, tick_s: float) -> Workload:
    arrivals_s = np.array([request.arrival_s for request in workload.requests])
    ticks = (arrivals_s / tick_s).round()
    if not ticks.any() or np.abs(arrivals_s - ticks * tick_s).max() > 0.01:
        return workload
    within = np.random.default_rng(0).random(len(ticks))
    # Sorting inside every tick keeps the recorded order of its requests.
    times_s = np.sort(ticks + within) * tick_s
    requests = (replace(one, arrival_s=float(at_s)) for one, at_s in zip(workload.requests, times_s, strict=True))
    return replace(workload, requests=tuple(requests))


def _percentiles(values: list[int], name: str) -> Percentiles:
    if not values:
        raise InvalidInput(f"workload {name} has no requests to take percentiles of")
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return Percentiles(float(np.mean(values)), float(p50), float(p90), float(p99), float(max(values)))
