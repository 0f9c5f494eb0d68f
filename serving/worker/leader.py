"""Rank 0 of a group: owns the schedulers, says what every step computes, and reports what came of it."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import msgspec
from msgspec import structs

from serving.engine.batch import SampledToken, StepPlan
from serving.engine.scheduler import Emission as Drawn
from serving.engine.scheduler import ScheduledRequest, Scheduler
from serving.engine.sharing import Sharing
from serving.messages import (
    Adoption,
    Assignment,
    Emission,
    Message,
    Paused,
    Reserved,
    Resident,
    Residents,
    Seat,
    Tokens,
    Wanted,
)
from serving.worker.groups import GroupBroken
from serving.worker.position import Position
from serving.worker.replica import IDLE_STEP, STOP, StepLoop
from serving.worker.tables import Sent

logger = logging.getLogger(__name__)

_token_decoder = msgspec.msgpack.Decoder(list[SampledToken])
_WINDOW = 4  # reports that may be on their way to the journal before the leader waits
_LONG_STEP_S = 0.05  # worth a line in the log


class Leader(StepLoop):
    """Rank 0 of a group. `schedulers` are those of the position's parts, in their order.

    Commands arrive through `submit`, `cancel` and `pause`.
    """

    def __init__(
        self,
        position: Position,
        schedulers: Sequence[Scheduler],
        *,
        fail: Callable[[str], None],
        report: Callable[[Message], None],
        keepalive_s: float,
    ) -> None:
        super().__init__(position, fail)
        self._sharing = Sharing(schedulers)
        self._schedulers = dict(zip(position.replicas, schedulers, strict=True))
        self._report = report
        self._keepalive_s = keepalive_s
        self._window = threading.Semaphore(_WINDOW)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._in_flight: deque[tuple[StepPlan, list[SampledToken] | None]] = deque()
        self._pausing = False
        self._tables = Sent()
        self._seats: dict[tuple[int, int], tuple[int, Seat]] = {}  # by replica and request: for which epoch, and what
        self._relieved: set[int] = set()  # replicas that lost requests without an emission to say how much is left
        self._unproven: dict[int, int] = {}  # tokens before chunks of prompts that may not be computed everywhere yet
        self._spoke_at = time.monotonic()

    def submit(self, replica: int, assignments: list[Assignment]) -> None:
        """New requests, or requests to be replayed."""
        self._commands.put(lambda: self._add(replica, assignments))

    def cancel(self, replica: int, keys: list[int]) -> None:
        """Forget requests; unknown keys are ignored."""
        self._commands.put(lambda: self._cancel(replica, keys))

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
            for replica, scheduler in self._schedulers.items():
                adopted = [one for one in adoptions if one.replica == replica]
                scheduler.claim([block for one in adopted for block in one.blocks])
                scheduler.forget(self._here(replica) - {one.assignment.key for one in adopted})
        except ValueError as error:
            raise GroupBroken(f"blocks promised to requests: {error}") from error
        for adoption in adoptions:
            self._adopt(adoption)

    def _here(self, replica: int) -> set[int]:
        """Sequences of which there is KV in the cache."""
        part = self.position.part(replica)
        return set(part.index.snapshot()) if part is not None else set()

    def snapshot(self, epoch: int) -> None:
        """Report what is resident on every rank at the next step boundary, and go on."""
        self._commands.put(lambda: self._report(Residents(epoch, self.position.number, self._proven())))

    def reserve(self, epoch: int, wanted: list[Wanted]) -> None:
        """Set blocks aside for requests that will join in `epoch`, as long as running ones keep a spare each."""
        self._commands.put(lambda: self._reserve(epoch, wanted))

    def graft(self, epoch: int, adoptions: list[Adoption]) -> None:
        """Let requests join whose KV is in reserved blocks; what else was reserved for `epoch` is free again."""
        self._commands.put(lambda: self._graft(epoch, adoptions))

    def _reserve(self, epoch: int, wanted: list[Wanted]) -> None:
        for one in wanted:
            place = one.replica, one.key
            # A seat of an attempt that failed will do: whatever is still written there is the same request's.
            held = self._seats[place][1].blocks if place in self._seats else []
            more = self._schedulers[one.replica].reserve(one.tokens, len(held))
            if more is not None:
                self._seats[place] = epoch, Seat(one.key, one.replica, [*held, *more])
        self._report(Reserved(epoch, [seat for reserved_for, seat in self._seats.values() if reserved_for == epoch]))

    def _graft(self, epoch: int, adoptions: list[Adoption]) -> None:
        for adoption in adoptions:
            _, seat = self._seats.pop((adoption.replica, adoption.assignment.key), (epoch, None))
            if seat is not None:  # else it has been freed since
                self._adopt(structs.replace(adoption, blocks=seat.blocks))
        for place in [place for place, (reserved_for, _) in self._seats.items() if reserved_for == epoch]:
            _, empty = self._seats.pop(place)
            self._schedulers[empty.replica].release(empty.blocks)
            self._schedulers[empty.replica].forget([empty.key])

    def _adopt(self, adoption: Adoption) -> None:
        request = scheduled(adoption.assignment)
        self._tables.forget(self.position.replicas.index(adoption.replica), request.key)
        self._schedulers[adoption.replica].adopt(request, adoption.cached_tokens, adoption.blocks)

    def _add(self, replica: int, assignments: list[Assignment]) -> None:
        for assignment in assignments:
            self._schedulers[replica].add(scheduled(assignment))

    def _cancel(self, replica: int, keys: list[int]) -> None:
        for key in keys:
            if self._schedulers[replica].abort(key):
                self._relieved.add(replica)

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
            self._expire(time.monotonic())
        self._keep_alive()

    def _keep_alive(self) -> None:
        """The other ranks wait for plans, and not for ever."""
        if time.monotonic() - self._spoke_at > self._keepalive_s:
            self._broadcast(self._tables.encode(StepPlan(IDLE_STEP, [])))

    def _launch(self) -> bool:
        now = time.monotonic()
        self._expire(now)
        plan = self._sharing.schedule(now)
        if plan is None:
            return False
        with self._turn.step():
            if len(self.position.role.members) > 1:
                self._broadcast(self._tables.encode(plan))
            logits = self._compute(plan)
            launched = time.monotonic()
            model = self.position.parts[plan.part].model
            drawn = model.draw(logits, plan) if self.position.role.rank == self.position.tail else None
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
        self._prove(plan, drawn)
        replica = self.position.replicas[plan.part]
        self._tell(replica, self._schedulers[replica].complete(plan, drawn))

    def _prove(self, plan: StepPlan, drawn: Sequence[SampledToken]) -> None:
        """Tokens that were drawn show that all ranks have computed everything up to them; without any, a step may be
        no more than launched.
        """
        if drawn:
            self._unproven.clear()
        else:
            fresh = {one.key: min(one.start, self._unproven.get(one.key, one.start)) for one in plan.sequences}
            self._unproven |= fresh

    def _expire(self, now_s: float) -> None:
        for replica, scheduler in self._schedulers.items():
            self._tell(replica, scheduler.expire(now_s))

    def _broadcast(self, payload: bytes) -> None:
        self._spoke_at = time.monotonic()
        for rank in range(1, len(self.position.role.members)):
            self._later(self.position.group.send_bytes(payload, rank))

    def _leave(self) -> None:
        self._broadcast(STOP)
        while self._sends:
            self._sends.popleft().wait()
        self._report(Paused(self.position.number, self._residents()))

    def _residents(self) -> list[Resident]:
        return [Resident(*one) for scheduler in self._schedulers.values() for one in scheduler.snapshot()]

    def _proven(self) -> list[Resident]:
        limits = self._unproven
        found = [
            structs.replace(one, cached_tokens=min(one.cached_tokens, limits.get(one.key, one.cached_tokens)))
            for one in self._residents()
        ]
        return [one for one in found if one.cached_tokens]

    def _granted(self) -> bool:
        """Wait until the journal can take another report; False if the loop is stopped meanwhile."""
        self.resting = True
        try:
            while not self._window.acquire(timeout=0.5):
                if self._stopped.is_set():
                    return False
                self._keep_alive()
            return True
        finally:
            self.resting = False

    def _tell(self, replica: int, drawn: list[Drawn]) -> None:
        quiet = not drawn and (self._in_flight or replica not in self._relieved)
        if quiet or self._stopped.is_set():
            return
        # What ends while it is under way is freed after its step, which then has nothing else to say.
        if not self._in_flight:
            self._relieved.discard(replica)
        elif any(one.token is None for one in drawn):
            self._relieved.add(replica)
        if not self._granted():
            return
        emissions = [
            Emission(one.key, one.index, one.token, one.logprob, list(one.top), one.finish, one.error) for one in drawn
        ]
        scheduler = self._schedulers[replica]
        load = scheduler.running, scheduler.waiting, scheduler.kv_usage
        self._report(Tokens(replica, emissions, *load, scheduler.given_up()))


def complete(adoption: Adoption, announced: Mapping[int, Assignment]) -> Adoption:
    """An adoption with all of its prompt and output, of which `announced` may have a part.

    Raises `GroupBroken` if it has another part than the adoption says.
    """
    if adoption.announced is None:
        return adoption
    rest = adoption.assignment
    known = announced.get(rest.key)
    if known is None or len(known.output) != adoption.announced:
        raise GroupBroken(f"request {rest.key} was not announced with {adoption.announced} tokens")
    whole = structs.replace(rest, prompt=known.prompt, output=[*known.output, *rest.output])
    return structs.replace(adoption, assignment=whole)


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
