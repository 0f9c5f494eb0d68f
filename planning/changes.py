"""What going from one configuration to another takes on instances of one type: bytes, preparation, pause.

An instance holds roles: ranges of layers × shares of their shards. Instances take those roles of the new
configuration of which they hold most, and fetch the rest once each; inside them it is copied. This is the transition
of `planning.transition` with instances in place of devices, quick enough for every pair of a plan book.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import ceil, lcm

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from data.cluster import InstanceType
from data.explanation import Move
from data.layout import ParallelConfig
from data.models import ModelSpec, tensors
from data.plan import Objective
from planning.charges import Traffic
from planning.costs import CostModel
from planning.options import lost_s
from planning.simulation.serving_perennial import Charges

Cells = npt.NDArray[np.float64]

_SAMPLE = 16  # instances that a pair of shapes is worked out for; roles repeat from replica to replica


class Changes:
    """Changes between configurations of one model. `charges` say what they take beside bytes, `traffic` of bytes."""

    def __init__(
        self,
        costs: CostModel,
        kind: InstanceType,
        objective: Objective,
        charges: Charges,
        traffic: Traffic | None = None,
    ) -> None:
        self._costs, self._kind, self._charges, self._traffic = costs, kind, charges, traffic or Traffic()
        self._spec = spec = costs.spec
        tokens = objective.input_tokens + objective.output_tokens // 2
        self._kv_bytes = 2 * spec.layers * spec.kv_heads * spec.head_dim * costs.kv_element_bytes * tokens
        self._sampled: dict[tuple[ParallelConfig, ParallelConfig], tuple[float, float, float]] = {}

    def instances(self, config: ParallelConfig) -> int:
        """Instances that a configuration occupies."""
        return ceil(config.devices / self._kind.devices)

    def between(self, now: ParallelConfig, then: ParallelConfig, running: float) -> Move:
        """The move from one configuration to another under `running` requests."""
        if now == then:
            return Move(now, then, 0, 0.0, 0.0)
        share = stopping_share(now, then)
        builds = share == 1 or then.replicas > now.replicas
        moved, most = self._weights(now, then)
        prepare_s = self._prepare_s(moved, most, self.instances(now)) if builds else 0.0
        kv_s = self._transfer_s(running * share * self._kv_bytes / self.instances(then))
        pause_s = self._charges.cut_s + kv_s if share else 0.0
        return Move(now, then, round(moved), round(prepare_s, 4), round(pause_s, 4))

    def cost_s(self, move: Move, running: float) -> float:
        """Seconds that requests lose by a move.

        Fewer instances are a loss: what is not prepared within its grace is waited for by those who have to stop.
        """
        share = stopping_share(move.now, move.then)
        shrinks = self.instances(move.then) < self.instances(move.now)
        late_s = max(move.prepare_s - self._kind.grace_s, 0.0) if shrinks else 0.0
        slowed = lost_s(running, prepare_s=move.prepare_s, slowdown=self._charges.slowdown)
        return slowed + lost_s(running * share, pause_s=move.pause_s + late_s)

    def price_usd(self, move: Move, running: float) -> float:
        """Dollars for the bytes of a move: weights, and the KV of `running` requests as far as it has to go."""
        kv_bytes = running * stopping_share(move.now, move.then) * self._kv_bytes
        return (move.moved_bytes + kv_bytes) / 1e9 * self._traffic.usd_per_gb

    def start_s(self, config: ParallelConfig) -> float:
        """Seconds until a configuration serves where nothing runs: workers start and read their weights from disk."""
        roles = _roles(self._spec, self._sample(config), self._kind.devices, config.shards)
        fullest = (roles.sum(axis=2) @ _row_bytes(self._spec)).max() / config.shards
        return self._charges.start_s + float(fullest) / self._charges.disk_bytes_per_s

    def _prepare_s(self, moved: float, most: float, sources: int) -> float:
        """As long as the instance that fetches most needs, and as the sources need to send everything."""
        share = self._charges.background
        return self._charges.prepare_s + max(self._transfer_s(most), self._transfer_s(moved / sources)) / share

    def _transfer_s(self, size_bytes: float) -> float:
        if self._traffic.link_bytes_per_s or not self._costs.links:
            return size_bytes / (self._traffic.link_bytes_per_s or self._kind.network_bytes_per_s)
        return self._costs.transfer_s(round(size_bytes), "network")

    def _weights(self, now: ParallelConfig, then: ParallelConfig) -> tuple[float, float]:
        """Bytes that all instances fetch, and the most that one of them does."""
        have, need = self.instances(now), self.instances(then)
        pair = self._sample(now), self._sample(then)
        if pair not in self._sampled:
            self._sampled[pair] = self._fetched(*pair)
        mean, most, whole = self._sampled[pair]
        fresh = max(need - have, 0)
        return mean * (need - fresh) + whole * fresh, max(most, whole if fresh else 0.0)

    def _sample(self, config: ParallelConfig) -> ParallelConfig:
        """As many replicas as tell what the others are like."""
        enough = max(_SAMPLE * self._kind.devices // config.replica_devices, 1)
        return replace(config, replicas=min(config.replicas, enough))

    def _fetched(self, now: ParallelConfig, then: ParallelConfig) -> tuple[float, float, float]:
        """Bytes that an instance fetches on average and at most beside what it holds, and where it holds nothing."""
        fine = lcm(now.shards, then.shards)
        held = _roles(self._spec, now, self._kind.devices, fine)
        needed = _roles(self._spec, then, self._kind.devices, fine)
        row_bytes = np.repeat(_row_bytes(self._spec) / fine, fine)
        reuse = (held.reshape(len(held), -1) * row_bytes) @ needed.reshape(len(needed), -1).T
        size = needed.reshape(len(needed), -1) @ row_bytes
        rows, columns = linear_sum_assignment(reuse, maximize=True)
        fetched = size[columns] - reuse[rows, columns]
        return float(fetched.mean()), float(fetched.max()), float(size.mean())


def stopping_share(now: ParallelConfig, then: ParallelConfig) -> float:
    """Share of the replicas in force that stop: all if the new ones are of another kind."""
    if replace(now, replicas=1) != replace(then, replicas=1):
        return 1.0
    return max(now.replicas - then.replicas, 0) / now.replicas


def _roles(spec: ModelSpec, config: ParallelConfig, devices: int, fine: int) -> Cells:
    """What each instance of `devices` devices holds: [instance, row, fine shard], 1 or 0; rows as in `_row_bytes`."""
    cells = np.zeros((ceil(config.devices / devices), spec.layers + 3, fine))
    width = fine // config.shards
    for index, position in enumerate(config.positions()):
        start, stop = config.stage_layers(position.stage, spec.layers)
        first, last = position.stage == 0, position.stage == config.stages - 1
        rows = [*range(start, stop), *np.flatnonzero([first, last, first or last]) + spec.layers]
        cells[index // devices, rows, position.shard * width : (position.shard + 1) * width] = 1
    return cells


@lru_cache(maxsize=16)
def _row_bytes(spec: ModelSpec) -> Cells:
    """Bytes of every layer, then of what only the first, only the last, and both of the outer stages hold."""
    rows = np.zeros(spec.layers + 3)
    for tensor in tensors(spec):
        outer = spec.layers + (2 if tensor.first and tensor.last else int(tensor.last))
        rows[outer if tensor.layer is None else tensor.layer] += tensor.elements * spec.dtype_bytes
    return rows
