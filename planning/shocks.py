"""Events that hit several instances of a zone at once: how often how many of them go, or come, together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import betaln, gammaln

from data.errors import InvalidInput

Matrix = npt.NDArray[np.float64]

_SEPARATE = 1e-9  # the least that a chance of going along is told from 0 by


@dataclass(frozen=True, slots=True)
class Shocks:
    """Each instance is hit `each_s` times per second, and every time each other one goes along with one chance.

    That chance is drawn anew for every event, from a Beta distribution with mean `along` (0 … 1) and parameters
    that sum to `spread`: a large spread makes groups of one size, a small one of none or all. Any part of the
    instances sees the same shocks (exchangeable Marshall–Olkin shocks; the rates are those of Λ-coalescents,
    J. Pitman, Annals of Probability 27(4), 1999). Raises `InvalidInput` for what is no such distribution.
    """

    each_s: float
    along: float = 0.0
    spread: float = 1.0

    def __post_init__(self) -> None:
        if not (self.each_s >= 0 and 0 <= self.along <= 1 and self.spread > 0):
            raise InvalidInput(f"{self} is no way to come or go; give a rate ≥ 0, a share within 0 … 1, a spread > 0")

    def down(self, most: int) -> Matrix:
        """Events per second that leave `m` of `n` instances, [n, m], for up to `most`; 0 where none is hit."""
        along = min(max(self.along, _SEPARATE), 1 - _SEPARATE)
        a, b = along * self.spread, (1 - along) * self.spread
        left, hit, choices = _groups(most)
        rates = self.each_s * np.exp(choices + betaln(a + hit - 1, b + left) - betaln(a, b))
        return np.tril(rates, -1)

    def times(self, factor: float) -> Shocks:
        """As many together, `factor` times as often."""
        return replace(self, each_s=self.each_s * factor)


@lru_cache(maxsize=16)
def _groups(most: int) -> tuple[Matrix, Matrix, Matrix]:
    """Who is left and how many are hit, [n, m], and the logarithm of the number of such groups."""
    count, left = np.indices((most + 1, most + 1)).astype(float)
    hit = np.maximum(count - left, 1.0)
    return left, hit, gammaln(count + 1) - gammaln(hit + 1) - gammaln(left + 1)
