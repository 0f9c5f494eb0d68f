"""Nothing listens beyond this machine unless asked: every socket of a running fleet is looked at."""

from __future__ import annotations

from pathlib import Path

import psutil

from perennial.testing import fleet
from serving.engine.checkpoint import create_checkpoint


def _listening(pids: set[int]) -> set[tuple[str, int]]:
    return {
        (connection.laddr.ip, connection.laddr.port)
        for pid in pids
        for connection in psutil.Process(pid).net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }


async def test_a_fleet_listens_on_loopback_only(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    create_checkpoint(str(checkpoint), family="llama", seed=3, layers=2, hidden=32, heads=4, kv_heads=2, ffn=64)
    async with fleet(checkpoint, instances=2) as service:
        processes = {child.pid for child in psutil.Process().children(recursive=True)}
        sockets = _listening(processes)
        grpc, control, metrics = (
            service.settings.grpc_port,
            service.settings.control_port,
            service.settings.metrics_port,
        )
    ports = {port for _, port in sockets}
    assert {grpc, control, metrics} <= ports, "the fleet's own ports were not found, so this test saw nothing"
    assert len(ports) > 3, "gloo and the rendezvous store listen too while a layout of two devices stands"
    # gRPC listens on the IPv4 address through an IPv6 socket.
    assert {address.removeprefix("::ffff:") for address, _ in sockets} == {"127.0.0.1"}
