"""Private mean and standard deviation over clients: the sums, their sensitivity, the noise, the ledger, the result."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from accountants import Gaussian, NeighboringRelation, PRVAccountant
from dpdl.budget import Budget
from dpdl.errors import BudgetExceededError, DataError, ParameterError
from dpdl.federated.noisy_moments import NoisyMoments, joint_sensitivity
from dpdl.federated.normalisation import combined_moments
from dpdl.federated.private_moments import PrivateMoments
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile

LOWER, UPPER = (-1.0, 0.0, 10.0), (3.0, 1.0, 20.0)


def a_ledger(**settings: Any) -> Ledger:
    return Ledger(relation=NeighboringRelation.ADD_OR_REMOVE, **settings)


def records(n: int, seed: int = 0) -> torch.Tensor:
    """Three features, some values beyond their bounds."""
    low, high = torch.tensor(LOWER), torch.tensor(UPPER)
    draws = torch.rand(n, 3, generator=torch.Generator().manual_seed(seed))
    return low + (high - low) * (1.2 * draws - 0.1)


def moments_of(features: Any, noise: float = 0.0, **changes: Any) -> NoisyMoments:
    settings: dict[str, Any] = {"lower": LOWER, "upper": UPPER, "ledger": a_ledger(), **changes}
    name = settings.pop("name", "h1")
    return PrivateMoments(name, features, noise_multiplier=noise, **settings).release()


def by_hand(rows: list[list[float]]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of clipped values, one number at a time."""
    means, stds = [], []
    for j, (low, high) in enumerate(zip(LOWER, UPPER, strict=True)):
        values = [min(high, max(low, row[j])) for row in rows]
        mean = math.fsum(values) / len(values)
        means.append(mean)
        stds.append(math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values)))
    return means, stds


def vector(record: list[float], lower: tuple[float, ...], upper: tuple[float, ...]) -> list[float]:
    """What one record adds, as the module says, without its code."""
    halves = [(high - low) / 2 for low, high in zip(lower, upper, strict=True)]
    z = [(x - low) / half - 1 for x, low, half in zip(record, lower, halves, strict=True)]
    return [len(z) ** 0.25, *z, *(math.sqrt(2) * (v * v - 0.5) for v in z)]


# ── without noise: the plain statistics ─────────────────────────────────────────────────────────────


def test_without_noise_it_is_mean_and_std_of_the_clipped_records_of_all_clients() -> None:
    parts = [records(n, seed=n) for n in (200, 7, 1, 0)]
    found = combined_moments([moments_of(part, name=f"h{i}") for i, part in enumerate(parts)], variance_floor=1e-9)
    means, stds = by_hand(torch.cat(parts).tolist())
    assert found.mean == pytest.approx(means, abs=1e-6)
    assert found.std == pytest.approx(stds, abs=1e-5)
    assert found.count == pytest.approx(208)
    assert found.clients == ("h0", "h1", "h2", "h3")


def test_pixels_of_a_channel_are_values_of_one_feature() -> None:
    images = torch.rand(20, 2, 5, 4, generator=torch.Generator().manual_seed(1))
    found = combined_moments([moments_of(images, lower=(0.0, 0.0), upper=(1.0, 1.0))], variance_floor=1e-9)
    channels = images.double().transpose(0, 1).flatten(1)
    assert found.mean == pytest.approx(channels.mean(1).tolist(), abs=1e-6)
    assert found.std == pytest.approx(channels.std(1, correction=0).tolist(), abs=1e-5)
    plain = found.apply(images)
    assert plain.shape == images.shape
    assert plain.dtype == torch.float32
    assert plain.transpose(0, 1).flatten(1).mean(1).tolist() == pytest.approx([0.0, 0.0], abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float64])
def test_any_real_dtype_will_do(dtype: torch.dtype) -> None:
    values = torch.tensor([[0, 1], [1, 1], [1, 0], [1, 1]]).to(dtype)
    found = combined_moments([moments_of(values, lower=(0, 0), upper=(1, 1))])
    assert found.mean == pytest.approx((0.75, 0.75), abs=1e-6)


def test_values_far_beyond_their_bounds_count_as_the_bound() -> None:
    far = torch.tensor([[1.7e308, -1.7e308, 1e300], [-1.7e308, 1.7e308, -1e300]], dtype=torch.float64)
    assert moments_of(far) == moments_of(torch.tensor([[3.0, 0.0, 20.0], [-1.0, 1.0, 10.0]]))


