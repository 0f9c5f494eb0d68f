"""AlpaServe's search with model buckets (`mp-search-sep`): models of like latency share devices, others do not.

Li et al., OSDI 2023, Algorithm 2. What a bucket makes of a number of devices is searched once, whatever the others
get; splits whose buckets could not reach the best score even apart are not searched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf

from data.placement import Placement
from planning.placement.dedicated import nothing_known
from planning.placement.partitions import uniform_partitions
from planning.placement.problem import Problem
from planning.placement.uniform import Found, UniformSearch, mp_search

ALIKE = 0.38
"""Models share a bucket if their latency on one device differs by less than this from the bucket's first model."""
_THRESHOLDS = (1.0, 0.5, 0.3, 0.2, 0.1)
_MOST_SPLITS = 100
_ROUNDING = 1e-12

Split = tuple[int, ...]


def model_buckets(problem: Problem) -> list[list[int]]:
    """Models by first fit in order of number. The latency is that of the smallest shape a model was profiled in."""
    buckets: list[list[int]] = []
    for model in range(len(problem.fleet.models)):
        for bucket in buckets:
            first_s = _alone_s(problem, bucket[0])
            if abs(_alone_s(problem, model) - first_s) / first_s < ALIKE:
                bucket.append(model)
                break
        else:
            buckets.append([model])
    return buckets


def device_splits(devices: int, parts: int, devices_per_node: int) -> Iterator[Split]:
    """Ordered splits into parts that share at most one node each with what is left after them."""
    if parts == 1:
        yield (devices,)
        return
    for first in range(1, devices):
        left, over = devices - first, devices % devices_per_node
        if first <= over or left % devices_per_node == 0 or over == 0:
            yield from ((first, *rest) for rest in device_splits(left, parts - 1, devices_per_node))


def balanced_splits(problem: Problem, buckets: Sequence[Sequence[int]], splits: Sequence[Split]) -> list[Split]:
    """Fewer than 100 splits, if the thresholds reach that: those with devices best in step with request rates."""
    kept = list(splits)
    rates = [sum(problem.fleet.models[model].rate_rps for model in bucket) for bucket in buckets]
    for threshold in _THRESHOLDS:
        if len(kept) < _MOST_SPLITS:
            break
        kept = [split for split in kept if _imbalance(problem, buckets, rates, split) < threshold]
    return kept


def mp_search_sep(problem: Problem, *, prune: bool = True) -> Found:
    """The better of `mp_search` on everything and the best split of the devices among the buckets."""
    mixed = mp_search(problem, prune=prune)
    buckets = model_buckets(problem)
    if len(buckets) == 1 or len(buckets) > problem.fleet.devices:
        return mixed
    splits = list(device_splits(problem.fleet.devices, len(buckets), problem.fleet.devices_per_node))
    return _Buckets(problem, buckets, prune).better(mixed, balanced_splits(problem, buckets, splits))


class _Buckets:
    """Searches of (bucket, devices), each done once."""

    def __init__(self, problem: Problem, buckets: Sequence[Sequence[int]], prune: bool) -> None:
        self._problem, self._prune = problem, prune
        self._allowed = [problem.only(bucket) for bucket in buckets]
        self._known = nothing_known(problem.costs, problem.fleet.devices)
        self._searches: dict[tuple[int, int], UniformSearch] = {}
        self._found: dict[tuple[int, int], Found] = {}
        self._most: dict[tuple[int, int], float] = {}  # what a search reached, or cannot exceed

    def better(self, best: Found, splits: Sequence[Split]) -> Found:
        """The best of `best` and the splits; the earlier on ties."""
        simulated, chosen, rank = best.simulated, None, 0
        score = best.score
        for index in sorted(range(len(splits)), key=lambda index: (-self._bound(splits[index]), index)):
            if self._bound(splits[index]) < score:
                break
            reached = self._search(splits[index], score)
            if reached is not None and (reached > score or (reached == score and chosen and index < rank)):
                score, chosen, rank = reached, splits[index], index
        simulated += sum(found.simulated for found in self._found.values())
        return Found(self._together(chosen) if chosen else best.placement, score, simulated)

    def _bound(self, split: Split) -> float:
        for key in enumerate(split):
            if key not in self._most:
                bucket, devices = key
                partitions = list(uniform_partitions(self._problem.fleet, devices))
                search = UniformSearch.of(
                    self._problem, partitions, self._allowed[bucket], prune=self._prune, worth_bounding=0.0,
                    known=self._known,
                )  # fmt: skip
                self._searches[key], self._most[key] = search, search.bound
        return sum(self._most[key] for key in enumerate(split))

    def _search(self, split: Split, floor: float) -> float | None:
        """The score of a split, None if it is below `floor`."""
        for key in enumerate(split):
            if key not in self._found:
                needed = floor - (self._bound(split) - self._most[key])
                found = self._searches[key].run(needed - _ROUNDING if self._prune else -inf)
                if found is None:
                    self._most[key] = min(self._most[key], needed)
                    return None
                self._found[key], self._most[key] = found, found.score
        return self._bound(split)

    def _together(self, split: Split) -> Placement:
        groups = [group for key in enumerate(split) for group in self._found[key].placement.groups]
        return Placement(tuple(groups)).normalised()


def _alone_s(problem: Problem, model: int) -> float:
    profiles = problem.fleet.profiles[problem.fleet.models[model].kind]
    smallest = min(profiles, key=lambda shape: (shape.devices, shape))
    return sum(profiles[smallest].latency_s)


def _imbalance(
    problem: Problem, buckets: Sequence[Sequence[int]], rates: Sequence[float], split: Split
) -> float:  # fmt: skip
    """Largest difference of a bucket's share of the requests and its share of devices / latency of its first model."""
    power = [devices / _alone_s(problem, bucket[0]) for devices, bucket in zip(split, buckets, strict=True)]
    shares = [rate / sum(rates) - one / sum(power) for rate, one in zip(rates, power, strict=True)]
    return max(abs(share) for share in shares)
