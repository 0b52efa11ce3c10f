"""From a budget to a noise multiplier, by the accountant that will be used."""

from __future__ import annotations

from typing import Any

from dpdl.compat.opacus.accountants.registry import create_accountant
from dpdl.errors import ParameterError

__all__ = ["get_noise_multiplier"]

MAX_SIGMA = 1e6
_FIRST_SIGMA = 20.0


def get_noise_multiplier(
    *,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    epochs: int | None = None,
    steps: int | None = None,
    accountant: str = "rdp",
    epsilon_tolerance: float = 0.01,
    **kwargs: Any,
) -> float:
    """A noise multiplier that keeps a run within its budget.

    Args:
        target_epsilon, target_delta: the budget.
        sample_rate: of one step.
        epochs, steps: how long; give one. An epoch is 1 / sample_rate steps.
        accountant: its name.
        epsilon_tolerance: how far below the budget the run may end.
        kwargs: for the accountant's get_epsilon.

    Guarantee:
        The accountant's epsilon of the run with the returned noise is in
        (target_epsilon - epsilon_tolerance, target_epsilon].

    Raises:
        ParameterError: both or none of epochs and steps, or a budget that no noise meets.
    """
    if (steps is None) == (epochs is None):
        raise ParameterError(f"Give either epochs or steps, got epochs={epochs!r} and steps={steps!r}.")
    if not target_epsilon > 0 or not epsilon_tolerance > 0:
        raise ParameterError(
            f"target_epsilon and epsilon_tolerance must be > 0, got {target_epsilon!r} and {epsilon_tolerance!r}."
        )
    if steps is None:
        assert epochs is not None
        # 1/49 * 49 steps an epoch, not 48.99999: the rate was a quotient of whole numbers.
        steps = int(epochs / sample_rate + 1e-6)
    trial = create_accountant(accountant)

    def spent(sigma: float) -> float:
        trial.history = [(sigma, sample_rate, steps)]
        return float(trial.get_epsilon(delta=target_delta, **kwargs))

    low, high = 0.0, _FIRST_SIGMA
    while (epsilon := spent(high)) > target_epsilon:
        high *= 2
        if high > MAX_SIGMA:
            raise ParameterError(
                f"No noise multiplier up to {MAX_SIGMA:g} meets epsilon {target_epsilon} at delta {target_delta}. "
                "Train for fewer steps, on smaller batches, or allow more."
            )
    while target_epsilon - epsilon > epsilon_tolerance:
        middle = (low + high) / 2
        found = spent(middle)
        if found < target_epsilon:
            high, epsilon = middle, found
        else:
            low = middle
    return high
