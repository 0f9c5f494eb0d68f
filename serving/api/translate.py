"""Protobuf messages ↔ the values of `serving.requests`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from data.plan import PlanBook
from data.shared_plan import SharedPlanBook
from serving.api.generated import control_pb2, inference_pb2
from serving.requests import Chunk, Event, FinishReason, GenerationRequest, Limits, Sampling, ServerInfo, TopLogprob

_FINISH: dict[FinishReason, Any] = {
    "stop": inference_pb2.FINISH_REASON_STOP,
    "length": inference_pb2.FINISH_REASON_LENGTH,
    "abort": inference_pb2.FINISH_REASON_ABORT,
    "deadline": inference_pb2.FINISH_REASON_DEADLINE,
}
_FINISH_NAMES = {number: name for name, number in _FINISH.items()}


def request_message(
    request_id: str, prompt: str | Sequence[int], sampling: Sampling, limits: Limits
) -> inference_pb2.GenerateRequest:
    """The client's side of a request. Raises `ValueError` or `TypeError` for what no message can hold."""
    message = inference_pb2.GenerateRequest(request_id=request_id, sampling_params=msgspec.structs.asdict(sampling))
    message.sampling_params.MergeFrom(inference_pb2.SamplingParams(**msgspec.structs.asdict(limits)))
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.token_ids.ids.extend(prompt)
    return message


def prompt_info(request: GenerationRequest) -> inference_pb2.PromptInfo:
    """What the first message of a stream says about its request."""
    return inference_pb2.PromptInfo(request_id=request.request_id, num_prompt_tokens=len(request.prompt))


def chunk_message(chunk: Chunk) -> inference_pb2.GenerateStreamResponse:
    """One chunk on the wire; the hot path, so what is absent is not even assigned."""
    message = inference_pb2.GenerateStreamResponse(output_index=chunk.output_index, token_ids=chunk.token_ids)
    if chunk.text:
        message.text = chunk.text
    if chunk.logprobs:
        message.logprobs.extend(chunk.logprobs)
    if chunk.top:
        message.top_logprobs.extend(_top_message(top) for top in chunk.top)
    if chunk.finish is not None:
        message.finish_info.finish_reason = _FINISH[chunk.finish]
        message.finish_info.num_output_tokens = chunk.output_index + len(chunk.token_ids)
    return message


def _top_message(top: tuple[TopLogprob, ...]) -> inference_pb2.TopLogprobs:
    entries = [inference_pb2.TopLogprob(token_id=entry.token_id, logprob=entry.logprob) for entry in top]
    return inference_pb2.TopLogprobs(entries=entries)


def extend_response(response: inference_pb2.GenerateResponse, chunk: Chunk) -> None:
    """Append a chunk to a unary answer."""
    message = chunk_message(chunk)
    response.token_ids.extend(message.token_ids)
    response.text += message.text
    response.logprobs.extend(message.logprobs)
    response.top_logprobs.extend(message.top_logprobs)
    if message.HasField("finish_info"):
        response.finish_info.CopyFrom(message.finish_info)


def chunk_value(message: inference_pb2.GenerateStreamResponse) -> Chunk:
    """Inverse of `chunk_message`."""
    return Chunk(
        output_index=message.output_index,
        token_ids=tuple(message.token_ids),
        text=message.text,
        logprobs=tuple(message.logprobs) if message.logprobs else (),
        top=tuple(_top_value(top) for top in message.top_logprobs) if message.top_logprobs else (),
        finish=_FINISH_NAMES[message.finish_info.finish_reason] if message.HasField("finish_info") else None,
    )


def _top_value(top: inference_pb2.TopLogprobs) -> tuple[TopLogprob, ...]:
    return tuple(TopLogprob(token_id=entry.token_id, logprob=entry.logprob) for entry in top.entries)


def info_message(info: ServerInfo) -> control_pb2.GetServerInfoResponse:
    """`ServerInfo` on the wire."""
    fields = msgspec.structs.asdict(info)
    fields["positions"] = [control_pb2.Position(**msgspec.structs.asdict(position)) for position in info.positions]
    fields["instances"] = [control_pb2.Instance(**msgspec.structs.asdict(instance)) for instance in info.instances]
    fields["models"] = [control_pb2.Model(**msgspec.structs.asdict(model)) for model in info.models]
    return control_pb2.GetServerInfoResponse(**fields)


def info_value(message: control_pb2.GetServerInfoResponse) -> ServerInfo:
    """Inverse of `info_message`. Raises `msgspec.ValidationError` for a state this version does not know."""
    fields = {name: getattr(message, name) for name in ServerInfo.__struct_fields__}
    fields["positions"] = [_fields(position) for position in message.positions]
    fields["instances"] = [_fields(instance) for instance in message.instances]
    fields["models"] = [_fields(model) for model in message.models]
    return msgspec.convert(fields, ServerInfo)


def _fields(message: control_pb2.Position | control_pb2.Instance | control_pb2.Model) -> dict[str, Any]:
    names = (field for field in message.DESCRIPTOR.fields if not field.has_presence or message.HasField(field.name))
    return {field.name: getattr(message, field.name) for field in names}


def plan_message(book: PlanBook | SharedPlanBook, info: ServerInfo) -> control_pb2.GetPlanResponse:
    """A plan book on the wire, with where it came from."""
    return control_pb2.GetPlanResponse(
        plan_json=book.to_bytes(), sha256=book.sha256, source=info.plan_source, version=info.plan_version
    )


def event_message(event: Event) -> control_pb2.Event:
    """An event on the wire, its data as JSON."""
    data_json = msgspec.json.encode(event.data).decode()
    return control_pb2.Event(sequence=event.sequence, time_s=event.time_s, kind=event.kind, data_json=data_json)


def event_value(message: control_pb2.Event) -> Event:
    """Inverse of `event_message`."""
    data = msgspec.json.decode(message.data_json)
    return Event(sequence=message.sequence, time_s=message.time_s, kind=message.kind, data=data)
