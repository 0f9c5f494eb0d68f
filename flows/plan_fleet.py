"""Plans of several models: fleet file → profiles → placements for every number of instances → registry.

With recent requests nothing is planned while they are those that the champion counts on; once they have drifted, a
new book is published beside it, as challenger, that says what drifted and what it gains.
"""

from dataclasses import dataclass, replace

from data.cluster import ClusterState
from data.errors import InvalidInput
from data.shared_plan import SharedPlanBook, fleet_title
from flows.fleet_file import FleetFile, measured, recent_history
from flows.fleet_steps import (
    FleetRequest,
    FleetResult,
    Workload,
    inputs_of,
    profiles_of,
    publish_fleet,
    result_of,
    searched,
    worst_error,
)
from flows.publish import Published
from flows.registry import CHALLENGER, CHAMPION, Registry, open_registry, plan_name
from flows.summary import FitError
from planning.drift import drifts
from planning.hosting import placement_of
from planning.shared_book import LEAST_SPAN_S, attained


def plan_fleet(request: FleetRequest) -> FleetResult:
    """Plan every number of instances of a fleet of several models, publish the book, and promote it if asked.

    Raises `Infeasible` naming every model that the fleet cannot serve.
    """
    file = FleetFile.read(request.fleet)
    if request.recent:
        return _replan(file, request)
    demands, arrivals = file.workload(request.seed)
    folders = profiles_of(file, request)
    book = searched(file, folders, Workload(demands, arrivals), request)
    error = worst_error(folders)
    published = publish_fleet(book, error, folders, request, CHAMPION if request.promote else None)
    return result_of(published, book, folders, error, request)


def _replan(file: FleetFile, request: FleetRequest) -> FleetResult:
    registry = open_registry(request.home, request.registry)
    name = plan_name(fleet_title(file.models), file.spec().name)
    champion, *challengers = _counted_on(registry, name)
    recent = recent_history(request.recent, list(file.models))
    if recent.arrivals.span_s < LEAST_SPAN_S:
        raise InvalidInput(
            f"{request.recent} holds {recent.arrivals.span_s:.0f} s of requests, too few to compare; it takes "
            f"{LEAST_SPAN_S:.0f} s"
        )
    found = [str(one) for one in drifts(champion.book.demands, recent)]
    for one in (champion, *challengers):
        if not drifts(one.book.demands, recent):  # a schedule is not to propose the same again and again
            return result_of(one.published, None, {}, FitError(0.0, 0.0), request, found)
    workload = Workload(measured(file.demands(), recent), recent.arrivals, champion.book)
    folders = profiles_of(file, request)
    book = searched(file, folders, workload, request)
    book = replace(book, occasion=_occasion(file, folders, workload, book, found, champion.published.version, request))
    error = worst_error(folders)
    published = publish_fleet(book, error, folders, request, CHALLENGER)
    return result_of(published, book, folders, error, request, found)


@dataclass(frozen=True, slots=True)
class _Held:
    """A version of the registry and its book."""

    published: Published
    book: SharedPlanBook


def _counted_on(registry: Registry, name: str) -> list[_Held]:
    """The champion, and the challenger if there is another. Raises `NotFound` or `InvalidInput` without a champion."""
    registry.load_plan(name, CHAMPION)  # which says it, if there is none
    versions = {alias: one for one in registry.list_plans(name) for alias in one.aliases}
    found = []
    for alias in (CHAMPION, CHALLENGER):
        if (one := versions.get(alias)) is not None:
            book = registry.load_plan(name, one.version)
            if isinstance(book, SharedPlanBook) and book.demands:
                found.append(_Held(Published(one.name, one.version, one.sha256, one.aliases), book))
            elif alias == CHAMPION:
                raise InvalidInput(f"{name} does not say which requests it counts on; plan without --recent first")
    return found


def _occasion(
    file: FleetFile,
    folders: dict[str, str],
    workload: Workload,
    book: SharedPlanBook,
    found: list[str],
    version: str,
    request: FleetRequest,
) -> str:
    """What drifted, and what the new groups of the whole fleet gain on the recent arrivals."""
    cluster = file.spec()
    inputs = inputs_of(folders, cluster, workload, request)
    whole = ClusterState.of({cluster.types[0].name: cluster.most[0]})
    problem, names = inputs.problem(cluster.most[0]), [one.name for one in inputs.tenants]
    champion = workload.incumbent
    assert champion is not None
    old, new = (one.plan_for(whole).deployment for one in (champion, book))
    before, after = (attained(problem, placement_of(one, names))[0] for one in (old, new))
    same = "the groups of the whole fleet stay as they are" if old == new else f"these {after:.1%}"
    return (
        f"Recent requests are not those that version {version} counts on: {'; '.join(found)}; on them its groups have "
        f"{before:.1%} in time, {same}"
    )
