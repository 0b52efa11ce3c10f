"""What is wrong with Flower's private strategies: how they clip, weight, count, draw and account."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp.strategy import FedAvg
from flwr.serverapp.strategy.dp_adaptive_clipping import DifferentialPrivacyAdaptiveBase
from flwr.serverapp.strategy.dp_fixed_clipping import DifferentialPrivacyFixedClippingBase

from accountants import Gaussian, PoissonSampled
from dpdl.federated.flower.findings import Case, Finding
from dpdl.federated.flower.strategy import DPStrategy

__all__ = ["account", "adaptive_clipping", "dropouts", "odd_updates", "sampling", "weights"]


def adaptive_clipping(case: Case) -> Iterator[Finding]:
    """F1, F2: which way the norm goes, and which norm the noise is for."""
    if not isinstance(case.strategy, DifferentialPrivacyAdaptiveBase):
        return
    trial = copy.copy(case.strategy)
    trial.clipping_norm = 1.0
    trial._geometric_update(1.0)  # everybody was clipped: the norm has to grow
    if trial.clipping_norm < 1.0:
        yield Finding(
            code="F1",
            severity="unsound",
            subject=case.name,
            message=f"When every update is clipped, the norm shrinks (from 1 to {trial.clipping_norm:.3g}): the "
            "clipped fraction stands where the unclipped one belongs (Andrew et al. 2021, Algorithm 1). The quantile "
            "drives the norm away, to 0, or to where nothing is clipped and the noise drowns everything.",
            remedy="Use DPStrategy with ClientLevelPlan(adaptive_clipping=AdaptiveClipping()).",
        )
    quantile = case.strategy.target_clipped_quantile
    missing = 1 - math.exp(-case.strategy.clip_norm_lr * max(quantile, 1 - quantile))
    yield Finding(
        code="F2",
        severity="unsound",
        subject=case.name,
        message="Updates are clipped to the norm before its update, and noise is for the norm after it: up to "
        f"{missing:.0%} too little in a round at this learning rate, and more with the noise on the fraction.",
        remedy="Use DPStrategy, whose noise is for the norm that clipped.",
    )


def weights(case: Case) -> Iterator[Finding]:
    """F3: a weighted mean with noise for an equal one."""
    flowers = case.flowers
    if flowers is None:
        return
    if case.accountant is not None and isinstance(case.strategy, DifferentialPrivacyFixedClippingBase):
        if len(set(case.weights)) > 1:
            yield Finding(
                code="F3",
                severity="fragile",
                subject=case.name,
                message="Clients have unequal weights, which accounted mode refuses after they have trained.",
                remedy="Let every client send the same 'num-examples'; update_clipping() does.",
            )
        return
    key = getattr(flowers.strategy, "weighted_by_key", "num-examples")
    message = f"The mean is weighted by '{key}', which clients choose; the noise is for equal weights."
    if case.weights:
        share = max(case.weights) / sum(case.weights)
        equal = 1 / flowers.num_sampled_clients
        if share <= equal * (1 + 1e-9):
            return
        left = case.noise_multiplier * equal / share
        message += (
            f" With these weights one client holds {share:.1%} of the mean, and the noise multiplier against it is "
            f"{left:.3f}, where {case.noise_multiplier:g} is claimed."
        )
    yield Finding(
        code="F3",
        severity="unsound",
        subject=case.name,
        message=message,
        remedy="Let every client send the same weight (update_clipping() does), or use DPStrategy, which bounds it.",
    )


def odd_updates(case: Case) -> Iterator[Finding]:
    """F6: zero and NaN."""
    if case.flowers is None and not any(mod in (fixedclipping_mod, adaptiveclipping_mod) for mod in case.mods):
        return
    yield Finding(
        code="F6",
        severity="unsound",
        subject=case.name,
        message="An update of zero divides by zero and ends the round; one with a NaN passes unclipped, since "
        "min(1, nan) is 1.",
        remedy="Put update_clipping() in place of Flower's mod, or use DPStrategy.",
    )


def dropouts(case: Case) -> Iterator[Finding]:
    """F7: fewer answers than the noise is for."""
    flowers = case.flowers
    if flowers is None:
        return
    n = flowers.num_sampled_clients
    if getattr(flowers, "accountant", None) is not None:
        yield Finding(
            code="F7",
            severity="fragile",
            subject=case.name,
            message="In accounted mode one missing or refusing client voids the whole round, which has cost all others "
            "their training.",
            remedy="Use DPStrategy: the round is closed with who has answered, and the noise stays.",
        )
        return
    yield Finding(
        code="F7",
        severity="unsound",
        subject=case.name,
        message=f"The noise is for a mean over {n} clients. With fewer answers there is a warning and the same noise: "
        f"with one of two missing the noise multiplier is half of the {case.noise_multiplier:g} that is claimed.",
        remedy="Use DPStrategy: noise is added to the sum and divided by a number fixed in advance.",
    )


def sampling(case: Case) -> Iterator[Finding]:
    """F9: how clients and noise are drawn, and what leaves besides."""
    flowers = case.flowers
    if not isinstance(case.strategy, DPStrategy) and (case.sampling == "poisson" or case.method == "poisson"):
        yield Finding(
            code="F9",
            severity="unsound",
            subject=case.name,
            message="The account is of Poisson sampling, but Flower takes a fixed number of whoever is connected, by "
            "Python's random, whose next draws can be computed from its past ones.",
            remedy="Account without amplification, or use DPStrategy with PoissonClients.",
        )
    if flowers is None:
        return
    yield Finding(
        code="F9",
        severity="unsound",
        subject=case.name,
        message="Noise comes from numpy's global Mersenne Twister, whose state can be told from its output, in one "
        "draw of float64 that is cut to the weights' type.",
        remedy="Use DPStrategy: AES in counter mode, keyed by the operating system.",
    )
    if isinstance(flowers.strategy, FedAvg) and flowers.strategy.fraction_evaluate > 0:
        yield Finding(
            code="F9",
            severity="unprotected",
            subject=f"{type(flowers.strategy).__name__}.fraction_evaluate = {flowers.strategy.fraction_evaluate:g}",
            message="Training and evaluation metrics are averaged without noise.",
            remedy="Set fraction_evaluate=0.0 and evaluate on public data; release_inventory() lists what is sent.",
        )


def account(case: Case) -> Iterator[Finding]:
    """F10: what is accounted, and what that is worth."""
    flowers = case.flowers
    if flowers is None or case.noise_multiplier <= 0:
        return
    noise = case.noise_multiplier
    if case.accountant is None:
        yield Finding(
            code="F10",
            severity="unprotected",
            subject=case.name,
            message=f"Nobody accounts. {case.rounds} rounds with noise multiplier {noise:g} come to epsilon "
            f"{case.epsilon(Gaussian(noise)):.4g} at delta {case.delta:g} (equal weights, nobody missing, zero-out).",
            remedy="Give the fixed-clipping strategies an accountant, or use DPStrategy, whose server has a ledger.",
        )
        return
    config = getattr(case.accountant, "config", None)
    population = getattr(config, "population_size", None) if case.population is None else case.population
    if case.method != "no-amplification" or population is None or flowers.num_sampled_clients >= population:
        return
    yield Finding(
        code="F10",
        severity="unsound",
        subject="add-or-remove-one",
        message="Where a client is taken away, a cohort of a fixed size takes another one in, which moves the sum by "
        "up to twice the clipping norm; the accountant counts once. Its epsilon is for a client whose update is "
        "zeroed out.",
        remedy="Say zero-out, or account for half the noise multiplier, or use DPStrategy with PoissonClients.",
    )
    rate = flowers.num_sampled_clients / population
    yield Finding(
        code="F10",
        severity="loose",
        subject=type(case.accountant).__name__,
        message=f"Without amplification {case.rounds} rounds come to epsilon {case.epsilon(Gaussian(noise)):.4g}; if "
        f"clients were drawn by Poisson sampling at rate {rate:g}, to "
        f"{case.epsilon(PoissonSampled(rate, Gaussian(noise))):.4g}.",
        remedy="Use DPStrategy with PoissonClients.",
    )
