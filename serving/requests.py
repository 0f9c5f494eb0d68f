"""The values that cross the API: requests in, chunks of a stream out."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "deadline"]


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is drawn from the logits.

    Greedy when `temperature` is 0. A draw at output position i depends on (seed, i) and the logits
    alone, so a stream that resumes elsewhere is the same stream. `top_k` 0 and `top_p` 1 do not cut.
    `logprobs` is the number of most likely alternatives reported with each token.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    logprobs: int = 0


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """When a request ends: after `max_tokens`, at a stop token or string, or at its deadline."""

    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request as admitted: token ids, never text. `model` is "" where only one is served.

    `deadline_s` counts from admission. A `resumable` request outlives its client's connection for
    the orphan grace of the settings; any other is aborted when its stream is dropped.
    """

    request_id: str
    prompt: tuple[int, ...]
    sampling: Sampling = Sampling()
    limits: Limits = Limits()
    deadline_s: float | None = None
    resumable: bool = False
    detokenize: bool = True
    model: str = ""


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One alternative of a sampled token."""

    token_id: int
    logprob: float


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """Consecutive tokens of one stream; `output_index` tokens came before them.

    `logprobs[i]` belongs to `token_ids[i]`; `top[i]` holds its alternatives when asked for.
    `finish` is set on the last chunk only.
    """

    output_index: int
    token_ids: tuple[int, ...]
    text: str = ""
    logprobs: tuple[float, ...] = ()
    top: tuple[tuple[TopLogprob, ...], ...] = ()
    finish: FinishReason | None = None


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something the fleet did. `time_s` is Unix time; `kind` and `data` are listed in docs/events.md."""

    sequence: int
    time_s: float
    kind: str
    data: dict[str, Any]


class InstanceInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An instance as the controller sees it; `leaving_s` counts down to its announced end, `zone` may be ""."""

    instance: str
    type: str
    devices: int
    state: Literal["joining", "ready", "leaving", "lost"]
    leaving_s: float | None = None
    zone: str = ""


class PositionInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One bound position of the layout in force; `model` is "" where only one is served."""

    replica: int
    stage: int
    shard: int
    device: str
    model: str = ""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is served, and how many live replicas it has."""

    name: str
    family: str
    max_positions: int
    vocab: int
    replicas: int


class ServerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is being served, by whom, right now. `model` to `vocab` are those of the first of `models`."""

    model: str
    family: str
    max_positions: int
    vocab: int
    state: Literal["starting", "serving", "draining", "no_capacity"]
    epoch: int
    config: str
    positions: tuple[PositionInfo, ...]
    instances: tuple[InstanceInfo, ...]
    running: int
    waiting: int
    kv_usage: float
    plan_source: str
    plan_sha256: str
    plan_version: str
    models: tuple[ModelInfo, ...] = ()
