"""Budgets that others published, beside ours: each is reproduced by its own accountant, and improved on by ours.

Reproducing it shows that the setting was read as its authors meant it. `docs/published_budgets.md` is written from
these rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable

import numpy as np
import pytest

import accountants

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "published_budgets.md"

ORDERS = np.array([1 + x / 10 for x in range(1, 100)] + [*range(11, 64), 128, 256, 512, 1024], dtype=float)
MOMENTS = np.arange(2, 34, dtype=float)  # lambda = 1..32 is order lambda + 1 [Abadi et al. 2016, section 3.2]


def renyi(q: float, sigma: float, orders: np.ndarray) -> np.ndarray:
    """Renyi divergence of one step, removing an example, by the trapezoid rule; shares no code with the package."""
    divergences = []
    for order in orders:
        x = np.linspace(-15 * sigma, 15 * sigma + order, 8_001)
        with np.errstate(divide="ignore"):
            ratio = np.logaddexp(np.log1p(-q), math.log(q) + (2 * x - 1) / (2 * sigma**2))
        log_weight = order * ratio - x**2 / (2 * sigma**2)
        top = log_weight.max()
        integral = np.exp(log_weight - top).sum() * (x[1] - x[0]) / (sigma * math.sqrt(2 * math.pi))
        divergences.append((top + math.log(integral)) / (order - 1))
    return np.array(divergences)


def classical(orders: np.ndarray, rdp: np.ndarray, delta: float) -> float:
    """Mironov 2017, proposition 3; on integer orders, Abadi et al. 2016, theorem 2."""
    return float((rdp + math.log(1 / delta) / (orders - 1)).min())


def improved(orders: np.ndarray, rdp: np.ndarray, delta: float) -> float:
    """Canonne, Kamath, Steinke 2020, proposition 12."""
    return float((rdp + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)).min())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """One published budget.

    Attributes:
        source: paper or program, and where in it.
        setting: in its words.
        q, sigma, steps, delta: what it accounts for.
        epsilon: what it says.
        conversion, orders: how it was computed.
    """

    source: str
    setting: str
    q: float
    sigma: float
    steps: int
    delta: float
    epsilon: float
    conversion: Callable[[np.ndarray, np.ndarray, float], float] = classical
    orders: tuple[float, ...] = tuple(ORDERS)

    @property
    def plan(self) -> dict[str, float]:
        """For `accountants.epsilon`."""
        return {"noise_multiplier": self.sigma, "sample_rate": self.q, "steps": self.steps, "delta": self.delta}


ABADI = "Abadi et al. 2016 [1], figure 2"
TF_PRIVACY = "TensorFlow Privacy [2], tutorials, table"
BU = "Bu et al. 2020 [3], figure 4"
TRAMER = "Tramèr & Boneh 2021 [4], repository"
DE = "De et al. 2022 [5], repository"
USERS = "moments accountant of [1], users, z = 1 [6]"  # computed by its method, not printed anywhere
FLOWER = "Flower's accountant, z = 1 [7]"  # what the program returns

ROWS = [
    Published(
        source=ABADI, setting="q = 0.01, 100 epochs", q=0.01, sigma=4.0, steps=10_000, delta=1e-5, epsilon=1.26,
        orders=tuple(MOMENTS),
    ),
    *(
        Published(
            source=TF_PRIVACY, setting=f"MNIST, batch 256, {epochs} epochs", q=256 / 60_000, sigma=sigma,
            steps=epochs * 60_000 // 256, delta=1e-5, epsilon=epsilon,
        )
        for sigma, epochs, epsilon in ((1.12, 60, 2.92), (0.6, 30, 9.74), (1.2, 10, 1.20))
    ),
    *(
        Published(
            source=BU, setting=f"MNIST, batch 256, {epochs} epochs", q=256 / 60_000, sigma=sigma,
            steps=math.ceil(epochs * 60_000 / 256), delta=1e-5, epsilon=epsilon,
        )
        for sigma, epochs, epsilon in ((1.3, 20, 1.34), (0.7, 70, 8.68))
    ),
    *(
        Published(
            source=TRAMER, setting=f"{data}, batch {batch}, {epochs} epochs", q=batch / size, sigma=sigma,
            steps=size // batch * epochs, delta=1e-5, epsilon=3.0,
        )
        for data, size, batch, sigma, epochs in (
            ("MNIST", 60_000, 512, 1.23, 40),
            ("Fashion-MNIST", 60_000, 2048, 2.15, 40),
            ("CIFAR-10", 50_000, 1024, 1.54, 30),
        )
    ),
    *(
        Published(
            source=DE, setting=f"{data}, batch {batch}, {steps} steps", q=batch / size, sigma=sigma, steps=steps,
            delta=delta, epsilon=epsilon, conversion=improved,
        )
        for data, size, batch, sigma, steps, delta, epsilon in (
            ("CIFAR-10, WRN-16-4", 50_000, 4096, 10.0, 875, 1e-5, 1.0),
            ("CIFAR-100, fine-tuned", 50_000, 16_384, 21.1, 250, 1e-5, 1.0),
            ("ImageNet, NF-ResNet-50", 1_271_167, 16_384, 2.5, 71_589, 8e-7, 8.0),
        )
    ),
    *(
        Published(
            source=USERS, setting=f"{users:,} users, {sampled:,} a round, {rounds:,} rounds", q=sampled / users,
            sigma=1.0, steps=rounds, delta=users**-1.1, epsilon=epsilon, orders=tuple(MOMENTS),
        )
        for users, sampled, rounds, epsilon in (
            (100_000, 100, 100, 1.00),
            (1_000_000, 1000, 10_000, 1.39),
        )
    ),
    *(
        Published(
            source=FLOWER, setting=f"every client in every round; rounds: {rounds}", q=1.0, sigma=1.0, steps=rounds,
            delta=1e-5, epsilon=epsilon, conversion=improved,
        )
        for rounds, epsilon in ((1, 4.73), (10, 19.05), (100, 96.12))
    ),
]  # fmt: skip

BUDGETS = [(8.0, 0.5), (4.0, 2.0), (2.0, 8.0)]  # noise levels and epsilons of Abadi et al.'s MNIST experiments


def ids(row: Published) -> str:
    return f"{row.source}, {row.setting}"


@pytest.mark.parametrize("row", ROWS, ids=ids)
def test_its_own_accountant_gives_the_published_epsilon(row: Published) -> None:
    orders = np.array(row.orders)
    theirs = row.conversion(orders, row.steps * renyi(row.q, row.sigma, orders), row.delta)
    assert theirs == pytest.approx(row.epsilon, abs=0.0151, rel=2e-4)


@pytest.mark.parametrize("row", ROWS, ids=ids)
def test_ours_is_below_the_published_epsilon_and_tight(row: Published) -> None:
    low, high = accountants.interval(**row.plan)
    assert high < 0.96 * row.epsilon
    assert low >= high * (1 - 1e-3)


@pytest.mark.parametrize("row", ROWS, ids=ids)
def test_less_noise_keeps_the_published_budget(row: Published) -> None:
    sigma = noise_at_their_budget(row)
    assert sigma < row.sigma
    assert accountants.epsilon(**{**row.plan, "noise_multiplier": sigma}) <= row.epsilon


@pytest.mark.parametrize(("sigma", "epsilon"), BUDGETS)
def test_the_mnist_budgets_of_abadi_et_al_last_longer(sigma: float, epsilon: float) -> None:
    theirs, ours = epochs(sigma, epsilon)
    assert 1.3 * theirs < ours


@pytest.mark.parametrize("lines", ["budget_lines", "epoch_lines"])
def test_the_document_has_the_current_figures(lines: str) -> None:
    stated = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    for line in globals()[lines]():
        close = [other for other in stated if _same(line, other)]
        assert close, f"{DOCUMENT.name} should say\n{line}"


def _same(line: str, other: str) -> bool:
    """Equal cells, but for the last digit shown of a number: the solvers' own tolerance may move it."""
    cells, others = (text.replace("%", "").strip("| ").split("|") for text in (line, other))
    return len(cells) == len(others) and all(
        one.strip() == two.strip() or (_number(one) == pytest.approx(_number(two), rel=0.02, abs=5e-5))
        for one, two in zip(cells, others, strict=True)
    )


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


