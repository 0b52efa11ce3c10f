"""Many sampled Gaussians that differ in their scale, stood for by a few.

The log moments of a step are a smooth (analytic) function of mu = 1 / scale, so a sum of them over many scales is a
quadrature of that function: Gauss's rule for the discrete measure of the steps has positive weights and converges
geometrically in its number of nodes. The nodes are scales, the weights (not whole numbers) how many steps each stands
for. What it is wrong by is not proved but measured: whoever uses it does the sum with two numbers of nodes, and takes
their difference, which is the error of the smaller number, as the error of the larger.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from accountants.components.component import Array
from accountants.components.sampled_noise import SampledNoise

Steps = list[tuple[SampledNoise, float]]


def thinned(steps: Sequence[tuple[SampledNoise, float]], nodes: int) -> Steps:
    """The steps, those of one rate replaced by `nodes` of them where there are more than that.

    Args:
        steps: components with their counts.
        nodes: how many to keep of each rate.

    Returns:
        Components with weights; the weights of each rate add up to its counts.
    """
    by_rate: dict[tuple[str, float], list[tuple[SampledNoise, float]]] = defaultdict(list)
    for component, count in steps:
        by_rate[component.noise, component.rate].append((component, count))
    result: Steps = []
    for (noise, rate), group in by_rate.items():
        if noise != "gaussian" or len(group) <= nodes:
            result += group
            continue
        inverse = np.array([1 / component.scale for component, _ in group])
        mu, weights = _gauss_rule(inverse, np.array([count for _, count in group], dtype=np.float64), nodes)
        result += [(SampledNoise("gaussian", 1 / float(m), rate), float(w)) for m, w in zip(mu, weights, strict=True)]
    return result


def _gauss_rule(points: Array, weights: Array, nodes: int) -> tuple[Array, Array]:
    """Nodes and weights of Gauss's rule for a discrete measure, by the Stieltjes procedure and Golub-Welsch."""
    low, high = points.min(), points.max()
    x = (2 * points - low - high) / (high - low)
    total = weights.sum()
    diagonal, off = np.zeros(nodes), np.zeros(nodes)
    previous, current = np.zeros_like(x), np.ones_like(x)
    current /= np.sqrt(total)
    for k in range(nodes):
        diagonal[k] = np.sum(weights * x * current**2)
        following = (x - diagonal[k]) * current - off[k - 1] * previous if k else (x - diagonal[k]) * current
        off[k] = np.sqrt(np.sum(weights * following**2))
        previous, current = current, following / off[k]
    jacobi = np.diag(diagonal) + np.diag(off[:-1], 1) + np.diag(off[:-1], -1)
    eigenvalues, vectors = np.linalg.eigh(jacobi)
    return (low + high + eigenvalues * (high - low)) / 2, total * vectors[0] ** 2
