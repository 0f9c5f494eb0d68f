"""How long a step of a real fleet takes: a law for each shape of replica, fitted to what was measured while it served.

One stage of a pipeline computes a step in a time that grows with its sequences, its tokens and the cached
tokens that these attend to. Workers that share processors slow each other down: the law says by how much when
so many stages of the fleet compute at once. Both are measured with the fleet as it runs, so that copies of the
KV, the journal and the clients are in the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from data.errors import InvalidInput

Array = npt.NDArray[np.float64]

_TERMS = 4
_TYPICAL_S = (1e-2, 1e-3, 1e-3, 1e-6)  # of the terms: where the search for the best fit begins
_SOFT = 0.1  # relative errors beyond this count less than squared


@dataclass(frozen=True, slots=True)
class Mix:
    """What one step computes: sequences, tokens, and the sum over tokens of the cached tokens each attends to."""

    sequences: float
    tokens: float
    attended: float

    @property
    def terms(self) -> Array:
        """What a law's coefficients are multiplied by."""
        return np.array([1.0, self.sequences, self.tokens - self.sequences, self.attended])


def decode(sequences: float, context: float) -> Mix:
    """A step of single tokens with `context` cached tokens each."""
    return Mix(sequences, sequences, sequences * context)


def prompt_steps(tokens: int, step_tokens: int) -> tuple[Mix, ...]:
    """The steps that a prompt alone takes, in chunks of `step_tokens`."""
    starts = range(0, tokens, step_tokens)
    sizes = [min(step_tokens, tokens - start) for start in starts]
    return tuple(Mix(1, size, size * (start + size)) for start, size in zip(starts, sizes, strict=True))


@dataclass(frozen=True, slots=True)
class Observed:
    """`seconds` that the steps of one replica took one after the other, while `busy` stages of the fleet computed.

    Every step went through all stages. With `admitted`, the way of a request to its replica and of its token to
    the client is in the time.
    """

    seconds: float
    steps: tuple[Mix, ...]
    busy: int
    admitted: bool = False


@dataclass(frozen=True, slots=True)
class StepLaw:
    """Seconds of one stage for a step: `coefficients` of 1, sequences, tokens beyond one each, and attended tokens.

    `slowness[k - 1]` is the factor when k stages of the fleet compute at once; beyond the last one measured it
    grows in proportion. `overhead_s` is what a request spends outside of steps.
    """

    coefficients: tuple[float, float, float, float]
    slowness: tuple[float, ...] = (1.0,)
    overhead_s: float = 0.0

    def work_s(self, mix: Mix) -> float:
        """A stage's time for a step when nothing else computes."""
        return float(mix.terms @ self.coefficients)

    def slow(self, busy: int) -> float:
        """By how much everything takes longer while `busy` stages compute."""
        known = len(self.slowness)
        return self.slowness[max(busy, 1) - 1] if busy <= known else self.slowness[-1] * busy / known


def fit_law(observations: Sequence[Observed], stages: int) -> StepLaw:
    """The law of replicas of `stages` stages that explains the observations best, by relative error.

    Raises `InvalidInput` without any.
    """
    if not observations:
        raise InvalidInput("a law needs observations; measure the fleet first")
    most = max(one.busy for one in observations)
    sums = np.array([stages * sum(mix.terms for mix in one.steps) for one in observations])
    seconds = np.array([one.seconds for one in observations])
    busy = np.array([one.busy - 1 for one in observations])
    admitted = np.array([one.admitted for one in observations], dtype=np.float64)

    def misses(unknown: Array) -> Array:
        slowness = 1 + np.concatenate([[0.0], np.cumsum(unknown[_TERMS:-1])])
        found: Array = ((sums @ unknown[:_TERMS]) * slowness[busy] + admitted * unknown[-1]) / seconds - 1
        return found

    scale = np.array([*_TYPICAL_S, *(0.5,) * (most - 1), 5e-3])
    fitted = least_squares(misses, scale, bounds=(0, np.inf), x_scale=scale, loss="soft_l1", f_scale=_SOFT).x
    slowness = 1 + np.concatenate([[0.0], np.cumsum(fitted[_TERMS:-1])])
    base, sequence, token, attended = (float(one) for one in fitted[:_TERMS])
    return StepLaw((base, sequence, token, attended), tuple(float(one) for one in slowness), float(fitted[-1]))
