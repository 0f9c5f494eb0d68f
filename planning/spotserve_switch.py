"""SpotServe's placement and transfer estimate of a switch, as published.

X. Miao et al., "SpotServe: Serving Generative Large Language Models on Preemptible Instances",
ASPLOS'24, §3.3 and §3.4, in the form of its artifact: whole clusters of devices are matched to
contiguous shards, every receiver fetches from the old pipeline it belonged to, and the time is that
of the busiest instance between instances plus that of the busiest inside, at one bandwidth. It is
here to be compared with; our own mapping and movement are `planning.mapping` and `planning.resharding`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from data.errors import Infeasible
from data.layout import ParallelConfig, Position
from planning.edge_weights import GptShape, InterruptedBatches, edge_weights
from planning.matching import Matrix

BANDWIDTH_MBPS = 50_000.0
RESTART_S = 0.5  # added to every estimate for the start of the engines

Gpu = tuple[int, int]  # (host, index)
Placement = Mapping[Gpu, Position]
Unit = tuple[str, int, int]  # (what, layer, fine shard)


@dataclass(frozen=True, slots=True)
class Switch:
    """A change of configuration: `before` are the old positions, `hosts` those usable afterwards in
    order of address; `batches` says which interrupted requests are carried over.
    """

    model: GptShape
    old: ParallelConfig
    new: ParallelConfig
    before: Placement
    hosts: Sequence[int]
    gpus_per_host: int
    batches: InterruptedBatches

    @property
    def survivors(self) -> list[Gpu]:
        """Devices that had a position and stay, by address."""
        return [gpu for gpu in self._usable() if gpu in self.before]

    @property
    def grows_only(self) -> bool:
        """Whether running pipelines go on: same shape, no fewer of them, and nobody in use is lost."""
        stays = len(self.survivors) == len(self.before)
        return self.old.shape == self.new.shape and self.new.replicas >= self.old.replicas and stays

    def _usable(self) -> Iterator[Gpu]:
        for host in self.hosts:
            for index in range(self.gpus_per_host):
                yield host, index


def first_placement(config: ParallelConfig, hosts: Sequence[int], gpus_per_host: int) -> dict[Gpu, Position]:
    """Positions in rank order on the first devices. Raises `Infeasible` if there are too few."""
    gpus = [(host, index) for host in hosts for index in range(gpus_per_host)]
    if len(gpus) < config.devices:
        raise Infeasible(f"{config} needs {config.devices} devices and {len(gpus)} are usable")
    return dict(zip(gpus, config.positions(), strict=False))


def place(switch: Switch) -> dict[Gpu, Position]:
    """The published placement: pure growth moves nobody, otherwise clusters are matched to slots.

    Among placements of equal weight the first found is taken. Raises `Infeasible` with too few devices.
    """
    usable = list(switch._usable())
    if len(usable) < switch.new.devices:
        raise Infeasible(f"{switch.new} needs {switch.new.devices} devices and {len(usable)} are usable")
    if switch.grows_only:
        return _filled(dict(switch.before), [[position] for position in switch.new.positions()], usable, 1)
    survivors = switch.survivors
    if not survivors:
        return first_placement(switch.new, switch.hosts, switch.gpus_per_host)
    beside = sum(host == survivors[0][0] for host, _ in survivors)
    size = min(switch.new.shards, beside)
    slots = _slots(switch.new, size)
    return _filled(_matched(switch, survivors, slots, size), slots, usable, size)


def traffic_mbit(switch: Switch, after: Placement) -> dict[int, tuple[float, float]]:
    """Mbit that every host sends and receives (between hosts, inside), counted as the artifact counts."""
    counted: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for source, target, mbit in _messages(switch, after):
        if source[0] == target[0]:
            counted[source[0]][1] += mbit
        else:
            counted[source[0]][0] += mbit
            counted[target[0]][0] += mbit
    return {host: (between, inside) for host, (between, inside) in counted.items()}


def transfer_s(switch: Switch, after: Placement) -> float:
    """The published estimate of the transfers, without `RESTART_S`."""
    traffic = traffic_mbit(switch, after).values()
    between, inside = (max((pair[scope] for pair in traffic), default=0.0) for scope in (0, 1))
    return (between + inside) / BANDWIDTH_MBPS


def _slots(config: ParallelConfig, size: int) -> list[list[Position]]:
    """Contiguous blocks of shards by (pipeline, block, stage), the order in which free slots are filled."""
    return [
        [Position(replica, stage, block * size + index) for index in range(size)]
        for replica in range(config.replicas)
        for block in range(config.shards // size)
        for stage in range(config.stages)
    ]


def _matched(
    switch: Switch, survivors: Sequence[Gpu], slots: Sequence[Sequence[Position]], size: int
) -> dict[Gpu, Position]:
    held = [switch.before[gpu] for gpu in survivors]
    values = edge_weights(switch.model, switch.old, switch.new, held, switch.batches)
    columns = {position: column for column, position in enumerate(switch.new.positions())}
    clusters = [range(start, start + size) for start in range(0, len(survivors) - size + 1, size)]
    inner = {
        (row, column): _best(values[np.ix_(rows, [columns[position] for position in slot])])
        for row, rows in enumerate(clusters)
        for column, slot in enumerate(slots)
    }
    totals = np.array([[inner[row, column][0] for column in range(len(slots))] for row in range(len(clusters))])
    placed: dict[Gpu, Position] = {}
    for row, column in zip(*linear_sum_assignment(totals, maximize=True), strict=True):
        for offset, chosen in enumerate(inner[int(row), int(column)][1]):
            placed[survivors[clusters[int(row)][offset]]] = slots[int(column)][chosen]
    return placed


def _best(values: Matrix) -> tuple[int, list[int]]:
    """Value of the best square matching and the column of every row."""
    rows, columns = linear_sum_assignment(values, maximize=True)
    return int(values[rows, columns].sum()), [int(column) for column in columns]


def _filled(
    placed: dict[Gpu, Position], slots: Sequence[Sequence[Position]], usable: Sequence[Gpu], size: int
) -> dict[Gpu, Position]:
    """Unmatched slots take the first free devices, `size` by `size`."""
    taken = set(placed.values())
    free = [gpu for gpu in usable if gpu not in placed]
    groups = (free[start : start + size] for start in range(0, len(free), size))
    for slot in slots:
        if slot[0] not in taken:
            placed.update(zip(next(groups), slot, strict=True))
    return placed


def _messages(switch: Switch, after: Placement) -> Iterator[tuple[Gpu, Gpu, float]]:
    """Every unit that travels: receivers of an old pipeline take its holders in turn."""
    grain = max(switch.old.shards, switch.new.shards)
    order = sorted(after)  # hosts in index order, as the artifact lists its nodes
    holders: dict[int, dict[Unit, list[Gpu]]] = defaultdict(lambda: defaultdict(list))
    for gpu in sorted(switch.before):
        for unit in _units(switch.model, switch.old, switch.before[gpu], grain):
            holders[switch.before[gpu].replica][unit].append(gpu)
    for pipeline, gpus in _receivers(switch, after, order).items():
        yield from _polled(switch.model, grain, holders[pipeline], _wanted(switch, after, gpus, grain), 0)
    if not switch.grows_only:
        for pipeline, batch in enumerate(switch.batches.batch):
            gpus = [gpu for gpu in order if _inherited(switch, after[gpu].replica) == pipeline]
            wanted = _wanted(switch, after, gpus if batch else [], grain)
            yield from _polled(switch.model, grain, holders[pipeline], wanted, batch or 0, switch.batches.tokens)


def _inherited(switch: Switch, replica: int) -> int:
    return switch.batches.inherits[replica] if replica < len(switch.batches.inherits) else replica


def _receivers(switch: Switch, after: Placement, order: Sequence[Gpu]) -> dict[int, list[Gpu]]:
    """Devices by the old pipeline they belonged to; newcomers are dealt out by (stage, shard, pipeline)."""
    fresh = sorted(
        (gpu for gpu in order if gpu not in switch.before),
        key=lambda gpu: (after[gpu].stage, after[gpu].shard, after[gpu].replica),
    )
    dealt = {gpu: number % switch.old.replicas for number, gpu in enumerate(fresh)}
    found: dict[int, list[Gpu]] = defaultdict(list)
    for gpu in order:
        found[switch.before[gpu].replica if gpu in switch.before else dealt[gpu]].append(gpu)
    return found


def _wanted(switch: Switch, after: Placement, gpus: Sequence[Gpu], grain: int) -> dict[Unit, list[Gpu]]:
    wanted: dict[Unit, list[Gpu]] = defaultdict(list)
    for gpu in gpus:
        for unit in _units(switch.model, switch.new, after[gpu], grain):
            wanted[unit].append(gpu)
    return wanted


def _polled(
    model: GptShape,
    grain: int,
    holders: Mapping[Unit, Sequence[Gpu]],
    wanted: Mapping[Unit, Sequence[Gpu]],
    batch: int,
    tokens: int = 0,
) -> Iterator[tuple[Gpu, Gpu, float]]:
    for unit, receivers in wanted.items():
        sources = holders.get(unit, ())
        mbit = 32e-6 * (_kv_elements(model, unit, batch, tokens) if tokens else _weight_elements(model, unit, grain))
        lacking = [gpu for gpu in receivers if gpu not in sources]
        if mbit and sources:
            for number, gpu in enumerate(lacking):
                yield sources[number % len(sources)], gpu, mbit


def _units(model: GptShape, config: ParallelConfig, position: Position, grain: int) -> Iterator[Unit]:
    yield "pre", 0, 0
    width = grain // config.shards
    for layer in range(*config.stage_layers(position.stage, model.layers)):
        yield "replicated", layer, 0
        for fine in range(position.shard * width, (position.shard + 1) * width):
            yield "shard", layer, fine
    if position.stage == config.stages - 1:
        yield "post", 0, 0


def _weight_elements(model: GptShape, unit: Unit, grain: int) -> float:
    h = model.hidden
    if unit[0] == "pre":
        return (model.vocab + model.max_seq) * h
    if unit[0] == "post":
        return (model.vocab + 2) * h
    return 6 * h if unit[0] == "replicated" else (12 * h + 7) * h / grain


def _kv_elements(model: GptShape, unit: Unit, batch: int, tokens: int) -> float:
    """As the artifact estimates: K alone, but not divided by the number of fine shards."""
    if unit[0] == "pre":
        return (tokens + 3 * model.hidden + 4) * batch
    return batch * tokens * model.hidden if unit[0] == "shard" else 0.0
