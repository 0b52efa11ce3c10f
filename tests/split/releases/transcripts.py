"""A lower bound on epsilon, from what an adversary saw in many runs on two neighbours: Clopper and Pearson's limits.

The adversary gets a transcript and scores it; whoever claims (epsilon, delta) claims that for each threshold

    P[score > threshold | one] <= e^epsilon P[score > threshold | the other] + delta.

Half of the transcripts choose the threshold, the other half bound the two probabilities at `CONFIDENCE`; the bound is
wrong (above the true epsilon) once in 1 / (1 - CONFIDENCE) audits.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

CONFIDENCE = 0.9999
Scores = NDArray[np.float64]


def epsilon_seen(one: Scores, other: Scores, *, delta: float) -> float:
    """A lower bound on epsilon at `delta`, from scores of transcripts on either neighbour."""
    best = 0.0
    for a, b in ((one, other), (other, one), (-one, -other), (-other, -one)):
        best = max(best, _one_sided(a, b, delta))
    return best


def _one_sided(one: Scores, other: Scores, delta: float) -> float:
    half_one, half_other = len(one) // 2, len(other) // 2
    thresholds = np.unique(np.quantile(other[:half_other], np.linspace(0.01, 0.999, 200)))
    threshold = max(thresholds, key=lambda t: _bound(one[:half_one], other[:half_other], t, delta))
    return _bound(one[half_one:], other[half_other:], threshold, delta)


def _bound(one: Scores, other: Scores, threshold: float, delta: float) -> float:
    level = (1 - CONFIDENCE) / 8  # two limits, four ways round
    hits, n = int((one > threshold).sum()), len(one)
    false, m = int((other > threshold).sum()), len(other)
    low = float(beta.ppf(level, hits, n - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - level, false + 1, m - false)) if false < m else 1.0
    return math.log((low - delta) / high) if low > delta else 0.0
