"""Semantics of Generate, GenerateStream and Attach on the wire."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from serving.api.generated import control_pb2, inference_pb2
from serving.api.status import from_call
from serving.errors import Aborted
from tests.serving.api.conftest import Served, eventually
from tests.serving.api.token_source import token_at


def request(**fields: Any) -> inference_pb2.GenerateRequest:
    fields = {"token_ids": inference_pb2.TokenIds(ids=[1, 2, 3])} | fields
    return inference_pb2.GenerateRequest(**fields)


def params(**fields: Any) -> inference_pb2.SamplingParams:
    return inference_pb2.SamplingParams(**fields)


async def test_a_stream_says_prompt_info_first_finish_info_last_and_every_index(service: Served) -> None:
    messages = [one async for one in service.inference.GenerateStream(request(sampling_params=params(max_tokens=20)))]
    assert [one.HasField("prompt_info") for one in messages] == [True] + [False] * (len(messages) - 1)
    assert [one.HasField("finish_info") for one in messages] == [False] * (len(messages) - 1) + [True]
    assert messages[0].prompt_info.num_prompt_tokens == 3
    assert len(messages[0].prompt_info.request_id) == 32
    assert messages[-1].finish_info.finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert messages[-1].finish_info.num_output_tokens == 20
    position = 0
    for message in messages:
        assert message.output_index == position
        position += len(message.token_ids)
    tokens = [token for one in messages for token in one.token_ids]
    assert tokens == [token_at((1, 2, 3), index) for index in range(20)]
    assert "".join(one.text for one in messages) == "".join(f" é{token}" for token in tokens)


async def test_unary_is_the_stream_in_one_message(service: Served) -> None:
    sampling = params(max_tokens=5, logprobs=2)
    answer = await service.inference.Generate(request(request_id="unary", sampling_params=sampling))
    assert list(answer.token_ids) == [token_at((1, 2, 3), index) for index in range(5)]
    assert answer.prompt_info == inference_pb2.PromptInfo(request_id="unary", num_prompt_tokens=3)
    assert answer.finish_info.num_output_tokens == 5
    assert list(answer.logprobs) == [-0.5] * 5
    assert [[entry.token_id for entry in top.entries] for top in answer.top_logprobs] == [[0, 1]] * 5


async def test_sampling_reaches_the_service_exactly(service: Served) -> None:
    sampling = params(temperature=0.7, top_k=-1, top_p=0.9, seed=2**63 - 1, max_tokens=4, stop=["é"], ignore_eos=True)
    await service.inference.Generate(request(request_id="exact", sampling_params=sampling, resumable=True))
    admitted = service.source.journal["exact"].request
    assert (admitted.sampling.temperature, admitted.sampling.top_p) == (0.7, 0.9)
    assert (admitted.sampling.top_k, admitted.sampling.seed) == (0, 2**63 - 1)
    assert (admitted.limits.stop, admitted.limits.ignore_eos, admitted.resumable) == (("é",), True, True)
    assert (admitted.deadline_s, admitted.detokenize) == (None, True)


async def test_unset_fields_take_their_defaults_and_a_seed_is_drawn_per_request(service: Served) -> None:
    for name in ("first", "second"):
        sampling = params(temperature=1.0, max_tokens=2)
        await service.inference.Generate(request(request_id=name, sampling_params=sampling))
    await service.inference.Generate(request(request_id="greedy"))
    first, second, greedy = (service.source.journal[name].request for name in ("first", "second", "greedy"))
    assert first.sampling.seed != second.sampling.seed
    await service.inference.Generate(request(request_id="first", sampling_params=params(temperature=1.0, max_tokens=2)))
    assert (greedy.sampling.seed, greedy.sampling.top_p, greedy.limits.max_tokens) == (0, 1.0, 128)


async def test_max_tokens_are_cut_to_the_room_in_the_context(service: Served) -> None:
    ids = inference_pb2.TokenIds(ids=[1] * 250)
    answer = await service.inference.Generate(request(token_ids=ids, sampling_params=params(max_tokens=1000)))
    assert len(answer.token_ids) == 6


async def test_text_prompts_are_encoded_by_the_service(service: Served) -> None:
    text = inference_pb2.GenerateRequest(text="añb", sampling_params=params(max_tokens=1))
    answer = await service.inference.Generate(text)
    assert answer.prompt_info.num_prompt_tokens == 4


async def test_attach_continues_anywhere_and_gives_no_prompt_info(service: Served) -> None:
    await service.inference.Generate(request(request_id="whole", sampling_params=params(max_tokens=10)))
    attach = inference_pb2.AttachRequest(request_id="whole", resume_from=6)
    messages = [one async for one in service.inference.Attach(attach)]
    assert messages[0].output_index == 6
    assert not messages[0].HasField("prompt_info")
    assert [t for one in messages for t in one.token_ids] == [token_at((1, 2, 3), index) for index in range(6, 10)]


async def test_the_same_id_and_prompt_attaches_from_the_start(service: Served) -> None:
    twice = [service.inference.Generate(request(request_id="twice")) for _ in range(2)]
    answers = await asyncio.gather(*twice)
    assert answers[0].token_ids == answers[1].token_ids
    assert list(service.source.journal) == ["twice"]


@pytest.mark.parametrize(("resumable", "state"), [(False, "abort"), (True, None)])
async def test_cancelling_ends_the_request_unless_it_is_resumable(
    service: Served, resumable: bool, state: str | None
) -> None:
    call = service.inference.GenerateStream(
        request(request_id="gone", resumable=resumable, sampling_params=params(max_tokens=10_000))
    )
    await call.read()
    call.cancel()
    record = service.source.journal["gone"]
    await eventually(lambda: record.listeners == 0)
    assert record.finish == state


async def test_cancelling_a_unary_call_ends_the_request(service: Served) -> None:
    call = service.inference.Generate(request(request_id="unary", sampling_params=params(max_tokens=10_000)))
    await eventually(lambda: "unary" in service.source.journal)
    call.cancel()
    await eventually(lambda: service.source.journal["unary"].finish == "abort")


@pytest.mark.parametrize("own", [True, False])
async def test_a_deadline_is_the_earlier_of_the_calls_and_the_requests(service: Served, own: bool) -> None:
    long = params(max_tokens=10_000)
    fields = {"deadline_s": 0.1 if own else 60.0}
    call = service.inference.GenerateStream(
        request(request_id="late", sampling_params=long, **fields), timeout=60.0 if own else 0.1
    )
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        _ = [one async for one in call]
    assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    deadline_s = service.source.journal["late"].request.deadline_s
    assert deadline_s is not None
    assert 0 < deadline_s < 0.2  # gRPC rounds up to its timer


async def test_abort_ends_a_stream_with_its_partial_count(service: Served) -> None:
    call = service.inference.GenerateStream(request(request_id="unwanted", sampling_params=params(max_tokens=10_000)))
    stream = aiter(call)
    await anext(stream)
    assert (await service.control.Abort(control_pb2.AbortRequest(request_id="unwanted"))).aborted
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        _ = [one async for one in stream]
    back = from_call(failure.value)
    assert isinstance(back, Aborted)
    assert back.tokens == len(service.source.journal["unwanted"].tokens)
    assert not (await service.control.Abort(control_pb2.AbortRequest(request_id="unwanted"))).aborted
