"""The worker of one device: takes commands from the controller, never exits on a reconfiguration.

The asyncio loop talks; threads prepare and move; one step loop per role computes. Everything that
takes time runs in a thread and answers with a message, so that a stuck collective can be abandoned:
its thread is left behind and ends at the collective's timeout, and the next epoch does not wait for it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakMethod

import torch

from planning.resharding import Box
from serving import lifeline
from serving import messages as m
from serving.engine.checkpoints import Checkpoints
from serving.engine.kv_cache import KvCache
from serving.engine.own_stream import own_stream
from serving.settings import ServingSettings
from serving.transport import Connection, join
from serving.worker.build import (
    Build,
    build_position,
    compute_device,
    numerics_of,
    rehearse_models,
    weight_dtype,
)
from serving.worker.clearing import BrokenLoops, clear_aside
from serving.worker.communicators import Communicators
from serving.worker.copies import Copies
from serving.worker.groups import Group, GroupBroken, connect_store
from serving.worker.kv_movement import KvMover, meet_leader
from serving.worker.leader import Leader, complete
from serving.worker.loops import step_loop
from serving.worker.movement import HeldTensor, WeightMover
from serving.worker.position import ModelPart, Position
from serving.worker.pulse import Pulse
from serving.worker.reading import Way
from serving.worker.replica import StepLoop
from serving.worker.rounds import Traffic
from serving.worker.window import Windows

logger = logging.getLogger(__name__)

# Of a thread that records steps while another one of the process computes them, in every layer twice: where there is
# time for it, and in a hurry. With 4 ms those who decode lost up to an eighth of their throughput.
_REST_S, _SHORT_REST_S = 0.006, 0.002
# That steps are kept away for copies: two steps' time where the layout changes, for a single copy where others join.
_CHANGING_S, _JOINING_S = 0.015, 0.0


@dataclass(slots=True)
class PreparedRole:
    """What is ready for an epoch: its world, and the new position unless this worker only serves as a source."""

    world: list[str]
    group: Group
    position: Position | None
    held: dict[str, HeldTensor]
    announced: dict[int, m.Assignment] = field(default_factory=dict)

    def adoptions(self, order: m.Switch) -> list[m.Adoption]:
        """Those of an order, complete with what was announced."""
        return [complete(one, self.announced) for one in order.adoptions]


class Worker:
    """State of one worker: resident weights, prepared epochs, and the running role."""

    def __init__(self, settings: ServingSettings, instance: str, index: int) -> None:
        self.name = f"{instance}/{index}"
        self._settings, self._instance, self._index = settings, instance, index
        self._device = compute_device(settings.engine, index)
        cuda = self._device.type == "cuda"
        # Everything beside the step loop shares one stream: the memory of another would not be reused.
        self._side_stream = own_stream(self, self._device) if cuda else None
        self._windows = Windows(self._device, settings.capacity.window_bytes) if cuda else None
        self._communicators = Communicators()
        self._checkpoints = Checkpoints(settings.models)
        self._held: dict[str, HeldTensor] = {}
        self._preparing = 0  # epochs
        self._prepared: dict[int, PreparedRole] = {}
        self._abandoned_through = -1
        self._loop: StepLoop | None = None
        self._broken = BrokenLoops(on_gpu=cuda)
        self._copies = Copies(settings)
        self._lock = threading.Lock()  # orders to let go arrive while threads take on
        self._connection: Connection[m.Downward] | None = None
        self._runner = asyncio.get_running_loop()
        if cuda and numerics_of(settings.engine) == "native":
            rehearse_models(self._checkpoints.specs.values(), settings.engine, self._device)

    # -- connection ---------------------------------------------------------------------------

    async def serve(self, controller: str, *, pid: int) -> None:
        """Obey the controller at `host:port` until the connection ends.

        Raises `JoinRefused` or `TransportError` if there is no connection.
        """
        settings = self._settings
        connection = await join(
            controller,
            m.WorkerHello(settings.token, self._instance, self._index, pid, self._copies.address),
            frame_bytes=settings.capacity.frame_bytes,
            timeout_s=settings.timeouts.join_s,
            silence_s=settings.timeouts.controller_gone_s,
            unacknowledged_s=settings.timeouts.lease_s,
        )
        self._connection = connection
        if self._held:  # of an earlier controller, or of this one before the connection was lost
            connection.send(m.Preloaded([one.box for one in self._held.values()]))
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
                self._in_thread(
                    message.epoch, "prepare", lambda: self._aside(lambda: self._prepare(message, connection))
                )
            case m.Preload(boxes=boxes):
                connection = self._connection
                self._in_thread(-1, "preload", lambda: self._aside(lambda: self._preload(boxes, connection)))
            case m.Pause(replica=replica):
                self._to_leader(replica, Leader.pause)
            case m.Snapshot(epoch=epoch, replica=replica):
                self._to_leader(replica, lambda leader: leader.snapshot(epoch))
            case m.Survey():
                self._in_thread(message.epoch, "survey", lambda: self._survey(message))
            case m.Reserve(epoch=epoch, wanted=wanted):
                self._to_leader(wanted[0].replica, lambda leader: leader.reserve(epoch, wanted))
            case m.Copy():
                self._in_thread(message.epoch, "copy", lambda: self._aside(lambda: self._copy(message)))
            case m.Switch():
                self._in_thread(message.epoch, "switch", lambda: self._aside(lambda: self._switch(message)))
            case m.Salvage(replica=replica):
                self._salvage(replica)
            case m.Keep(replicas=replicas):
                self._keep(replicas)
            case m.Replicate(replica=replica, address=address):
                self._replicate(replica, address)
            case m.Retire(replicas=replicas):
                self._retire(replicas)
            case m.Abandon(epoch=epoch):
                self._abandon(epoch)
            case m.Submit(replica=replica, assignments=assignments):
                self._to_leader(replica, lambda leader: leader.submit(replica, assignments))
            case m.Cancel(replica=replica, keys=keys):
                self._to_leader(replica, lambda leader: leader.cancel(replica, keys))
            case m.Taken(replica=replica, count=count):
                self._to_leader(replica, lambda leader: leader.taken(count))
            case _:
                pass

    def _to_leader(self, replica: int, command: Callable[[Leader], None]) -> None:
        """Commands for a replica that is no longer led from here are late, and void."""
        if isinstance(self._loop, Leader) and self._runs([replica]):
            command(self._loop)

    def _runs(self, replicas: list[int]) -> bool:
        """Whether the loop of this moment is that of any of these replicas."""
        return self._loop is not None and any(one in replicas for one in self._loop.position.replicas)

    def _in_thread(self, epoch: int, phase: str, work: Callable[[], m.Message]) -> None:
        post = self._poster()

        def run() -> None:
            try:
                with torch.inference_mode():
                    answer = work()
            except Exception as error:  # noqa: BLE001 - the controller decides what a failure means
                logger.warning("%s: %s of epoch %d failed: %s", self.name, phase, epoch, error)
                answer = m.Failed(epoch, -1, phase, f"{type(error).__name__}: {error}")
            post(answer)

        threading.Thread(target=run, name=f"{phase}-{epoch}", daemon=True).start()

    # -- phases (each in its own thread) --------------------------------------------------------

    def _prepare(self, order: m.Prepare, connection: Connection[m.Downward] | None) -> m.Message:
        with self._lock:
            self._preparing += 1
        try:
            return self._prepare_role(order, connection)
        finally:
            with self._lock:
                self._preparing -= 1

    def _prepare_role(self, order: m.Prepare, connection: Connection[m.Downward] | None) -> m.Message:
        timeouts, host = self._settings.timeouts, self._settings.host
        build = Build(
            specs=self._checkpoints.specs,
            store=connect_store(order.store, timeouts.prepare_s),
            epoch=order.epoch,
            device=self._device,
            host=host,
            timeout_s=timeouts.collective_s,
            engine=self._settings.engine,
            communicators=self._communicators,
            rest_s=self._rest_s(order),
        )
        if order.role:
            self._broken.end_all()
        world = build.group("world", order.world, self.name, windows=self._windows)
        mover = WeightMover(
            world,
            order.world,
            self._held,
            self._checkpoints,
            weight_dtype(self._settings.engine),
            self._device,
            self._settings.capacity.transfer_bytes,
            self._way(changes=order.role is not None),
        )
        share = self._settings.capacity.copy_share if self._loop is not None else 1.0
        result = mover.run(order.needed, order.sends, order.receives, share=share)
        position = build_position(build, order.role, result.tensors) if order.role else None
        if self._loop is None:
            lifeline.settle()  # now nobody waits; in the first steps everybody would
        held = retained(self._held, result.tensors) if order.role else self._held
        with self._lock:
            if connection is not self._connection or order.epoch <= self._abandoned_through:
                raise GroupBroken("the epoch was abandoned meanwhile")
            self._prepared[order.epoch] = PreparedRole(order.world, world, position, held)
        traffic = result.traffic
        return m.Prepared(order.epoch, result.local_bytes, traffic.received_bytes, result.disk_bytes, traffic.seconds)

    def _rest_s(self, order: m.Prepare) -> float:
        if self._loop is None:
            return 0.0
        return _SHORT_REST_S if order.hurry else _REST_S

    def _preload(self, boxes: list[Box], connection: Connection[m.Downward] | None) -> m.Message:
        """A spare fetches weights before they are needed; a role that comes meanwhile is more important."""
        loaded = {}
        for box in boxes:
            self._check_idle(connection)
            data = self._checkpoints.read(box.tensor, box.start, box.stop)
            loaded[box.tensor] = HeldTensor(box, data.to(self._device, weight_dtype(self._settings.engine)))
        with self._lock:
            self._check_idle(connection)
            self._held = loaded
        return m.Preloaded(boxes)

    def _check_idle(self, connection: Connection[m.Downward] | None) -> None:
        if self._loop is not None or self._prepared or self._preparing or connection is not self._connection:
            raise GroupBroken("a role came before the weights were in")

    def _copy(self, order: m.Copy) -> m.Message:
        prepared = self._prepared[order.epoch]
        prepared.announced.update({one.key: one for one in order.announced})
        traffic = self._exchange(
            prepared, order, self._settings.capacity.copy_share, self._way(changes=prepared.position is not None)
        )
        return m.Copied(order.epoch, traffic.sent_bytes, traffic.seconds)

    def _way(self, *, changes: bool) -> Way | None:
        """How large copies get by the steps of this device, whose layout `changes`; otherwise others come to join."""
        if self._loop is None or self._side_stream is None:
            return None
        make_way = WeakMethod(self._loop.make_way)  # the loop may be let go of before, with all that it holds
        return Way(
            lambda: loop() if (loop := make_way()) else nullcontext(True), _CHANGING_S if changes else _JOINING_S
        )

    def _switch(self, order: m.Switch) -> m.Message:
        prepared, began = self._prepared[order.epoch], time.monotonic()
        self._wait_until_stopped(order)
        stopped = time.monotonic()
        traffic = self._exchange(prepared, order, 1.0)
        self._await_ranks(prepared, order)
        moved = time.monotonic()
        with self._lock:
            if order.epoch not in self._prepared:
                raise GroupBroken("the epoch was abandoned meanwhile")
            done: list[object] = [self._prepared.pop(order.epoch)]
            if self._runs(order.retire):
                done.append(self._give_way())
            self._take_over(order, prepared)
        del prepared  # taking its group down must not hold the answer up
        clear_aside(done)
        parts_ms = (1e3 * one for one in (stopped - began, moved - stopped, time.monotonic() - moved))
        logger.debug("switch: %.1f ms until the old loop ended, %.1f to move the rest, %.1f to take over", *parts_ms)
        return m.Switched(order.epoch, traffic.sent_bytes, traffic.seconds)

    def _wait_until_stopped(self, order: m.Switch) -> None:
        """The last tokens of a paused replica are there once its loop has ended, and the device is done with it."""
        loop = self._loop
        if loop is not None and self._runs(order.retire):
            loop.join(self._settings.timeouts.pause_s)
            if loop.is_alive():
                raise GroupBroken("the old replica did not stop in time")
            for part in loop.position.parts:
                part.index.catch_up()

    def _await_ranks(self, prepared: PreparedRole, order: m.Switch) -> None:
        """A running replica takes sequences in once every rank has their KV: the others tell its leader so."""
        loop = self._loop
        if loop is None or not any(pieces.replica in loop.position.replicas for pieces in order.receives):
            return
        meet_leader(prepared.group, [prepared.world.index(name) for name in loop.position.role.members])

    def _exchange(
        self, prepared: PreparedRole, order: m.Copy | m.Switch, share: float, way: Way | None = None
    ) -> Traffic:
        """Move the KV of an order; beside what is computed meanwhile, unless that makes `way`."""
        mover = KvMover(
            prepared.group,
            prepared.world,
            self._source,
            lambda pieces: self._receiver(prepared, pieces).cache,
            weight_dtype(self._settings.engine),
            self._settings.capacity.transfer_bytes,
            way,
        )
        traffic = mover.run(order.sends, order.receives, share=share)
        if self._side_stream is not None:
            self._side_stream.synchronize()  # what came from this worker's own memory, too
        self._note(prepared, order.receives)
        return traffic

    def _aside(self, work: Callable[[], m.Message]) -> m.Message:
        """Work whose kernels do not queue behind the step loop's, nor those behind its; it ends when its own have."""
        if self._side_stream is None:
            return work()
        with torch.cuda.stream(self._side_stream):
            answer = work()
            self._side_stream.synchronize()
            return answer

    def _source(self, pieces: m.KvPieces) -> KvCache:
        loop = self._loop
        if loop is not None and not pieces.kept and (part := loop.position.part(pieces.replica)) is not None:
            return part.cache
        return self._copies.cache(pieces)

    def _receiver(self, prepared: PreparedRole, pieces: m.KvPieces) -> ModelPart:
        loop = self._loop
        candidates = [prepared.position, loop.position if loop is not None else None]
        for position in candidates:
            if position is not None and (part := position.part(pieces.replica)) is not None:
                return part
        raise GroupBroken(f"replica {pieces.replica} is not here")

    def _note(self, prepared: PreparedRole, receives: list[m.KvPieces]) -> None:
        for pieces in receives:
            index = self._receiver(prepared, pieces).index
            for span in pieces.spans:
                index.adopt(span.key, span.stop, span.blocks)

    def _take_over(self, order: m.Switch, prepared: PreparedRole) -> None:
        if (position := prepared.position) is not None:
            self._held = prepared.held
            self._loop = self._step_loop(order.epoch, position, prepared.adoptions(order))
            self._loop.start()
        elif isinstance(self._loop, Leader):
            self._loop.graft(order.epoch, prepared.adoptions(order))
        self._tell_copies()

    def _tell_copies(self) -> None:
        """While requests were expected the controller took no copy for complete: say again how they are."""
        loop = self._loop
        for part in loop.position.parts if loop is not None else ():
            part.index.start_over(())

    def _step_loop(self, epoch: int, position: Position, adoptions: list[m.Adoption]) -> StepLoop:
        post, settings = self._poster(), self._settings
        return step_loop(
            position,
            adoptions,
            self._checkpoints.specs,
            settings.engine,
            fail=lambda reason: post(m.Failed(epoch, position.number, "step", reason)),
            report=post,
            keepalive_s=settings.timeouts.collective_s / 4,
        )

    # -- letting go -----------------------------------------------------------------------------

    def _give_way(self) -> StepLoop:
        """Stop the loop for the next one, and keep its caches at hand."""
        loop = self._set_aside()
        if not loop.ended:
            loop.position.abort()
        return loop

    def _set_aside(self) -> StepLoop:
        """Stop the loop and keep its caches at hand: whoever takes over may fail."""
        assert self._loop is not None
        self._copies.salvage(self._loop.position)
        return self._stop_loop()

    def _retire(self, replicas: list[int]) -> None:
        with self._lock:
            retired = self._copies.drop(replicas)
            if self._runs(replicas):
                loop = self._stop_loop()
                if not loop.ended:
                    loop.position.abort()
                retired.append(loop)
            if retired:
                clear_aside(retired)

    def _stop_loop(self) -> StepLoop:
        loop = self._loop
        assert loop is not None
        if loop.ended:
            loop.position.close()
        else:
            loop.discard()
        for replica in loop.position.replicas:
            self._copies.end_stream(replica)
        self._loop = None
        return loop

    def _salvage(self, replica: int) -> None:
        """Stop the loop of a broken replica, and keep the caches of its group at hand."""
        with self._lock:
            if self._runs([replica]):
                self._broken.add(self._set_aside())

    def _keep(self, replicas: list[int]) -> None:
        with self._lock:
            self._copies.keep(replicas)

    def _replicate(self, replica: int, address: str) -> None:
        """Copies of the running replica's KV go to another worker from now on."""
        post = self._poster()
        with self._lock:
            part = self._loop.position.part(replica) if self._loop is not None else None
            if part is not None:
                part.gate = self._copies.stream(part, address, partial(_tell_state, post, replica))

    def _survey(self, order: m.Survey) -> m.Message:
        self._copies.freeze(order.ended)
        return m.Holdings(order.epoch, self._copies.holdings(order.replicas))

    def _abandon(self, epoch: int) -> None:
        with self._lock:
            self._abandoned_through = max(self._abandoned_through, epoch)
            void = [self._prepared.pop(ready) for ready in list(self._prepared) if ready <= epoch]
        for group in [prepared.group for prepared in void]:
            group.abort()
        loop = self._loop
        if isinstance(loop, Leader):
            self._free_later(loop, epoch)
        self._tell_copies()
        clear_aside(void)

    def _free_later(self, leader: Leader, epoch: int) -> None:
        """Reservations for an epoch are free again once no rank can still be writing there: one that has not heard of
        its end for so long is lost, and the replica with it.
        """
        free = WeakMethod(leader.graft)  # it may be gone before, and must not wait for this with all that it holds
        later = threading.Timer(self._settings.timeouts.lease_s, lambda: (graft := free()) and graft(epoch, []))
        later.daemon = True
        later.start()

    def _forget_everything(self) -> None:
        """Without a controller nothing here is in force; the weights stay for the next one."""
        self._connection = None  # what threads still bring to an end is void
        self._abandon(max(self._prepared, default=-1))
        if self._loop is not None:
            self._retire(self._loop.position.replicas)
        self._keep([])
        self._broken.end_all()
        self._communicators.clear()
        self._abandoned_through = -1


def _tell_state(post: Callable[[m.Message], None], replica: int, complete: bool) -> None:
    post(m.CopyState(replica, complete))


def retained(held: dict[str, HeldTensor], needed: dict[str, HeldTensor]) -> dict[str, HeldTensor]:
    """What stays in memory: a tensor that is a view keeps its larger parent alive, so keep naming it."""
    return {
        name: held[name] if name in held and held[name].box.overlap(tensor.box) == tensor.box else tensor
        for name, tensor in needed.items()
    }
