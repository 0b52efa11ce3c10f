"""Audits: what each adversary can be seen to learn stays below its claim, and planted faults go above it.

A toy network whose cut has two numbers. The adversary knows everything but which of two neighbours is the victim's
row, and adds up what it saw along the line between the two. Many rows that hold the same victim are as many
independent runs, as long as the weights do not learn from them.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from accountants import Event, Gaussian, NeighboringRelation, PoissonSampled, PRVAccountant
from dpdl.ledger import Ledger
from dpdl.secure_random import RandomStream
from dpdl.split.cut_release import CutRelease
from dpdl.split.gradient_release import GradientRelease
from dpdl.split.labels import LabelStore, MemoizedRandomizedResponse
from dpdl.split.part_training import PartTraining
from dpdl.split.releaser import CachedRelease, RowReleaser
from dpdl.split.row_account import RowAccount
from dpdl.split.row_cache import RowCache
from dpdl.split.row_noise import clip_rows, noised_rows
from tests.split.releases.transcripts import Scores, epsilon_seen

REPLACE_ONE = NeighboringRelation.REPLACE_ONE
RUNS = 20_000
DELTA = 0.01
VICTIMS = (torch.tensor([5.0, 0.0]), torch.tensor([-5.0, 0.0]))  # clipped: two norms apart
S = 4.0


def claimed(event: Event) -> float:
    return PRVAccountant(relation=REPLACE_ONE).compose(event).epsilon(DELTA)


def account(training: PartTraining | None = None) -> RowAccount:
    ledger = Ledger(relation=REPLACE_ONE)
    return RowAccount(ledger=ledger, run="server", training=training or PartTraining.frozen())


def per_step(victim: Tensor, steps: int, *, noise_multiplier: float = S, seed: int) -> tuple[Scores, Event]:
    """What the server saw of the victim, in each of RUNS runs, and what is claimed."""
    spent = account()
    releaser = RowReleaser(
        CutRelease(max_norm=1.0, noise_multiplier=noise_multiplier),
        kind="activations",
        account=spent,
        stream=RandomStream.from_insecure_seed(seed),
    )
    seen = torch.zeros(RUNS, dtype=torch.float64)
    for step in range(steps):
        seen += releaser.release(victim.expand(RUNS, 2), range(RUNS), number=step, step=step)[:, 0].double()
    return seen.numpy(), spent.event


def audit_per_step(steps: int, *, noise_multiplier: float = S) -> tuple[float, Event]:
    """The lower bound, and the event that was recorded."""
    (one, event), (other, _) = (
        per_step(victim, steps, noise_multiplier=noise_multiplier, seed=seed) for seed, victim in enumerate(VICTIMS)
    )
    return epsilon_seen(one, other, delta=DELTA), event


@pytest.mark.parametrize("steps", [1, 4])
def test_the_server_learns_less_of_rows_than_is_claimed_and_not_much_less(steps: int) -> None:
    seen, event = audit_per_step(steps)
    assert 0.6 * claimed(event) < seen <= claimed(event)


def test_noise_that_is_half_of_what_is_claimed_is_caught() -> None:
    seen, _ = audit_per_step(1, noise_multiplier=S / 2)
    assert seen > claimed(Gaussian(S))


def test_a_sensitivity_of_one_norm_in_place_of_two_is_caught() -> None:
    seen, _ = audit_per_step(4)
    one_norm = PRVAccountant(relation=NeighboringRelation.ADD_OR_REMOVE).compose(4 * Gaussian(S)).epsilon(DELTA)
    assert seen > one_norm


def test_amplification_by_a_sampling_that_the_server_sees_is_caught() -> None:
    """In vertical learning numbers are agreed: the server knows at which four of forty steps the victim was there."""
    seen, event = audit_per_step(4)
    amplified = 40 * PoissonSampled(0.1, Gaussian(S))
    assert claimed(amplified) < seen <= claimed(event)


def once(victim: Tensor, epochs: int, *, forgetful: bool, seed: int) -> tuple[Scores, Event]:
    runs = RUNS // 8
    spent = account()
    cache = RowCache()
    seen = torch.zeros(runs)
    for epoch in range(epochs):
        cut = CachedRelease(
            CutRelease(max_norm=1.0, noise_multiplier=S, mode="release_once"),
            cache=RowCache() if forgetful else cache,
            encoder=nn.Identity(),
            account=spent,
            stream=RandomStream.from_insecure_seed(100 * seed + epoch),
        )
        seen += cut.release(victim.expand(runs, 2), range(runs))[:, 0]
    return seen.double().numpy(), spent.event


def test_a_row_released_once_tells_as_much_after_six_epochs_as_after_one_and_a_row_noised_anew_is_caught() -> None:
    (one, event), (other, _) = (once(v, 6, forgetful=False, seed=i) for i, v in enumerate(VICTIMS))
    claim = claimed(event)
    assert claim == pytest.approx(claimed(Gaussian(S)))
    assert epsilon_seen(one, other, delta=DELTA) <= claim
    (one, event), (other, _) = (once(v, 6, forgetful=True, seed=i) for i, v in enumerate(VICTIMS))
    assert epsilon_seen(one, other, delta=DELTA) > claim
    assert claimed(event) == pytest.approx(claimed(6 * Gaussian(S)))  # and our own ledger would have said so


def labels(truth: int, epochs: int, *, redrawn: bool, seed: int) -> Scores:
    plan = MemoizedRandomizedResponse(epsilon=0.5, classes=2)
    runs = RUNS // 2
    stores = [
        LabelStore(plan, stream=RandomStream.from_insecure_seed(100 * seed + epoch))
        for epoch in range(epochs if redrawn else 1)
    ]
    true = torch.full((runs,), truth)
    return sum(stores[epoch % len(stores)].release(range(runs), true) for epoch in range(epochs)).double().numpy()  # type: ignore[union-attr]


def test_labels_tell_their_epsilon_whatever_the_epochs_and_labels_drawn_anew_are_caught() -> None:
    seen = epsilon_seen(labels(0, 5, redrawn=False, seed=0), labels(1, 5, redrawn=False, seed=1), delta=0)
    assert 0.3 < seen <= 0.5
    assert epsilon_seen(labels(0, 5, redrawn=True, seed=0), labels(1, 5, redrawn=True, seed=1), delta=0) > 0.5


def trained(victim: Tensor, *, part_noise: float | None, seed: int) -> tuple[Scores, Event]:
    """A part of one bias that learns from the victim at step 0; then the server looks at 10 *other* rows.

    The bias moves by a gradient that is clipped to C_c = 1 and points where the victim does; the other rows are the
    bias, and tell of it together.
    """
    runs, others = 6000, 10
    training = PartTraining.unprotected() if part_noise is None else PartTraining.private(noise_multiplier=part_noise)
    spent = account(training)
    stream = RandomStream.from_insecure_seed(seed)
    bias = clip_rows(victim.expand(runs, 2), max_norm=1.0)
    if part_noise is not None:
        moved = {"max_norm": 1.0, "noise_multiplier": part_noise, "stream": stream.child("steps"), "number": 0}
        bias = noised_rows(bias, **moved)  # type: ignore[arg-type]
    cut = CutRelease(max_norm=100.0, noise_multiplier=S / 100)  # others are not clipped: their noise is S
    releaser = RowReleaser(cut, kind="rows", account=account(training), stream=stream.child("others"))
    own = RowReleaser(
        CutRelease(max_norm=1.0, noise_multiplier=S), kind="rows", account=spent, stream=stream.child("victim")
    )
    first = own.release(victim.expand(runs, 2), [f"victim {run}" for run in range(runs)], number=0, step=0)[:, 0]
    later = torch.zeros(runs)
    for number in range(others):
        later += releaser.release(bias, range(number * runs, (number + 1) * runs), number=number, step=1)[:, 0] / others
    score = first / S**2 + later / ((part_noise or 0) ** 2 + S**2 / others)  # the best there is
    return score.double().numpy(), spent.event


def test_rows_of_others_tell_of_the_victim_through_weights_within_the_claim_and_beyond_that_of_rows_alone() -> None:
    """The state leak: a claim for the victim's own release alone, mu = 2 / s, does not hold."""
    for part_noise in (2.0, None):
        (one, event), (other, _) = (trained(v, part_noise=part_noise, seed=i) for i, v in enumerate(VICTIMS))
        seen = epsilon_seen(one, other, delta=DELTA)
        assert claimed(Gaussian(S)) < seen <= claimed(event)
        assert (claimed(event) == math.inf) == (part_noise is None)


