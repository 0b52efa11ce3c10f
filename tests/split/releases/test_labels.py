"""Labels are answered at random, once for ever, at the epsilon that was asked for."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from scipy.stats import binom

from accountants import NeighboringRelation, PRVAccountant
from dpdl.budget import Budget
from dpdl.errors import BudgetExceededError, CheckpointError, DataError, ParameterError
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from dpdl.secure_random import RandomStream
from dpdl.split.labels import LabelStore, MemoizedRandomizedResponse

REPLACE_ONE = NeighboringRelation.REPLACE_ONE


def store(epsilon: float = 1.0, classes: int = 4, *, path: Path | None = None, seed: int = 0) -> LabelStore:
    plan = MemoizedRandomizedResponse(epsilon=epsilon, classes=classes, path=path)
    return LabelStore(plan, stream=RandomStream.from_insecure_seed(seed))


def kept_as_often(answers: torch.Tensor, truth: torch.Tensor, probability: float) -> bool:
    """Whether the number of true answers is one that this probability gives, to 1 in 10,000."""
    kept, n = int((answers == truth).sum()), len(truth)
    return bool(min(binom.cdf(kept, n, probability), binom.sf(kept - 1, n, probability)) > 5e-5)


@pytest.mark.parametrize(("epsilon", "classes"), [(0.5, 2), (1.0, 10), (3.0, 10), (2.0, 1000)])
def test_answers_are_true_as_often_as_epsilon_allows(epsilon: float, classes: int) -> None:
    truth = torch.arange(60_000) % classes
    answers = store(epsilon, classes).release(range(60_000), truth)
    probability = math.exp(epsilon) / (math.exp(epsilon) + classes - 1)
    assert kept_as_often(answers, truth, probability)
    for wrong in (1.3 * epsilon, 0.7 * epsilon):
        assert not kept_as_often(answers, truth, math.exp(wrong) / (math.exp(wrong) + classes - 1))
    assert not kept_as_often(answers, truth, 1.0)  # nobody's label was drawn: they are in clear


def test_false_answers_are_uniform() -> None:
    truth = torch.zeros(45_000, dtype=torch.int64)
    counts = torch.bincount(store(0.5, 10).release(range(45_000), truth), minlength=10)[1:]
    expected = counts.sum() / 9
    assert ((counts - expected) ** 2 / expected).sum() < 33  # chi^2 of 8 degrees: 1 in 10,000 above


@pytest.mark.parametrize("epsilon", [0.01, 0.1, 1.0, 2.0, 8.0, 30.0])
@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_the_mechanism_that_is_drawn_is_within_epsilon_in_whole_numbers(epsilon: float, classes: int) -> None:
    """The ratio of the two probabilities as they are drawn from 64-bit words, with no rounding anywhere."""
    from mpmath import exp, mp, mpf

    mp.prec = 300
    plan = MemoizedRandomizedResponse(epsilon=epsilon, classes=classes)
    drawn = mpf(math.ceil(plan.p * 2**64)) / 2**64
    least, most = mpf(2**64 // classes) / 2**64, mpf(-(-(2**64) // classes)) / 2**64
    assert (1 - drawn + drawn * most) / (drawn * least) <= exp(mpf(epsilon))
    accountant = PRVAccountant(relation=REPLACE_ONE).compose(plan.event)
    assert epsilon - 1e-6 < accountant.epsilon(1e-15) <= epsilon * (1 + 1e-6)


def test_epsilon_does_not_grow_with_epochs(tmp_path: Path) -> None:
    ledger = LedgerFile(tmp_path / "ledger", relation=REPLACE_ONE)
    plan = MemoizedRandomizedResponse(epsilon=1.0, classes=4, path=tmp_path / "labels")
    truth = torch.arange(50) % 4
    seen = []
    for _ in range(3):  # processes
        labels = LabelStore(plan, stream=RandomStream.from_os(), ledger=ledger)
        seen += [labels.release(range(50), truth) for _ in range(4)]
    assert all(torch.equal(seen[0], other) for other in seen)
    assert ledger.releases == 1
    assert ledger.epsilon(1e-12) <= 1.0 + 1e-6


def test_answers_of_new_rows_come_beside_those_that_are_there(tmp_path: Path) -> None:
    first = store(path=tmp_path / "labels").release([0, 1, 2], torch.tensor([0, 1, 2]))
    both = store(path=tmp_path / "labels", seed=1).release([2, 9, 0], torch.tensor([2, 3, 0]))
    assert torch.equal(both[[2, 0]], first[[0, 2]])
    # Whatever becomes of the true label, the answer stays: what was asked twice was answered once.
    assert torch.equal(store(path=tmp_path / "labels").release([0, 1, 2], torch.tensor([3, 3, 3])), first)


def test_rows_of_different_batches_are_answered_independently() -> None:
    labels = store(0.5, 1000)
    zeros = torch.zeros(50, dtype=torch.int64)
    first, second = labels.release(range(50), zeros), labels.release(range(50, 100), zeros)
    assert (first == second).float().mean() < 0.2


def test_a_party_with_labels_only_answers_at_random() -> None:
    """A library that flips labels only where a party has features too leaves 100 % of these as they are."""
    truth = torch.zeros(2000, dtype=torch.int64)
    answers = store(0.1, 2).release(range(2000), truth)
    assert 0.4 < answers.float().mean() < 0.55


def test_averaging_over_epochs_finds_nothing() -> None:
    """Redrawn each epoch, the majority of 101 answers would be right nearly always."""
    truth = torch.zeros(300, dtype=torch.int64)
    labels = store(0.5, 2)
    mean = torch.stack([labels.release(range(300), truth) for _ in range(101)]).float().mean(0)
    assert set(mean.tolist()) == {0.0, 1.0}
    redrawn = torch.stack([store(0.5, 2, seed=seed).release(range(60), truth[:60]) for seed in range(101)])
    assert (redrawn.float().mean(0) < 0.5).float().mean() > 0.95  # the attack works where there is something to find


def test_a_release_beyond_the_budget_does_not_happen() -> None:
    plan = MemoizedRandomizedResponse(epsilon=2.0, classes=4)
    ledger = Ledger(relation=REPLACE_ONE, budget=Budget(epsilon=1.0, delta=1e-9))
    labels = LabelStore(plan, stream=RandomStream.from_os(), ledger=ledger)
    with pytest.raises(BudgetExceededError):
        labels.release([0], torch.tensor([1]))
    assert labels.count == 0


@pytest.mark.parametrize(
    "labels",
    [torch.rand(2), torch.eye(2, dtype=torch.int64), torch.tensor([1]), torch.tensor([0, 4]), torch.tensor([-1, 0])],
)
def test_what_is_not_a_class_a_row_is_refused_and_nothing_drawn(labels: torch.Tensor) -> None:
    answers = store()
    with pytest.raises(DataError):
        answers.release([0, 1], labels)
    assert answers.count == 0


@pytest.mark.parametrize("epsilon", [0, -1.0, math.inf, math.nan, 31])
def test_an_epsilon_that_protects_nothing_or_tells_nothing_is_refused(epsilon: float) -> None:
    with pytest.raises(ParameterError):
        MemoizedRandomizedResponse(epsilon=epsilon, classes=3)


@pytest.mark.parametrize("classes", [0, 1, 2.5, "3", True])
def test_fewer_than_two_classes_are_refused(classes: object) -> None:
    with pytest.raises(ParameterError):
        MemoizedRandomizedResponse(epsilon=1.0, classes=classes)  # type: ignore[arg-type]


def test_another_mechanism_over_the_same_answers_is_refused(tmp_path: Path) -> None:
    store(1.0, path=tmp_path / "labels").release([0], torch.tensor([1]))
    with pytest.raises(CheckpointError, match=r"epsilon was 1\.0, now 2\.0"):
        store(2.0, path=tmp_path / "labels")


def test_a_ledger_of_another_relation_is_refused() -> None:
    plan = MemoizedRandomizedResponse(epsilon=1.0, classes=4)
    with pytest.raises(ParameterError, match="replace_one"):
        LabelStore(plan, stream=RandomStream.from_os(), ledger=Ledger(relation=NeighboringRelation.ADD_OR_REMOVE))


def test_no_rows_have_no_answers() -> None:
    assert store().release([], torch.zeros(0, dtype=torch.int64)).shape == (0,)
