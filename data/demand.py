"""What is asked of models that share a fleet: what a plan book assumes, and the arrivals that it is made from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data.canonical import exactly
from data.errors import CorruptData, InvalidInput
from data.placement import Arrivals
from data.records import csv_records


@dataclass(frozen=True, slots=True)
class Demand:
    """What one model has to answer: requests per second, the CV of the gaps between them, and mean lengths.

    `slo_s` bounds admission to last token. `requests` is how many arrivals the figures were measured on; 0 if they
    were told.
    """

    model: str
    slo_s: float
    rate_rps: float
    cv: float
    input_tokens: float
    output_tokens: float
    requests: int = 0

    def __post_init__(self) -> None:
        if not self.slo_s > 0 or not self.rate_rps >= 0 or not self.cv >= 0:
            raise InvalidInput(f"{self.model!r} needs an SLO above 0, and a rate and a CV of at least 0")
        if min(self.input_tokens, self.output_tokens) < 1:
            raise InvalidInput(f"a request for {self.model!r} has at least one token in and one out")

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping; `from_json` inverts it."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Demand:
        """Inverse of `to_json`. Raises `CorruptData`, `InvalidInput` or `TypeError`."""
        return cls(**exactly(value, cls.__dataclass_fields__, "a demand"))


@dataclass(frozen=True)
class History:
    """Requests for several models in order of arrival, and their lengths in tokens; `arrivals.models` index `names`."""

    names: tuple[str, ...]
    arrivals: Arrivals
    input_tokens: npt.NDArray[np.int64]
    output_tokens: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        if not len(self.arrivals) == len(self.input_tokens) == len(self.output_tokens):
            raise InvalidInput("a history needs a length in and out for every arrival")

    @classmethod
    def of(cls, names: Sequence[str], rows: Sequence[tuple[float, str, int, int]]) -> History:
        """The history of `(arrival_s, model, tokens in, tokens out)` in any order, counted from the first arrival.

        Raises `InvalidInput` for a model that is not among `names`.
        """
        unknown = sorted({model for _, model, *_ in rows} - set(names))
        if unknown:
            raise InvalidInput(f"requests ask for {unknown[0]!r}, which is none of the models {', '.join(names)}")
        ordered = sorted(rows, key=lambda row: row[0])
        numbers = {name: number for number, name in enumerate(names)}
        # To the nanosecond: of a gap that no clock can tell, rates would be infinite.
        times_s = np.array([row[0] for row in ordered], dtype=float).round(9)
        arrivals = Arrivals.of(times_s - times_s[:1], [numbers[row[1]] for row in ordered])
        lengths = np.array([row[2:] for row in ordered], dtype=np.int64).reshape(-1, 2)
        return cls(tuple(names), arrivals, lengths[:, 0], lengths[:, 1])

    def __len__(self) -> int:
        return len(self.arrivals)

    @property
    def window_s(self) -> float:
        """The time that the arrivals stand for: as many mean gaps as there are arrivals."""
        return self.arrivals.span_s * len(self) / (len(self) - 1) if len(self) > 1 else 0.0

    def times_s(self, model: int) -> npt.NDArray[np.float64]:
        """Arrivals of one model."""
        times_s: npt.NDArray[np.float64] = self.arrivals.times_s[self.arrivals.models == model]
        return times_s

    def lengths(self, model: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Tokens in and out of the requests for one model."""
        asked = self.arrivals.models == model
        return self.input_tokens[asked], self.output_tokens[asked]

    def measured(self, told: Demand) -> Demand:
        """`told` with what this history says of its model: rate, CV (from three arrivals on), mean lengths.

        A model that nobody asks for keeps what was told but for its rate, which is 0.
        """
        number = self.names.index(told.model)
        times_s, (inputs, outputs) = self.times_s(number), self.lengths(number)
        count = len(times_s)
        return Demand(
            told.model,
            told.slo_s,
            count / self.window_s if self.window_s else 0.0,
            gap_cv(times_s) if count > 2 else told.cv,
            float(inputs.mean()) if count else told.input_tokens,
            float(outputs.mean()) if count else told.output_tokens,
            count,
        )


def gap_cv(times_s: npt.NDArray[np.float64]) -> float:
    """Coefficient of variation of the gaps between arrivals; 0 if there is no gap."""
    gaps = np.diff(times_s)
    return float(gaps.std() / gaps.mean()) if gaps.any() else 0.0


def read_history(path: str | os.PathLike[str], names: Sequence[str]) -> History:
    """Read CSV with the header `arrival_s,model,input_tokens,output_tokens` (`.gz` allowed), in any order.

    Raises `CorruptData` naming file and line.
    """
    rows = []
    for record in csv_records(path):
        model = str(record.fields.get("model", "")).strip()
        if model not in names:
            record.reject(f"model is {model!r}, which is none of {', '.join(names)}")
        lengths = record.integer("input_tokens", least=1), record.integer("output_tokens", least=1)
        rows.append((record.number("arrival_s"), model, *lengths))
    if not rows:
        raise CorruptData(f"{path}, line 1: no requests in this file")
    return History.of(names, rows)
