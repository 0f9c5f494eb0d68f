from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from data.layout import Device, ParallelConfig, Position
from planning.resharding import KvBox, kv_extent
from serving import messages as m
from serving.controller.dispatch import Replica
from serving.controller.orders import Adopted, adopt, block_bytes, kv_blocks, move_orders, prepare_orders, world_of
from serving.engine.scheduler import ScheduledRequest, Scheduler, SchedulerLimits
from serving.settings import EngineSettings
from tests.planning.fleets import SPEC, Scene, scenes

ENGINE = EngineSettings(block_tokens=4, kv_blocks=12)


def replicas(scene: Scene) -> tuple[list[Replica], list[Replica]]:
    """The retired and the new replicas of a scene's transition."""
    transition = scene.transition()
    retired = [
        Replica(live.number, 1, live.config, live.devices, ENGINE.kv_blocks)
        for live in scene.live
        if live.number in transition.retire
    ]
    new = [
        Replica(1000 + index, 2, transition.config, planned.devices, ENGINE.kv_blocks)
        for index, planned in enumerate(transition.new)
    ]
    return retired, new


@settings(deadline=None)
@given(scene=scenes())
def test_every_send_has_its_receive_with_the_same_boxes_in_the_same_order(scene: Scene) -> None:
    transition = scene.transition()
    retired, new = replicas(scene)
    world = world_of(transition, new, retired)
    orders = prepare_orders(5, "store", transition, new, world)
    assert list(orders) == sorted(orders)
    assert all(order.world == [str(device) for device in world] for order in orders.values())
    sent = {(str(source), one.peer): one.boxes for source, order in orders.items() for one in order.sends}
    received = {
        (one.peer, str(target)): one.boxes for target, order in orders.items() for one in order.receives if one.peer
    }
    assert sent == received
    assert sum(len(order.sends) for order in orders.values()) == len(sent)  # one message stream per pair
    for replica in new:
        for rank, device in enumerate(replica.devices):
            role = orders[device].role
            assert role is not None
            assert (role.replica, role.rank) == (replica.number, rank)
            assert role.members[rank] == str(device)
            assert list(transition.needed[device]) == orders[device].needed
    roles = {device for device, order in orders.items() if order.role}
    assert roles == {device for replica in new for device in replica.devices}


@st.composite
def residents(draw: st.DrawFn, retired: Sequence[Replica]) -> dict[int, list[m.Resident]]:
    """What paused leaders report: disjoint blocks within their caches."""
    result: dict[int, list[m.Resident]] = {}
    key = 0
    for replica in retired:
        free = draw(st.permutations(range(replica.kv_blocks)))
        result[replica.number] = []
        while free and draw(st.booleans()):
            count = draw(st.integers(1, min(4, len(free))))
            tokens = draw(st.integers((count - 1) * ENGINE.block_tokens + 1, count * ENGINE.block_tokens))
            key += 1
            result[replica.number].append(m.Resident(key, tokens, list(free[:count])))
            free = free[count:]
    return result


def adoption(scene: Scene, data: st.DataObject) -> tuple[list[Adopted], list[Replica], dict[int, list[m.Resident]]]:
    transition = scene.transition()
    retired, new = replicas(scene)
    found = data.draw(residents(retired))
    heirs = {number: new[at] for at, planned in enumerate(transition.new) for number in planned.inherits}
    by_number = {replica.number: replica for replica in retired}
    return adopt(found, heirs, by_number, ENGINE.block_tokens), new, found


@settings(deadline=None)
@given(scene=scenes(), data=st.data())
def test_adoptions_fit_and_the_leader_will_find_the_same_blocks(scene: Scene, data: st.DataObject) -> None:
    adopted, new, found = adoption(scene, data)
    for replica in new:
        mine = [one for one in adopted if one.target is replica]
        blocks = [block for one in mine for block in one.blocks]
        assert len(blocks) == len(set(blocks))
        assert len(blocks) + len(mine) <= replica.kv_blocks  # each has a block for its next token
        assert len(mine) <= replica.config.max_batch
        limits = SchedulerLimits(replica.config.max_batch, 64, ENGINE.block_tokens, replica.kv_blocks, 64)
        scheduler = Scheduler(limits, ())
        for one in mine:
            assert scheduler.reserve(one.resident.cached_tokens) == list(one.blocks)
            request = ScheduledRequest(one.resident.key, [1] * (one.resident.cached_tokens + 1))
            scheduler.adopt(request, one.resident.cached_tokens, list(one.blocks))
    keys = [one.resident.key for one in adopted]
    assert len(keys) == len(set(keys))
    for one in adopted:
        assert one.resident in found[one.source.number]


@settings(deadline=None)
@given(scene=scenes(), data=st.data())
def test_kv_of_every_adopted_request_reaches_each_cell_of_its_new_replica_once(
    scene: Scene, data: st.DataObject
) -> None:
    adopted, _, _ = adoption(scene, data)
    orders = move_orders(7, SPEC, adopted)
    pairs = {(source, target) for source in orders for target in orders}
    for source, target in pairs:
        sends = [one for one in orders[source].sends if one.peer == str(target)]
        receives = [one for one in orders[target].receives if one.peer == str(source)]
        assert [_content(one) for one in sends] == [_content(one) for one in receives]
    for one in adopted:
        for rank, device in enumerate(one.target.devices):
            extent = _extent(one.target, rank)
            pieces = [piece for piece in orders[device].receives if piece.key == one.resident.key]
            boxes = [KvBox(piece.layers, piece.heads) for piece in pieces]
            assert all(box.overlap(extent) == box for box in boxes)
            assert sum(box.cells for box in boxes) == extent.cells
            assert not any(a.overlap(b) for i, a in enumerate(boxes) for b in boxes[:i])
            assert all(piece.blocks == list(one.blocks) for piece in pieces)
        for rank, device in enumerate(one.source.devices):
            extent = _extent(one.source, rank)
            for piece in orders[device].sends if device in orders else ():
                if piece.key == one.resident.key:
                    assert piece.blocks == one.resident.blocks
                    assert KvBox(piece.layers, piece.heads).overlap(extent)


def _content(piece: m.KvPiece) -> tuple[object, ...]:
    return piece.key, piece.tokens, piece.layers, piece.heads


def _extent(replica: Replica, rank: int) -> KvBox:
    return kv_extent(SPEC, replica.config, Position(0, *divmod(rank, replica.config.shards)))


def test_every_rank_has_as_many_blocks_and_the_widest_fits_its_memory() -> None:
    config = ParallelConfig(1, 3, 1, 64)  # two layers in the first stage, one in the others
    replica = Replica(1, 1, config, tuple(Device("i", rank) for rank in range(3)), 0)
    sizes = [block_bytes(SPEC, replica, EngineSettings(), rank) for rank in range(3)]
    assert sizes == [2 * 2 * 2 * 16 * 4 * 4, 2 * 2 * 16 * 4 * 4, 2 * 2 * 16 * 4 * 4]
    assert kv_blocks(SPEC, replica, EngineSettings(kv_memory_bytes=10 * sizes[0] + 1)) == 10
    most = 64 * SPEC.max_positions // 16
    assert kv_blocks(SPEC, replica, EngineSettings(kv_memory_bytes=1 << 40)) == most
    assert kv_blocks(SPEC, replica, EngineSettings(kv_memory_bytes=1)) == 1
