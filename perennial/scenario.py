"""The demo's scenario: which requests arrive and what happens to the fleet, all from one seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from data.synthesis import Uniform, synthetic_workload
from data.workload import Request
from perennial.recording import ActionKind
from serving.requests import GenerationRequest, Limits, Sampling


@dataclass(frozen=True, slots=True)
class Action:
    """Something done to the fleet `time_s` after the start; `victim` counts through the live instances."""

    time_s: float
    kind: ActionKind
    victim: int = 0
    grace_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request and when it is sent."""

    time_s: float
    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class Scenario:
    """Requests and actions, each in time order."""

    arrivals: tuple[Arrival, ...]
    actions: tuple[Action, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """How big a scenario is. `least` and `most` bound the live instances; `gap_s` parts the actions.

    `cv` is the coefficient of variation of the Gamma arrival process; token numbers are ranges.
    """

    requests: int = 64
    instances: int = 4
    least: int = 2
    most: int = 4
    notices: int = 3
    kills: int = 1
    additions: int = 3
    start_s: float = 4.0
    gap_s: tuple[float, float] = (4.0, 6.0)
    grace_s: tuple[float, float] = (1.5, 4.0)
    cv: float = 1.3
    prompt_tokens: tuple[int, int] = (8, 48)
    output_tokens: tuple[int, int] = (64, 224)
    tail_s: float = 2.0  # requests go on arriving for this long after the last action
    vocab: int = 512
    reserved: int = 8  # token ids below this are special and do not appear in prompts

    @property
    def span_s(self) -> float:
        """About how long requests arrive."""
        gaps = self.notices + self.kills + self.additions - 1
        return self.start_s + sum(self.gap_s) / 2 * gaps + self.tail_s

    @property
    def rate_rps(self) -> float:
        """About how many requests arrive in a second."""
        return self.requests / self.span_s


SHORT = Shape(requests=40, gap_s=(3.0, 4.0), start_s=2.0, grace_s=(1.0, 2.5), output_tokens=(48, 160))
GPU = Shape(
    requests=30, instances=2, least=1, most=2, notices=3, kills=1, additions=3, output_tokens=(64, 256), vocab=8192
)
SHORT_GPU = replace(GPU, requests=20, gap_s=(3.0, 4.0), output_tokens=(48, 160))


def scenario(seed: int, shape: Shape) -> Scenario:
    """The scenario of a seed. Pure: the same arguments give the same scenario."""
    source = random.Random(seed)
    actions = _actions(source, shape)
    return Scenario(_arrivals(seed, source, shape, until_s=actions[-1].time_s + shape.tail_s), actions)


def _order(source: random.Random, shape: Shape) -> list[ActionKind]:
    """A random order of the actions in which the live instances stay in bounds and reach both."""
    counted: tuple[tuple[ActionKind, int], ...]
    counted = (("notice", shape.notices), ("kill", shape.kills), ("add", shape.additions))
    kinds = [kind for kind, count in counted for _ in range(count)]
    for _ in range(10_000):
        source.shuffle(kinds)
        path, live = [], shape.instances
        for kind in kinds:
            live += 1 if kind == "add" else -1
            path.append(live)
        if min(path) == shape.least and max(path) <= shape.most:
            return kinds
    raise ValueError(f"no order of these actions keeps the fleet between {shape.least} and {shape.most} instances")


def _actions(source: random.Random, shape: Shape) -> tuple[Action, ...]:
    result, time_s = [], shape.start_s
    for kind in _order(source, shape):
        grace_s = round(source.uniform(*shape.grace_s), 2) if kind == "notice" else 0.0
        result.append(Action(round(time_s, 2), kind, source.randrange(shape.most), grace_s))
        time_s += source.uniform(*shape.gap_s)
    return tuple(result)


def _arrivals(seed: int, source: random.Random, shape: Shape, *, until_s: float) -> tuple[Arrival, ...]:
    """Gamma arrivals over the time of the actions."""
    workload = synthetic_workload(
        seed,
        requests=shape.requests,
        rate_rps=(shape.requests - 1) / until_s,
        cv=shape.cv,
        inputs=Uniform(*shape.prompt_tokens),
        outputs=Uniform(*shape.output_tokens),
    )
    return tuple(
        Arrival(round(item.arrival_s, 3), _request(source, shape, f"demo-{index:03d}", item))
        for index, item in enumerate(workload.requests)
    )


def _request(source: random.Random, shape: Shape, request_id: str, size: Request) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        prompt=tuple(source.randrange(shape.reserved, shape.vocab) for _ in range(size.input_tokens)),
        sampling=random_sampling(source),
        limits=Limits(max_tokens=size.output_tokens, ignore_eos=True),
        resumable=True,
    )


def random_sampling(source: random.Random) -> Sampling:
    """Greedy or sampled, half and half; sampled with every combination of cuts."""
    if source.random() < 0.5:
        return Sampling()
    return Sampling(
        temperature=round(source.uniform(0.5, 1.2), 2),
        top_k=source.choice((0, 20, 50)),
        top_p=source.choice((1.0, 0.95, 0.8)),
        seed=source.getrandbits(31),
    )
