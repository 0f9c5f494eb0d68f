"""Known instance types, with prices and where each is from, known model shapes, and published profiles.

`instances.json` and `models.json` beside this file are the catalog; bytes, bytes/s and US dollars per hour.
`spotserve_profiles.json` holds SpotServe's measurements on `g4dn.12xlarge` as published (source and licence inside).
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import Any

from data.cluster import ClusterSpec, InstanceType
from data.errors import InvalidInput
from data.models import ModelSpec


def instance_names() -> tuple[str, ...]:
    """Names that `instance_type` knows."""
    return tuple(_entries("instances"))


def model_names() -> tuple[str, ...]:
    """Names that `model_shape` knows."""
    return tuple(_entries("models"))


def instance_type(name: str) -> InstanceType:
    """The instance type of this name. Raises `InvalidInput` listing the known ones."""
    fields = {key: value for key, value in _entry("instances", name).items() if key != "source"}
    return InstanceType(name=name, **fields)


def instance_sources(name: str) -> dict[str, str]:
    """Where the hardware figures and each price of an instance type are from."""
    return dict(_entry("instances", name)["source"])


def cluster_of(type: str, instances: int, memory_mb: float = 0.0) -> ClusterSpec:  # noqa: A002 - as in files
    """Up to `instances` instances of a known type, of which a device has `memory_mb` (0: as it is)."""
    kind = instance_type(type)
    if memory_mb:
        kind = replace(kind, memory_bytes=int(memory_mb * 1e6))
    return ClusterSpec(f"{type}-{instances}", (kind,), (instances,))


def model_shape(name: str) -> ModelSpec:
    """The dimensions of a known model. Raises `InvalidInput` listing the known ones."""
    return ModelSpec.from_hf_config(_entry("models", name)["config"], name=name)


def published_names() -> tuple[str, ...]:
    """Models that `published_profile` knows."""
    return tuple(_entries("spotserve_profiles")["profiles"])


def published_profile(name: str) -> dict[str, Any]:
    """SpotServe's profile of a model, an entry for `StaticBatchProfile.from_json`, with the rates that it was run at.

    Raises `InvalidInput` listing the known ones.
    """
    entries: dict[str, dict[str, Any]] = _entries("spotserve_profiles")["profiles"]
    if name not in entries:
        raise InvalidInput(f"no profile of {name!r} was published; known are {', '.join(entries)}")
    return entries[name]


@cache
def _entries(kind: str) -> dict[str, Any]:
    entries: dict[str, Any] = json.loads(files("data.catalog").joinpath(f"{kind}.json").read_text(encoding="utf-8"))
    return entries


def _entry(kind: str, name: str) -> dict[str, Any]:
    try:
        entry: dict[str, Any] = _entries(kind)[name]
    except KeyError:
        known = ", ".join(_entries(kind))
        raise InvalidInput(f"the catalog of {kind} has no {name!r}; it has {known}") from None
    return entry
