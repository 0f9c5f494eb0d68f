"""Where measurements were taken, apart from the measurements: it needs no table formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from data.canonical import checksum, exactly


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The machine and software that measurements hold for; `extra` is sorted `(name, value)` pairs."""

    device: str
    devices: int
    cpu: str
    cores: int
    memory_bytes: int
    os: str
    python: str
    torch: str
    extra: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, *, extra: Mapping[str, str] | None = None, **values: Any) -> Fingerprint:
        """The fingerprint with `extra` given as a mapping."""
        return cls(**values, extra=tuple(sorted((extra or {}).items())))

    @property
    def sha256(self) -> str:
        """Checksum of all fields: the key that measurements are cached under."""
        return checksum(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping; `from_json` inverts it."""
        return {**asdict(self), "extra": dict(self.extra)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Fingerprint:
        """Inverse of `to_json`. Raises `CorruptData` on missing or unknown fields."""
        return cls.of(**exactly(value, (field.name for field in fields(cls)), "the fingerprint"))
