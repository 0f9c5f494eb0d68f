"""How long a step of a real fleet takes: a law for each shape of replica, fitted to what was measured while it served.

One stage of a pipeline computes a step in a time that grows with its sequences, its tokens, its calls of attention
and the cached tokens that these read. Workers that share processors slow each other down: the law says by how much
when so many stages of the fleet compute at once. Both are measured with the fleet as it runs, so that copies of the
KV, the journal and the clients are in the figures.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from data.errors import InvalidInput

Array = npt.NDArray[np.float64]

_TERMS = 7
_TYPICAL_S = (1e-2, 1e-3, 1e-3, 1e-3, 1e-5, 1e-6, 1e-3)  # of the terms: where the search for the best fit begins
_SOFT = 0.3  # relative errors beyond this count less than squared
_PASSES = 4


@dataclass(frozen=True, slots=True)
class Mix:
    """What one step computes: sequences, tokens, calls of attention, cached tokens that single tokens read, the sum
    over the tokens of chunks of the cached tokens that each attends to, and chunks: with each comes what is done
    once for a request, or for the copy of many tokens' KV.

    Contexts are counted as the engine computes them without paged kernels: in blocks, single tokens with tables of
    like length (up to the same power of two) in one call that pads them to its longest, every chunk in its own.
    """

    sequences: float
    tokens: float
    calls: float
    read: float
    attended: float
    chunks: float = 0.0

    @property
    def terms(self) -> Array:
        """What a law's coefficients are multiplied by."""
        more = self.tokens - self.sequences
        return np.array([1.0, self.sequences, more, self.calls, self.read, self.attended, self.chunks])


def mix_of(pieces: Iterable[tuple[int, int]], block_tokens: int) -> Mix:
    """A step of pieces: tokens that are cached already, and tokens to compute, of each sequence."""
    tables: dict[int, list[int]] = defaultdict(list)
    sequences = tokens = chunks = attended = 0
    for start, count in pieces:
        blocks = -(-(start + count) // block_tokens)
        sequences, tokens = sequences + 1, tokens + count
        if count == 1:
            tables[(blocks - 1).bit_length()].append(blocks)
        else:
            chunks, attended = chunks + 1, attended + count * blocks * block_tokens
    read = sum(len(alike) * max(alike) * block_tokens for alike in tables.values())
    return Mix(sequences, tokens, chunks + len(tables), read, attended, chunks)


def mean_mix(mixes: Sequence[Mix]) -> Mix:
    """The step that costs what these cost on average: laws are linear."""
    return Mix(*(float(value) for value in np.mean([astuple(one) for one in mixes], axis=0)))


def prompt_steps(tokens: int, step_tokens: int, block_tokens: int) -> tuple[Mix, ...]:
    """The steps that a prompt alone takes, in chunks of `step_tokens`."""
    starts = range(0, tokens, step_tokens)
    return tuple(mix_of([(start, min(step_tokens, tokens - start))], block_tokens) for start in starts)


@dataclass(frozen=True, slots=True)
class Observed:
    """`seconds` that the steps of one replica took one after the other, while `busy` stages of the fleet computed.

    Every step went through all stages. The way of a request to its replica and of its first token to the client is
    in the time as often as `admitted` says. It was observed at `at_s`, when everything on these processors took
    `drag` times as long as it does on average. Of a flow it is known how many `clients` sent one request after the
    other to how many `replicas`.
    """

    seconds: float
    steps: tuple[Mix, ...]
    busy: int
    admitted: float = 0.0
    at_s: float = 0.0
    drag: float = 1.0
    clients: int = 0
    replicas: int = 0


@dataclass(frozen=True, slots=True)
class StepLaw:
    """Seconds of one stage for a step: `coefficients` of `Mix.terms`.

    `slowness[k - 1]` is the factor when k stages of the fleet compute at once; beyond the last one measured it
    grows in proportion. `overhead_s` is what a request spends outside of steps.
    """

    coefficients: tuple[float, ...]
    slowness: tuple[float, ...] = (1.0,)
    overhead_s: float = 0.0

    def work_s(self, mix: Mix) -> float:
        """A stage's time for a step when nothing else computes."""
        return float(mix.terms @ self.coefficients)

    def predicted_s(self, observed: Observed, stages: int) -> float:
        """What the law says that observed steps of a replica of so many stages took."""
        steps_s = stages * sum(map(self.work_s, observed.steps)) * self.slow(observed.busy)
        return observed.drag * (steps_s + observed.admitted * self.overhead_s)

    def slow(self, busy: int) -> float:
        """By how much everything takes longer while `busy` stages compute."""
        known = len(self.slowness)
        return self.slowness[max(busy, 1) - 1] if busy <= known else self.slowness[-1] * busy / known


def fit_law(observations: Sequence[Observed], stages: int) -> StepLaw:
    """The law of replicas of `stages` stages that explains the observations best, by relative error.

    Misses are weighed by what is predicted, not by what was observed, which would favour what was observed
    while processors were quick (quasi-likelihood with a constant coefficient of variation, by repeated least
    squares). Raises `InvalidInput` without any observations.
    """
    if not observations:
        raise InvalidInput("a law needs observations; measure the fleet first")
    most = max(one.busy for one in observations)
    sums = np.array([stages * sum(mix.terms for mix in one.steps) for one in observations])
    seconds = np.array([one.seconds / one.drag for one in observations])
    busy = np.array([one.busy - 1 for one in observations])
    admitted = np.array([one.admitted for one in observations], dtype=np.float64)

    def predicted(unknown: Array) -> Array:
        slowness = 1 + np.concatenate([[0.0], np.cumsum(unknown[_TERMS:-1])])
        found: Array = (sums @ unknown[:_TERMS]) * slowness[busy] + admitted * unknown[-1]
        return found

    scale = np.array([*_TYPICAL_S, *(0.5,) * (most - 1), 5e-3])
    fitted, weight = scale, seconds
    for _ in range(_PASSES):

        def misses(unknown: Array, weight: Array = weight) -> Array:
            found: Array = (predicted(unknown) - seconds) / weight
            return found

        fitted = least_squares(misses, fitted, bounds=(0, np.inf), x_scale=scale, loss="soft_l1", f_scale=_SOFT).x
        weight = predicted(fitted)
    slowness = 1 + np.concatenate([[0.0], np.cumsum(fitted[_TERMS:-1])])
    coefficients = tuple(float(one) for one in fitted[:_TERMS])
    return StepLaw(coefficients, tuple(float(one) for one in slowness), float(fitted[-1]))
