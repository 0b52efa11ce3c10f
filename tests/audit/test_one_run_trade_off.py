"""Guesses of one run against a trade-off curve: a linear program over all laws as the oracle, then simulated runs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import linprog

from dpdl.audit.curves import GaussianCurve, Lines
from dpdl.audit.one_run_trade_off import one_run_refutes
from dpdl.errors import ParameterError


def most_probable(right: int, guesses: int, candidates: int, pairs: tuple[tuple[float, float], ...]) -> float:
    """The largest P[N >= right] of any law of N that meets all constraints, each a line of the curve."""
    n = np.arange(guesses + 1)
    rows, limits = [], []
    for t in range(guesses):
        rights, wrongs = n * (n > t) / candidates, (guesses - n) * (n >= t) / candidates
        for epsilon, delta in pairs:
            rows.append(rights - math.exp(epsilon) * wrongs)
            limits.append(delta)
            rows.append(rights - math.exp(-epsilon) * wrongs)
            limits.append(1 - math.exp(-epsilon) * (1 - delta))
    found = linprog(
        -(n >= right).astype(float), A_ub=rows, b_ub=limits, A_eq=[np.ones(guesses + 1)], b_eq=[1.0], bounds=(0, None)
    )
    assert found.success
    return float(-found.fun)


@pytest.mark.parametrize("counts", [(10, 10, 10), (9, 10, 25), (18, 20, 20), (16, 20, 60), (13, 20, 20)])
@pytest.mark.parametrize("pairs", [((1.0, 0.0),), ((0.5, 0.01),), ((0.0, 0.1), (1.0, 0.02), (2.0, 0.001))])
def test_the_probability_that_is_refuted_is_the_largest_there_can_be(
    counts: tuple[int, int, int], pairs: tuple[tuple[float, float], ...]
) -> None:
    most = most_probable(*counts, pairs)
    curve = Lines(pairs)
    if most < 0.99:
        assert one_run_refutes(*counts, curve=curve, failure=most * 1.001)
    assert not one_run_refutes(*counts, curve=curve, failure=most * 0.999)


def test_lines_are_below_the_curve_that_they_are_taken_from() -> None:
    mu = 1.0
    phi = np.vectorize(lambda x: 0.5 * math.erfc(-x / math.sqrt(2)))
    pairs = tuple((e, float(phi(mu / 2 - e / mu) - math.exp(e) * phi(-mu / 2 - e / mu))) for e in (0.0, 0.5, 1.0, 2.0))
    for tpr in np.linspace(0.01, 0.99, 50):
        lines, gaussian = Lines(pairs).least_fpr(tpr), GaussianCurve(mu).least_fpr(tpr)
        assert gaussian * 0.4 - 1e-3 < lines <= gaussian + 1e-12


def refuted_share(mu: float, claimed: float, *, runs: int = 300, candidates: int = 200, share: float = 0.1) -> float:
    """Of simulated runs: a coin and a Gaussian score for each candidate, the extremes guessed."""
    generator = np.random.default_rng(0)
    refuted, some = 0, int(share * candidates)
    for _ in range(runs):
        coins = generator.random(candidates) < 0.5
        order = np.argsort(generator.standard_normal(candidates) + mu * coins)
        right = int((~coins[order[:some]]).sum() + coins[order[-some:]].sum())
        refuted += one_run_refutes(right, 2 * some, candidates, curve=GaussianCurve(claimed), failure=0.05)
    return refuted / runs


def test_simulated_runs_are_covered_and_a_wrong_scale_is_refuted() -> None:
    assert refuted_share(1.0, 1.0) <= 0.05
    assert refuted_share(3.0, 1.0) > 0.9
    assert refuted_share(1.0, 2.0) == 0


def test_one_that_tells_all_coins_with_probability_delta_is_covered() -> None:
    curve = Lines(((0.0, 0.2),))
    assert not one_run_refutes(100, 100, 100, curve=curve, failure=0.19)
    assert one_run_refutes(100, 100, 100, curve=curve, failure=0.25)


def test_counts_out_of_range_are_refused() -> None:
    for counts in ((3, 2, 5), (2, 6, 5), (-1, 2, 5), (0, 0, 0)):
        with pytest.raises(ParameterError):
            one_run_refutes(*counts, curve=GaussianCurve(1.0), failure=0.1)
    with pytest.raises(ParameterError):
        one_run_refutes(1, 2, 3, curve=GaussianCurve(1.0), failure=1.0)
