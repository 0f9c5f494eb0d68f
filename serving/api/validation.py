"""What a request may say: validation of what comes in, each refusal one sentence."""

from __future__ import annotations

import hashlib
import math
import re
import uuid

from data.models import ModelSpec
from serving.api.generated import inference_pb2
from serving.api.service import Service
from serving.errors import InvalidInput, NotFound
from serving.requests import GenerationRequest, Limits, Sampling

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
_SEED_LIMIT = 1 << 63
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidInput(message)


def generation_request(
    message: inference_pb2.GenerateRequest, service: Service, call_remaining_s: float | None
) -> GenerationRequest:
    """The request to admit. Raises `InvalidInput`, or `NotFound` for the name of a model that is not served."""
    model = _model(message, service)
    spec = service.specs[model]
    prompt = _prompt(message, service, model)
    room = spec.max_positions - len(prompt)
    _require(
        room > 0, f"The prompt has {len(prompt)} tokens; the context of {spec.max_positions} leaves no room to answer."
    )
    detokenize = message.detokenize if message.HasField("detokenize") else True
    _require(detokenize or not message.sampling_params.stop, "Stop strings need detokenize; use stop_token_ids.")
    name = request_id(message.request_id) if message.request_id else uuid.uuid4().hex
    return GenerationRequest(
        request_id=name,
        prompt=prompt,
        sampling=_sampling(message.sampling_params, name),
        limits=_limits(message.sampling_params, spec, room),
        deadline_s=_deadline_s(message, call_remaining_s),
        resumable=message.resumable,
        detokenize=detokenize,
        model=model,
    )


def _model(message: inference_pb2.GenerateRequest, service: Service) -> str:
    """The key in `service.specs` of the model that a request asks for."""
    keys = {spec.name: key for key, spec in service.specs.items()}
    names = ", ".join(map(repr, keys))
    if message.model:
        if message.model not in keys:
            raise NotFound(f"Model {message.model!r} is not served here; this server has {names}.")
        return keys[message.model]
    _require(len(keys) == 1, f"The request names no model; this server has {names}.")
    return next(iter(keys.values()))


def request_id(value: str) -> str:
    """`value` if it may name a request. Raises `InvalidInput`."""
    _require(bool(_REQUEST_ID.fullmatch(value)), "A request_id has 1 to 128 characters of [A-Za-z0-9._:-].")
    return value


def seconds(value: float, name: str) -> float:
    """`value` if it is a span of time. Raises `InvalidInput`."""
    _require(math.isfinite(value) and value >= 0, f"{name} must be a number of seconds, 0 or more, not {value}.")
    return value


def _prompt(message: inference_pb2.GenerateRequest, service: Service, model: str) -> tuple[int, ...]:
    spec = service.specs[model]
    _require(message.WhichOneof("prompt") is not None, "The prompt is missing; set text or token_ids.")
    if message.HasField("text"):
        # a token is never longer than some hundred bytes, so a text of this size cannot fit: do not tokenize it
        too_long = len(message.text) > 1024 * spec.max_positions
        _require(not too_long, f"The prompt is far over the context of {spec.max_positions} tokens.")
        prompt = tuple(service.encode(message.text, model)) if message.text else ()
    else:
        prompt = tuple(message.token_ids.ids)
        _check_ids(prompt, spec, "prompt")
    _require(len(prompt) > 0, "The prompt is empty; send at least one token.")
    return prompt


def _check_ids(ids: tuple[int, ...], spec: ModelSpec, what: str) -> None:
    worst = max(ids, default=0)
    _require(worst < spec.vocab, f"Token id {worst} of the {what} is out of range; the vocabulary has {spec.vocab}.")


def _sampling(params: inference_pb2.SamplingParams, name: str) -> Sampling:
    top_p = params.top_p if params.HasField("top_p") else 1.0
    _require(
        math.isfinite(params.temperature) and params.temperature >= 0,
        f"temperature must be 0 or more, not {params.temperature}.",
    )
    _require(0 < top_p <= 1, f"top_p must be above 0 and at most 1, not {top_p}.")
    _require(params.top_k >= -1, f"top_k must be positive, or 0 for no cut, not {params.top_k}.")
    _require(0 <= params.logprobs <= MAX_LOGPROBS, f"logprobs must be 0 to {MAX_LOGPROBS}, not {params.logprobs}.")
    _require(params.seed < _SEED_LIMIT, f"seed must be below 2^63, not {params.seed}.")
    return Sampling(
        temperature=params.temperature,
        top_k=max(params.top_k, 0),
        top_p=top_p,
        seed=params.seed if params.HasField("seed") else _drawn_seed(params.temperature, name),
        logprobs=params.logprobs,
    )


def _drawn_seed(temperature: float, name: str) -> int:
    """A function of the request's id: a request that is sent again must be the same request."""
    digest = hashlib.sha256(name.encode("ascii")).digest()
    return int.from_bytes(digest) % _SEED_LIMIT if temperature > 0 else 0


def _limits(params: inference_pb2.SamplingParams, spec: ModelSpec, room: int) -> Limits:
    max_tokens = params.max_tokens if params.HasField("max_tokens") else Limits().max_tokens
    _require(max_tokens > 0, f"max_tokens must be 1 or more, not {max_tokens}.")
    _require(len(params.stop) <= MAX_STOP_STRINGS, f"At most {MAX_STOP_STRINGS} stop strings are allowed.")
    _require(all(params.stop), "A stop string must not be empty.")
    stop_ids = tuple(params.stop_token_ids)
    _check_ids(stop_ids, spec, "stop_token_ids")
    return Limits(
        max_tokens=min(max_tokens, room),
        stop=tuple(params.stop),
        stop_token_ids=stop_ids,
        ignore_eos=params.ignore_eos,
    )


def _deadline_s(message: inference_pb2.GenerateRequest, call_remaining_s: float | None) -> float | None:
    bounds = [] if call_remaining_s is None else [max(call_remaining_s, 0.0)]
    if message.HasField("deadline_s"):
        bounds.append(seconds(message.deadline_s, "deadline_s"))
    return min(bounds, default=None)
