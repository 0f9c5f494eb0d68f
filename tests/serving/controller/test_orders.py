from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from data.layout import Device, ParallelConfig, Position
from planning.resharding import KvBox, kv_extent
from serving import messages as m
from serving.controller.dispatch import Replica
from serving.controller.orders import (
    Heir,
    block_bytes,
    found_sources,
    kv_blocks,
    kv_pieces,
    live_sources,
    prepare_orders,
    world_of,
)
from serving.controller.seating import Seating
from serving.settings import EngineSettings
from tests.planning.fleets import SPEC, Scene, scenes

ENGINE = EngineSettings(block_tokens=4, kv_blocks=12)
SPECS = {"": SPEC}


def replicas(scene: Scene) -> tuple[list[Replica], list[Replica]]:
    """The retired and the new replicas of a scene's transition."""
    transition = scene.transition()
    retired = [
        Replica(live.number, 1, live.config, live.devices, ENGINE.kv_blocks)
        for live in scene.live
        if live.number in transition.retire
    ]
    new = [
        Replica(1000 + index, 2, planned.config, planned.devices, ENGINE.kv_blocks)
        for index, planned in enumerate(transition.new)
    ]
    return retired, new


@settings(deadline=None)
@given(scene=scenes())
def test_every_send_has_its_receive_with_the_same_boxes_in_the_same_order(scene: Scene) -> None:
    transition = scene.transition()
    retired, new = replicas(scene)
    world = world_of(transition, [*new, *retired])
    orders = prepare_orders(5, "store", transition, new, world)
    assert list(orders) == sorted(orders)
    assert all(order.world == [str(device) for device in world] for order in orders.values())
    sent = {(str(source), one.peer, one.relayed): one.boxes for source, order in orders.items() for one in order.sends}
    received = {
        (one.peer, str(target), one.relayed): one.boxes
        for target, order in orders.items()
        for one in order.receives
        if one.peer
    }
    assert sent == received
    assert sum(len(order.sends) for order in orders.values()) == len(sent)  # one message stream per pair and wave
    for replica in new:
        for rank, device in enumerate(replica.devices):
            role = orders[device].role
            assert role is not None
            assert ([one.replica for one in role.hosted], role.rank) == ([replica.number], rank)
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


def inheritance(scene: Scene, data: st.DataObject) -> tuple[list[Heir], list[Replica], list[Replica]]:
    """Sequences of retired replicas on their way into new ones, each into blocks of its own."""
    transition = scene.transition()
    retired, new = replicas(scene)
    found = data.draw(residents(retired))
    seating = {replica.number: Seating(replica.kv_blocks, ENGINE.block_tokens) for replica in new}
    heirs = []
    for source in retired:
        for one in found[source.number] if new else ():
            target = data.draw(st.sampled_from(new))
            if seating[target.number].fit(one.key, one.cached_tokens, 10_000):
                blocks = tuple(seating[target.number].seats[one.key])
                heirs.append(Heir(one.key, one.cached_tokens, live_sources(SPEC, source, one), target, blocks))
    assert transition.retire == tuple(replica.number for replica in retired)
    return heirs, new, retired


@settings(deadline=None)
@given(scene=scenes(), data=st.data())
def test_kv_of_every_sequence_reaches_each_cell_of_its_new_replica_once(scene: Scene, data: st.DataObject) -> None:
    heirs, _, _ = inheritance(scene, data)
    starts = {heir.key: data.draw(st.integers(0, heir.tokens)) for heir in heirs if data.draw(st.booleans())}
    sends, receives = kv_pieces(SPECS, heirs, starts)
    for source in sends:
        for target in receives:
            sent = [one for one in sends[source] if one.peer == str(target)]
            received = [one for one in receives[target] if one.peer == str(source)]
            assert [_content(one) for one in sent] == [_content(one) for one in received]
    for heir in heirs:
        for rank, device in enumerate(heir.target.devices):
            boxes = []
            for piece in receives.get(device, ()):
                for span in (one for one in piece.spans if one.key == heir.key):
                    assert (span.start, span.stop) == (starts.get(heir.key, 0), heir.tokens)
                    assert span.blocks == list(heir.blocks)
                    assert piece.replica == heir.target.number
                    boxes.append(KvBox(piece.layers, piece.heads))
            extent = _extent(heir.target, rank)
            assert all(box.overlap(extent) == box for box in boxes)
            missing = starts.get(heir.key, 0) < heir.tokens
            assert sum(box.cells for box in boxes) == (extent.cells if missing else 0)
            assert not any(a.overlap(b) for i, a in enumerate(boxes) for b in boxes[:i])


@settings(deadline=None)
@given(scene=scenes(), data=st.data())
def test_what_is_sent_is_read_where_the_sequence_is(scene: Scene, data: st.DataObject) -> None:
    heirs, _, _ = inheritance(scene, data)
    sends, _ = kv_pieces(SPECS, heirs, {})
    for device, pieces in sends.items():
        for piece in pieces:
            for span in piece.spans:
                (source,) = (
                    one
                    for heir in heirs
                    for one in heir.sources
                    if heir.key == span.key and one.device == device and one.replica == piece.replica
                )
                box = KvBox(piece.layers, piece.heads)
                assert source.box.overlap(box) == box
                assert span.blocks == list(source.blocks)


def test_a_copy_is_read_where_no_cache_is_left_and_only_if_it_is_long_enough() -> None:
    old = Replica(1, 1, ParallelConfig(1, 1, 2, 4), (Device("a", 0), Device("b", 0)), 8)
    new = Replica(2, 2, ParallelConfig(1, 1, 1, 4), (Device("a", 0),), 8)
    left, right = (_extent(old, rank) for rank in (0, 1))
    held = {
        Device("a", 0): [
            m.Holding(1, 7, 20, left.layers, left.heads, False, [3, 4, 5, 6, 7]),
            m.Holding(1, 7, 18, right.layers, right.heads, True, [0, 1, 2, 3, 4]),
        ],
        Device("c", 0): [m.Holding(1, 7, 9, right.layers, right.heads, True, [0, 1, 2])],
    }
    sources = found_sources(held)[7]
    sends, receives = kv_pieces(SPECS, [Heir(7, 18, tuple(sources), new, (0, 1, 2, 3, 4))], {})
    assert list(sends) == list(receives) == [Device("a", 0)]
    assert [(piece.kept, piece.heads) for piece in sends[Device("a", 0)]] == [(False, left.heads), (True, right.heads)]


def _content(piece: m.KvPieces) -> tuple[object, ...]:
    return piece.layers, piece.heads, [(span.key, span.start, span.stop) for span in piece.spans]


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
