"""AUCs against a loop over pairs, and cases in which they are known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpdl.audit import A_FAILURE_PROVES_NOTHING, infer_labels, rank_auc
from dpdl.errors import ParameterError


def auc_by_loop(scores: list[float], positive: list[bool]) -> float:
    wins = pairs = 0.0
    for one, is_positive in zip(scores, positive, strict=True):
        for other, other_is in zip(scores, positive, strict=True):
            if is_positive and not other_is:
                pairs += 1
                wins += 1.0 if one > other else 0.5 if one == other else 0.0
    return wins / pairs


@pytest.mark.parametrize("levels", [3, 10, 10**6])
def test_the_auc_is_that_of_all_pairs_with_ties_and_without(levels: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    scores = torch.randint(levels, (80,), generator=generator).double()
    positive = torch.rand(80, generator=generator) < 0.3
    assert rank_auc(scores, positive) == pytest.approx(auc_by_loop(scores.tolist(), positive.tolist()), abs=1e-12)


def test_scores_in_order_have_auc_one_reversed_zero_and_constant_a_half() -> None:
    positive = torch.tensor([False] * 5 + [True] * 3)
    assert rank_auc(torch.arange(8.0), positive) == 1
    assert rank_auc(-torch.arange(8.0), positive) == 0
    assert rank_auc(torch.zeros(8), positive) == 0.5


def test_larger_gradients_of_one_class_are_told_by_norm_and_opposite_ones_by_cosine() -> None:
    directions = F.normalize(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    positive = torch.arange(40) % 4 == 0
    by_norm = infer_labels(directions * torch.where(positive, 3.0, 1.0)[:, None], positive)
    assert by_norm.norm == 1
    assert by_norm.positives == 10
    same = torch.ones(40, 6)
    by_direction = infer_labels(same * torch.where(positive, 1.0, -1.0)[:, None], positive)
    assert by_direction.norm == 0.5
    assert by_direction.cosine == by_direction.leak == 1


def test_an_order_turned_round_leaks_as_much() -> None:
    positive = torch.arange(10) < 4
    gradients = torch.where(positive, 1.0, 2.0)[:, None] * torch.ones(10, 3)
    found = infer_labels(gradients, positive)
    assert found.norm == 0
    assert found.leak == 1


def test_gradients_that_know_no_label_tell_none() -> None:
    generator = torch.Generator().manual_seed(3)
    gradients, positive = torch.randn(4000, 8, generator=generator), torch.rand(4000, generator=generator) < 0.5
    found = infer_labels(gradients, positive)
    assert found.norm == pytest.approx(0.5, abs=0.04)  # 4 standard errors
    assert found.cosine == pytest.approx(0.5, abs=0.04)
    assert A_FAILURE_PROVES_NOTHING in str(found)


def logistic_gradients(noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """The gradients that come back at a cut: of a rare class, through a trained logistic top."""
    generator = torch.Generator().manual_seed(5)
    y = torch.rand(400, generator=generator) < 0.15
    z = torch.randn(400, 5, generator=generator) + y[:, None].float()
    w = torch.ones(5) * 0.5
    residual = torch.sigmoid(z @ w - 2.5) - y.float()
    gradients = residual[:, None] * w
    return gradients + noise * torch.randn(400, 5, generator=generator), y


def test_a_rare_class_is_found_in_a_real_networks_gradients_and_lost_in_enough_noise() -> None:
    gradients, y = logistic_gradients()
    found = infer_labels(gradients, y)
    assert found.norm > 0.9
    assert found.cosine == 1  # the residual's sign is the label
    hidden = infer_labels(*logistic_gradients(noise=20.0))
    assert hidden.leak < 0.65


def test_the_known_row_is_left_out_of_its_own_test() -> None:
    """Two positive rows at right angles and a negative one between them: only the known row is like itself."""
    gradients = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert infer_labels(gradients, torch.tensor([True, True, False]), known=1).cosine == 0


@pytest.mark.parametrize(
    ("gradients", "positive", "known", "said"),
    [
        (torch.ones(4, 2), torch.tensor([1, 0, 1, 0]), None, "positive must be bool"),
        (torch.ones(4), torch.ones(4, dtype=torch.bool), None, r"shape \[n, ...\]"),
        (torch.ones(4, 2), torch.tensor([True, False, False, False]), None, "1 of 4 rows are positive"),
        (torch.ones(4, 2), torch.ones(4, dtype=torch.bool), None, "4 of 4 rows are positive"),
        (torch.ones(4, 2), torch.tensor([True, True, False, False]), 3, "number of a positive row"),
        (torch.full((4, 2), torch.nan), torch.tensor([True, True, False, False]), None, "not finite"),
    ],
)
def test_what_has_no_auc_is_refused(gradients: Tensor, positive: Tensor, known: int | None, said: str) -> None:
    with pytest.raises(ParameterError, match=said):
        infer_labels(gradients, positive, known=known)
    with pytest.raises(ParameterError, match="rows of both kinds"):
        rank_auc(torch.ones(3), torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ParameterError, match="NaN"):
        rank_auc(torch.tensor([torch.nan, 1.0]), torch.tensor([True, False]))
