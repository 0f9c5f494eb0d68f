"""What steps take: requests that come one after the other as they will come later, and requests sent at once."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from benchmarks.fidelity.clients import WARM_TOKENS, Clients, Stream, steady_s
from planning.step_laws import Mix, Observed, StepLaw, mean_mix, mix_of, prompt_steps

Range = tuple[int, int]

_LONE_PROMPTS = (8, 64, 200)
_SHORT, _LONG = 16, 300
_OUTPUT, _FEW_OUTPUTS, _OPENING = 32, 16, 3
FLOW_SPAN_S = 0.5, 3.0  # when tokens of a flow count, after its clients began
_FULL = (0.25, 0.5, 0.75, 1.0)  # of a batch, by requests that flow through it
# Prompts of requests that decode together on one replica: attention computes those of like lengths at once, and
# only beside equal ones does it show what a call of it costs.
_MIXED = ((20, 50, 100), (8, 16, 24, 40, 56, 72, 96, 120))
_DRAWS = 300


@dataclass(frozen=True, slots=True)
class StepSurvey:
    """Measures the steps of a model that has `replicas` replicas of `stages` stages, through the public API alone.

    `prompts` and `outputs` are the token numbers of the requests that will come.
    """

    clients: Clients
    step_tokens: int
    block_tokens: int
    prompts: Range
    outputs: Range

    async def measure(self, replicas: int, stages: int, max_batch: int, *, model: str = "") -> list[Observed]:
        """Nothing else may run meanwhile."""
        await self.clients.together([_SHORT] * replicas, _FEW_OUTPUTS, model=model)  # the first ones warm it up
        lines = replicas * stages
        fuller = (replicas * round(full * max_batch) for full in _FULL)
        flows = [*range(1, lines + 1), *(count for count in fuller if count > lines)]
        batches = [(_SHORT,) * max_batch, *(prompts for prompts in _MIXED if len(prompts) <= max_batch)]
        found = []
        for prompt in _LONE_PROMPTS:
            found += await _timed(self._prompts(1, prompt, model))
        found += await _timed(self._prompts(replicas, _LONE_PROMPTS[-1], model))
        for count in flows:
            found += await self.flow(count, replicas, stages, model=model)
        for prompts in batches:
            found += await _timed(self._decoding(prompts, replicas, stages, _OUTPUT, model))
        return found + await _timed(self._decoding((_LONG,), replicas, stages, _FEW_OUTPUTS, model))

    async def _prompts(self, count: int, tokens: int, model: str) -> list[Observed]:
        """The time to the third token of `count` prompts, one on every replica.

        Not to the first: the copy of a prompt's KV holds the step after it up.
        """
        streams = await self.clients.together([tokens] * count, _OPENING, model=model)
        singles = [mix_of([(tokens + made, 1)], self.block_tokens) for made in range(_OPENING - 1)]
        steps = (*prompt_steps(tokens, self.step_tokens, self.block_tokens), *singles)
        return [Observed(stream.latency_s, steps, count, admitted=1.0) for stream in streams]

    async def flow(self, count: int, replicas: int, stages: int, *, beside: int = 0, model: str = "") -> list[Observed]:
        """The time for a token when `count` clients send one request after the other, of all lengths, while `beside`
        stages of others compute.

        Requests then come and go beside others, which slows these down more than sequences that only decode; and
        a mean over hundreds of steps is worth more than one over thirty.
        """
        each = shares(range(max(1, round(count / replicas))), stages)
        busy = min(count, replicas * len(each)) + beside
        found = await _timed(self._flow(count, [len(step) for step in each], busy, model))
        return [replace(one, clients=count, replicas=replicas) for one in found]

    async def _flow(self, count: int, sizes: Sequence[int], busy: int, model: str) -> list[Observed]:
        source, streams, begun_s = flow_source(count), list[Stream](), time.monotonic()

        async def client() -> None:
            while time.monotonic() < begun_s + FLOW_SPAN_S[1]:
                await self.clients.send(*drawn(source, self.prompts, self.outputs), streams, model=model)

        await asyncio.gather(*(client() for _ in range(count)))
        span = begun_s + FLOW_SPAN_S[0], begun_s + FLOW_SPAN_S[1]
        tokens = max(1, sum(span[0] < at_s <= span[1] for one in streams for at_s in one.times_s))
        began = sum(span[0] < one.sent_s <= span[1] for one in streams)
        mix = mean_mix([typical(streams, size, self.block_tokens, source) for size in sizes])
        seconds = count * (span[1] - span[0]) / tokens  # every client has one request all the time
        return [Observed(seconds, (mix,), busy, admitted=began / tokens)]

    async def _decoding(
        self, prompts: Sequence[int], replicas: int, stages: int, output: int, model: str
    ) -> list[Observed]:
        """The time between tokens of requests with these prompts on every replica."""
        # equal ones next to each other: dispatch deals them out, one to each replica
        streams = await self.clients.together([one for one in prompts for _ in range(replicas)], output, model=model)
        chunks = shares(prompts, stages)
        mixes = [decoding(chunk, output, self.block_tokens) for chunk in chunks]
        return [Observed(steady_s(streams), (mean_mix(mixes),), replicas * len(chunks))]


def flow_source(clients: int) -> random.Random:
    """What the requests of a flow are drawn from: always the same, so that a simulation can send those of the flow."""
    return random.Random(clients)


def drawn(source: random.Random, prompts: Range, outputs: Range) -> tuple[int, int]:
    """Prompt and output tokens of the next request."""
    return source.randint(*prompts), source.randint(*outputs)


def typical(streams: Sequence[Stream], sequences: int, block_tokens: int, source: random.Random) -> Mix:
    """The mean step of so many sequences, each somewhere in one of the streams."""
    places = [place for stream in streams for place in _places(stream)]
    return mean_mix([mix_of(source.choices(places, k=sequences), block_tokens) for _ in range(_DRAWS)])


def _places(stream: Stream) -> list[tuple[int, int]]:
    """What a request brings to each of its steps: tokens that are cached, and tokens to compute."""
    return [(0, stream.prompt_tokens), *((stream.prompt_tokens + made, 1) for made in range(len(stream.times_s) - 1))]


async def _timed(observing: Awaitable[list[Observed]]) -> list[Observed]:
    """With the moment in the middle."""
    begun_s = time.monotonic()
    found = await observing
    return [replace(one, at_s=(begun_s + time.monotonic()) / 2) for one in found]


def quality(law: StepLaw, stages: int, observed: Sequence[Observed]) -> dict[str, float]:
    """How well a law explains what it was fitted to (`misfit`, the median relative error), and by how much the same
    steps took longer the second time, after the run (`drift`, the median ratio).
    """
    misses = [abs(law.predicted_s(one, stages) / one.seconds - 1) for one in observed]
    ratios = [after.seconds / before.seconds for before, after in twice(observed)]
    return {"misfit": round(median(misses), 3), "drift": round(median(ratios or [1.0]), 3)}


def twice(observed: Sequence[Observed]) -> list[tuple[Observed, Observed]]:
    """Observations of the same steps, the first time and the second."""
    half = len(observed) // 2
    return list(zip(observed[:half], observed[half:], strict=False))


def shares(prompts: Sequence[int], stages: int) -> list[Sequence[int]]:
    """How the requests of a replica are spread over its steps under way: as evenly as can be, in their order."""
    most = -(-len(prompts) // stages)
    return [prompts[first : first + most] for first in range(0, len(prompts), most)]


def decoding(prompts: Sequence[int], output: int, block_tokens: int) -> Mix:
    """The mean step of requests that decode together until they have so many tokens."""
    steps = range(WARM_TOKENS, output - 1)
    return mean_mix([mix_of([(prompt + step, 1) for prompt in prompts], block_tokens) for step in steps])
