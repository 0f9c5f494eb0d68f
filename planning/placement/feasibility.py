"""Which models of a fleet cannot be served at all, and why."""

from __future__ import annotations

from collections.abc import Iterator

from data.errors import Infeasible
from data.placement import HostedModel, Placement, Shape, SharedFleet
from planning.simulation.requests import OVERHEAD_S
from planning.simulation.tables import STAGE_PENALTY

_GIB = 2.0**30


def obstacles(fleet: SharedFleet) -> Iterator[str]:
    """One sentence for every model that fits on no group of the fleet, or is too slow for its SLO on each that it fits.

    Its own memory and latency only: what all models take together is the planner's to find out.
    """
    for number, model in enumerate(fleet.models):
        shapes = [shape for shape in fleet.profiles[model.kind] if _can_form(fleet, shape)]
        if not shapes:
            yield f"{model.name} was profiled in no shape that {fleet.devices} devices can form; profile smaller shapes"
            continue
        fitting = [shape for shape in shapes if _weight_bytes(fleet, number, shape) <= fleet.budget_bytes]
        if not fitting:
            yield _too_large(fleet, number, model, shapes)
        elif (quickest := min(_latency_s(fleet, number, shape) for shape in fitting)) > model.slo_s:
            yield (
                f"{model.name} takes {quickest:.3f} s in its quickest shape that fits, its SLO is {model.slo_s:.3f} s; "
                "raise the SLO or profile larger shapes"
            )


def require_feasible(fleet: SharedFleet) -> None:
    """Raise `Infeasible` naming every model that cannot be served, one by one."""
    found = list(obstacles(fleet))
    if found:
        raise Infeasible("; ".join(found))


def breaches(fleet: SharedFleet, placement: Placement) -> list[str]:
    """How a placement breaks the rules: devices, whole nodes, missing profiles, memory rule A."""
    found = []
    if placement.devices > fleet.devices:
        found.append(f"the groups take {placement.devices} of {fleet.devices} devices")
    for number, group in enumerate(placement.groups):
        if not fleet.whole_nodes(group.shape):
            found.append(f"group {number} {group.shape} does not fill whole nodes")
        if len(set(group.models)) != len(group.models):
            found.append(f"group {number} holds a model twice")
        missing = [fleet.models[model].name for model in group.models if fleet.profile(model, group.shape) is None]
        if missing:
            found.append(f"group {number} {group.shape} holds {', '.join(missing)} without a profile")
        elif sum(_weight_bytes(fleet, model, group.shape) for model in group.models) > fleet.budget_bytes:
            found.append(f"group {number} {group.shape} holds more than {fleet.budget_bytes / _GIB:.2f} GiB")
    return found


def device_bytes(fleet: SharedFleet, placement: Placement) -> float:
    """The fullest device's weights: memory rule B adds up stage by stage what rule A adds up by largest stage."""
    fullest = 0.0
    for group in placement.groups:
        stages = [fleet.profiles[fleet.models[model].kind][group.shape].weight_bytes for model in group.models]
        fullest = max([fullest, *(sum(stage) for stage in zip(*stages, strict=True))])
    return fullest


def _can_form(fleet: SharedFleet, shape: Shape) -> bool:
    return shape.devices <= fleet.devices and fleet.whole_nodes(shape)


def _weight_bytes(fleet: SharedFleet, model: int, shape: Shape) -> float:
    return fleet.profiles[fleet.models[model].kind][shape].widest_bytes


def _latency_s(fleet: SharedFleet, model: int, shape: Shape) -> float:
    """As it is simulated: with the charge for every stage and the overhead of every request."""
    profile = fleet.profiles[fleet.models[model].kind][shape]
    return sum(profile.latency_s) * (1 + STAGE_PENALTY * len(profile.latency_s)) + OVERHEAD_S


def _too_large(fleet: SharedFleet, number: int, model: HostedModel, shapes: list[Shape]) -> str:
    least = min(shapes, key=lambda shape: _weight_bytes(fleet, number, shape))
    return (
        f"{model.name} fits nowhere: even {least} takes {_weight_bytes(fleet, number, least) / _GIB:.2f} GiB of each "
        f"device's {fleet.budget_bytes / _GIB:.2f}; use larger devices or profile larger shapes"
    )
