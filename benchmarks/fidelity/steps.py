"""What steps take: requests that are sent at once, alone and in batches, equal and of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.fidelity.clients import WARM_TOKENS, Clients, steady_s
from planning.step_laws import Mix, Observed, StepLaw, mean_mix, mix_of, prompt_steps

_LONE_PROMPTS = (8, 64, 200)
_SHORT, _LONG = 16, 300
_OUTPUT, _FEW_OUTPUTS, _OPENING = 32, 16, 3
# Prompts of requests that decode together on one replica: attention computes those of like lengths at once, so
# what batches of equal requests take says too little.
_MIXED = ((12, 90), (20, 50, 100), (8, 30, 60, 110), (8, 16, 24, 40, 56, 72, 96, 120))


@dataclass(frozen=True, slots=True)
class StepSurvey:
    """Measures the steps of a model that has `replicas` replicas of `stages` stages, through the public API alone."""

    clients: Clients
    step_tokens: int
    block_tokens: int

    async def measure(self, replicas: int, stages: int, max_batch: int, *, model: str = "") -> list[Observed]:
        """Nothing else may run meanwhile."""
        await self.clients.together([_SHORT] * replicas, _FEW_OUTPUTS, model=model)  # the first ones warm it up
        found = []
        for prompt in _LONE_PROMPTS:
            found += await self._prompts(1, prompt, model)
        found += await self._prompts(replicas, _LONE_PROMPTS[-1], model)
        each = [(_SHORT,) * count for count in (2, 4, max_batch)] + [one for one in _MIXED if len(one) <= max_batch]
        for prompts in each:
            found.append(await self._decoding(prompts, replicas, stages, _OUTPUT, model))
        for count in range(1, replicas * stages + 1):
            found.append(await self._single(count, model))
        found.append(await self._decoding((_LONG,), replicas, stages, _FEW_OUTPUTS, model))
        return found

    async def _prompts(self, count: int, tokens: int, model: str) -> list[Observed]:
        """The time to the third token of `count` prompts, one on every replica.

        Not to the first: the copy of a prompt's KV holds the step after it up.
        """
        streams = await self.clients.together([tokens] * count, _OPENING, model=model)
        singles = [mix_of([(tokens + made, 1)], self.block_tokens) for made in range(_OPENING - 1)]
        steps = (*prompt_steps(tokens, self.step_tokens, self.block_tokens), *singles)
        return [Observed(stream.latency_s, steps, count, admitted=True) for stream in streams]

    async def _single(self, count: int, model: str) -> Observed:
        """No more requests than there are stages: each is a step of its own and keeps one stage busy."""
        streams = await self.clients.together([_SHORT] * count, _OUTPUT, model=model)
        return Observed(steady_s(streams), (decoding([_SHORT], _OUTPUT, self.block_tokens),), count)

    async def _decoding(self, prompts: Sequence[int], replicas: int, stages: int, output: int, model: str) -> Observed:
        """The time between tokens of requests with these prompts on every replica."""
        # equal ones next to each other: dispatch deals them out, one to each replica
        streams = await self.clients.together([one for one in prompts for _ in range(replicas)], output, model=model)
        chunks = shares(prompts, stages)
        mixes = [decoding(chunk, output, self.block_tokens) for chunk in chunks]
        return Observed(steady_s(streams), (mean_mix(mixes),), replicas * len(chunks))


def quality(law: StepLaw, stages: int, observed: Sequence[Observed]) -> dict[str, float]:
    """How well a law explains what it was fitted to (`misfit`, the median relative error), and by how much the same
    steps took longer the second time, after the run (`drift`, the median ratio).
    """
    misses = [abs(law.predicted_s(one, stages) / one.seconds - 1) for one in observed]
    half = len(observed) // 2
    ratios = [after.seconds / before.seconds for before, after in zip(observed[:half], observed[half:], strict=False)]
    return {"misfit": round(median(misses), 3), "drift": round(median(ratios or [1.0]), 3)}


def shares(prompts: Sequence[int], stages: int) -> list[Sequence[int]]:
    """How the requests of a replica are spread over its steps under way: as evenly as can be, in their order."""
    most = -(-len(prompts) // stages)
    return [prompts[first : first + most] for first in range(0, len(prompts), most)]


def decoding(prompts: Sequence[int], output: int, block_tokens: int) -> Mix:
    """The mean step of requests that decode together until they have so many tokens."""
    steps = range(WARM_TOKENS, output - 1)
    return mean_mix([mix_of([(prompt + step, 1) for prompt in prompts], block_tokens) for step in steps])
