"""Guesses about the coins of one run, held against a whole trade-off curve instead of one (epsilon, delta).

A coin for each of m candidates decides whether it is in the data. The attacker sees what the run released and guesses c
of the coins, c fixed beforehand; N guesses are right. If the run's trade-off curve is at least f, then for each
threshold t, with T(b) = 1 - f(b) the most true positives that b false ones buy,

    E[N; N > t] / m  <=  T(E[c - N; N >= t] / m)                                                               (*)

Why [cf. 1, section 3]: take a candidate j at random, and let O be the event that at least t of the other guesses are
right. With the other coins fixed, "guess j is 'in', and O" is an event of the release, so that its probability if coin
j is heads is at most T of its probability if it is tails; the same for "'out', and O" with the sides exchanged. T is
concave: averaged over j and all coins, P[guess j right and O] <= T(P[guess j wrong and O]). Given N = n, guess j is
right in n of m cases, and O then says n - 1 >= t; it is wrong in c - n of m, and O then says n >= t.

So many right guesses cannot come without fewer: if N >= v has probability p, (*) for t = v - 1 asks for some
probability of N = v - 1, then t = v - 2 for some of N = v - 2, and so on. The least that is asked for is got by taking
at each n no more than its own (*) needs: what is moved from n to n - 1 adds less to the left side, and more to the
right side, of all (*) below. If it adds up to more than 1, N >= v has a probability below p.

Against a Gaussian curve this refutes with about a tenth of the candidates that one (epsilon, delta) needs.

References:
    [1] Mahloujifar, Melis, Chaudhuri, Auditing f-Differential Privacy in One Run, 2024. arXiv:2410.22235
"""

from __future__ import annotations

from dpdl.audit.curves import Curve
from dpdl.errors import ParameterError

__all__ = ["one_run_refutes"]

_SLACK = 1e-9  # of sums of up to a million numbers of rounding 1e-16 each, with room to spare


def one_run_refutes(right: int, guesses: int, candidates: int, *, curve: Curve, failure: float) -> bool:
    """Whether so many right guesses have, under a curve, a probability below `failure`.

    Args:
        right: right guesses, in [0, guesses].
        guesses: c, how many coins were guessed; a number that does not depend on the coins.
        candidates: m, how many coins there were.
        curve: that the run is claimed to have, or to be above.
        failure: in (0, 1).

    Returns:
        True if P[at least `right` right guesses] < failure under each run whose trade-off curve is at least `curve`.

    Raises:
        ParameterError: counts or failure are out of range.

    Example:
        >>> from dpdl.audit.curves import GaussianCurve
        >>> one_run_refutes(197, 200, 1000, curve=GaussianCurve(1.0), failure=0.05)
        True
        >>> one_run_refutes(160, 200, 1000, curve=GaussianCurve(1.0), failure=0.05)
        False
    """
    if not 0 <= right <= guesses <= candidates or candidates < 1:
        raise ParameterError(
            f"Counts must be 0 <= right <= guesses <= candidates, got {right}, {guesses} and {candidates}."
        )
    if not 0 < failure < 1:
        raise ParameterError(f"failure must be in (0, 1), got {failure!r}.")
    # All mass at `right`: E[N; N > t] and E[c - N; N >= t], over m, and the probability that is asked for so far.
    rights, wrongs, total = right * failure / candidates, (guesses - right) * failure / candidates, failure
    for n in range(right - 1, -1, -1):
        missing = curve.least_fpr(rights) * (1 - _SLACK) - wrongs
        if missing <= 0:  # nothing is added, and nothing will be
            return False
        mass = missing * candidates / (guesses - n)
        total += mass
        if total > 1 + _SLACK:
            return True
        rights, wrongs = rights + n * mass / candidates, wrongs + missing
    return False
