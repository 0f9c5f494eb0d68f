"""A group's step loop on one worker: the leader schedules, everyone computes, the tail samples.

Rank r of the group is stage r div T, shard r mod T. The leader (rank 0) sends each step's plan to
the other ranks; activations go from stage to stage, shard by shard; the tail (last stage, shard 0)
returns the sampled tokens. Up to P steps of disjoint requests are in flight, one per stage. A step is of one
model; those that share the group take turns.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import torch
from torch import Tensor

from serving.engine.batch import StepPlan
from serving.worker.groups import GroupBroken, Pending, Waiting
from serving.worker.position import Position
from serving.worker.streams import first, mark
from serving.worker.tables import Known
from serving.worker.turn import Turn

logger = logging.getLogger(__name__)

STOP = b""  # instead of a plan: leave the loop
IDLE_STEP = -1  # a plan with this number only shows that the leader lives
encode = msgspec.msgpack.Encoder().encode
_REST_S, _MOST_REST_S = 100e-6, 0.05  # how often, and how long, to look whether a device is done


class StepLoop(threading.Thread, ABC):
    """Base of leader and follower. `fail` is called once, with a sentence, if the loop breaks."""

    def __init__(self, position: Position, fail: Callable[[str], None]) -> None:
        super().__init__(name=f"replica-{position.number}", daemon=True)
        self.position = position
        self.steps = 0
        self.resting = False  # there is nothing that this rank or another could do
        self.ended = False  # as it was told to, like those of the other ranks
        self._cpu_clock: int | None = None
        self._turn = Turn()
        self._fail = fail
        self._stopped = threading.Event()
        self._sends: deque[Pending] = deque()

    def run(self) -> None:
        """Step until told to stop, or until the group breaks."""
        self._cpu_clock = time.pthread_getcpuclockid(threading.get_ident())
        try:
            with torch.inference_mode(), first(self.position.group.device):
                self._loop()
            self.ended = not self._stopped.is_set()
        except Exception as error:  # whatever broke the loop must reach the controller
            if not self._stopped.is_set():
                if not isinstance(error, GroupBroken):
                    logger.exception("replica %d broke", self.position.number)
                self._fail(f"{type(error).__name__}: {error}")
        logger.info("the loop of replica %d has ended", self.position.number)

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
        self.position.give_up()

    @contextmanager
    def make_way(self) -> Iterator[bool]:
        """From any thread: no step is launched during the block. Says whether the device is done with those before; it
        is not waited for longer than a usual step takes.
        """
        with self._turn.alone() as alone:
            until = time.monotonic() + _MOST_REST_S
            while alone and self._busy and time.monotonic() < until:
                time.sleep(_REST_S)
            yield alone and not self._busy

    @property
    def _busy(self) -> bool:
        return self.is_alive() and not self.position.at_rest

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
        part = position.parts[plan.part]
        part.index.begin(plan)
        part.gate(plan)
        hidden = None
        if position.before is not None:
            shape = part.model.rows(plan), part.model.spec.hidden
            buffer = torch.empty(shape, dtype=part.model.hidden_dtype, device=position.group.device)
            hidden = position.before.receive(buffer)
        output = part.model.forward(plan, hidden)
        part.index.finish(plan, mark(position.group.device))
        if position.after is None:
            return output
        assert output is not None
        self._later(position.after.send(output.contiguous()))
        return None


class Follower(StepLoop):
    """Every rank but the leader: computes the plans that arrive."""

    def _loop(self) -> None:
        position, tables = self.position, Known()
        while not self._stopped.is_set():
            payload = position.group.receive_bytes(0)
            if payload == STOP:
                return
            plan = tables.decode(payload)
            if plan.step == IDLE_STEP:
                continue
            drawn = None
            with self._turn.step():
                logits = self._compute(plan)
                if position.role.rank == position.tail:
                    drawn = position.parts[plan.part].model.draw(logits, plan)
            if drawn is not None:
                self._later(position.group.send_bytes(encode(drawn), 0))
            self.steps += 1
