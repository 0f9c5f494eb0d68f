"""A small non-negative regression on relative errors that survives outliers, with a local correction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

Array = npt.NDArray[np.float64]

_ROUNDS = 6
_HUBER = 1.345
_FOLDS = 5
_NEIGHBOURS = 4
# Added to squared distances (in doublings): one noisy neighbour must not decide alone.
_SOFTNESS = 0.25


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """`coefficients` · features, times what measured neighbours of the point say is missing.

    `places` [neighbour, coordinate] and `logs` (of measured / fitted) are empty if the correction
    did not lower the error on points held out of the fit.
    """

    coefficients: Array
    places: Array | None = None
    logs: Array | None = None

    def at(self, features: Sequence[float], coordinates: Sequence[float]) -> float:
        """Predicted value at one point."""
        fitted = float(np.dot(self.coefficients, features))
        if self.places is None or self.logs is None:
            return fitted
        return fitted * float(np.exp(_nearby(self.places, self.logs, np.asarray(coordinates))))


def fit_curve(features: Array, coordinates: Array, values: Array) -> Curve:
    """Fit positive `values`; with or without the local correction, whichever errs less on held-out points."""
    plain = Curve(_fit(features, values))
    if len(values) < 2 * _FOLDS:
        return plain
    errors = np.zeros((2, len(values)))
    folds = np.arange(len(values)) % _FOLDS
    for fold in range(_FOLDS):
        known = folds != fold
        curve = _corrected(features[known], coordinates[known], values[known])
        for index in np.flatnonzero(~known):
            rough = float(np.dot(curve.coefficients, features[index]))
            for row, guess in enumerate((rough, curve.at(features[index], coordinates[index]))):
                errors[row, index] = abs(guess / values[index] - 1)
    plain_error, corrected_error = errors.mean(axis=1)
    return _corrected(features, coordinates, values) if corrected_error < plain_error else plain


def _corrected(features: Array, coordinates: Array, values: Array) -> Curve:
    coefficients = _fit(features, values)
    logs = np.log(values / np.maximum(features @ coefficients, 1e-12))
    return Curve(coefficients, coordinates, logs)


def _nearby(places: Array, logs: Array, at: Array) -> float:
    distance = ((places - at) ** 2).sum(axis=1)
    nearest = np.argsort(distance, kind="stable")[:_NEIGHBOURS]
    weight = 1 / (distance[nearest] + _SOFTNESS)
    return float((weight * logs[nearest]).sum() / weight.sum())


def _fit(features: Array, values: Array) -> Array:
    """Non-negative least squares on relative errors, reweighted by Huber's rule."""
    relative = features / values[:, None]
    norms = np.linalg.norm(relative, axis=0)
    norms[norms == 0] = 1.0
    weights = np.ones(len(values))
    for _ in range(_ROUNDS):
        solution, _ = nnls(relative / norms * weights[:, None], weights)
        misses = np.abs(relative @ (solution / norms) - 1)
        limit = _HUBER * 1.4826 * float(np.median(misses)) + 1e-9
        weights = np.sqrt(np.minimum(1.0, limit / np.maximum(misses, 1e-12)))
    coefficients: Array = solution / norms
    return coefficients
