"""The gRPC server: the two services, health and reflection on one address."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from serving.api.generated import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from serving.api.interceptor import ErrorInterceptor
from serving.api.service import Service
from serving.api.servicers import ControlServicer, InferenceServicer
from serving.errors import InvalidInput

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
CONTROL = control_pb2.DESCRIPTOR.services_by_name["Control"].full_name
_STATUS = health_pb2.HealthCheckResponse


class ApiServer:
    """A running server; `set_serving` steers its health, `stop` ends it."""

    def __init__(self, server: grpc.aio.Server, healths: health.aio.HealthServicer) -> None:
        self._server = server
        self._health = healths

    async def set_serving(self, serving: bool) -> None:
        """Answer health checks with SERVING or NOT_SERVING; Control stays SERVING, it can still be used."""
        status = _STATUS.SERVING if serving else _STATUS.NOT_SERVING
        for name in ("", INFERENCE):
            await self._health.set(name, status)

    async def stop(self, grace_s: float = 0.0) -> None:
        """Turn NOT_SERVING, accept nothing new, and close what is left after `grace_s` seconds."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


async def start(
    service: Service, *, host: str = "127.0.0.1", port: int = 0, message_bytes: int = 4 << 20
) -> tuple[ApiServer, int]:
    """Serve `service` on `host`; returns the server and its port, which is `port` unless that is 0.

    Requests above `message_bytes` are refused with RESOURCE_EXHAUSTED. Raises `InvalidInput` if the
    address cannot be had.
    """
    server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=_options(message_bytes))
    healths = health.aio.HealthServicer()
    api = ApiServer(server, healths)
    inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(service), server)
    control_pb2_grpc.add_ControlServicer_to_server(ControlServicer(service, api), server)
    health_pb2_grpc.add_HealthServicer_to_server(healths, server)
    reflection.enable_server_reflection((INFERENCE, CONTROL, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    bound = _bind(server, host, port)
    await healths.set(CONTROL, _STATUS.SERVING)
    await api.set_serving(True)
    await server.start()
    return api, bound


def _bind(server: grpc.aio.Server, host: str, port: int) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise InvalidInput(f"Cannot listen on {address}: is the port in use? Choose another one, or 0.") from error


def _options(message_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),  # two servers on one port would share its connections silently
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
