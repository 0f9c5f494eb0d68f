"""A replica's step loop on one worker: the leader schedules, everyone computes, the tail samples.

Rank r of the replica is stage r div T, shard r mod T. The leader (rank 0) sends each step's plan to
the other ranks; activations go from stage to stage, shard by shard; the tail (last stage, shard 0)
returns the sampled tokens. Up to P steps of disjoint requests are in flight, one per stage.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import torch
from torch import Tensor

from data.models import ModelSpec
from serving.engine.batch import SampledToken, StepPlan
from serving.engine.kv_cache import KvCache
from serving.engine.kv_index import KvIndex
from serving.engine.scheduler import Emission as Drawn
from serving.engine.scheduler import ScheduledRequest, Scheduler
from serving.messages import (
    Adoption,
    Assignment,
    Emission,
    Message,
    Paused,
    Reserved,
    Resident,
    Residents,
    Role,
    Seat,
    Tokens,
    Wanted,
)
from serving.worker.groups import Group, GroupBroken, Hop, Pending, Waiting
from serving.worker.streams import mark

logger = logging.getLogger(__name__)

_plan_decoder = msgspec.msgpack.Decoder(StepPlan)
_token_decoder = msgspec.msgpack.Decoder(list[SampledToken])
_encode = msgspec.msgpack.Encoder().encode
_STOP = b""  # instead of a plan: leave the loop
_WINDOW = 4  # reports that may be on their way to the journal before the leader waits
_LONG_STEP_S = 0.05  # worth a line in the log
_IDLE_STEP = -1  # a plan with this number only shows that the leader lives


class StepModel(Protocol):
    """What a step loop asks of a model part; `ShardModel` is one."""

    spec: ModelSpec

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Dtype of the activations between stages."""

    def rows(self, plan: StepPlan) -> int:
        """Rows of the activations of a step."""

    def forward(self, plan: StepPlan, hidden: Tensor | None) -> Tensor | None:
        """The next stage's activations, or the logits."""


@dataclass(slots=True)
class Position:
    """What a worker needs to run its rank: the model part, its cache, and the groups it talks through."""

    role: Role
    model: StepModel
    cache: KvCache
    group: Group
    draw: Callable[[Tensor | None, StepPlan], list[SampledToken]]
    before: Hop | None = None  # to the same shard of the stage before
    after: Hop | None = None
    comm: Group | None = None  # of the stage's shards
    index: KvIndex = field(default_factory=KvIndex)

    def abort(self) -> None:
        """From any thread: make whatever this rank waits for fail. All groups: a kernel that waits in one of them
        would hold up everything that has to wait for the device, the end of the others included.
        """
        hops = [hop.group for hop in (self.before, self.after) if hop is not None]
        for group in dict.fromkeys([self.comm, self.group, *hops]):
            if group is not None:
                group.abort()

    @property
    def tail(self) -> int:
        """The rank that samples."""
        return (self.role.stages - 1) * self.role.shards


class StepLoop(threading.Thread, ABC):
    """Base of leader and follower. `fail` is called once, with a sentence, if the loop breaks."""

    def __init__(self, position: Position, fail: Callable[[str], None]) -> None:
        super().__init__(name=f"replica-{position.role.replica}", daemon=True)
        self.position = position
        self.steps = 0
        self.resting = False  # there is nothing that this rank or another could do
        self._cpu_clock: int | None = None
        self._fail = fail
        self._stopped = threading.Event()
        self._sends: deque[Pending] = deque()
        self.gate: Callable[[StepPlan], None] = lambda plan: None
        """Called before every step; may hold it up, for example until copies of the KV have caught up."""

    def run(self) -> None:
        """Step until told to stop, or until the group breaks."""
        self._cpu_clock = time.pthread_getcpuclockid(threading.get_ident())
        try:
            with torch.inference_mode():
                self._loop()
        except Exception as error:  # whatever broke the loop must reach the controller
            if not self._stopped.is_set():
                if not isinstance(error, GroupBroken):
                    logger.exception("replica %d broke", self.position.role.replica)
                self._fail(f"{type(error).__name__}: {error}")
        logger.info("the loop of replica %d has ended", self.position.role.replica)

    @property
    def waiting(self) -> Waiting:
        """Whom the loop waits for."""
        return self.position.group.waiting

    def cpu_s(self) -> float:
        """Processor time that the loop's thread has used; from any thread."""
        if self._cpu_clock is None:
            return 0.0
        try:
            return time.clock_gettime(self._cpu_clock)
        except OSError:  # the thread has ended
            return 0.0

    def discard(self) -> None:
        """From any thread: stop without a word, whatever the loop is doing; its state is void."""
        self._stopped.set()
        self.position.abort()

    @abstractmethod
    def _loop(self) -> None:
        """Step until there is a reason to stop."""

    def _later(self, pending: Pending) -> None:
        """Remember a send; wait for old ones so that no more than two steps' buffers stay alive."""
        self._sends.append(pending)
        while len(self._sends) > 2 * (self.position.role.stages + len(self.position.role.members)):
            self._sends.popleft().wait()

    def _compute(self, plan: StepPlan) -> Tensor | None:
        """Run this rank's stage; hand the activations on, or return the logits (tail only)."""
        position = self.position
        position.index.begin(plan)
        self.gate(plan)
        hidden = None
        if position.before is not None:
            shape = position.model.rows(plan), position.model.spec.hidden
            buffer = torch.empty(shape, dtype=position.model.hidden_dtype, device=position.group.device)
            hidden = position.before.receive(buffer)
        output = position.model.forward(plan, hidden)
        position.index.finish(plan, mark(position.group.device))
        if position.after is None:
            return output
        assert output is not None
        self._later(position.after.send(output.contiguous()))
        return None


