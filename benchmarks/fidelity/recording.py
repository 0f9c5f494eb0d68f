"""Runs as they are written down: real fleets take minutes, and their simulations can be repeated at any time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.fidelity.measure import Measured
from benchmarks.fidelity.play import Played
from benchmarks.fidelity.shared_play import SharedPlayed
from data.errors import CorruptData, InvalidInput


class Recording(msgspec.Struct, frozen=True, tag="one model"):
    """A script that was played on a fleet of one model, and the profile of that fleet.

    `machine` is the fingerprint of where it was played; its cores are those that the fleet could use.
    """

    script: str
    seed: int
    machine: dict[str, Any]
    played: Played
    measured: Measured


class SharedRecording(msgspec.Struct, frozen=True, tag="several models"):
    """A script that was played on a fleet of several models."""

    script: str
    seed: int
    machine: dict[str, Any]
    played: SharedPlayed


Recorded = Recording | SharedRecording

_decoder = msgspec.json.Decoder(Recorded)


def append(path: Path, recorded: Recorded) -> None:
    """One line more."""
    with path.open("ab") as file:
        file.write(msgspec.json.encode(recorded) + b"\n")


def read(paths: Iterable[Path]) -> Sequence[Recorded]:
    """All runs of these files, in order. Raises `CorruptData`, and `InvalidInput` for a file that is not there."""
    found: list[Recorded] = []
    for path in paths:
        try:
            found += [_decoder.decode(line) for line in path.read_bytes().splitlines()]
        except OSError as error:
            raise InvalidInput(f"cannot read {path}: {error.strerror}") from error
        except msgspec.MsgspecError as error:
            raise CorruptData(f"{path} does not hold recorded runs ({error}); record them again") from error
    return found
