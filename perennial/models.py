"""Which checkpoints a service has, as its command line says it, and plan books that were told, not searched."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.cluster import ClusterSpec, ClusterState, InstanceType
from data.deployment import Deployment, SharedGroup
from data.errors import CorruptData, InvalidInput
from data.shared_plan import SharedPlan, SharedPlanBook, Speed


def checkpoint_fields(values: Sequence[str]) -> dict[str, Any]:
    """The fields of `ServingSettings` for `--checkpoint`: one folder, or any number of `name=folder`.

    Raises `InvalidInput` for a folder without a model, or a name that is missing or there twice.
    """
    pairs = [_pair(value) for value in values]
    for _, folder in pairs:
        if not (folder / "config.json").is_file():
            raise InvalidInput(f"{folder} is not a checkpoint: it has no config.json; see `perennial make-checkpoint`")
    if len(pairs) == 1 and not pairs[0][0]:
        return {"checkpoint": str(pairs[0][1].absolute())}
    names = [name for name, _ in pairs]
    if not all(names) or len(set(names)) < len(names):
        raise InvalidInput("several checkpoints need a name each: --checkpoint NAME=FOLDER --checkpoint OTHER=FOLDER")
    return {"checkpoints": {name: str(folder.absolute()) for name, folder in pairs}}


def _pair(value: str) -> tuple[str, Path]:
    name, equals, folder = value.partition("=")
    return (name, Path(folder)) if equals and not Path(value).is_dir() else ("", Path(value))


def given_groups(
    checkpoints: Mapping[str, str | Path],
    groups: Mapping[int, Sequence[SharedGroup]],
    *,
    devices_per_instance: int = 1,
    instance_type: str = "local-cpu",
    speeds: Sequence[Speed] = (),
) -> SharedPlanBook:
    """A plan book of several models that was not searched but told: groups by number of instances.

    A state in between has the groups of the largest one within it that was given.
    """
    from serving.engine.weights import read_spec

    specs = tuple(replace(read_spec(str(path)), name=name) for name, path in checkpoints.items())
    kind = InstanceType(instance_type, devices_per_instance, "cpu", 1 << 30, 1e9, 1e10, 0.0, 0.0)
    plans = [
        SharedPlan(ClusterState.of({instance_type: count}), Deployment(tuple(groups[count])), "given")
        for count in sorted(groups)
    ]
    return SharedPlanBook(specs, ClusterSpec("given", (kind,), (max(groups),)), "given", tuple(plans), tuple(speeds))


def read_groups(path: Path, checkpoints: Mapping[str, str]) -> SharedPlanBook:
    """The plan book that a groups file describes (README, *Several models*).

    A model without a `kv_share` gets an equal part, one without a `max_batch` 8 requests. Raises `InvalidInput`.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        groups = {int(count): [_group(group) for group in some] for count, some in told["instances"].items()}
        if not groups:
            raise InvalidInput("no number of instances has groups")
        return given_groups(
            checkpoints,
            groups,
            devices_per_instance=int(told.get("devices", 1)),
            instance_type=str(told.get("type", "local-cpu")),
            speeds=[Speed(**speed) for speed in told.get("speeds", ())],
        )
    except OSError as error:
        raise InvalidInput(f"cannot read the groups {path}: {error.strerror}") from error
    except (InvalidInput, CorruptData) as error:
        raise InvalidInput(f"{path}: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidInput(f"{path} does not describe groups ({error!r}); see the README for an example") from error


def _group(told: Mapping[str, Any]) -> SharedGroup:
    models = told["models"]
    usual = {"max_batch": 8, "kv_share": 1 / len(models) if models else 1.0, "partition": ()}
    hosted = [{**usual, **({"model": one} if isinstance(one, str) else one)} for one in models]
    return SharedGroup.from_json({"stages": 1, "shards": 1, **told, "models": hosted})
