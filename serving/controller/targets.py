"""What the plan book wants of the fleet as it is, and how to get there from what runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from data.deployment import Deployment, SharedGroup
from data.errors import Infeasible
from data.layout import Device, ParallelConfig
from data.models import ModelSpec
from data.plan import Plan, PlanBook
from data.shared_plan import SharedPlanBook
from planning.load import IN_TOKENS, Pace
from planning.preference import dependable, spare_ranks
from planning.resharding import Box
from planning.sharing import LiveGroup, group_boxes, live_groups, plan_deployment
from planning.transition import LiveReplica, Transition, common
from serving.controller.dispatch import Dispatcher, Replica
from serving.controller.membership import Membership
from serving.settings import ServingSettings

logger = logging.getLogger(__name__)

Resident = Mapping[Device, Sequence[Box]]
"""The boxes of weights that every device holds."""

Keepers = Callable[[Replica], tuple[Device | None, ...]]
"""Who keeps the copy of the KV of every rank of a replica."""


class Targets:
    """Looks at plan book, membership and live replicas; changes none of them."""

    def __init__(
        self,
        settings: ServingSettings,
        specs: Mapping[str, ModelSpec],
        membership: Membership,
        dispatcher: Dispatcher,
    ) -> None:
        self._specs, self._membership, self._dispatcher = specs, membership, dispatcher
        self._element_bytes = settings.engine.element_bytes
        self._residency = settings.engine.residency
        self._gpus = settings.engine.device != "cpu"
        self._paced_book: PlanBook | SharedPlanBook | None = None
        self._paces: dict[tuple[str, ParallelConfig], Pace] = {}

    def wanted(self, book: PlanBook | SharedPlanBook, now: Deployment | None) -> Deployment | None:
        """What the book says of the present state while `now` is in force; None if that holds nothing."""
        if isinstance(book, SharedPlanBook):
            return book.plan_for(self._membership.state()).deployment
        config = self._chosen(book, now).config
        return Deployment.of(config) if config is not None else None

    def _chosen(self, book: PlanBook, now: Deployment | None) -> Plan:
        """The book's plan for who is there and what is in force; choosing again, once it runs, changes nothing."""
        running = now.uniform if now is not None and self._dispatcher.replicas else None
        return book.plan_for(self._membership.state(), running)

    def whole(self, book: PlanBook | SharedPlanBook, now: Deployment | None) -> bool:
        """Whether devices are to keep all of their models: as set, or as the plan has memory for."""
        if self._residency == "plan" and isinstance(book, PlanBook):
            estimate = self._chosen(book, now).estimate
            return estimate is not None and estimate.residency == "model"
        return self._residency == "model"

    def promised_step_s(self, book: PlanBook | SharedPlanBook) -> float:
        """How long the plan of the present state says that a decode step takes; 0 if it does not say."""
        if isinstance(book, SharedPlanBook):
            return max((speed.step_s for speed in book.speeds), default=0.0)
        estimate = book.plan_for(self._membership.state()).estimate
        return estimate.latency_s / book.objective.output_tokens if estimate else 0.0

    def pace(self, book: PlanBook | SharedPlanBook, replica: Replica) -> Pace:
        """How quick a replica is, as the book has it; `IN_TOKENS` if it does not say."""
        if book is not self._paced_book:
            self._paced_book, self._paces = book, {}
        key = replica.model, replica.config
        if key not in self._paces:
            self._paces[key] = book_pace(book, *key)
        return self._paces[key]

    async def transition(
        self,
        target: Deployment,
        resident: Resident,
        *,
        whole: bool,
        keepers: Keepers,
    ) -> Transition | None:
        """What has to change as things are now; None if it cannot be done, which is logged. `keepers` keep copies of
        replicas' KV. It is worked out in a thread: tokens are not held up.
        """
        usable, advised = self._membership.usable_devices(), self._membership.advised_devices()
        live = self._live(keepers)
        work = partial(
            plan_deployment,
            self._specs,
            target,
            live=live,
            usable=dependable(usable, advised, live=live, target=target),
            resident={one: boxes for one, boxes in resident.items() if self._membership.connected(one)},
            element_bytes=self._element_bytes,
            whole=whole,
        )
        try:
            return await asyncio.to_thread(work)
        except Infeasible as error:
            logger.warning("%s", error)
            return None

    def _live(self, keepers: Keepers = lambda replica: ()) -> list[LiveReplica]:
        return [
            LiveReplica(
                one.number,
                one.config,
                one.devices,
                _cached_tokens(one),
                one.model,
                one.kv_share,
                self._useful(one, keepers(one)),
            )
            for one in self._dispatcher.replicas.values()
        ]

    def _useful(self, replica: Replica, keepers: Sequence[Device | None]) -> tuple[Device | None, ...]:
        """Those whose copies spare a move: GPUs of one host read each other's memory, which is quicker."""
        host = self._membership.host
        return tuple(
            None if keeper is not None and self._gpus and host(keeper) == host(device) else keeper
            for device, keeper in zip(replica.devices, keepers, strict=False)
        )

    def preloads(self, target: Deployment, resident: Resident, *, whole: bool) -> dict[Device, tuple[Box, ...]]:
        """What devices without a position had better fetch: the weights of positions that are likely to go, then of
        all in turn.
        """
        live = live_groups(self._live())
        busy = {device for one in live for device in one.devices}
        spares = [device for device in self._membership.usable_devices() if device not in busy]
        places = [(group, rank) for group in target.counts for rank in range(1 if whole else group.devices)]
        advised = [] if whole else self._advised(live, places)
        found = {}
        for device, index in zip(spares, spare_ranks(len(spares), len(places), advised), strict=True):
            boxes = group_boxes(self._specs, *places[index], whole=whole)
            held = resident.get(device, ())
            if not held or (index in advised and common(held, boxes) != boxes):
                found[device] = boxes
        return found

    def _advised(self, live: Sequence[LiveGroup], places: Sequence[tuple[SharedGroup, int]]) -> list[int]:
        """Places of the target on devices that may have to go."""
        advised, known = self._membership.advised_devices(), set(places)
        return [
            places.index((one.group, rank))
            for one in live
            for rank, device in enumerate(one.devices)
            if device in advised and (one.group, rank) in known
        ]


def book_pace(book: PlanBook | SharedPlanBook, model: str, config: ParallelConfig) -> Pace:
    """The pace of one replica. In a book of one model a reference request's latency is taken for that of its steps."""
    if isinstance(book, SharedPlanBook):
        shape = model, config.stages, config.shards
        found = [one for one in book.speeds if (one.model, one.stages, one.shards) == shape]
        return Pace(found[0].prefill_token_s, found[0].step_s, config.max_batch) if found else IN_TOKENS
    rated = {one.config: one.estimate for plan in book.plans for one in plan.frontier}
    rated |= {
        plan.config: plan.estimate for plan in book.plans if plan.config is not None and plan.estimate is not None
    }
    for known, estimate in rated.items():
        if estimate.latency_s and replace(known, replicas=1) == config:
            return Pace(0.0, estimate.latency_s / book.objective.output_tokens, config.max_batch)
    return IN_TOKENS


def _cached_tokens(replica: Replica) -> int:
    return sum(len(record.request.prompt) + len(record.output) for record in replica.records.values())
