"""What rows have spent, against Gaussian differential privacy in closed form, which shares no code with it."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from accountants import NeighboringRelation, PRVAccountant
from dpdl import Budget, LedgerFile
from dpdl.errors import BudgetExceededError, ParameterError, StepError
from dpdl.ledger import Ledger
from dpdl.secure_random import RandomStream
from dpdl.split.cut_release import CutRelease
from dpdl.split.gradient_release import GradientRelease
from dpdl.split.part_training import PartTraining
from dpdl.split.releaser import RowReleaser
from dpdl.split.row_account import RowAccount

REPLACE_ONE = NeighboringRelation.REPLACE_ONE
DELTA = 1e-5
FROZEN = PartTraining.frozen()


def gdp_epsilon(mu: float, delta: float = DELTA) -> float:
    """Dong, Roth, Su 2019, Corollary 2.13, solved for epsilon."""

    def excess(epsilon: float) -> float:
        return float(norm.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon + norm.logcdf(-epsilon / mu - mu / 2)) - delta)

    return float(brentq(excess, 0, 200 * mu + mu * mu, xtol=1e-10))


def account(training: PartTraining = FROZEN, ledger: Ledger | LedgerFile | None = None) -> RowAccount:
    return RowAccount(ledger=ledger or Ledger(relation=REPLACE_ONE), run="server", training=training)


def releases(of: RowAccount, steps: int, noise_multiplier: float = 1.0) -> RowReleaser:
    cut = CutRelease(max_norm=1.0, noise_multiplier=noise_multiplier)
    releaser = RowReleaser(cut, kind="activations", account=of, stream=RandomStream.from_insecure_seed(0))
    for step in range(steps):
        releaser.release(torch.ones(3, 2), [7, 8, 9], number=step, step=step)
    return releaser


@pytest.mark.parametrize(
    ("noise_multiplier", "steps", "epsilon"),
    # In two digits, as published tables have them: a claim of 1.03 where this says 46 is what amplification by a
    # sampling that the receiver sees would make of it.
    [
        *((1, 1, 10), (1, 10, 46), (1, 100, 284), (4, 1, 2.0), (4, 10, 7.5), (4, 100, 33)),
        *((16, 1, 0.43), (16, 10, 1.5), (16, 100, 5.7), (64, 1, 0.10), (64, 10, 0.34), (64, 100, 1.2)),
    ],
)
def test_a_frozen_part_spends_mu_of_two_roots_of_t_over_s(noise_multiplier: int, steps: int, epsilon: float) -> None:
    spent = account()
    releases(spent, steps, noise_multiplier)
    exact = gdp_epsilon(2 * math.sqrt(steps) / noise_multiplier)
    assert spent.epsilon(DELTA) == pytest.approx(exact, rel=1e-4)
    assert spent.epsilon(DELTA) >= exact * (1 - 1e-9)
    assert float(f"{exact:.{2 if epsilon < 1 else 0 if epsilon >= 10 else 1}f}") == pytest.approx(epsilon)


def test_the_sensitivity_of_a_row_is_two_norms_and_half_of_it_would_be_seen() -> None:
    spent = account()
    releases(spent, 1, 4.0)
    assert spent.epsilon(DELTA) > 1.5 * gdp_epsilon(1 / 4.0)


def test_a_trained_part_composes_rows_and_its_own_steps_without_amplification() -> None:
    spent = account(PartTraining.private(noise_multiplier=3.0))
    releases(spent, 25, 4.0)
    exact = gdp_epsilon(math.sqrt(25 * ((2 / 4.0) ** 2 + (2 / 3.0) ** 2)))
    assert spent.epsilon(DELTA) == pytest.approx(exact, rel=1e-4)


def test_a_part_trained_without_noise_has_no_finite_bound() -> None:
    spent = account(PartTraining.unprotected())
    releases(spent, 1, 64.0)
    assert spent.epsilon(DELTA) == math.inf
    with pytest.raises(BudgetExceededError):
        releases(
            account(PartTraining.unprotected(), Ledger(relation=REPLACE_ONE, budget=Budget(epsilon=50, delta=DELTA))), 1
        )


def test_the_second_release_of_a_u_shape_composes_and_the_parts_steps_count_once() -> None:
    spent = account(PartTraining.private(noise_multiplier=5.0))
    first = RowReleaser(
        CutRelease(max_norm=1.0, noise_multiplier=4.0),
        kind="activations",
        account=spent,
        stream=RandomStream.from_insecure_seed(0),
    )
    second = RowReleaser(
        GradientRelease(max_norm=0.1, noise_multiplier=6.0),
        kind="gradients",
        account=spent,
        stream=RandomStream.from_insecure_seed(1),
    )
    for step in range(9):
        first.release(torch.ones(2, 3), [1, 2], number=step, step=step)
        second.release(torch.ones(2, 3), [1, 2], number=step, step=step)
    exact = gdp_epsilon(math.sqrt(9 * ((2 / 4.0) ** 2 + (2 / 6.0) ** 2 + (2 / 5.0) ** 2)))
    assert spent.epsilon(DELTA) == pytest.approx(exact, rel=1e-4)


def test_the_worst_row_counts_however_often_it_was_really_released() -> None:
    spent = account()
    cut = CutRelease(max_norm=1.0, noise_multiplier=4.0)
    releaser = RowReleaser(cut, kind="activations", account=spent, stream=RandomStream.from_insecure_seed(0))
    chance = random.Random(5)
    batches = [[row for row in range(40) if chance.random() < 0.2] for _ in range(60)]
    for step, batch in enumerate(batches):
        releaser.release(torch.ones(len(batch), 2), batch, number=step, step=step)
    worst = max(sum(row in batch for batch in batches) for row in range(40))
    assert 0 < worst < 60
    assert spent.most("activations") == worst == spent.ledger.releases
    assert spent.epsilon(DELTA) == pytest.approx(gdp_epsilon(2 * math.sqrt(worst) / 4.0), rel=1e-4)
    assert spent.of(3, "activations") == sum(3 in batch for batch in batches)


def test_a_row_that_is_twice_in_a_batch_is_released_twice() -> None:
    spent = account()
    releaser = releases(spent, 0)
    releaser.release(torch.ones(3, 2), ["a", "b", "a"], number=0, step=0)
    assert spent.epsilon(DELTA) == pytest.approx(gdp_epsilon(2 * math.sqrt(2)), rel=1e-4)


def test_rows_that_nobody_can_name_may_have_been_any_row() -> None:
    spent = account(PartTraining.private(noise_multiplier=2.0))
    releaser = releases(spent, 2, 2.0)
    releaser.release(torch.ones(3, 2), None, number=2, step=2)
    releaser.release(torch.ones(3, 2), ["other", "x", "y"], number=3, step=3)
    assert spent.most("activations") == 3
    assert spent.of("other", "activations") == 2
    assert spent.epsilon(DELTA) == pytest.approx(gdp_epsilon(math.sqrt(3 * 2.0)), rel=1e-4)


def test_inference_releases_rows_and_takes_no_step() -> None:
    spent = account(PartTraining.private(noise_multiplier=2.0))
    releaser = releases(spent, 1, 2.0)
    releaser.release(torch.ones(3, 2), [7, 8, 9], number=1, step=None)
    assert spent.epsilon(DELTA) == pytest.approx(gdp_epsilon(math.sqrt(2 * 1.0 + 1.0)), rel=1e-4)


def test_a_release_is_in_the_ledger_before_its_noise_is_drawn() -> None:
    ledger = Ledger(relation=REPLACE_ONE)

    class Watched(RandomStream):
        def words(self, count: int, *, message: int, start: int = 0):  # type: ignore[no-untyped-def]
            assert ledger.releases == 1
            return super().words(count, message=message, start=start)

    stream = Watched(b"0" * 32, seed=1)
    cut = CutRelease(max_norm=1.0, noise_multiplier=1.0)
    releaser = RowReleaser(cut, kind="activations", account=account(ledger=ledger), stream=stream)
    assert releaser.release(torch.ones(1, 2), [1], number=0, step=0).shape == (1, 2)


def test_a_release_beyond_the_budget_does_not_happen_and_leaves_all_as_it_was(tmp_path: Path) -> None:
    budget = Budget(epsilon=gdp_epsilon(2 * math.sqrt(3) / 4.0) * 1.001, delta=DELTA)
    with LedgerFile(tmp_path / "rows.ledger", relation=REPLACE_ONE, budget=budget) as ledger:
        spent = account(ledger=ledger)
        releaser = releases(spent, 3, 4.0)
        for _ in range(2):
            with pytest.raises(BudgetExceededError):
                releaser.release(torch.ones(2, 2), [7, 1], number=3, step=3)
        assert (spent.most("activations"), spent.of(1, "activations"), ledger.releases) == (3, 0, 3)
        # Rows that were released less often still can be.
        assert releaser.release(torch.ones(2, 2), [1, 2], number=3, step=3).shape == (2, 2)


def test_another_process_starts_at_zero_and_the_ledger_adds_up(tmp_path: Path) -> None:
    path = tmp_path / "rows.ledger"
    for seed in range(2):
        with LedgerFile(path, relation=REPLACE_ONE) as ledger:
            spent = account(ledger=ledger)
            cut = CutRelease(max_norm=1.0, noise_multiplier=4.0)
            stream = RandomStream.from_insecure_seed(seed)
            releaser = RowReleaser(cut, kind="activations", account=spent, stream=stream)
            for step in range(5):
                releaser.release(torch.ones(2, 2), [seed, 9], number=step, step=step)
    assert spent.most("activations") == 5
    assert spent.epsilon(DELTA) == pytest.approx(gdp_epsilon(2 * math.sqrt(10) / 4.0), rel=1e-4)


def test_an_empty_batch_releases_nothing() -> None:
    spent = account(PartTraining.unprotected())
    sent = releases(spent, 0).release(torch.ones(0, 2), [], number=0, step=0)
    assert sent.shape == (0, 2)
    assert spent.ledger.releases == 0
    assert spent.epsilon(DELTA) == 0


def test_the_same_number_again_is_refused_before_anything_is_spent() -> None:
    spent = account()
    releaser = releases(spent, 3)
    for number in (0, 2):
        with pytest.raises(StepError, match="same noise"):
            releaser.release(torch.ones(1, 2), [1], number=number, step=3)
    assert spent.most("activations") == 3


@pytest.mark.parametrize("relation", ["add_or_remove", "zero_out"])
def test_a_ledger_of_another_relation_is_refused(relation: str) -> None:
    with pytest.raises(ParameterError, match="replacing one example"):
        account(ledger=Ledger(relation=NeighboringRelation(relation)))


@pytest.mark.parametrize("ids", [[1.0, 2.0], [True, False], [None, 1], ["", "a"], torch.tensor([0.5, 1.5])])
def test_rows_without_proper_names_are_refused(ids: list[object]) -> None:
    spent = account()
    with pytest.raises(ParameterError, match="whole number or a text"):
        releases(spent, 0).release(torch.ones(2, 2), ids, number=0, step=0)
    assert spent.ledger.releases == 0


def test_as_many_names_as_rows_are_needed() -> None:
    with pytest.raises(ParameterError, match="3 names"):
        releases(account(), 0).release(torch.ones(2, 2), [1, 2, 3], number=0, step=0)


def test_a_frozen_part_has_no_noise_of_its_own() -> None:
    with pytest.raises(ParameterError, match="frozen"):
        PartTraining(trained=False, noise_multiplier=1.0)


def test_the_add_or_remove_form_of_the_event_is_half_the_multiplier() -> None:
    from accountants import Gaussian

    one = PRVAccountant(relation=REPLACE_ONE).compose(CutRelease(max_norm=1.0, noise_multiplier=3.0).event)
    other = PRVAccountant(relation=NeighboringRelation.ADD_OR_REMOVE).compose(Gaussian(1.5))
    assert one.epsilon(DELTA) == pytest.approx(other.epsilon(DELTA), rel=1e-9)