def test_parts_add_up_to_the_whole() -> None:
    whole = records(50)
    assert moments_of(list(whole.split(7))) == moments_of(whole)


# ── sensitivity ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_joint_sensitivity_is_attained_and_never_passed(d: int) -> None:
    lower, upper = LOWER[:d], UPPER[:d]
    corners = itertools.product(*zip(lower, upper, strict=True))
    assert max(math.hypot(*vector(list(c), lower, upper)) for c in corners) == pytest.approx(joint_sensitivity(d))
    draws = random.Random(d)
    for _ in range(2000):
        inside = [draws.uniform(low, high) for low, high in zip(lower, upper, strict=True)]
        assert math.hypot(*vector(inside, lower, upper)) <= joint_sensitivity(d) * (1 + 1e-12)


def moved(without: torch.Tensor, record: torch.Tensor) -> float:
    """By how much one more record moves the sums, measured."""
    d = without.shape[1]
    bounds = {"lower": (-1.0,) * d, "upper": (1.0,) * d}
    one, other = moments_of(without, **bounds), moments_of(torch.cat([without, record]), **bounds)
    differences = [
        d**0.25 * (other.count - one.count),
        *(b - a for a, b in zip(one.sums, other.sums, strict=True)),
        *(math.sqrt(2) * (b - a) for a, b in zip(one.squares, other.squares, strict=True)),
    ]
    return math.hypot(*differences)


