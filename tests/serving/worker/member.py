"""One process of a group under test: reads tasks, carries them out in a fresh group, says what came of it."""

from __future__ import annotations

import hashlib
import signal
import sys
import time
from typing import Any

import msgspec
import torch
from torch import Tensor

from data.layout import ParallelConfig, Position
from data.models import kv_head_range
from serving import messages as m
from serving.engine.checkpoints import Checkpoints
from serving.engine.kv_cache import KvCache
from serving.engine.place import Place
from serving.engine.weights import load_weights, read_spec
from serving.worker.groups import Group, GroupBroken, connect_store
from serving.worker.kv_movement import KvMover
from serving.worker.movement import HeldTensor, WeightMover
from tests.serving.engine.cells import extract, insert


class Task(msgspec.Struct, kw_only=True):
    """What one member is to do."""

    name: str
    store: str
    prefix: str
    rank: int
    size: int
    timeout_s: float = 5.0
    options: dict[str, Any] = {}


class Outcome(msgspec.Struct):
    """What came of it: a result, or the sentence with which the group broke, and how long that took."""

    result: Any = None
    broken: str = ""
    seconds: float = 0.0


def content(size: int, seed: int) -> bytes:
    return hashlib.shake_256(str(seed).encode()).digest(size) if size else b""


def values(kind: str, seed: int, shape: tuple[int, ...]) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    if kind == "int64":
        return torch.randint(-(1 << 40), 1 << 40, shape, generator=source)
    return torch.randn(shape, generator=source) * 10.0 ** torch.randint(-6, 6, shape, generator=source)


def swap_bytes(group: Group, sizes: list[int]) -> bool:
    """Every pair exchanges messages of all sizes, both ways at once."""
    peers = [peer for peer in range(group.size) if peer != group.rank]
    pending = [group.send_bytes(content(size, group.rank), peer) for size in sizes for peer in peers]
    right = all(group.receive_bytes(peer) == content(size, peer) for size in sizes for peer in peers)
    for one in pending:
        one.wait()
    return right


def all_reduce(group: Group, kind: str, shape: list[int]) -> bool:
    parts = [values(kind, rank, tuple(shape)) for rank in range(group.size)]
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    given = parts[group.rank].clone()
    return torch.equal(group.all_reduce(given), total) and torch.equal(given, parts[group.rank])


def gather(group: Group, sizes: list[int]) -> bool:
    parts = [values("float32", rank, (3, size)) for rank, size in enumerate(sizes)]
    found = group.gather(parts[group.rank], sizes)
    return found is None if group.rank else found is not None and torch.equal(found, torch.cat(parts, dim=-1))


def exchange(group: Group, sizes: list[int]) -> bool:
    peers = [peer for peer in range(group.size) if peer != group.rank]
    sends = [(values("float32", 10 * group.rank + peer, (size,)), peer) for size in sizes for peer in peers]
    receives = [(torch.empty(size), peer) for size in sizes for peer in peers]
    group.begin_exchange(sends, receives).wait()
    group.flush()
    expected = [values("float32", 10 * peer + group.rank, (size,)) for size in sizes for peer in peers]
    return all(torch.equal(got, want) for (got, _), want in zip(receives, expected, strict=True))


def wait_for(group: Group, peer: int) -> bool:
    group.receive_bytes(peer)
    return True


def leave(group: Group, after_s: float) -> bool:
    time.sleep(after_s)
    return True


def aborted(group: Group) -> bool:
    group.abort()
    group.check()
    return True


