"""Labels from the gradients that come back at the cut: their norms, and the directions they point in.

    found = infer_labels(gradients, labels == 1, known=0)
    print(found)

Whoever holds features gets, for each row, the gradient of that row's loss. Of two classes the rarer one has, mostly,
the larger gradients, and gradients of different classes point to opposite sides: ordering rows by norm, or by the
cosine with one row whose label is known, orders them by label [1]. No training, no side information but that one row.

Private: gradients and labels. What is returned is a measurement on them, not for publication either.

References:
    [1] Li et al., Label Leakage and Protection in Two-party Split Learning, ICLR 2022. arXiv:2102.08504 (norm attack,
        direction attack, leak AUC).
    [2] Mann, Whitney, On a Test of Whether one of Two Random Variables is Stochastically Larger than the Other, Annals
        of Mathematical Statistics 18(1), 1947.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpdl.audit.verdict import A_FAILURE_PROVES_NOTHING
from dpdl.errors import ParameterError

__all__ = ["LabelInference", "infer_labels", "rank_auc"]


@dataclass(frozen=True, kw_only=True)
class LabelInference:
    """How well two scores order rows by label.

    Attributes:
        norm: AUC of the gradient's norm: the probability that a positive row has a larger one than a negative row.
            1/2 is chance, and 0 is as bad as 1.
        cosine: AUC of the cosine with the known row's gradient, the known row left out; chance and best as above.
        positives, negatives: how many rows.

    Guarantee:
        None: of two attacks, a lower bound on what can be inferred.
    """

    norm: float
    cosine: float
    positives: int
    negatives: int

    @property
    def leak(self) -> float:
        """The better of the two, in [1/2, 1], the attacker being free to turn an order round."""
        return max(self.norm, 1 - self.norm, self.cosine, 1 - self.cosine)

    def __str__(self) -> str:
        return (
            f"labels from cut gradients: AUC {self.norm:.3f} by norm, {self.cosine:.3f} by cosine "
            f"({self.positives} positive and {self.negatives} negative rows, chance is 0.5); {A_FAILURE_PROVES_NOTHING}"
        )


def infer_labels(gradients: Tensor, positive: Tensor, *, known: int | None = None) -> LabelInference:
    """Norm and cosine attack on the gradients of rows.

    Args:
        gradients: shape [n, ...], floating point: of each row's own loss with respect to what it sent, unclipped and
            un-noised or as they were released. Over several steps: put one after another.
        positive: shape [n], bool: which rows have the label in question (of several classes, one against the rest).
        known: the row whose label the attacker knows to be positive; by default the first one that is.

    Returns:
        What the two scores reach.

    Guarantee:
        None: it is an attack. AUCs near 1/2 do not show that labels are safe.

    Raises:
        ParameterError: shapes do not fit; a gradient is not finite; there are fewer than two positive rows or no
            negative one; the known row is not positive.

    References:
        Li et al., Label Leakage and Protection in Two-party Split Learning, ICLR 2022. arXiv:2102.08504
    """
    rows = _rows(gradients)
    if positive.dtype != torch.bool or positive.shape != (len(rows),):
        raise ParameterError(
            f"positive must be bool of shape ({len(rows)},), got {positive.dtype} of shape {tuple(positive.shape)}. "
            "Give labels == the_class."
        )
    count = int(positive.sum())
    if count < 2 or count == len(rows):
        raise ParameterError(
            f"{count} of {len(rows)} rows are positive: an AUC needs one whose label is known, another one, and a "
            "negative row. Give the gradients of more steps."
        )
    anchor = int(positive.nonzero()[0]) if known is None else known
    if not 0 <= anchor < len(rows) or not positive[anchor]:
        raise ParameterError(f"known must be the number of a positive row of {len(rows)}, got {known!r}.")
    others = torch.arange(len(rows), device=rows.device) != anchor
    norms = torch.linalg.vector_norm(rows, dim=1)
    # Rows of zeros have no direction: at right angles to everything.
    cosines = rows @ rows[anchor] / (norms * norms[anchor]).clamp_min(torch.finfo(rows.dtype).tiny)
    return LabelInference(
        norm=rank_auc(norms, positive),
        cosine=rank_auc(cosines[others], positive[others]),
        positives=count,
        negatives=len(rows) - count,
    )


def rank_auc(scores: Tensor, positive: Tensor) -> float:
    """The probability that a positive row's score is above a negative row's; equal ones count half.

    Args:
        scores: shape [n], no NaN.
        positive: shape [n], bool.

    Returns:
        The area under the ROC curve, in [0, 1], from ranks: memory and time O(n log n)        [2, statistic U]

    Raises:
        ParameterError: all rows are of one kind, or a score is NaN.

    Example:
        >>> rank_auc(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([False, False, True, True]))
        0.75
    """
    n, count = len(scores), int(positive.sum())
    if not 0 < count < n:
        raise ParameterError(f"{count} of {n} rows are positive: an AUC needs rows of both kinds.")
    if bool(torch.isnan(scores).any()):
        raise ParameterError("A score is NaN. Leave rows without a score out.")
    _, place, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()  # the highest rank of each value, counted from 1
    ranks = (last - (counts.double() - 1) / 2)[place]
    above = float(ranks[positive].sum()) - count * (count + 1) / 2
    return above / (count * (n - count))


def _rows(gradients: Tensor) -> Tensor:
    if gradients.ndim < 2 or not gradients.is_floating_point():
        raise ParameterError(
            f"gradients must be floating point of shape [n, ...], got {gradients.dtype} of shape "
            f"{tuple(gradients.shape)}."
        )
    rows = gradients.detach().reshape(len(gradients), -1).double()
    if not bool(torch.isfinite(rows).all()):
        raise ParameterError("A gradient is not finite. Leave such rows out.")
    return rows
