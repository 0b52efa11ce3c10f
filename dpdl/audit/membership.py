"""Membership inference by the loss of one trained model: an example it was trained on tends to have a smaller one.

    found = loss_threshold_attack(model, members=(x, y), non_members=(other_x, other_y))
    print(found)                                   # true positive rates at 0.1% and 1% false positives, AUC, advantage

The attacker has the model, candidates with their labels, and nothing else [1]. Hard examples have large losses whether
trained on or not; with reference models, trained on other data, each loss is compared with what they make of the same
example, which is much sharper [2].

No epsilon comes of it by itself: see `MembershipResult`. In one case it does: the examples were split into members
and non-members *at random* (`split="random"`). Then, of a member and a non-member put together at random, which is
which was one fair coin, whatever the examples are, and the coins of disjoint pairs are independent. The bound is then
for replacing one example, which is what turning such a coin does.

References:
    [1] Yeom, Giacomelli, Fredrikson, Jha, Privacy Risk in Machine Learning: Analyzing the Connection to Overfitting,
        2018. arXiv:1709.01604, section 3 (adversary 2).
    [2] Watson, Guo, Cormode, Sablayrolles, On the Importance of Difficulty Calibration in Membership Inference Attacks,
        2021. arXiv:2111.08440, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from accountants import NeighboringRelation
from dpdl.audit.coin_game import CoinGame
from dpdl.audit.membership_result import MembershipResult
from dpdl.errors import ParameterError

__all__ = ["Split", "loss_threshold_attack", "losses_of"]

Array = NDArray[np.float64]
Split = Literal["given", "random"]
LossFunction = Callable[[Tensor, Tensor], Tensor]

_ROWS = 1000  # in one forward pass; bounds memory
_FEWEST_PAIRS = 4
_LARGEST = 1e300  # of a loss, so that sums and differences of a few stay finite

_RANDOM_SPLIT = (
    "members and non-members were split uniformly at random, and nothing but the training depends on who is which",
    "the model is the outcome of one training run on the members, in no particular order",
)
_NO_COINS = (
    "Nobody said that members and non-members were split at random: they may differ by themselves. If they were, give "
    'split="random".'
)


def loss_threshold_attack(
    model: nn.Module,
    *,
    members: tuple[Tensor, Tensor],
    non_members: tuple[Tensor, Tensor],
    references: Sequence[nn.Module] = (),
    loss_fn: LossFunction | None = None,
    split: Split = "given",
    confidence: float = 0.95,
    seed: int | None = None,
) -> MembershipResult:
    """Score examples by minus their loss, or by how much smaller it is than that of models that never saw them.

    Args:
        model: as it was trained; it is evaluated in eval mode, and left as it was.
        members: inputs [n, ...] and targets [n, ...] that it was trained on.
        non_members: inputs [m, ...] and targets [m, ...] that it was not, from the same source.
        references: models trained on neither members nor non-members, for difficulty calibration [2].
        loss_fn: (outputs, targets) to the loss of each example, shape [n]; by default the cross-entropy.
        split: "random" if a uniformly random split made the two groups; "given" if anything else did. Only a random
            split bounds epsilon (`MembershipResult.to_audit`). MNIST's own test set, for one, is by other writers.
        confidence: of intervals, in (0, 1).
        seed: of the pairs that are made for `to_audit`; by default from the operating system.

    Returns:
        The scores, with what can be read off them.

    Guarantee:
        None: it is an attack. Better ones exist (`lira`).

    Raises:
        ParameterError: inputs and targets do not fit, the loss is not one number an example or not a number, or the
            split is of no known kind.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> x, y = torch.randn(20, 2), torch.arange(20) % 2
        >>> found = loss_threshold_attack(model, members=(x[:10], y[:10]), non_members=(x[10:], y[10:]))
        >>> 0 <= found.auc <= 1
        True
    """
    if split not in get_args(Split):
        raise ParameterError(f"split must be one of {get_args(Split)}, got {split!r}.")
    scores = []
    for name, (inputs, targets) in (("members", members), ("non_members", non_members)):
        _check(name, inputs, targets)
        score = -losses_of(model, inputs, targets, loss_fn=loss_fn)
        if references:
            usual = [losses_of(reference, inputs, targets, loss_fn=loss_fn) for reference in references]
            score = score + np.mean(usual, axis=0)
        scores.append(score)
    return MembershipResult(
        attack="loss threshold, calibrated" if references else "loss threshold",
        members=scores[0],
        non_members=scores[1],
        confidence=confidence,
        game=_paired(scores[0], scores[1], np.random.default_rng(seed)) if split == "random" else None,
        no_epsilon=_NO_COINS,
    )


def losses_of(
    model: nn.Module, inputs: Tensor, targets: Tensor, *, loss_fn: LossFunction | None = None, rows: int = _ROWS
) -> Array:
    """The loss of each example, with the model in eval mode and left as it was.

    Args:
        model: any module, private or plain.
        inputs: shape [n, ...].
        targets: shape [n, ...].
        loss_fn: (outputs, targets) to shape [n]; by default the cross-entropy.
        rows: examples in one forward pass.

    Returns:
        Shape [n], float64. Losses above 1e300 are cut to that: infinite ones have no order, and no difference.

    Raises:
        ParameterError: the loss is not one number an example, or NaN.
    """
    loss_of = loss_fn or _cross_entropy
    first = next(model.parameters(), None)
    device = inputs.device if first is None else first.device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    parts = []
    try:
        with torch.no_grad():
            for start in range(0, len(inputs), rows):
                x, y = (part[start : start + rows].to(device) for part in (inputs, targets))
                loss = loss_of(model(x), y)
                if loss.shape != (len(x),):
                    raise ParameterError(
                        f"loss_fn must return one loss an example, shape ({len(x)},), got {tuple(loss.shape)}. "
                        'Use reduction="none".'
                    )
                parts.append(loss.double().cpu())
    finally:
        for module, training in modes:
            module.training = training
    losses: Array = torch.cat(parts).numpy()
    if np.isnan(losses).any():
        raise ParameterError("A loss is NaN. Leave such examples out, or mend the model.")
    return np.clip(losses, -_LARGEST, _LARGEST)


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    # In float64: at float32's least loss, 0, confident members and confident others cannot be told apart.
    return F.cross_entropy(outputs.double(), targets, reduction="none")


def _check(name: str, inputs: Tensor, targets: Tensor) -> None:
    if not len(inputs) or len(inputs) != len(targets):
        raise ParameterError(f"{name} must be inputs and as many targets, got {len(inputs)} and {len(targets)}.")


def _paired(members: Array, non_members: Array, generator: np.random.Generator) -> CoinGame:
    """A member and a non-member in each pair, at random; the coin says which of the two comes first.

    Given who is paired with whom, all orders are equally likely under a random split, because the pairs are made
    without looking at the scores: both groups are shuffled first.
    """
    count = min(len(members), len(non_members))
    if count < _FEWEST_PAIRS:
        raise ParameterError(f'split="random" needs at least {_FEWEST_PAIRS} members and non-members, got {count}.')
    one = generator.permutation(members)[:count]
    other = generator.permutation(non_members)[:count]
    first_is_member = generator.random(count) < 0.5
    scores = np.where(first_is_member, one - other, other - one)
    return CoinGame(
        scores=scores,
        coins=first_is_member,
        relation=NeighboringRelation.REPLACE_ONE,
        assumptions=_RANDOM_SPLIT,
    )
