"""Ray: a node that is drained, asked of the cluster's control service (GCS) in its own gRPC words, without Ray.

Any reason for a drain counts: a node that the autoscaler finds idle goes as surely as a preempted one.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import psutil

from serving.agent.notices.base import Notice, Sighting, SourceFailed
from serving.api.generated import ray_gcs_pb2 as gcs
from serving.api.generated.ray_gcs_pb2_grpc import NodeInfoGcsServiceStub, NodeResourceInfoGcsServiceStub

PERIOD_S = 2.0

_ENDLESS_S = 86400.0  # a deadline later than this stands for none
_DRAINED = (gcs.NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED, gcs.NodeDeathInfo.AUTOSCALER_DRAIN_IDLE)


class Ray:
    """Watches the Ray node of this machine, or the node that is named (in hex).

    A drain without a deadline ends after `grace_s`. Deadlines are those of the clock of whoever drained.
    """

    name = "ray"

    def __init__(
        self,
        address: str = "",
        node: str = "",
        *,
        grace_s: float,
        period_s: float = PERIOD_S,
        timeout_s: float = 5.0,
    ) -> None:
        self._address, self._given, self._node = address, bytes.fromhex(node), b""
        self._grace_s, self.period_s, self._timeout_s = grace_s, period_s, timeout_s

    async def poll(self) -> AsyncIterator[Sighting]:
        """See `Source.poll`: the drain of this node, under way or done."""
        address = self._address or _cluster_here()
        try:
            async with grpc.aio.insecure_channel(address) as channel:
                sighting = await self._look(channel)
        except grpc.aio.AioRpcError as error:
            raise SourceFailed(f"Ray's GCS at {address} cannot be asked: {error.code().name}") from error
        if sighting is not None:
            yield sighting

    async def release(self) -> None:
        """Nobody waits for it: whoever drains watches the node's own work."""

    async def _look(self, channel: grpc.aio.Channel) -> Sighting | None:
        self._node = self._node or self._given or await self._own_node(channel)
        stub = NodeResourceInfoGcsServiceStub(channel)
        reply = _checked(await stub.GetDrainingNodes(gcs.GetDrainingNodesRequest(), timeout=self._timeout_s))
        for draining in reply.draining_nodes:
            if draining.node_id == self._node:
                deadline_ms = draining.draining_deadline_timestamp_ms
                key = f"the drain of {self._node.hex()} until {deadline_ms}"
                return Sighting(key, Notice(self._seconds_left(deadline_ms), self.name))
        return await self._drained(channel)

    async def _drained(self, channel: grpc.aio.Channel) -> Sighting | None:
        """A node without work is not draining for any time: it is dead at once, and says why."""
        selector = gcs.GetAllNodeInfoRequest.NodeSelector(node_id=self._node)
        nodes = [node for node in await self._nodes(channel, selector) if node.node_id == self._node]
        dead = [node for node in nodes if node.state == gcs.GcsNodeInfo.DEAD]
        if any(node.death_info.reason in _DRAINED for node in dead):
            return Sighting(f"the drain of {self._node.hex()}", Notice(self._grace_s, self.name))
        if dead:
            self._node = b""  # Ray may have been started here again
        return None

    async def _own_node(self, channel: grpc.aio.Channel) -> bytes:
        here = {address.address for each in psutil.net_if_addrs().values() for address in each}
        here.add(socket.gethostname())
        alive = [node for node in await self._nodes(channel) if node.state == gcs.GcsNodeInfo.ALIVE]
        own = [node.node_id for node in alive if node.node_manager_address in here]
        if len(own) != 1:
            raise SourceFailed(f"{len(own)} live Ray nodes have an address of this machine; write ray=HOST:PORT/NODE")
        return own[0]

    async def _nodes(
        self, channel: grpc.aio.Channel, *selectors: gcs.GetAllNodeInfoRequest.NodeSelector
    ) -> list[gcs.GcsNodeInfo]:
        request = gcs.GetAllNodeInfoRequest(node_selectors=selectors)
        reply = await NodeInfoGcsServiceStub(channel).GetAllNodeInfo(request, timeout=self._timeout_s)
        return list(_checked(reply).node_info_list)

    def _seconds_left(self, deadline_ms: int) -> float:
        left_s = deadline_ms / 1000 - time.time()
        return max(0.0, left_s) if deadline_ms > 0 and left_s < _ENDLESS_S else self._grace_s


def _checked(reply: gcs.GetDrainingNodesReply | gcs.GetAllNodeInfoReply) -> Any:
    if reply.status.code:
        raise SourceFailed(f"Ray's GCS answered with status {reply.status.code}: {reply.status.message}")
    return reply


def _cluster_here() -> str:
    """Where Ray's own programs look for the cluster of this machine."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address.rpartition(":")[2].isdigit() and "://" not in address:
        return address
    path = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    try:
        return path.read_text().strip()
    except OSError as error:
        raise SourceFailed("no Ray cluster is known here; set RAY_ADDRESS or write ray=HOST:PORT") from error
