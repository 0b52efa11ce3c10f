"""A test for your own continuous integration: training code against the epsilon that it claims.

    def test_training_is_private():
        plan = dpdl.PrivacyPlan(sample_rate=0.1, expected_batch_size=100, steps=20, noise_multiplier=2, max_grad_norm=1)

        def train(model, dataset):
            loader = DataLoader(dataset, batch_size=100)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model, optimizer, loader = dpdl.make_private(model, optimizer, loader, plan)
            ...                                                       # the loop, as it is

        assert_private(train, epsilon=plan.epsilon(1e-5), delta=1e-5, canaries=1000)

The training code is given a model and data that are the worst case for it: each example's gradient is one direction of
its own, whatever the weights are, and longer than any clipping norm (`DirectionsOnly`). It may be anybody's code that
trains with a torch optimizer: it is watched from outside, at each step. The same code runs `runs` times, twice by
default, so that noise which repeats itself from run to run shows.

What it can see: too little noise, no clipping, noise that repeats itself, batches that are drawn otherwise than claimed
(if the plan is given). What it cannot: what goes wrong with one kind of layer or model only, and all that is too small
for the number of canaries; the result says how much noise would have had to be missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Dataset

from dpdl.audit.gradient_canaries import DirectionsOnly
from dpdl.audit.many_runs import with_power_of_runs
from dpdl.audit.one_run import EMPTY_PLACES, bound_from_canaries_as_runs
from dpdl.audit.power import leak_of, least_shortfall, runs_see
from dpdl.audit.result import AuditResult
from dpdl.audit.transcript import Transcript, statistics_of
from dpdl.errors import ParameterError
from dpdl.plan import PrivacyPlan

__all__ = ["AuditFailure", "assert_private", "least_visible_leak"]

Array = NDArray[np.float64]
Coins = NDArray[np.bool_]

BETWEEN_RUNS = "difference of runs"
_LEADS = {
    "sum": "there is less noise in all than claimed, or gradients are not clipped",
    "largest": "single steps show who was in their batch: too little noise, no clipping, or batches drawn otherwise "
    "than claimed",
    "soft maximum": "single steps show who was in their batch: too little noise, no clipping, or batches drawn "
    "otherwise than claimed",
    "range": "steps differ from each other by more than noise: it repeats itself from step to step, or is too small",
    BETWEEN_RUNS: "noise repeats itself from run to run: a fixed seed",
}
# The Gaussian curve through a claim at a small delta lies below that of sampled Gaussians, whose tails are heavier;
# through one at a large delta it need not.
_LARGEST_DELTA = 1e-3


class AuditFailure(AssertionError):
    """Training code is less private than claimed; `result` says what was found."""

    def __init__(self, result: AuditResult) -> None:
        self.result = result
        lead = _LEADS.get(str(result.details.get("statistic")), "")
        super().__init__(f"{result}. Where to look: {lead}. Assumptions: {'; '.join(result.assumptions)}.")


def assert_private(
    train: Callable[[nn.Module, Dataset[Any]], object],
    *,
    epsilon: float,
    delta: float,
    plan: PrivacyPlan | None = None,
    confidence: float = 0.999,
    canaries: int = 2000,
    runs: int = 2,
    outputs: int = 2,
    label: Any = 0,
    insecure_seed: int | None = None,
) -> AuditResult:
    """Run training code on worst-case data, attack it, and raise if more leaks than it claims.

    Args:
        train: trains the model that it is given (that very object, with a torch optimizer) on the data set that it is
            given: `canaries` items (number, label), of which about half have a gradient. What it returns is not used.
        epsilon, delta: what the code claims for such data; delta in (0, 1).
        plan: what the claim comes from, if there is a plan: its whole privacy curve is then held against what is seen.
            Without, the curve is taken to be the Gaussian one through (epsilon, delta), and delta
            must be at most 1e-3.
        confidence: in (0, 1): a correct training fails the test at most in a share of 1 - confidence.
        canaries: in each run; more see smaller faults.
        runs: trainings, >= 1; noise that repeats itself from run to run is seen from 2 on.
        outputs: how many scores the model that is handed over returns, shape [N, outputs]. The default of 2 does for
            any cross-entropy on class numbers, however many classes your own model has; give another number if `train`
            needs it, as a mask or weights of that many classes, or 1 for squared error.
        label: the target that each item of the data has. The default, class 0, does for any cross-entropy on class
            numbers; else whatever your loss takes and pulls the first score up, such as 1.0 (with outputs=1) for
            squared error or binary cross-entropy on shapes that your loss makes equal.
        insecure_seed: makes the coins reproducible, not the training.

    Returns:
        The result, if it is consistent with the claim; a note says which missing noise would have been seen: by the
        plan, if it is given, else as if all of the data were in each step.

    Raises:
        AuditFailure: an AssertionError; the lower bound is above the claim.
        ParameterError: a number is out of range, or the claim is so weak that no leak could be seen beyond it.
        StepError: the code did not train the model that it was given.
    """
    if not isinstance(runs, int) or runs < 1:
        raise ParameterError(f"runs must be a whole number >= 1, got {runs!r}.")
    if plan is None and delta > _LARGEST_DELTA:
        raise ParameterError(
            f"delta = {delta:g} says little of the rest of the privacy curve. Give the claim at a delta of at most "
            f"{_LARGEST_DELTA:g}, or the plan that it comes from."
        )
    trials = canaries * runs // 4
    least_visible_leak(epsilon=epsilon, delta=delta, trials=trials, confidence=confidence)  # else refused here
    seen = []
    for run in range(runs):
        seed = None if insecure_seed is None else insecure_seed + run
        seen.append(_watched(train, canaries, outputs=outputs, label=label, seed=seed))
    result = bound_from_canaries_as_runs(
        _scores(seen),
        attack=f"{runs} run{'s' if runs > 1 else ''}, white box",
        delta=delta,
        confidence=confidence,
        claimed_epsilon=epsilon,
        curve="gaussian" if plan is None else plan,
        assumptions=(EMPTY_PLACES,),
    )
    what = f"{canaries} canaries in each of {runs} runs"
    result = with_power_of_runs(result, what, trials=trials, curve="gaussian" if plan is None else plan, plan=None)
    result = replace(result, details=result.details | {"canaries": canaries, "runs": runs})
    if not result.consistent:
        raise AuditFailure(result)
    return result


def least_visible_leak(*, epsilon: float, delta: float, trials: int, confidence: float) -> float:
    """By how much noise must fall short for an audit of independent trials to see it, by a Gaussian curve.

    Args:
        epsilon, delta: the claim.
        trials: counted of either kind.
        confidence: of the audit.

    Returns:
        The least factor k, rounded up by 2%, such that noise of 1/k of the claimed is seen with probability 90%.

    Raises:
        ParameterError: a number is out of range, or no factor up to 8 is seen.

    Example:
        >>> round(least_visible_leak(epsilon=4.0, delta=1e-5, trials=1000, confidence=0.999), 2)
        1.46
    """
    sees = runs_see("gaussian", epsilon=epsilon, delta=delta, trials=trials, confidence=confidence)
    factor = least_shortfall(leak_of(None, epsilon=epsilon, delta=delta), sees)
    if factor is not None:
        return factor
    raise ParameterError(
        f"With {trials} counted trials no leak beyond epsilon = {epsilon:g} at delta = {delta:g} could be seen. Give "
        "more canaries or runs, or audit a setting with a smaller epsilon."
    )


def _watched(
    train: Callable[[nn.Module, Dataset[Any]], object], canaries: int, *, outputs: int, label: Any, seed: int | None
) -> tuple[Array, Coins]:
    """One training: moves, shape [steps, canaries], and coins."""
    model = DirectionsOnly(count=canaries, outputs=outputs, label=label, insecure_seed=seed)
    with Transcript([model.watched]) as transcript:
        train(model, model.dataset())
    return transcript.moves[:, :-1], model.coins.numpy()


def _scores(seen: list[tuple[Array, Coins]]) -> dict[str, tuple[Array, Coins]]:
    """Of the canaries of all runs, one of each run after another, so that both halves have some of all runs."""
    steps = max(len(moves) for moves, _ in seen)
    # A run that took fewer steps stands still for the rest.
    padded = [np.pad(moves, ((0, steps - len(moves)), (0, 0))) for moves, _ in seen]
    moves = np.stack(padded, axis=2).reshape(steps, -1)
    coins = np.stack([each for _, each in seen], axis=1).reshape(-1)
    scores = {
        name: (values, coins)
        for name, values in statistics_of(moves, reference=moves[:, : max(1, len(coins) // 4)]).items()
    }
    # Noise that two runs share is not in their difference. Each run is in one pair: the differences are independent.
    pairs = list(zip(seen[::2], seen[1::2], strict=False))
    if pairs:
        gaps = np.stack([now.sum(axis=0) - before.sum(axis=0) for (before, _), (now, _) in pairs], axis=1)
        scores[BETWEEN_RUNS] = (gaps.reshape(-1), np.stack([each for _, (_, each) in pairs], axis=1).reshape(-1))
    return scores