def test_the_feature_holder_learns_less_of_a_label_from_gradients_than_is_claimed_and_raw_ones_are_caught() -> None:
    """d = p - y of a binary head at p = 0.4: its sign is the label."""
    scores = []
    spent = account()
    for label in (0, 1):
        spent = account()
        releaser = RowReleaser(
            GradientRelease(max_norm=0.4, noise_multiplier=2.0),
            kind="gradients",
            account=spent,
            stream=RandomStream.from_insecure_seed(label),
        )
        gradient = torch.full((RUNS, 1), 0.4 - label)
        scores.append(releaser.release(gradient, range(RUNS), number=0, step=0)[:, 0].double().numpy())
        scores.append(gradient[:, 0].double().numpy())
    assert 0.5 * claimed(spent.event) < epsilon_seen(scores[0], scores[2], delta=DELTA) <= claimed(spent.event)
    assert epsilon_seen(scores[1], scores[3], delta=DELTA) > claimed(spent.event)


def test_model_consumers_who_see_noisy_steps_learn_less_than_the_sampled_claim() -> None:
    """Poisson-sampled noisy sums: the consumers' claim, amplified, where nobody sees who takes part."""
    draws = np.random.default_rng(0)
    rate, sigma, steps = 0.2, 1.0, 3
    with_it = sum(draws.random(RUNS) < rate for _ in range(steps)) + draws.normal(0, sigma * math.sqrt(steps), RUNS)
    without = draws.normal(0, sigma * math.sqrt(steps), RUNS)
    claim = PRVAccountant().compose(steps * PoissonSampled(rate, Gaussian(sigma))).epsilon(DELTA)
    seen = epsilon_seen(with_it, without, delta=DELTA)
    assert 0 < seen <= claim
    # Who sees at which steps the example takes part is not covered by that claim.
    always = steps + draws.normal(0, sigma * math.sqrt(steps), RUNS)
    assert epsilon_seen(always, without, delta=DELTA) > claim


def test_the_bound_is_below_the_truth_of_gaussians_and_near_it() -> None:
    draws = np.random.default_rng(1)
    for mu in (0.25, 0.5, 1.0, 2.0):
        seen = epsilon_seen(draws.normal(mu, 1, 40_000), draws.normal(0, 1, 40_000), delta=DELTA)
        truth = claimed(Gaussian(2 / mu))
        assert 0.4 * truth < seen <= truth
