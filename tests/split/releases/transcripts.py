"""A lower bound on epsilon, from what an adversary saw in many runs on two neighbours.

The adversary gets a transcript and scores it; whoever claims (epsilon, delta) claims that for each threshold

    P[score > threshold | one] <= e^epsilon P[score > threshold | the other] + delta,

and the same of the complement. Half of the transcripts choose the threshold, and which of the two is rather above it;
the other half bound the two probabilities at `CONFIDENCE` together (`dpdl.audit.bounds`). The bound is wrong (above the
true epsilon) once in 1 / (1 - CONFIDENCE) audits.

`dpdl.audit.many_runs` compares fewer thresholds, and none at delta = 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dpdl.audit.bounds import epsilon_of_rates, rate_at_most

CONFIDENCE = 0.9999
Scores = NDArray[np.float64]


def epsilon_seen(one: Scores, other: Scores, *, delta: float) -> float:
    """A lower bound on epsilon at `delta`, from scores of transcripts on either neighbour."""
    (one_first, one_second), (other_first, other_second) = np.array_split(one, 2), np.array_split(other, 2)
    shares = np.linspace(0.001, 0.999, 200)  # of either kind: claims are attained in the tails
    thresholds = np.unique(np.quantile(one_first, shares).tolist() + np.quantile(other_first, shares).tolist())
    _, sign, threshold = max(
        (_bound(sign * one_first, sign * other_first, sign * t, delta), sign, t) for t in thresholds for sign in (1, -1)
    )
    return _bound(sign * one_second, sign * other_second, sign * threshold, delta)


def _bound(one: Scores, other: Scores, threshold: float, delta: float) -> float:
    failure = (1 - CONFIDENCE) / 2  # two limits
    fpr = rate_at_most(int((other > threshold).sum()), len(other), failure=failure)
    fnr = rate_at_most(int((one <= threshold).sum()), len(one), failure=failure)
    return epsilon_of_rates(fpr, fnr, delta=delta)
