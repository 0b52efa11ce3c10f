"""Training with noise correlated over steps: matrix mechanisms, and how far one example moves them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from accountants import arguments
from accountants.errors import ParameterError
from accountants.events.event import Event

Array = NDArray[np.float64]

_ROUNDING = 1e-12  # relative, of a sum of products


@dataclasses.dataclass(frozen=True)
class MatrixFactorization(Event, kind="matrix_factorization"):
    """DP-SGD's sums G, one row a step, released as C G + Z, with C banded and Z independent Gaussian [1].

    What training uses is decoded from that release, so its noise is correlated over steps: C^-1 Z in G's place. C is
    lower triangular, C[i, j] = 0 for i - j >= bands, and its columns have L2 norm at most 1; the std of Z's entries
    is noise_multiplier * clip norm.

    Examples are split, without looking at them, into `bands` groups; step t draws from group t mod bands, each member
    independently with probability sample_rate. So an example takes part in at most ceil(steps / bands) steps, at
    least `bands` apart, whose columns of C share no row: the release is dominated by ceil(steps / bands) rounds of
    PoissonSampled(sample_rate, Gaussian(noise_multiplier)) on disjoint rows. One band is DP-SGD itself. At
    sample_rate 1 it is one Gaussian, of noise multiplier noise_multiplier / sqrt(ceil(steps / bands)).

    Other strategies and ways of taking part: Gaussian(noise_multiplier / participation_sensitivity(C, ...)).

    Args:
        noise_multiplier: >= 0, finite.
        bands: >= 1.
        steps: >= 0.
        sample_rate: within the group, in [0, 1]: expected batch size * bands / number of examples.

    References:
        [1] Choquette-Choo et al., (Amplified) Banded Matrix Factorization: A unified approach to private training,
            2023. arXiv:2306.08153
    """

    noise_multiplier: float
    bands: int
    steps: int
    sample_rate: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multiplier", arguments.noise_scale("noise_multiplier", self.noise_multiplier))
        object.__setattr__(
            self, "bands", arguments.positive_whole("bands", self.bands, remedy="Give C's bands; 1 is DP-SGD.")
        )
        object.__setattr__(self, "steps", arguments.steps(self.steps))
        object.__setattr__(self, "sample_rate", arguments.sample_rate(self.sample_rate))

    @property
    def rounds(self) -> int:
        """The most steps that one example takes part in."""
        return -(-self.steps // self.bands)


def participation_sensitivity(strategy: ArrayLike, *, min_separation: int, max_participations: int) -> float:
    """How far one example moves C G in Frobenius norm, if each of its contributions has norm at most 1.

    With X = C^T C and pi the steps taken part in, contributions g_i give sum over i, j in pi of X_ij <g_i, g_j>, at
    most the sum of |X_ij|, which equal contributions attain where X >= 0 [1]. The sum is at most that of the row
    bounds r_i = max over patterns that hold i of sum_j |X_ij|, and patterns' best sums are found step by step.

    Args:
        strategy: C, shape [rows, steps].
        min_separation: least distance between two steps with the same example, >= 1.
        max_participations: the most steps with the same example, >= 1.

    Returns:
        An upper bound, rounded up, in units of the clip norm. Exact where columns min_separation apart are orthogonal
        (bands <= min_separation).

    Guarantee:
        C G + Z with Z of std s * clip norm is Gaussian(s / the result) for adding, removing or zeroing one example,
        steps being chosen adaptively as well [2]; C must be lower triangular for that.

    Raises:
        ParameterError: a strategy that is not a finite matrix, a count below 1.

    Example:
        >>> round(participation_sensitivity([[1, 0], [0, 1]], min_separation=1, max_participations=2), 6)
        1.414214

    References:
        [1] Choquette-Choo et al., Multi-Epoch Matrix Factorization Mechanisms for Private Machine Learning, 2023.
            arXiv:2211.06530
        [2] Denisov et al., Improved Differential Privacy for SGD via Optimal Private Linear Operators on Adaptive
            Streams, 2022. arXiv:2202.08312
    """
    separation = arguments.positive_whole(
        "min_separation", min_separation, remedy="Give 1 if steps in a row may share examples."
    )
    count = arguments.positive_whole(
        "max_participations", max_participations, remedy="Give the most steps of one example."
    )
    matrix = arguments.reals("strategy", strategy, remedy="Give C as a matrix of numbers, [rows, steps].")
    if matrix.ndim != 2 or not matrix.size or not np.all(np.isfinite(matrix)):
        raise ParameterError(f"strategy must be a finite matrix, got shape {matrix.shape}. Give C, [rows, steps].")
    size = matrix.shape[1]
    products = np.abs(matrix.T @ matrix)
    diagonal = products.diagonal()
    apart = np.abs(np.subtract.outer(np.arange(size), np.arange(size))) >= separation
    rows = diagonal + _best_sums(np.where(apart, products, 0.0), separation, count - 1)
    best = float(_best_sums(rows[None, :], separation, count)[0])
    return math.sqrt(best) * (1 + _ROUNDING)


def _best_sums(weights: Array, separation: int, count: int) -> Array:
    """For each row of non-negative weights, the greatest sum over at most `count` places `separation` apart."""
    rows, size = weights.shape
    best = np.zeros((rows, size + 1))  # best[:, j]: using the first j places
    for _ in range(min(count, -(-size // separation))):
        # One more place, the last of them at j - 1: what was best up to j - separation, plus its weight.
        start = np.maximum(np.arange(1, size + 1) - separation, 0)
        taken = best[:, start] + weights
        fresh = np.concatenate([np.zeros((rows, 1)), np.maximum.accumulate(taken, axis=1)], axis=1)
        if np.array_equal(fresh, best):
            break
        best = fresh
    total: Array = best[:, -1]
    return total