def move(
    group: Group,
    checkpoint: str,
    old: dict[str, Any] | None,
    new: dict[str, Any] | None,
    before: int,
    after: int,
    prepare: str,
    copy: str,
    switch: str,
    kv_blocks: int,
) -> bool:
    """Weights and KV of rank `before` of `old` become those of rank `after` of `new`, bit for bit."""
    spec, cpu = read_spec(checkpoint), torch.device("cpu")
    order = msgspec.msgpack.decode(bytes.fromhex(prepare), type=m.Prepare)
    held, source = {}, None
    if old is not None:
        place = _place(spec, old, before)
        weights = load_weights(checkpoint, spec, place, dtype=torch.float32, device=cpu)
        held = {
            tensor.name: HeldTensor(_box(tensor.name, start, stop), weights[tensor.name])
            for tensor, start, stop in place.boxes(spec)
        }
        source = _cache(spec, old, before, kv_blocks)
    mover = WeightMover(group, order.world, held, Checkpoints({"": checkpoint}), torch.float32, cpu, 4096)
    result = mover.run(order.needed, order.sends, order.receives)
    target = _cache(spec, new, after, kv_blocks) if new is not None else None
    copying = msgspec.msgpack.decode(bytes.fromhex(copy), type=m.Copy)
    switching = msgspec.msgpack.decode(bytes.fromhex(switch), type=m.Switch)
    if source is not None:
        _fill(source, [*copying.sends, *switching.sends])
    kv = KvMover(group, order.world, lambda _: source, lambda _: target, torch.float32, 700)  # type: ignore[arg-type, return-value]
    kv.run(copying.sends, copying.receives, share=0.9)
    kv.run(switching.sends, switching.receives)
    for span in {span.key: span for one in switching.receives for span in one.spans}.values():
        assert target is not None
        found = extract(target, span.blocks, span.stop, target.layers, target.heads)
        if not torch.equal(found, _kv(span.key, span.stop, target)):
            return False
    if new is None:
        return not result.tensors
    fresh = load_weights(checkpoint, spec, _place(spec, new, after), dtype=torch.float32, device=cpu)
    return fresh.keys() == result.tensors.keys() and all(
        torch.equal(fresh[name], result.tensors[name].data) for name in fresh
    )


def _box(name: str, start: Any, stop: Any) -> Any:
    from planning.resharding import Box

    return Box(name, tuple(start), tuple(stop))


def _place(spec: Any, config: dict[str, Any], rank: int) -> Place:
    parallel = ParallelConfig.from_json(config)
    return Place.of(spec, parallel, Position(0, *divmod(rank, parallel.shards)))


def _cache(spec: Any, config: dict[str, Any], rank: int, blocks: int) -> KvCache:
    parallel = ParallelConfig.from_json(config)
    stage, shard = divmod(rank, parallel.shards)
    heads = kv_head_range(spec, shard, parallel.shards)
    layers = parallel.stage_layers(stage, spec.layers)
    return KvCache(layers, heads, spec.head_dim, blocks, 4, torch.float32, torch.device("cpu"))


def _fill(source: KvCache, sends: list[m.KvPieces]) -> None:
    for span in (span for piece in sends for span in piece.spans):
        data = _kv(span.key, span.stop, source)
        insert(source, span.blocks, span.stop, source.layers, source.heads, data)


def _kv(key: int, tokens: int, cache: KvCache) -> Tensor:
    """What a cache of these layers and heads holds of a sequence: a number that says where it belongs."""
    layer, side, token, head, width = (
        torch.arange(low, high, dtype=torch.float32).view([-1 if axis == at else 1 for axis in range(5)])
        for at, (low, high) in enumerate([cache.layers, (0, 2), (0, tokens), cache.heads, (0, cache.head_dim)])
    )
    return ((((key * 8 + layer) * 2 + side) * 64 + token) * 8 + head) * 16 + width


TASKS = {task.__name__: task for task in (swap_bytes, all_reduce, gather, exchange, wait_for, leave, aborted, move)}


def carry_out(task: Task) -> Outcome:
    started = time.monotonic()
    try:
        store = connect_store(task.store, task.timeout_s)
        cpu = torch.device("cpu")
        group = Group(store, task.prefix, task.rank, task.size, device=cpu, host="127.0.0.1", timeout_s=task.timeout_s)
        started = time.monotonic()
        result = TASKS[task.name](group, **task.options)  # type: ignore[operator]
    except GroupBroken as error:
        return Outcome(broken=str(error), seconds=time.monotonic() - started)
    return Outcome(result, seconds=time.monotonic() - started)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    for line in sys.stdin:
        with torch.inference_mode():
            outcome = carry_out(msgspec.json.decode(line, type=Task))
        sys.stdout.write(msgspec.json.encode(outcome).decode() + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
