"""The gRPC methods: each translates, delegates to the service, and translates back."""

from __future__ import annotations

from contextlib import aclosing
from typing import Protocol

from grpc.aio import ServicerContext

from serving.api import translate, validation
from serving.api.generated import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from serving.api.service import Service, Stream
from serving.requests import Chunk


class Readiness(Protocol):
    """Who tells health checkers whether new requests are welcome."""

    async def set_serving(self, serving: bool) -> None:
        """Turn every health status to SERVING or NOT_SERVING."""
        ...


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Generation. Streams are written, not yielded: a cancelled call then closes its chunks at once."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def Generate(
        self, message: inference_pb2.GenerateRequest, context: ServicerContext
    ) -> inference_pb2.GenerateResponse:
        request = validation.generation_request(message, self._service, context.time_remaining())
        response = inference_pb2.GenerateResponse(prompt_info=translate.prompt_info(request))
        async with aclosing(await self._service.submit(request)) as chunks:
            async for chunk in chunks:
                translate.extend_response(response, chunk)
        return response

    async def GenerateStream(self, message: inference_pb2.GenerateRequest, context: ServicerContext) -> None:
        request = validation.generation_request(message, self._service, context.time_remaining())
        info = translate.prompt_info(request)
        async with aclosing(await self._service.submit(request)) as chunks:
            await _write(chunks, context, info)

    async def Attach(self, message: inference_pb2.AttachRequest, context: ServicerContext) -> None:
        request_id = validation.request_id(message.request_id)
        async with aclosing(self._service.attach(request_id, message.resume_from)) as chunks:
            await _write(chunks, context, None)


class ControlServicer(control_pb2_grpc.ControlServicer):
    """Looking at the service and steering it."""

    def __init__(self, service: Service, readiness: Readiness) -> None:
        self._service = service
        self._readiness = readiness

    async def GetServerInfo(
        self, message: control_pb2.GetServerInfoRequest, context: ServicerContext
    ) -> control_pb2.GetServerInfoResponse:
        return translate.info_message(self._service.info())

    async def GetPlan(
        self, message: control_pb2.GetPlanRequest, context: ServicerContext
    ) -> control_pb2.GetPlanResponse:
        return translate.plan_message(self._service.plan_book(), self._service.info())

    async def ReloadPlan(
        self, message: control_pb2.ReloadPlanRequest, context: ServicerContext
    ) -> control_pb2.ReloadPlanResponse:
        return control_pb2.ReloadPlanResponse(sha256=await self._service.reload_plan(message.source))

    async def Drain(self, message: control_pb2.DrainRequest, context: ServicerContext) -> control_pb2.DrainResponse:
        timeout_s = validation.seconds(message.timeout_s, "timeout_s") if message.HasField("timeout_s") else None
        await self._readiness.set_serving(False)
        return control_pb2.DrainResponse(remaining=await self._service.drain(timeout_s))

    async def Abort(self, message: control_pb2.AbortRequest, context: ServicerContext) -> control_pb2.AbortResponse:
        request_id = validation.request_id(message.request_id)
        return control_pb2.AbortResponse(aborted=await self._service.abort(request_id))

    async def NotifyPreemption(
        self, message: control_pb2.NotifyPreemptionRequest, context: ServicerContext
    ) -> control_pb2.NotifyPreemptionResponse:
        deadline_s = validation.seconds(message.deadline_s, "deadline_s")
        await self._service.notify(message.instance, deadline_s, message.source or "api")
        return control_pb2.NotifyPreemptionResponse()

    async def WatchEvents(self, message: control_pb2.WatchEventsRequest, context: ServicerContext) -> None:
        async with aclosing(self._service.events(message.since)) as events:
            async for event in events:
                await context.write(translate.event_message(event))


async def _write(chunks: Stream[Chunk], context: ServicerContext, info: inference_pb2.PromptInfo | None) -> None:
    async for chunk in chunks:
        message = translate.chunk_message(chunk)
        if info is not None:
            message.prompt_info.CopyFrom(info)
            info = None
        await context.write(message)