class Follower(StepLoop):
    """Every rank but the leader: computes the plans that arrive."""

    def _loop(self) -> None:
        position = self.position
        while not self._stopped.is_set():
            payload = position.group.receive_bytes(0)
            if payload == _STOP:
                return
            plan = _plan_decoder.decode(payload)
            if plan.step == _IDLE_STEP:
                continue
            logits = self._compute(plan)
            if position.role.rank == position.tail:
                self._later(position.group.send_bytes(_encode(position.draw(logits, plan)), 0))
            self.steps += 1


class Leader(StepLoop):
    """Rank 0: owns the scheduler. Commands arrive through `submit`, `cancel` and `pause`."""

    def __init__(
        self,
        position: Position,
        scheduler: Scheduler,
        *,
        fail: Callable[[str], None],
        report: Callable[[Message], None],
        keepalive_s: float,
    ) -> None:
        super().__init__(position, fail)
        self._scheduler = scheduler
        self._report = report
        self._keepalive_s = keepalive_s
        self._window = threading.Semaphore(_WINDOW)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._in_flight: deque[tuple[StepPlan, list[SampledToken] | None]] = deque()
        self._pausing = False
        self._reserved: dict[int, dict[int, list[int]]] = {}  # by epoch and request
        self._relieved = False  # requests went without an emission that would say how much is left
        self._spoke_at = time.monotonic()

    def submit(self, assignments: list[Assignment]) -> None:
        """New requests, or requests to be replayed."""
        self._commands.put(lambda: self._add(assignments))

    def cancel(self, keys: list[int]) -> None:
        """Forget requests; unknown keys are ignored."""
        self._commands.put(lambda: self._cancel(keys))

    def pause(self) -> None:
        """Stop at the next step boundary and report what is resident."""
        self._commands.put(self._pause)

    def discard(self) -> None:
        """As for every loop; an idle one wakes up to end."""
        super().discard()
        self._commands.put(lambda: None)

    def taken(self, count: int) -> None:
        """`count` reports have been journalled."""
        self._window.release(count)

    def adopt(self, adoptions: list[Adoption]) -> None:
        """Before `start`: take over requests whose KV is in the cache."""
        try:
            self._scheduler.claim([block for adoption in adoptions for block in adoption.blocks])
        except ValueError as error:
            raise GroupBroken(f"blocks promised to requests: {error}") from error
        for adoption in adoptions:
            self._scheduler.adopt(scheduled(adoption.assignment), adoption.cached_tokens, adoption.blocks)

    def snapshot(self, epoch: int) -> None:
        """Report what is resident at the next step boundary, and go on."""
        self._commands.put(lambda: self._report(Residents(epoch, self.position.role.replica, self._residents())))

    def reserve(self, epoch: int, wanted: list[Wanted]) -> None:
        """Set blocks aside for requests that will join in `epoch`, as long as running ones keep a spare each."""
        self._commands.put(lambda: self._reserve(epoch, wanted))

    def graft(self, epoch: int, adoptions: list[Adoption]) -> None:
        """Let requests join whose KV is in reserved blocks; what else was reserved for `epoch` is free again."""
        self._commands.put(lambda: self._graft(epoch, adoptions))

    def _reserve(self, epoch: int, wanted: list[Wanted]) -> None:
        seats = self._reserved.setdefault(epoch, {})
        for one in wanted:
            blocks = self._scheduler.reserve(one.tokens)
            if blocks is not None:
                seats[one.key] = blocks
        taken = [Seat(key, blocks) for key, blocks in seats.items()]
        self._report(Reserved(epoch, self.position.role.replica, taken))

    def _graft(self, epoch: int, adoptions: list[Adoption]) -> None:
        seats = self._reserved.pop(epoch, {})
        for adoption in adoptions:
            blocks = seats.pop(adoption.assignment.key, None)
            if blocks is not None:  # else the epoch was abandoned before this came
                self._scheduler.adopt(scheduled(adoption.assignment), adoption.cached_tokens, blocks)
        for blocks in seats.values():
            self._scheduler.release(blocks)

    def _add(self, assignments: list[Assignment]) -> None:
        for assignment in assignments:
            self._scheduler.add(scheduled(assignment))

    def _cancel(self, keys: list[int]) -> None:
        for key in keys:
            self._relieved |= self._scheduler.abort(key)

    def _pause(self) -> None:
        self._pausing = True

    def _loop(self) -> None:
        while not self._stopped.is_set():
            self._obey()
            if self._pausing and not self._in_flight:
                break
            launched = not self._pausing and self._launch()
            if self._in_flight and (not launched or len(self._in_flight) >= self.position.role.stages):
                self._collect()
            elif not launched:
                self._idle()
        if not self._stopped.is_set():
            self._leave()

    def _obey(self) -> None:
        while not self._commands.empty():
            self._commands.get()()

    def _idle(self) -> None:
        self.resting = True
        try:
            command = self._commands.get(timeout=self._keepalive_s / 4)
            self.resting = False
            command()
        except queue.Empty:
            self.resting = False
            expired = self._scheduler.expire(time.monotonic())
            self._tell(expired)
        if time.monotonic() - self._spoke_at > self._keepalive_s:
            self._broadcast(_encode(StepPlan(_IDLE_STEP, [])))

    def _launch(self) -> bool:
        now = time.monotonic()
        self._tell(self._scheduler.expire(now))
        plan = self._scheduler.schedule(now)
        if plan is None:
            return False
        self._broadcast(_encode(plan))
        logits = self._compute(plan)
        launched = time.monotonic()
        drawn = self.position.draw(logits, plan) if self.position.role.rank == self.position.tail else None
        self._in_flight.append((plan, drawn))
        if (ended := time.monotonic()) - now > _LONG_STEP_S:
            rows = sum(len(one.tokens) for one in plan.sequences)
            spent_ms = 1e3 * (launched - now), 1e3 * (ended - now)
            logger.debug("a step of %d rows: %.0f ms to launch, %.0f in all", rows, *spent_ms)
        return True

    def _collect(self) -> None:
        plan, drawn = self._in_flight.popleft()
        if drawn is None:
            drawn = _token_decoder.decode(self.position.group.receive_bytes(self.position.tail))
        self.position.group.check()
        self.steps += 1
        self._tell(self._scheduler.complete(plan, drawn))

    def _broadcast(self, payload: bytes) -> None:
        self._spoke_at = time.monotonic()
        for rank in range(1, len(self.position.role.members)):
            self._later(self.position.group.send_bytes(payload, rank))

    def _leave(self) -> None:
        self._broadcast(_STOP)
        while self._sends:
            self._sends.popleft().wait()
        self._report(Paused(self.position.role.replica, self._residents()))

    def _residents(self) -> list[Resident]:
        return [Resident(*one) for one in self._scheduler.snapshot()]

    def _granted(self) -> bool:
        """Wait until the journal can take another report; False if the loop is stopped meanwhile."""
        self.resting = True
        try:
            while not self._window.acquire(timeout=0.5):
                if self._stopped.is_set():
                    return False
            return True
        finally:
            self.resting = False

    def _tell(self, drawn: list[Drawn]) -> None:
        quiet = not drawn and (self._in_flight or not self._relieved)
        if quiet or self._stopped.is_set():
            return
        # What ends while it is under way is freed after its step, which then has nothing else to say.
        self._relieved = bool(self._in_flight) and (self._relieved or any(one.token is None for one in drawn))
        if not self._granted():
            return
        emissions = [
            Emission(one.key, one.index, one.token, one.logprob, list(one.top), one.finish, one.error) for one in drawn
        ]
        scheduler = self._scheduler
        self._report(
            Tokens(self.position.role.replica, emissions, scheduler.running, scheduler.waiting, scheduler.kv_usage)
        )


def scheduled(assignment: Assignment) -> ScheduledRequest:
    """The scheduler's form of an assignment; its deadline starts to count now."""
    deadline_at = None if assignment.deadline_s is None else time.monotonic() + assignment.deadline_s
    return ScheduledRequest(
        key=assignment.key,
        prompt=assignment.prompt,
        output=list(assignment.output),
        sampling=assignment.sampling,
        limits=assignment.limits,
        deadline_at_s=deadline_at,
    )
