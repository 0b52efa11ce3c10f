"""The clipping norm goes to the quantile that was asked for, and the bit is paid for."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from accountants import Gaussian, PoissonSampled
from dpdl.errors import ParameterError
from dpdl.federated.adaptive_clipping import AdaptiveClipping
from tests.federated.server.small_federation import names, plan, reply, server

CLIENTS = 100


def converge(
    start: float, *, quantile: float = 0.5, rounds: int, answering: float = 1.0, noise: float = 0.0
) -> tuple[list[float], Any]:
    """The clipping norms of rounds in which clients' updates have norms uniform on [0.5, 1.5]."""
    adaptive = AdaptiveClipping(quantile=quantile, learning_rate=0.5, bit_noise_multiplier=max(10.0, 2 * noise))
    its_plan = plan(
        clients=CLIENTS, rounds=rounds, max_update_norm=start, adaptive_clipping=adaptive, noise_multiplier=noise
    )
    ours = server(state={"w": torch.zeros(1)}, plan=its_plan)
    norms = np.random.default_rng(0).permutation(np.linspace(0.5, 1.5, CLIENTS))
    replying = np.random.default_rng(1)
    seen = []
    for number in range(1, rounds + 1):
        ours.open_round(names(CLIENTS))
        for name, norm in zip(names(CLIENTS), norms, strict=True):
            if replying.random() < answering:
                ours.add(reply(name, {"w": torch.tensor([float(norm)])}, round=number))
        summary = ours.close_round()
        seen.append(summary.max_update_norm)
    return seen, ours


@pytest.mark.parametrize("start", [0.1, 1.1, 100.0])
def test_it_converges_to_the_quantile_from_below_and_from_above(start: float) -> None:
    seen, _ = converge(start, rounds=50)
    assert seen[0] == start
    assert np.mean(seen[-10:]) == pytest.approx(1.0, abs=0.08)  # the median of U(0.5, 1.5)


@pytest.mark.parametrize(("quantile", "norm"), [(0.2, 0.7), (0.9, 1.4)])
def test_other_quantiles_and_those_who_do_not_answer_do_not_matter(quantile: float, norm: float) -> None:
    seen, _ = converge(1.0, quantile=quantile, rounds=70, answering=0.7)
    assert np.mean(seen[-20:]) == pytest.approx(norm, abs=0.08)


def test_the_total_stays_what_was_planned() -> None:
    _, ours = converge(1.0, rounds=3, noise=1.5)
    assert [(entry.event, entry.count) for entry in ours.ledger.entries] == [(Gaussian(1.5), 3)]
    poisson = plan(sample_rate=0.5, noise_multiplier=1.5, adaptive_clipping=AdaptiveClipping())
    assert poisson.event() == PoissonSampled(0.5, Gaussian(1.5))


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_the_sum_and_the_bits_together_have_the_planned_noise_multiplier(quantile: float) -> None:
    # Each release in units of its noise: the squared distance of neighbours must be 1 / z^2.
    adaptive = AdaptiveClipping(quantile=quantile, bit_noise_multiplier=3.0)
    z_delta = adaptive.update_noise_multiplier(noise_multiplier=1.2, cohort=10)
    bit = max(abs(1 - quantile), abs(0 - quantile))
    distance = math.sqrt(1 / z_delta**2 + (bit / 3.0) ** 2)
    assert distance <= 1 / 1.2
    assert distance == pytest.approx(1 / 1.2, rel=1e-9)


def test_at_the_median_it_is_the_papers_formula() -> None:
    z, sigma_b = 1.1, 4.0
    adaptive = AdaptiveClipping(bit_noise_multiplier=sigma_b)
    expected = (z**-2 - (2 * sigma_b) ** -2) ** -0.5
    assert adaptive.update_noise_multiplier(noise_multiplier=z, cohort=80) == pytest.approx(expected, rel=1e-9)


def test_by_default_the_bits_cost_little() -> None:
    adaptive = AdaptiveClipping()
    assert adaptive.bit_noise(noise_multiplier=1.0, cohort=1000) == 50
    for cohort in (2.0, 10.0, 1000.0):
        spent = adaptive.update_noise_multiplier(noise_multiplier=1.0, cohort=cohort)
        assert 1 < spent < 1.034


def test_bits_that_alone_would_spend_more_than_the_round_are_refused() -> None:
    with pytest.raises(ParameterError, match=r"Give more than 1\.1"):
        AdaptiveClipping(bit_noise_multiplier=1.0).update_noise_multiplier(noise_multiplier=2.2, cohort=10)


def test_the_bits_noise_is_what_is_accounted_and_ten_percent_off_is_rejected() -> None:
    sigma_b, rounds = 7.0, 2000
    adaptive = AdaptiveClipping(bit_noise_multiplier=sigma_b, learning_rate=1e-6)
    ours = server(
        state={"w": torch.zeros(1)}, plan=plan(rounds=rounds, noise_multiplier=1.0, adaptive_clipping=adaptive)
    )
    noise, of_update = [], []
    for number in range(1, rounds + 1):
        before = float(ours.state["w"])
        ours.open_round(names(10))
        for name in names(3):  # three zeros, which are not clipped
            ours.add(reply(name, {"w": torch.zeros(1)}, round=number))
        fraction = ours.close_round().unclipped_fraction
        assert fraction is not None
        noise.append((fraction - 0.5) * 10 - 3 * 0.5)
        of_update.append(float(ours.state["w"]) - before)

    def fits(std: float) -> bool:
        below = chi2.cdf(float(np.sum((np.array(noise) / std) ** 2)), rounds)
        return bool(1e-4 < below < 1 - 1e-4)

    assert fits(sigma_b)
    assert not fits(0.9 * sigma_b)
    assert not fits(1.1 * sigma_b)
    assert abs(np.corrcoef(noise, of_update)[0, 1]) < 4.5 / math.sqrt(rounds)  # draws of their own


def test_the_norm_stays_a_number() -> None:
    adaptive = AdaptiveClipping(learning_rate=1e6)
    for bits in (1e9, -1e9, 0.0):
        assert 1e-20 <= adaptive.next_norm(1.0, noisy_bits=bits, cohort=1.0) <= 1e20


@pytest.mark.parametrize(
    "settings",
    [
        {"quantile": 1.5},
        {"quantile": math.nan},
        {"learning_rate": 0.0},
        {"learning_rate": -1.0},
        {"bit_noise_multiplier": 0.0},
        {"bit_noise_multiplier": math.inf},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=next(iter(settings))):
        AdaptiveClipping(**settings)
