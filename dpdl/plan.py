"""The plan: everything that the guarantee of a private training run depends on, and nothing else.

A plan is made before training, holds only public values, and is what the run is then held to:

    >>> plan = PrivacyPlan(sample_rate=0.01, expected_batch_size=600, steps=1000,
    ...                    noise_multiplier=1.1, max_grad_norm=1.0, dataset_size=60_000)
    >>> plan.epsilon(1e-5) < 1.63
    True

The dataset's size enters as a public number: adding or removing one example is what the guarantee
hides, so a size that is itself a secret must be replaced by a public approximation of it.
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from torch.utils.data import DataLoader

import accountants
from accountants import Event, Gaussian, Interval, NeighboringRelation, PoissonSampled, arguments
from dpdl.errors import ParameterError, PrivacyWarning
from dpdl.uniform_loader import uniform_loader_sizes

__all__ = ["PrivacyPlan"]

_SCHEMA = "dpdl.plan/1"
# A plan whose expected batch is further than this from sample_rate x dataset_size was made for other data.
BATCH_SIZE_TOLERANCE = 0.05

Clipping = Literal["flat"]
Sampling = Literal["poisson"]
Noise = Literal["gaussian"]


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """What a private run will do, as far as its privacy is concerned.

    Each of `steps` steps draws every example independently with probability `sample_rate`, clips each
    drawn example's gradient to L2 norm `max_grad_norm`, adds Gaussian noise of standard deviation
    `noise_multiplier * max_grad_norm` to the sum, and divides by `expected_batch_size`
    [1, Algorithm 1].

    Attributes:
        sample_rate: q in (0, 1], the probability that an example is in a step's batch.
        expected_batch_size: the public number that the noisy sum is divided by, in examples.
        steps: noisy releases, at most.
        noise_multiplier: sigma >= 0, noise standard deviation over max_grad_norm. 0 gives no privacy.
        max_grad_norm: C > 0, the most that one example adds, as an L2 norm. Infinite (no clipping)
            only with noise_multiplier 0.
        clipping: "flat", one norm over all parameters.
        sampling: "poisson", independent inclusion.
        noise: "gaussian".
        relation: what neighbouring datasets differ in: "add_or_remove" (the default), "zero_out" or
            "replace_one".
        dataset_size: n, if it is public: used for warnings and for checking the loader.

    Raises:
        ParameterError: a value is out of range, or contradicts another.

    References:
        [1] Abadi et al., Deep Learning with Differential Privacy, CCS 2016. arXiv:1607.00133
    """

    sample_rate: float
    expected_batch_size: float
    steps: int
    noise_multiplier: float
    max_grad_norm: float
    clipping: Clipping = "flat"
    sampling: Sampling = "poisson"
    noise: Noise = "gaussian"
    relation: str = "add_or_remove"
    dataset_size: int | None = None

    def __post_init__(self) -> None:
        _set = object.__setattr__  # frozen: numbers are brought to plain Python types once, here
        for name in ("sample_rate", "expected_batch_size", "noise_multiplier", "max_grad_norm"):
            _set(self, name, arguments.real(name, getattr(self, name), remedy="Give a plain number."))
        _set(self, "steps", arguments.steps(self.steps))
        if self.dataset_size is not None:
            size = arguments.positive_whole("dataset_size", self.dataset_size, remedy="Count the examples.")
            _set(self, "dataset_size", size)
        if isinstance(self.relation, NeighboringRelation):
            _set(self, "relation", self.relation.value)

        if not 0 < self.sample_rate <= 1:
            raise ParameterError(
                f"sample_rate must be in (0, 1], got {self.sample_rate}. "
                "It is the expected batch size over the dataset size."
            )
        if not (self.expected_batch_size > 0 and math.isfinite(self.expected_batch_size)):
            raise ParameterError(f"expected_batch_size must be > 0, got {self.expected_batch_size}.")
        if not (self.noise_multiplier >= 0 and math.isfinite(self.noise_multiplier)):
            raise ParameterError(f"noise_multiplier must be a finite number >= 0, got {self.noise_multiplier}.")
        if not self.max_grad_norm > 0:
            raise ParameterError(
                f"max_grad_norm must be > 0, got {self.max_grad_norm}. "
                "To train without clipping, leave the model unwrapped."
            )
        if math.isinf(self.max_grad_norm) and self.noise_multiplier > 0:
            raise ParameterError(
                f"max_grad_norm is infinite with noise_multiplier {self.noise_multiplier}: no noise can "
                "hide an unbounded gradient. Give a finite max_grad_norm."
            )
        for name, allowed in (
            ("clipping", get_args(Clipping)),
            ("sampling", get_args(Sampling)),
            ("noise", get_args(Noise)),
            ("relation", tuple(r.value for r in NeighboringRelation)),
        ):
            if getattr(self, name) not in allowed:
                raise ParameterError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        accountants.PRVAccountant(relation=NeighboringRelation(self.relation)).compose(self.event(1))  # has a proof
        if self.dataset_size is not None:
            expected = self.sample_rate * self.dataset_size
            if abs(expected - self.expected_batch_size) > BATCH_SIZE_TOLERANCE * expected:
                raise ParameterError(
                    f"expected_batch_size {self.expected_batch_size:g} does not fit sample_rate "
                    f"{self.sample_rate:g} of {self.dataset_size} examples, which draws {expected:g} a step. "
                    "Give two of the three and derive the third, or use PrivacyPlan.for_loader."
                )

    @classmethod
    def for_loader(
        cls,
        loader: DataLoader[Any],
        *,
        epochs: int | None = None,
        steps: int | None = None,
        epsilon: float | None = None,
        delta: float | None = None,
        noise_multiplier: float | None = None,
        max_grad_norm: float,
        clipping: Clipping = "flat",
        sampling: Sampling = "poisson",
        noise: Noise = "gaussian",
        relation: str = "add_or_remove",
    ) -> PrivacyPlan:
        """The plan for a loader's dataset and batch size, from integers and never from a rounded rate.

        An epoch is `len(loader)` steps; each example is drawn with probability batch_size / n.

        Args:
            loader: an ordinary `DataLoader` with a batch size and a sized dataset.
            epochs, steps: how long to train; give one.
            epsilon, delta: the budget from which the noise multiplier is computed, rounded up; or
            noise_multiplier: the noise itself. Give the budget or the noise.
            max_grad_norm: C, as in `PrivacyPlan`; likewise the arguments after it.

        Raises:
            ParameterError: too few or too many of the alternatives, or a value out of range.
            LoaderError: the loader has no length or batch size to plan from.
        """

        dataset_size, batch_size, steps_per_epoch = uniform_loader_sizes(loader)
        if (epochs is None) == (steps is None):
            raise ParameterError(f"Give either epochs or steps, got epochs={epochs!r} and steps={steps!r}.")
        if steps is None:
            assert epochs is not None
            steps = arguments.positive_whole("epochs", epochs, remedy="Count passes over the data.") * steps_per_epoch
        budget_given = epsilon is not None or delta is not None
        if budget_given == (noise_multiplier is not None) or (epsilon is None) != (delta is None):
            raise ParameterError(
                "Give either epsilon and delta or noise_multiplier, got "
                f"epsilon={epsilon!r}, delta={delta!r}, noise_multiplier={noise_multiplier!r}."
            )
        batch_size = min(batch_size, dataset_size)
        plan = cls(
            sample_rate=batch_size / dataset_size,
            expected_batch_size=batch_size,
            steps=steps,
            noise_multiplier=1.0 if noise_multiplier is None else noise_multiplier,
            max_grad_norm=max_grad_norm,
            clipping=clipping,
            sampling=sampling,
            noise=noise,
            relation=relation,
            dataset_size=dataset_size,
        )
        if epsilon is None or delta is None:
            return plan
        return plan.calibrated(epsilon=epsilon, delta=delta)

    def event(self, steps: int | None = None) -> Event:
        """The privacy event of the first `steps` steps (all of them by default)."""
        count = self.steps if steps is None else steps
        return PoissonSampled(self.sample_rate, Gaussian(self.noise_multiplier)) * count

    def epsilon(self, delta: float) -> float:
        """An upper bound on the epsilon of the whole plan at `delta`."""
        return self.interval(delta).upper

    def interval(self, delta: float) -> Interval:
        """A lower and an upper bound on the plan's epsilon at `delta`."""
        bounds = accountants.interval(
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate,
            steps=self.steps,
            delta=delta,
            relation=NeighboringRelation(self.relation),
        )
        self.warn_if_delta_is_large(delta)
        return bounds

    def calibrated(self, *, epsilon: float, delta: float) -> PrivacyPlan:
        """The same plan with the least noise multiplier that keeps it within (epsilon, delta).

        Guarantee: `plan.calibrated(epsilon=e, delta=d).epsilon(d) <= e`.

        Args:
            epsilon, delta: the budget.
        """
        sigma = accountants.noise_multiplier(
            epsilon=epsilon,
            delta=delta,
            sample_rate=self.sample_rate,
            steps=self.steps,
            relation=NeighboringRelation(self.relation),
        )
        self.warn_if_delta_is_large(delta)
        return replace(self, noise_multiplier=sigma)

    def warn_if_delta_is_large(self, delta: float) -> None:
        """Warn where `delta` allows publishing whole examples: delta >= 1/n."""
        if self.dataset_size is not None and delta >= 1 / self.dataset_size:
            warnings.warn(
                f"delta = {delta:g} is not below 1/n = {1 / self.dataset_size:g} for {self.dataset_size} "
                "examples: a mechanism that publishes one example outright would meet it. Choose a "
                "smaller delta.",
                PrivacyWarning,
                stacklevel=3,
            )

    def to_json(self) -> str:
        """The plan as JSON, with its schema; an infinite clipping norm is the string "inf"."""
        values = asdict(self)
        if math.isinf(self.max_grad_norm):
            values["max_grad_norm"] = "inf"
        return json.dumps({"schema": _SCHEMA, **values})

    @classmethod
    def from_json(cls, text: str) -> PrivacyPlan:
        """The plan that `to_json` wrote.

        Raises:
            ParameterError: not such a text, or with fields missing or unknown.
        """
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, TypeError) as error:
            raise ParameterError(f"Not a plan: the text is not JSON ({error}).") from error
        if not isinstance(values, dict) or values.pop("schema", None) != _SCHEMA:
            raise ParameterError(f"Not a plan: expected a JSON object with schema {_SCHEMA!r}.")
        known = {f.name for f in fields(cls)}
        if set(values) != known:
            raise ParameterError(
                f"Not a plan: missing fields {sorted(known - set(values))}, "
                f"unknown fields {sorted(set(values) - known)}."
            )
        if values["max_grad_norm"] == "inf":
            values["max_grad_norm"] = math.inf
        return cls(**values)

    def __str__(self) -> str:
        of_all = "" if self.dataset_size is None else f" of {self.dataset_size:,}"
        return (
            f"{self.steps:,} steps; each draws every example independently with probability "
            f"{self.sample_rate:.6g} ({self.expected_batch_size:g}{of_all} expected), clips its gradient "
            f"to L2 norm {self.max_grad_norm:g} and adds Gaussian noise of {self.noise_multiplier:.6g} "
            f"times that to the sum; neighbouring datasets differ by "
            f"{NeighboringRelation(self.relation).phrase}."
        )