@pytest.mark.parametrize("shape", [(1,), (4,), (3, 2, 2)])
def test_a_record_moves_what_is_released_by_no_more_than_that(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    limit = joint_sensitivity(shape[0]) * (1 + 1e-9)
    without = torch.rand(30, *shape, generator=generator) * 2 - 1
    worst = moved(without, torch.ones(1, *shape))
    for size in (0.1, 0.99999, 1.0, 3.0, 1e30):
        for _ in range(20):
            record = (torch.rand(1, *shape, generator=generator) * 2 - 1).sign() * size
            worst = max(worst, moved(without, record))
    assert worst <= limit
    assert worst == pytest.approx(limit, rel=1e-6)  # a record at its bounds


def test_sums_are_exact_so_that_rounding_tells_nothing_of_the_other_records() -> None:
    without = records(1000, seed=5)
    record = records(1, seed=6)
    one, both = moments_of(without), moments_of(torch.cat([without, record]))
    alone = moments_of(record)
    assert [b - a for a, b in zip(one.sums, both.sums, strict=True)] == list(alone.sums)


# ── noise ───────────────────────────────────────────────────────────────────────────────────────────


def scaled_noise(noise: float, draws: int) -> list[list[float]]:
    """Noise in count, a sum and a square of three features, each by its standard deviation as the module states it."""
    delta = math.sqrt(math.sqrt(3) + 4.5)
    plain = moments_of(records(20))
    kinds: list[list[float]] = [[], [], []]
    for seed in range(draws):
        noisy = moments_of(records(20), noise, insecure_seed=seed)
        kinds[0].append((noisy.count - plain.count) * 3**0.25 / (noise * delta))
        kinds[1] += [(b - a) / (noise * delta) for a, b in zip(plain.sums, noisy.sums, strict=True)]
        kinds[2] += [
            (b - a) * math.sqrt(2) / (noise * delta) for a, b in zip(plain.squares, noisy.squares, strict=True)
        ]
    return kinds


def test_all_entries_have_noise_of_the_joint_sensitivity_and_a_wrong_scale_would_be_seen() -> None:
    for kind in scaled_noise(2.5, draws=1500):
        assert stats.kstest(kind, "norm").pvalue > 1e-3
        for wrong in (0.8, 1.25):
            assert stats.kstest([value * wrong for value in kind], "norm").pvalue < 1e-3


def test_entries_have_noise_of_their_own() -> None:
    noisy = moments_of(records(0), 1.0, insecure_seed=1)
    drawn = [noisy.count * 3**0.25, *noisy.sums, *(math.sqrt(2) * s for s in noisy.squares)]
    assert len(set(drawn)) == 7


def test_what_is_said_of_the_noise_is_what_it_is() -> None:
    noisy = moments_of(records(20), 2.5, insecure_seed=0)
    delta = math.sqrt(math.sqrt(3) + 4.5)
    assert noisy.noise == pytest.approx((2.5 * delta / 3**0.25, 2.5 * delta, 2.5 * delta / math.sqrt(2)))


def test_secure_noise_is_new_each_time() -> None:
    assert moments_of(records(3), 1.0).sums != moments_of(records(3), 1.0).sums


def test_under_a_seed_clients_federations_and_repetitions_have_noise_of_their_own() -> None:
    ledger = a_ledger()
    drawn = [
        moments_of(records(3), 1.0, insecure_seed=7, **changes).sums
        for changes in ({}, {"name": "h2"}, {"federation": "b"}, {"ledger": ledger}, {"ledger": ledger})
    ]
    assert drawn[0] == drawn[3]  # the same release, in two ledgers that know nothing of each other
    assert len({*drawn}) == 4
    assert ledger.releases == 2


# ── the ledger ──────────────────────────────────────────────────────────────────────────────────────


def test_one_release_is_one_gaussian_in_the_ledger_however_often_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "h1.ledger"
    moments = PrivateMoments("h1", records(9), lower=LOWER, upper=UPPER, noise_multiplier=4.0, ledger=path)
    first = moments.release()
    assert moments.release() is first
    ledger = LedgerFile(path)
    assert [(e.event, e.count, e.label, e.run) for e in ledger.entries] == [
        (Gaussian(4.0), 1, "normalisation", "federation/normalisation")
    ]
    assert ledger.epsilon(1e-5) == pytest.approx(
        PRVAccountant(relation=NeighboringRelation.ADD_OR_REMOVE).compose(Gaussian(4.0)).epsilon(1e-5)
    )


def test_a_release_beyond_the_budget_is_refused_and_nothing_leaves() -> None:
    ledger = a_ledger(budget=Budget(epsilon=0.5, delta=1e-5))
    moments = PrivateMoments("h1", records(9), lower=LOWER, upper=UPPER, noise_multiplier=4.0, ledger=ledger)
    with pytest.raises(BudgetExceededError):
        moments.release()
    assert ledger.releases == 0


def test_the_ledger_has_it_before_the_noise_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = a_ledger()

    def broken(*args: Any, **settings: Any) -> None:
        assert ledger.releases == 1
        raise RuntimeError("killed")

    monkeypatch.setattr("dpdl.federated.private_moments.gaussian_mechanism", broken)
    with pytest.raises(RuntimeError, match="killed"):
        moments_of(records(3), 4.0, ledger=ledger)
    assert ledger.releases == 1


# ── bad input ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("features", "says"),
    [
        (torch.tensor([[1.0, 2.0, math.nan], [1.0, 2.0, 3.0]]), "1 records of client 'h1' .*features \\[2\\]"),
        (torch.tensor([[math.inf, 2.0, -math.inf]]), "features \\[0, 2\\]"),
        (torch.zeros(4, 2), "must be real, of shape \\[N, 3"),
        (torch.zeros(3), "must be real, of shape"),
        (torch.zeros(4, 3, dtype=torch.complex64), "must be real"),
        (torch.zeros(4, 3, 0), "have no values"),
        ([torch.zeros(4, 3), "more"], "must be real, of shape .* got 'str'"),
    ],
)
def test_data_without_moments_is_refused_before_anything_is_recorded(features: Any, says: str) -> None:
    ledger = a_ledger()
    with pytest.raises(DataError, match=says):
        moments_of(features, 4.0, ledger=ledger)
    assert ledger.releases == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"lower": (), "upper": ()},
        {"lower": (0.0,)},
        {"lower": (-1.0, 1.0, 10.0)},
        {"upper": (3.0, math.inf, 20.0)},
        {"upper": (3.0, math.nan, 20.0)},
        {"lower": (-1.7e308, 0.0, 10.0), "upper": (1.7e308, 1.0, 20.0)},
        {"lower": (0.0, 0.0, 10.0), "upper": (5e-324, 1.0, 20.0)},
        {"noise": -1.0},
        {"noise": math.nan},
        {"name": ""},
        {"features": iter([records(3)])},
        {"insecure_seed": -1},
    ],
)
def test_arguments_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        moments_of(changes.pop("features", records(3)), changes.pop("noise", 4.0), **changes)


@pytest.mark.parametrize("n", [0, 1])
def test_a_client_with_hardly_any_records_answers_like_every_other(n: int) -> None:
    noisy = moments_of(records(n), 4.0, insecure_seed=3)
    assert len(noisy.sums) == len(noisy.squares) == 3


# ── putting together ────────────────────────────────────────────────────────────────────────────────


