"""The worker of one device: takes commands from the controller, never exits on a reconfiguration.

The asyncio loop talks; threads prepare and move; one step loop per role computes. Everything that
takes time runs in a thread and answers with a message, so that a stuck collective can be abandoned:
its thread is left behind and ends at the collective's timeout, and the next epoch does not wait for it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from serving import messages as m
from serving.engine.scheduler import Scheduler, SchedulerLimits
from serving.engine.weights import CheckpointReader, read_spec
from serving.settings import ServingSettings
from serving.transport import Connection, join
from serving.worker.build import Build, build_position, compute_device, weight_dtype
from serving.worker.groups import Group, GroupBroken, connect_store
from serving.worker.movement import HeldTensor, WeightMover, move_kv
from serving.worker.pulse import Pulse
from serving.worker.replica import Follower, Leader, Position, StepLoop

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class PreparedRole:
    """What is ready for an epoch: its world, and the new position unless this worker only serves as a source."""

    world: list[str]
    group: Group
    position: Position | None
    held: dict[str, HeldTensor]


class Worker:
    """State of one worker: resident weights, prepared epochs, and the running role."""

    def __init__(self, settings: ServingSettings, instance: str, index: int) -> None:
        self.name = f"{instance}/{index}"
        self._settings, self._instance, self._index = settings, instance, index
        self._device = compute_device(settings.engine, index)
        self._spec = read_spec(settings.checkpoint)
        self._reader = CheckpointReader(settings.checkpoint)
        self._held: dict[str, HeldTensor] = {}
        self._prepared: dict[int, PreparedRole] = {}
        self._abandoned_through = -1
        self._loop: StepLoop | None = None
        self._lock = threading.Lock()  # orders to let go arrive while threads take on
        self._connection: Connection[m.Downward] | None = None
        self._runner = asyncio.get_running_loop()

    # -- connection ---------------------------------------------------------------------------

    async def serve(self, controller: str, *, pid: int) -> None:
        """Obey the controller at `host:port` until the connection ends.

        Raises `JoinRefused` or `TransportError` if there is no connection.
        """
        settings = self._settings
        connection = await join(
            controller,
            m.WorkerHello(settings.token, self._instance, self._index, pid),
            frame_bytes=settings.capacity.frame_bytes,
            timeout_s=settings.timeouts.join_s,
            silence_s=settings.timeouts.controller_gone_s,
            unacknowledged_s=settings.timeouts.lease_s,
        )
        self._connection = connection
        beat = asyncio.create_task(self._beat(connection))
        try:
            async for message in connection:
                self._obey(message)
        finally:
            beat.cancel()
            self._forget_everything()
            await connection.close()

    async def _beat(self, connection: Connection[m.Downward]) -> None:
        heartbeat_s = self._settings.timeouts.heartbeat_s
        pulse = Pulse(heartbeat_s)
        while True:
            connection.send(pulse.take(self._loop))
            await asyncio.sleep(heartbeat_s)

    def _poster(self) -> Callable[[m.Message], None]:
        """Sends from any thread to the controller of this moment: its epochs mean nothing to the next one."""
        connection = self._connection
        assert connection is not None

        def post(message: m.Message) -> None:
            self._runner.call_soon_threadsafe(connection.send, message)

        return post

    # -- commands -----------------------------------------------------------------------------

    def _obey(self, message: m.Downward) -> None:
        match message:
            case m.Prepare():
                connection = self._connection
                self._in_thread(message.epoch, -1, "prepare", lambda: self._prepare(message, connection))
            case m.Pause(replica=replica):
                self._to_leader(replica, Leader.pause)
            case m.Move():
                self._in_thread(message.epoch, -1, "move", lambda: self._move(message))
            case m.Activate():
                self._in_thread(message.epoch, -1, "activate", lambda: self._activate(message))
            case m.Retire(replicas=replicas):
                self._retire(replicas)
            case m.Abandon(epoch=epoch):
                self._abandon(epoch)
            case m.Submit(replica=replica, assignments=assignments):
                self._to_leader(replica, lambda leader: leader.submit(assignments))
            case m.Cancel(replica=replica, keys=keys):
                self._to_leader(replica, lambda leader: leader.cancel(keys))
            case m.Taken(replica=replica, count=count):
                self._to_leader(replica, lambda leader: leader.taken(count))
            case _:
                pass

    def _to_leader(self, replica: int, command: Callable[[Leader], None]) -> None:
        """Commands for a replica that is no longer led from here are late, and void."""
        if isinstance(self._loop, Leader) and self._loop.position.role.replica == replica:
            command(self._loop)

    def _in_thread(self, epoch: int, replica: int, phase: str, work: Callable[[], m.Message]) -> None:
        post = self._poster()

        def run() -> None:
            try:
                with torch.inference_mode():
                    answer = work()
            except Exception as error:  # noqa: BLE001 - the controller decides what a failure means
                logger.warning("%s: %s of epoch %d failed: %s", self.name, phase, epoch, error)
                answer = m.Failed(epoch, replica, phase, f"{type(error).__name__}: {error}")
            post(answer)

        threading.Thread(target=run, name=f"{phase}-{epoch}", daemon=True).start()

    # -- phases (each in its own thread) --------------------------------------------------------

    def _prepare(self, order: m.Prepare, connection: Connection[m.Downward] | None) -> m.Message:
        timeouts, host = self._settings.timeouts, self._settings.host
        build = Build(
            spec=self._spec,
            store=connect_store(order.store, timeouts.prepare_s),
            epoch=order.epoch,
            device=self._device,
            host=host,
            timeout_s=timeouts.collective_s,
            engine=self._settings.engine,
        )
        world = build.group("world", order.world, self.name)
        mover = WeightMover(
            world,
            order.world,
            self._held,
            self._reader,
            weight_dtype(self._settings.engine),
            self._device,
            self._settings.capacity.transfer_bytes,
        )
        result = mover.run(order.needed, order.sends, order.receives)
        position = build_position(build, order.role, result.tensors) if order.role else None
        held = retained(self._held, result.tensors) if order.role else self._held
        with self._lock:
            if connection is not self._connection or order.epoch <= self._abandoned_through:
                raise GroupBroken("the epoch was abandoned meanwhile")
            self._prepared[order.epoch] = PreparedRole(order.world, world, position, held)
        return m.Prepared(order.epoch, result.local_bytes, result.received_bytes, result.disk_bytes)

    def _move(self, order: m.Move) -> m.Message:
        prepared = self._prepared[order.epoch]
        old = self._loop
        if old is not None and order.sends:
            old.join(self._settings.timeouts.pause_s)
            if old.is_alive():
                raise GroupBroken("the old replica did not stop in time")
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        source = old.position.cache if old is not None else None
        target = prepared.position.cache if prepared.position is not None else None
        sent = move_kv(prepared.group, prepared.world, order.sends, order.receives, source=source, target=target)
        return m.Moved(order.epoch, sent)

    def _activate(self, order: m.Activate) -> m.Message:
        self._retire(order.retire)
        with self._lock:
            if order.epoch not in self._prepared:
                raise GroupBroken("the epoch was abandoned meanwhile")
            prepared = [self._prepared.pop(order.epoch)]
            if (position := prepared[0].position) is not None:
                self._held = prepared[0].held
                self._loop = self._step_loop(order.epoch, position, order.adoptions)
                self._loop.start()
        _clear_aside(prepared)
        return m.Activated(order.epoch)

    def _step_loop(self, epoch: int, position: Position, adoptions: list[m.Adoption]) -> StepLoop:
        role, engine, spec = position.role, self._settings.engine, self._spec

        post = self._poster()

        def fail(reason: str) -> None:
            post(m.Failed(epoch, role.replica, "step", reason))

        if role.rank:
            return Follower(position, fail)
        limits = SchedulerLimits(
            max_batch=role.max_batch,
            step_tokens=engine.step_tokens,
            block_tokens=engine.block_tokens,
            blocks=role.kv_blocks,
            max_positions=spec.max_positions,
            plans_in_flight=role.stages,
        )
        leader = Leader(
            position,
            Scheduler(limits, spec.eos_token_ids),
            fail=fail,
            report=post,
            keepalive_s=self._settings.timeouts.collective_s / 4,
        )
        leader.adopt(adoptions)
        return leader

    # -- letting go -----------------------------------------------------------------------------

    def _retire(self, replicas: list[int]) -> None:
        with self._lock:
            if self._loop is not None and self._loop.position.role.replica in replicas:
                self._loop.discard()
                retired = [self._loop]
                self._loop = None
                _clear_aside(retired)

    def _abandon(self, epoch: int) -> None:
        with self._lock:
            self._abandoned_through = max(self._abandoned_through, epoch)
            void = [self._prepared.pop(ready) for ready in list(self._prepared) if ready <= epoch]
        for group in [prepared.group for prepared in void]:
            group.abort()
        _clear_aside(void)

    def _forget_everything(self) -> None:
        """Without a controller nothing here is in force; the weights stay for the next one."""
        if self._loop is not None:
            self._retire([self._loop.position.role.replica])
        self._abandon(max(self._prepared, default=-1))
        self._connection, self._abandoned_through = None, -1


def _clear_aside(things: list[Any]) -> None:
    """Destroy what only this list holds in a thread of its own: taking a NCCL group down takes a second."""
    threading.Thread(target=things.clear, name="clear", daemon=True).start()


def retained(held: dict[str, HeldTensor], needed: dict[str, HeldTensor]) -> dict[str, HeldTensor]:
    """What stays in memory: a tensor that is a view keeps its larger parent alive, so keep naming it."""
    return {
        name: held[name] if name in held and held[name].box.overlap(tensor.box) == tensor.box else tensor
        for name, tensor in needed.items()
    }
