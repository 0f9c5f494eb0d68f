"""Every error has its status, and bad input leaves the others served."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_status import rpc_status

from data import errors as data_errors
from serving import errors
from serving.api.generated import inference_pb2
from serving.api.status import from_call
from tests.serving.api.conftest import Served

Code = grpc.StatusCode
RAISED = [
    (errors.InvalidInput("why"), Code.INVALID_ARGUMENT),
    (data_errors.UnsupportedModel("why"), Code.INVALID_ARGUMENT),
    (errors.NotFound("why"), Code.NOT_FOUND),
    (errors.AlreadyExists("why"), Code.ALREADY_EXISTS),
    (errors.QueueFull("why", retry_after_s=2.5), Code.RESOURCE_EXHAUSTED),
    (errors.Unavailable("why", retry_after_s=0.25), Code.UNAVAILABLE),
    (errors.TransportError("why"), Code.UNAVAILABLE),
    (errors.DeadlineExceeded("why"), Code.DEADLINE_EXCEEDED),
    (errors.Aborted("why", tokens=17), Code.ABORTED),
    (errors.PlanMismatch("why"), Code.FAILED_PRECONDITION),
    (data_errors.Infeasible("why"), Code.FAILED_PRECONDITION),
    (data_errors.CorruptData("why"), Code.FAILED_PRECONDITION),
    (errors.Unauthenticated("why"), Code.UNAUTHENTICATED),
    (errors.PerennialError("why"), Code.INTERNAL),
]

# what a status cannot tell apart comes back as the nearest error of `serving.errors`
SEEN_AS = {
    data_errors.UnsupportedModel: errors.InvalidInput,
    data_errors.Infeasible: errors.PlanMismatch,
    data_errors.CorruptData: errors.PlanMismatch,
    errors.TransportError: errors.Unavailable,
}


async def refused(service: Served, **fields: Any) -> grpc.aio.AioRpcError:
    """The refusal of a request, after which the service still answers others."""
    request = inference_pb2.GenerateRequest(**{"token_ids": inference_pb2.TokenIds(ids=[1])} | fields)
    failures = []
    for method in (service.inference.Generate, service.inference.GenerateStream):
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await _answer(method(request))
        failures.append(failure.value)
    assert failures[0].code() is failures[1].code()
    service.source.raises = None
    good = inference_pb2.GenerateRequest(text="good", sampling_params=inference_pb2.SamplingParams(max_tokens=2))
    assert len((await service.inference.Generate(good)).token_ids) == 2
    return failures[1]


async def _answer(call: Any) -> None:
    _ = [one async for one in call] if hasattr(call, "read") else await call


@pytest.mark.parametrize(("error", "code"), RAISED, ids=lambda value: getattr(value, "name", type(value).__name__))
async def test_every_error_has_its_code_and_comes_back_as_itself(
    service: Served, error: errors.PerennialError, code: Code
) -> None:
    service.source.raises = lambda: error
    failure = await refused(service)
    assert (failure.code(), failure.details()) == (code, "why")
    back = from_call(failure)
    assert (type(back), str(back)) == (SEEN_AS.get(type(error), type(error)), "why")


@pytest.mark.parametrize("wait_s", [0.0, 0.25, 2.5, 61.0])
@pytest.mark.parametrize("kind", [errors.QueueFull, errors.Unavailable])
async def test_what_may_be_retried_says_when(
    service: Served, kind: Callable[..., errors.Retryable], wait_s: float
) -> None:
    service.source.raises = lambda: kind("later", retry_after_s=wait_s)
    failure = await refused(service)
    status = rpc_status.from_call(failure)
    info = RetryInfo()
    assert status.details[0].Unpack(info)
    assert info.retry_delay.seconds + info.retry_delay.nanos / 1e9 == wait_s
    back = from_call(failure)
    assert isinstance(back, errors.Retryable)
    assert back.retry_after_s == wait_s


async def test_an_aborted_stream_says_how_much_of_it_was_delivered(service: Served) -> None:
    service.source.raises = lambda: errors.Aborted("recovery budget spent", tokens=17)
    failure = await refused(service)
    info = ErrorInfo()
    assert rpc_status.from_call(failure).details[0].Unpack(info)
    assert info.metadata["delivered_tokens"] == "17"
    back = from_call(failure)
    assert isinstance(back, errors.Aborted)
    assert back.tokens == 17


async def test_a_bug_is_internal_says_nothing_of_itself_and_is_logged(
    service: Served, caplog: pytest.LogCaptureFixture
) -> None:
    service.source.raises = lambda: ZeroDivisionError("secret detail")
    with caplog.at_level(logging.ERROR, logger="serving.api.interceptor"):
        failure = await refused(service)
    assert failure.code() is Code.INTERNAL
    assert failure.details() == "The server failed unexpectedly; its log has the reason."
    assert "secret detail" in caplog.text


def params(**fields: Any) -> dict[str, Any]:
    return {"sampling_params": inference_pb2.SamplingParams(**fields)}


def ids(*values: int) -> dict[str, Any]:
    return {"token_ids": inference_pb2.TokenIds(ids=values)}


BAD = [
    ({"token_ids": None}, "The prompt is missing"),
    (ids(), "The prompt is empty"),
    ({"token_ids": None, "text": ""}, "The prompt is empty"),
    (ids(*[1] * 256), "The prompt has 256 tokens; the context of 256"),
    ({"token_ids": None, "text": "x" * 300}, "The prompt has 300 tokens; the context of 256"),
    (ids(1, 256), "Token id 256 of the prompt is out of range"),
    (ids(2**32 - 1), "Token id 4294967295"),
    (params(max_tokens=0), "max_tokens must be 1 or more, not 0"),
    (params(max_tokens=-5), "max_tokens must be 1 or more, not -5"),
    (params(temperature=-0.1), "temperature must be 0 or more"),
    (params(temperature=float("nan")), "temperature must be 0 or more"),
    (params(temperature=float("inf")), "temperature must be 0 or more"),
    (params(top_p=0.0), "top_p must be above 0 and at most 1"),
    (params(top_p=1.5), "top_p must be above 0 and at most 1"),
    (params(top_p=float("nan")), "top_p must be above 0 and at most 1"),
    (params(top_k=-2), "top_k must be positive"),
    (params(logprobs=21), "logprobs must be 0 to 20"),
    (params(logprobs=-1), "logprobs must be 0 to 20"),
    (params(seed=2**63), "seed must be below 2^63"),
    (params(stop=[""]), "A stop string must not be empty"),
    (params(stop=["x"] * 17), "At most 16 stop strings"),
    ({**params(stop=["x"]), "detokenize": False}, "Stop strings need detokenize"),
    (params(stop_token_ids=[256]), "Token id 256 of the stop_token_ids is out of range"),
    ({"deadline_s": -1.0}, "deadline_s must be a number of seconds"),
    ({"deadline_s": float("nan")}, "deadline_s must be a number of seconds"),
    ({"request_id": "no spaces"}, "A request_id has 1 to 128 characters"),
    ({"request_id": "x" * 129}, "A request_id has 1 to 128 characters"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[message[:40] for _, message in BAD])
async def test_bad_input_is_refused_in_one_sentence(service: Served, fields: dict[str, Any], message: str) -> None:
    failure = await refused(service, **fields)
    assert failure.code() is Code.INVALID_ARGUMENT
    assert (failure.details() or "").startswith(message)
    assert len(service.source.journal) == 1  # the good request


async def test_another_models_name_is_not_found(service: Served) -> None:
    failure = await refused(service, model="Other/Model")
    assert failure.code() is Code.NOT_FOUND
    assert failure.details() == "Model 'Other/Model' is not served here; this server has 'Tiny/Llama'."


async def test_an_id_in_use_by_another_prompt_is_refused(service: Served) -> None:
    await service.client.generate([5], request_id="mine")
    assert (await refused(service, request_id="mine")).code() is Code.ALREADY_EXISTS


async def test_text_that_is_not_utf8_is_refused(service: Served) -> None:
    """Field 3 (text) with two bytes that are no UTF-8, and something that is no message at all."""
    for body in (b"\x1a\x02\xff\xfe", b"\xff\xff\xff"):
        call = service.channel.unary_stream("/perennial.v1.Inference/GenerateStream")(body)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            _ = [one async for one in call]
        assert failure.value.code() is Code.INVALID_ARGUMENT
        assert "must be UTF-8" in (failure.value.details() or "")


async def test_a_gigantic_message_is_refused_and_the_connection_lives(service: Served) -> None:
    with pytest.raises(errors.InvalidInput, match="larger than max"):
        await service.client.generate("x" * (1 << 17))
    assert len((await service.client.generate([1])).token_ids) == 128


@pytest.mark.parametrize("prompt", ["\ud800", [-1], [2**32], [1.5]])
async def test_the_client_refuses_what_no_message_can_hold(service: Served, prompt: Any) -> None:
    with pytest.raises(errors.InvalidInput, match="cannot be sent"):
        await service.client.generate(prompt)


async def test_control_calls_refuse_bad_input(service: Served) -> None:
    with pytest.raises(errors.InvalidInput, match="deadline_s must be a number of seconds"):
        await service.client.notify("i-0", -1.0)
    with pytest.raises(errors.InvalidInput, match="timeout_s must be a number of seconds"):
        await service.client.drain(-1.0)
    with pytest.raises(errors.InvalidInput, match="A request_id has"):
        await service.client.abort("")
    with pytest.raises(errors.NotFound):
        await service.client.abort("unknown")
    with pytest.raises(errors.NotFound):
        await service.client.notify("i-9", 1.0)
    with pytest.raises(errors.PlanMismatch, match="damaged"):
        await service.client.reload_plan("damaged.json")
