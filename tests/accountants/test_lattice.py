"""One step on a lattice: above and below the truth in Blackwell's order, checked through the hockey-stick curve."""

from __future__ import annotations

import math

import numpy as np
import pytest

from accountants.components.component import LossPair
from accountants.components.sampled_noise import SampledNoise
from accountants.engines.composition import ComposedLaw, StepSpectrum, Window
from accountants.engines.lattice import LatticeLaw, dominated, dominating

COMPONENTS = [
    SampledNoise("gaussian", 1.0, 0.01),
    SampledNoise("gaussian", 0.3, 0.2),
    SampledNoise("gaussian", 2.0, 0.9),
    SampledNoise("gaussian", 1.5, 1.0),
    SampledNoise("gaussian", 30.0, 1e-3),
    SampledNoise("laplace", 1.0, 0.1),
    SampledNoise("laplace", 0.7, 1.0),
]


def curve(law: LatticeLaw, epsilon: float) -> float:
    """Sum of p (1 - e^(eps - loss))+."""
    above = law.losses > epsilon
    return float(np.sum(law.mass[above] * -np.expm1(epsilon - law.losses[above]))) + law.infinite


def truth(pair: LossPair, epsilon: float) -> float:
    p, q = pair.cells(np.array([epsilon, np.inf]))
    return float(p[0] - math.exp(epsilon) * q[0])


@pytest.mark.parametrize("direction", ["remove", "add"])
@pytest.mark.parametrize("component", COMPONENTS, ids=str)
@pytest.mark.parametrize("cells", [7, 60, 900])
def test_laws_enclose_the_hockey_stick_everywhere(component: SampledNoise, direction: str, cells: int) -> None:
    pair = component.pair(direction)  # type: ignore[arg-type]
    low, high = pair.tails(1e-12)
    spacing = (high - low) / cells
    above = dominating(pair, spacing, (-20.0, 20.0), 1e-12)
    below = dominated(pair, spacing, (-20.0, 20.0), 1e-12)
    for epsilon in np.linspace(max(low, -3.0), min(high, 9.0), 41):
        value = truth(pair, float(epsilon))
        assert curve(below, epsilon) <= value + 1e-14
        assert curve(above, epsilon) >= value - 1e-14
    if cells == 900:  # and closely: an offset of one cell would not pass
        assert curve(above, 0.0) - curve(below, 0.0) <= 0.04 * truth(pair, 0.0)


@pytest.mark.parametrize("component", [COMPONENTS[1], COMPONENTS[2]], ids=str)
def test_refinement_is_second_order(component: SampledNoise) -> None:
    pair = component.pair("remove")
    low, high = pair.tails(1e-14)
    gaps = []
    for cells in (400, 1600):
        h = (high - low) / cells
        laws = [f(pair, h, (-50.0, 50.0), 1e-14) for f in (dominating, dominated)]
        second = [float(np.sum(law.mass * np.exp(law.losses))) for law in laws]
        gaps.append(second[0] - second[1])
    assert 0 < gaps[1] < gaps[0] / 12


def test_composition_equals_direct_convolution() -> None:
    """The Fourier answer against every combination of three steps, enumerated."""
    pair = SampledNoise("gaussian", 1.0, 0.3).pair("remove")
    window = Window(tilt=1.5, extra=1.5, width=60.0, size=4096)
    law = dominating(pair, window.spacing, (-60.0, 60.0), 1e-15)
    masses = np.zeros(int(law.index.max() - law.index.min()) + 1)
    np.add.at(masses, law.index - law.index.min(), law.mass)
    triple = np.convolve(np.convolve(masses, masses), masses)
    losses = 3 * (law.origin + law.spacing * law.index.min()) + law.spacing * np.arange(len(triple))
    infinite = 1 - (1 - law.infinite) ** 3
    composed = ComposedLaw([StepSpectrum.of(law, window)], [3], window, upper=True)
    for epsilon in (0.0, 0.7, 2.0, 4.0):
        above = losses > epsilon
        direct = float(np.sum(triple[above] * -np.expm1(epsilon - losses[above]))) + infinite
        assert direct * (1 - 1e-11) <= math.exp(composed.log_delta(epsilon)) <= direct * (1 + 1e-6)


def test_a_window_too_narrow_loosens_the_bounds_and_never_flips_them() -> None:
    pair = SampledNoise("gaussian", 1.0, 0.3).pair("remove")
    bounds = []
    for width in (2.0, 5.0, 40.0):
        window = Window(tilt=1.5, extra=1.5, width=width, size=2**14)
        sides = []
        for make, upper in ((dominated, False), (dominating, True)):
            law = make(pair, window.spacing, (-40.0, 40.0), 1e-15)
            sides.append(ComposedLaw([StepSpectrum.of(law, window)], [5], window, upper=upper).log_delta(2.0))
        bounds.append(sides)
    best = bounds[-1]
    assert best[1] - best[0] < 1e-3
    for low, high in bounds:
        assert low <= best[1]
        assert high >= best[0]
    assert bounds[0][1] > best[1]
