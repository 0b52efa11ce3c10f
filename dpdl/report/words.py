"""What stands in a report, in plain words: releases, and what an attacker can do. Rounded to the safe side.

The bounds are for the strongest attacker: one who sees every noisy step, knows every other example, and has unlimited
time. Whoever sees only the final model does worse.
"""

from __future__ import annotations

import math

from accountants import EpsilonDelta, Event, Gaussian, Laplace, PoissonSampled
from dpdl.privacy_report import figures_down, figures_up, percent_up, rounded_up
from dpdl.readings import Membership

__all__ = [
    "ATTACKER",
    "accuracy_told",
    "advantage_told",
    "at_most",
    "event_told",
    "false_alarms",
    "membership_told",
    "one_in",
    "percent",
    "posterior_told",
    "protects_little",
    "rate_told",
    "spent_told",
]

ATTACKER = (
    "These bound everybody: somebody who sees every noisy step, knows all other examples and has unlimited time. "
    "Whoever sees only the final model can do less."
)
LITTLE = 0.98  # an accuracy above which the bounds exclude next to nothing


def event_told(event: Event) -> str:
    """One release, in words.

    Example:
        >>> print(event_told(PoissonSampled(0.01, Gaussian(1.1))))
        Gaussian noise of 1.1 times the sensitivity, on a Poisson sample at rate 0.01
    """
    if isinstance(event, PoissonSampled):
        return f"{event_told(event.event)}, on a Poisson sample at rate {figures_up(event.sample_rate)}"
    if isinstance(event, Gaussian):
        if event.noise_multiplier == 0:
            return "the exact answer, without noise"
        return f"Gaussian noise of {figures_down(event.noise_multiplier)} times the sensitivity"
    if isinstance(event, Laplace):
        return f"Laplace noise of scale {figures_down(event.scale)} times the sensitivity"
    if isinstance(event, EpsilonDelta):
        return f"a mechanism with epsilon {figures_up(event.epsilon)} at delta {figures_up(event.delta)}"
    return str(event)


def one_in(share: float) -> str:
    """A small share: 0.001 is "1 in 1,000"."""
    return f"1 in {round(1 / share):,}"


def spent_told(epsilon: float | None) -> str:
    """An epsilon in a cell."""
    return "–" if epsilon is None else rounded_up(epsilon) if math.isfinite(epsilon) else "no guarantee"


def at_most(epsilon: float) -> str:
    """A bound: "epsilon <= 2.99", or that there is none."""
    return f"epsilon <= {rounded_up(epsilon)}" if math.isfinite(epsilon) else "no guarantee"


def percent(share: float) -> str:
    """A share that is no bound: 0.1 is "10 %"."""
    return f"{100 * share:.6g} %"


def rate_told(false_positives: float, true_positives: float) -> str:
    """One point of the trade-off curve."""
    return (
        f"Somebody who accepts {false_alarms(false_positives)} recognises a given member at most "
        f"{percent_up(true_positives)} of the time; by guessing, {percent(false_positives)}."
    )


def false_alarms(share: float) -> str:
    """A false positive rate: 0.01 is "1 false alarm in 100"."""
    return f"1 false alarm in {round(1 / share):,}"


def accuracy_told(membership: Membership) -> str:
    """How often anybody is right."""
    return (
        "Asked whether an example was in the data or not, both as likely, nobody is right more than "
        f"{percent_up(membership.accuracy)} of the time; by guessing, 50 %."
    )


def advantage_told(membership: Membership) -> str:
    """The largest gap between hits and false alarms."""
    return (
        "No attack's hits (members recognised) exceed its false alarms (others taken for members) by more than "
        f"{percent_up(membership.advantage)} of the cases: the advantage."
    )


def posterior_told(before: float, after: float, failure: float) -> str:
    """What somebody may come to believe."""
    return (
        f"Whoever held membership for {percent(before)} likely before is at most {percent_up(after)} sure "
        f"afterwards, but for a chance of {one_in(failure)}."
    )


def membership_told(membership: Membership) -> list[str]:
    """All of it, sentence by sentence."""
    return [
        *(rate_told(*pair) for pair in membership.true_positive_rates),
        accuracy_told(membership),
        advantage_told(membership),
        *(posterior_told(*pair, membership.failure) for pair in membership.posteriors),
    ]


def protects_little(membership: Membership) -> bool:
    """Whether the bounds exclude next to nothing."""
    return membership.accuracy > LITTLE