def test_what_leaves_is_plain_and_comes_back_the_same() -> None:
    noisy = moments_of(records(9), 4.0)
    values = json.loads(json.dumps(noisy.to_dict()))
    assert NoisyMoments.from_dict(values) == noisy
    assert noisy.releases.unprotected == ()
    assert len(moments_of(records(9), 0.0).releases.unprotected) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "other"},
        {"count": math.nan},
        {"count": "9"},
        {"sums": [1.0, math.inf, 0.0]},
        {"sums": [1.0]},
        {"sums": None},
        {"squares": 3},
        {"client": 3},
        {"noise_multiplier": -1.0},
        {"upper": [0.0, 0.0, 0.0]},
    ],
)
def test_a_damaged_or_hostile_answer_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        NoisyMoments.from_dict({**moments_of(records(9), 4.0).to_dict(), **change})


def test_clients_that_cannot_be_put_together_are_refused() -> None:
    one = moments_of(records(9))
    with pytest.raises(ParameterError, match="moments is empty"):
        combined_moments([])
    with pytest.raises(ParameterError, match="'h1' is there more than once"):
        combined_moments([one, one])
    with pytest.raises(ParameterError, match="Client 'h2' has the bounds"):
        combined_moments([one, moments_of(records(9), name="h2", upper=(3.0, 1.0, 21.0))])
    with pytest.raises(ParameterError, match="moments must be NoisyMoments"):
        combined_moments([one.to_dict()])  # type: ignore[list-item]
    for floor in (0.0, -1.0, 1.1, math.nan):
        with pytest.raises(ParameterError, match="variance_floor"):
            combined_moments([one], variance_floor=floor)
    with pytest.raises(DataError, match="add up to 0 records"):
        combined_moments([moments_of(records(0))])


def test_a_constant_feature_has_the_variance_floor() -> None:
    found = combined_moments([moments_of(torch.tensor([[1.0, 0.5, 15.0]] * 8))], variance_floor=0.01)
    assert found.std == pytest.approx((0.2, 0.05, 0.5))
    assert bool(torch.isfinite(found.apply(torch.ones(2, 3))).all())


def test_noise_never_takes_mean_or_std_out_of_where_they_can_be() -> None:
    for seed in range(30):
        noisy = moments_of(records(2), 5.0, insecure_seed=seed)
        if noisy.count < 1:
            continue
        found = combined_moments([noisy])
        for mean, std, low, high in zip(found.mean, found.std, LOWER, UPPER, strict=True):
            assert low <= mean <= high
            assert 0.01 * (high - low) / 2 * (1 - 1e-9) <= std <= (high - low) / 2


def test_apply_wants_features_on_axis_one() -> None:
    found = combined_moments([moments_of(records(9))])
    with pytest.raises(ParameterError, match="features must have shape"):
        found.apply(torch.zeros(3))
    assert found.apply(torch.zeros(2, 3, dtype=torch.uint8)).dtype == torch.float32
    assert found.apply(torch.zeros(2, 3, dtype=torch.float64)).dtype == torch.float64


# ── how good it is ──────────────────────────────────────────────────────────────────────────────────


def outside(share_of_the_bound: float, runs: int = 300) -> float:
    """How often mean or std of some feature is farther from the plain one than that share of the stated bound."""
    parts = [records(400, seed=1), records(100, seed=2)]
    means, stds = by_hand(torch.cat(parts).tolist())
    out = 0
    for seed in range(runs):
        found = combined_moments(
            [moments_of(part, 1.0, name=f"h{i}", insecure_seed=seed) for i, part in enumerate(parts)]
        )
        of_mean, of_std = found.accuracy(0.9)
        wrong = [
            abs(got - true) > share_of_the_bound * bound
            for got, true, bound in zip([*found.mean, *found.std], [*means, *stds], [*of_mean, *of_std], strict=True)
        ]
        out += any(wrong)
    return out / runs


def test_the_accuracy_bound_holds_as_often_as_it_says_and_a_fifth_of_it_would_not() -> None:
    assert outside(1.0) <= 0.1
    assert outside(0.2) > 0.1  # nor is it far too wide


def test_accuracy_is_of_a_probability_and_never_worse_than_knowing_nothing() -> None:
    found = combined_moments([moments_of(records(9), 1000.0, insecure_seed=3)])
    of_mean, of_std = found.accuracy()
    assert of_mean == pytest.approx((4.0, 1.0, 10.0))
    assert of_std == (2.0, 0.5, 5.0)
    for probability in (0.0, 1.0, math.nan):
        with pytest.raises(ParameterError, match="probability"):
            found.accuracy(probability)