@functools.cache
def noise_at_their_budget(row: Published) -> float:
    return accountants.noise_multiplier(epsilon=row.epsilon, delta=row.delta, sample_rate=row.q, steps=row.steps)


@functools.cache
def epochs(sigma: float, epsilon: float) -> tuple[float, float]:
    """How long a budget lasts at q = 0.01, delta = 1e-5: by the moments accountant, and by ours."""
    steps = ((epsilon - math.log(1e5) / (MOMENTS - 1)) / renyi(0.01, sigma, MOMENTS)).max()
    ours = accountants.steps(epsilon=epsilon, delta=1e-5, noise_multiplier=sigma, sample_rate=0.01)
    return math.floor(steps) / 100, ours / 100


def budget_lines() -> list[str]:
    """The document's table; upper bounds rounded up."""
    lines = []
    for row in ROWS:
        ours = accountants.epsilon(**row.plan)
        lines.append(
            f"| {row.source} | {row.setting} | {row.delta:.2g} | {row.sigma:g} | {row.epsilon:g} | {_up(ours)} "
            f"| {math.floor(100 * (1 - ours / row.epsilon))} % | {_up(noise_at_their_budget(row))} |"
        )
    return lines


def epoch_lines() -> list[str]:
    return [
        f"| {sigma:g} | {epsilon:g} | {math.floor(theirs)} | {math.floor(ours)} |"
        for sigma, epsilon in BUDGETS
        for theirs, ours in [epochs(sigma, epsilon)]
    ]


def _up(value: float) -> str:
    return f"{math.ceil(value * 100) / 100:.2f}" if value >= 0.1 else f"{math.ceil(value * 1e4) / 1e4:.4f}"
