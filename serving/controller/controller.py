"""The controller: what the API needs, on top of fleet, ledger and journal."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path

from tokenizers import Tokenizer

from data.errors import CorruptData, InvalidInput
from data.models import ModelSpec
from data.plan import PlanBook
from data.shared_plan import SharedPlanBook
from serving.controller.events import EventLog
from serving.controller.fleet import Fleet
from serving.controller.journal import Journal
from serving.controller.ledger import Ledger
from serving.controller.plans import PlanSource, check_book, read_plan_file
from serving.controller.records import Record
from serving.engine.checkpoints import Checkpoints
from serving.errors import Aborted, NotFound, PerennialError, PlanMismatch, QueueFull, Unavailable
from serving.requests import Chunk, Event, GenerationRequest, ModelInfo, PositionInfo, ServerInfo
from serving.settings import ServingSettings
from serving.telemetry import Metrics

logger = logging.getLogger(__name__)

_TICK_S = 0.05
_ANYWHERE = ("0.0.0.0", "::", "")
_LEADERS_MARGIN_S = 0.5


class Controller:
    """Implements `serving.api.service.Service`. Create it with `open`, end it with `close`."""

    def __init__(
        self,
        settings: ServingSettings,
        specs: Mapping[str, ModelSpec],
        tokenizers: Mapping[str, Tokenizer],
        book: PlanBook | SharedPlanBook,
        version: str,
    ) -> None:
        self.specs, self.metrics, self.log = specs, Metrics(), EventLog()
        self._settings, self._tokenizers = settings, tokenizers
        self._plan_version = version
        self._journal = Journal(settings.journal)
        self._ledger = Ledger(self._journal, tokenizers, self.metrics, finished_kept=settings.capacity.finished_kept)
        self.fleet = Fleet(
            settings,
            specs,
            book,
            journal=self._journal,
            ledger=self._ledger,
            events=self.log,
            metrics=self.metrics,
        )
        self._source: PlanSource | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._draining = False

    @classmethod
    async def open(cls, settings: ServingSettings) -> tuple[Controller, int]:
        """Load checkpoints, plan and journal, resume what is unfinished; returns the control port too."""
        if settings.host in _ANYWHERE:
            raise InvalidInput(f"workers must reach the controller at its host; give an address, not {settings.host}")
        checkpoints = Checkpoints(settings.models)
        checkpoints.verify()  # workers would find out too, but far from whoever starts the service
        checkpoints.close()
        tokenizers = {name: _read_tokenizer(path) for name, path in settings.models.items()}
        source = None
        if settings.plan:
            book, version = _read_plan(settings.plan), ""
        else:
            source = await asyncio.to_thread(
                PlanSource, settings.registry, settings.registry_model, settings.registry_alias
            )
            found = await asyncio.to_thread(source.poll)
            if found is None:
                raise NotFound(f"no plan {settings.registry_model} in {settings.registry}; run `perennial plan` first")
            book, version = found
        check_book(book, checkpoints.specs)
        controller = cls(settings, checkpoints.specs, tokenizers, book, version)
        controller._source = source
        try:
            return controller, await controller._start()
        except BaseException:
            await controller.close()  # the journal's writer must not outlive the event loop
            raise

    async def _start(self) -> int:
        unfinished = self._ledger.restore()
        for record in unfinished:
            record.orphaned_at = asyncio.get_running_loop().time()
            self._resume(record)
        self.log.emit("controller_started", epoch=self.fleet.epoch, resumed_requests=len(unfinished))
        self._say_plan("start")
        port = await self.fleet.start()
        self._tasks.append(asyncio.create_task(self._housekeep()))
        if self._source is not None:
            self._tasks.append(asyncio.create_task(self._follow_registry()))
        return port

    def _resume(self, record: Record) -> None:
        if record.model in self.specs:
            self.fleet.dispatcher.enqueue(record)
        else:
            record.failure = Aborted(f"the model {record.model!r} is not served any more", tokens=len(record.output))
            self._ledger.end(record, "abort")

    async def close(self) -> None:
        """Stop the fleet and close the journal."""
        for task in self._tasks:
            task.cancel()
        await self.fleet.stop()
        self._ledger.stop()
        self._journal.close()

    # -- requests ---------------------------------------------------------------------------------------

    async def submit(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """See `Service.submit`."""
        record = self._ledger.known(request)
        if record is None:
            self._admit(request)
            record = await self._ledger.admit(request)
            self.metrics.admitted(len(request.prompt))
            if record.finish is None:  # it may have been aborted already
                self.fleet.dispatcher.enqueue(record)
                self.fleet.dispatch()
        return self._listen(record, 0)

    def _admit(self, request: GenerationRequest) -> None:
        """Raise what stands against taking a new request now."""
        if self._draining:
            raise self._refuse(Unavailable("the service is draining; try another endpoint", retry_after_s=5.0))
        if self.fleet.no_capacity:
            raise self._refuse(Unavailable("no plan fits the surviving devices; try again", retry_after_s=2.0))
        if not self.fleet.hosts(request.model):
            sentence = f"the devices that are left have no place for {request.model!r}; try again"
            raise self._refuse(Unavailable(sentence, retry_after_s=2.0))
        if self.fleet.dispatcher.waiting >= self._settings.capacity.queue:
            raise self._refuse(QueueFull("the queue is full; try again", retry_after_s=1.0))
        if len(request.prompt) >= (most := self.specs[request.model].max_positions):
            raise InvalidInput(
                f"the prompt has {len(request.prompt)} tokens; it must leave room for an answer within {most}"
            )

        if self._settings.capacity.admission == "slo" and request.deadline_s is not None:
            self._check_deadline(request, request.deadline_s)

    def _check_deadline(self, request: GenerationRequest, deadline_s: float) -> None:
        """Refuse a request that no replica can serve in time, and say when it would have been."""
        due_at = asyncio.get_running_loop().time() + deadline_s
        late_s = self.fleet.dispatcher.done_in_s(request, due_at) - deadline_s
        if late_s > 0:
            sentence = f"no replica can answer within {deadline_s:g} s, it would take {deadline_s + late_s:.2g} s"
            raise self._refuse(QueueFull(f"{sentence}; try again later or allow more time", retry_after_s=late_s))

    def _refuse(self, error: PerennialError) -> PerennialError:
        self.metrics.rejected(error)
        return error

    def attach(self, request_id: str, resume_from: int) -> AsyncGenerator[Chunk, None]:
        """See `Service.attach`."""
        record = self._ledger.find(request_id)
        if not 0 <= resume_from <= record.committed:
            raise InvalidInput(f"cannot resume from token {resume_from}: {record.committed} exist")
        return self._listen(record, resume_from)

    async def _listen(self, record: Record, start: int) -> AsyncGenerator[Chunk, None]:
        record.listeners += 1
        record.orphaned_at = None
        try:
            async for chunk in record.chunks(start):
                yield chunk
        finally:
            record.listeners -= 1
            if not record.listeners and record.finish is None:
                if record.request.resumable:
                    record.orphaned_at = asyncio.get_running_loop().time()
                else:
                    self.fleet.end(record, "abort")

    async def abort(self, request_id: str) -> bool:
        """See `Service.abort`."""
        record = self._ledger.find(request_id)
        if record.finish is not None:
            return False
        self.fleet.end(record, "abort")
        return True

    def decode(self, token_ids: tuple[int, ...], model: str) -> str:
        """See `Service.decode`."""
        return str(self._tokenizers[model].decode(list(token_ids), skip_special_tokens=True))

    def encode(self, text: str, model: str) -> tuple[int, ...]:
        """See `Service.encode`."""
        return tuple(self._tokenizers[model].encode(text).ids)

    # -- control ----------------------------------------------------------------------------------------

    def info(self) -> ServerInfo:
        """See `Service.info`."""
        fleet, now = self.fleet, asyncio.get_running_loop().time()
        replicas = list(fleet.dispatcher.replicas.values())
        positions = tuple(
            PositionInfo(
                replica=index,
                stage=rank // one.config.shards,
                shard=rank % one.config.shards,
                device=str(device),
                model=one.model,
            )
            for index, one in enumerate(replicas)
            for rank, device in enumerate(one.devices)
        )
        models = tuple(
            ModelInfo(
                name=spec.name,
                family=spec.family,
                max_positions=spec.max_positions,
                vocab=spec.vocab,
                replicas=sum(one.model == name for one in replicas),
            )
            for name, spec in self.specs.items()
        )
        return ServerInfo(
            model=models[0].name,
            family=models[0].family,
            max_positions=models[0].max_positions,
            vocab=models[0].vocab,
            state=self._state(),  # type: ignore[arg-type]
            epoch=fleet.epoch,
            config=str(fleet.target) if fleet.target and replicas else "",
            positions=positions,
            instances=tuple(fleet.membership.describe(now)),
            running=sum(one.running for one in replicas),
            waiting=fleet.dispatcher.waiting + sum(one.waiting for one in replicas),
            kv_usage=max((one.kv_usage for one in replicas), default=0.0),
            plan_source=self._settings.plan or f"{self._settings.registry_model}@{self._settings.registry_alias}",
            plan_sha256=fleet.book.sha256,
            plan_version=self._plan_version,
            models=models,
        )

    def _state(self) -> str:
        if self._draining:
            return "draining"
        if self.fleet.dispatcher.replicas:
            return "serving"
        return "no_capacity" if self.fleet.no_capacity else "starting"

    def plan_book(self) -> PlanBook | SharedPlanBook:
        """See `Service.plan_book`."""
        return self.fleet.book

    async def reload_plan(self, source: str) -> str:
        """See `Service.reload_plan`."""
        if source:
            self._adopt(_read_plan(source), "", source)
        elif self._source is not None:
            await self._poll_registry(self._source)
        elif self._settings.plan:
            self._adopt(_read_plan(self._settings.plan), "", self._settings.plan)
        return self.fleet.book.sha256

    def _adopt(self, book: PlanBook | SharedPlanBook, version: str, source: str) -> None:
        check_book(book, self.specs)
        self._plan_version = version
        if book.sha256 != self.fleet.book.sha256:
            self.fleet.adopt_book(book)
        self._say_plan(source)

    def _say_plan(self, source: str) -> None:
        book = self.fleet.book
        self.log.emit("plan_loaded", sha256=book.sha256, version=self._plan_version, source=source)
        config = str(self.fleet.target or "")
        self.metrics.plan(version=self._plan_version, sha256=book.sha256, source=source, config=config)

    async def _follow_registry(self) -> None:
        assert self._source is not None
        while True:
            await asyncio.sleep(self._settings.timeouts.plan_poll_s)
            try:
                await self._poll_registry(self._source)
            except Exception as error:  # noqa: BLE001 - a registry fails in many ways; the next poll may not
                logger.warning("%s; the plan in force stays", error)

    async def _poll_registry(self, source: PlanSource) -> None:
        found = await asyncio.to_thread(source.poll)
        if found is not None:
            self._adopt(*found, f"{self._settings.registry_model}@{self._settings.registry_alias}")

    async def drain(self, timeout_s: float | None) -> int:
        """See `Service.drain`."""
        self._draining = True
        self.log.emit("drain")
        clock = asyncio.get_running_loop().time
        until = clock() + (self._settings.timeouts.drain_s if timeout_s is None else timeout_s)
        while clock() < until and self._unfinished():  # noqa: ASYNC110 - many records, no single event
            await asyncio.sleep(_TICK_S)
        return self._unfinished()

    def _unfinished(self) -> int:
        return sum(not record.ended for record in self._ledger.records.values())

    async def notify(self, instance: str, deadline_s: float, source: str) -> None:
        """See `Service.notify`."""
        if not self.fleet.membership.notice(instance, deadline_s, source):
            names = ", ".join(sorted(self.fleet.membership.instances)) or "none"
            raise NotFound(f"no instance {instance} is here; present: {names}")

    def events(self, since: int) -> AsyncGenerator[Event, None]:
        """See `Service.events`."""
        return self.log.follow(since)

    async def _housekeep(self) -> None:
        """Deadlines of queued requests, orphans, and gauges."""
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(_TICK_S)
            now = clock()
            for record in list(self._ledger.records.values()):
                if record.finish is None:
                    self._check(record, now)
            info = self.info()
            self.metrics.load(running=info.running, waiting=info.waiting, kv_usage=info.kv_usage)
            self.metrics.fleet(info.epoch, [one.state for one in info.instances])

    def _check(self, record: Record, now: float) -> None:
        orphan_s = self._settings.timeouts.orphan_s
        # A leader sees to the deadlines of its requests itself, as long as it can.
        margin_s = 0.0 if record.replica is None else _LEADERS_MARGIN_S
        if record.deadline_at is not None and now > record.deadline_at + margin_s:
            self.fleet.end(record, "deadline")
        elif record.orphaned_at is not None and now - record.orphaned_at > orphan_s:
            self.fleet.end(record, "abort")


def _read_plan(path: str) -> PlanBook | SharedPlanBook:
    try:
        return read_plan_file(path)
    except OSError as error:
        raise InvalidInput(f"cannot read the plan book {path}: {error.strerror}") from error
    except CorruptData as error:
        raise PlanMismatch(str(error)) from error


def _read_tokenizer(checkpoint: str) -> Tokenizer:
    path = Path(checkpoint) / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise CorruptData(f"{path} is not a tokenizer; the checkpoint is incomplete") from error
