"""The plan of client-level privacy: everything that the server's guarantee depends on, and nothing else.

    >>> plan = ClientLevelPlan(clients=1000, sample_rate=0.01, rounds=100, noise_multiplier=1.0, max_update_norm=1.0)
    >>> plan.epsilon(1e-5) < 0.73
    True

A round draws clients, clips each one's update to L2 norm S over all its tensors, multiplies it by its weight (at most
max_weight), adds N(0, (z max_weight S)^2) to the sum and divides by a number that was fixed in advance [1].

What a round is accounted as, by sampling and by what neighbouring federations differ in:

    sampling      adding or removing a client     zeroing a client out, replacing one
    poisson       PoissonSampled(q, Gaussian(z))  PoissonSampled(q, Gaussian(z))
    all           Gaussian(z)                     Gaussian(z)
    fixed_size    Gaussian(z / 2)                 SampledWithoutReplacement(m, N, Gaussian(z)), or Gaussian(z)

Fixed size. Of m clients among N, one that is taken in leaves another one out, which moves the sum by two bounds: with
the rest of the cohort and that other client given, one neighbour's release has its sum at 0 or 2, the other's at 0, in
units of the bound. `accountants` has no proof that sampling amplifies this where the number of clients is what
neighbours differ in, so no amplification is claimed: Gaussian(z / 2). Under zeroing out the cohort is the same for both
neighbours, and Gaussian(z) holds, cohort for cohort; the amplified bound counts two norms, and is used where it can be
the smaller one, at m <= N / 2. (An accountant multiplies by two for replacement itself.)

The number of clients is public, and so is everything else here.

References:
    [1] McMahan, Ramage, Talwar, Zhang, Learning Differentially Private Recurrent Language Models, 2018.
        arXiv:1710.06963, section 2.
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal, final, get_args

from scipy import optimize

import accountants
from accountants import (
    Event,
    Gaussian,
    Interval,
    NeighboringRelation,
    PoissonSampled,
    PRVAccountant,
    SampledWithoutReplacement,
    arguments,
)
from dpdl.errors import ParameterError, PrivacyWarning
from dpdl.federated.adaptive_clipping import NORM_RANGE, AdaptiveClipping
from dpdl.federated.client_sampling import ClientSampling, EveryClient, FixedSizeClients, PoissonClients

__all__ = ["ClientLevelPlan"]

_SCHEMA = "dpdl.client_level_plan/1"
_TOLERANCE = 1e-5  # relative, of a calibrated noise multiplier
_MOST_NOISE = 1e7
_LEAST_EPSILON = 1e-9  # smaller ones are none, where a logarithm is taken

Sampling = Literal["poisson", "fixed_size", "all"]


@final
@dataclass(frozen=True, kw_only=True)
class ClientLevelPlan:
    """What the server will do, as far as its clients' privacy is concerned.

    Attributes:
        clients: N, how many there are at most; public.
        noise_multiplier: z >= 0, noise standard deviation over the sum's sensitivity, max_weight * max_update_norm;
            with adaptive clipping, of the sum and the bits together. 0 gives no privacy.
        max_update_norm: S, the L2 norm to which an update is clipped, over all its tensors; with adaptive clipping, in
            the first round.
        rounds: noisy releases, at most.
        sampling: "poisson" (needs sample_rate), "fixed_size" (needs cohort) or "all".
        sample_rate: q in (0, 1], the probability that a client is in a round.
        cohort: m, the clients of a round.
        max_weight: the most that a client's update counts; larger weights are lowered to it.
        expected_weight: a public guess of the clients' mean weight. The noisy sum is divided by it and by the expected
            cohort: never by who replied.
        adaptive_clipping: how the clipping norm changes; None keeps it.
        relation: what neighbouring federations differ in: "add_or_remove" (one client), "zero_out" (one client's
            update is nothing) or "replace_one" (one client's whole data).

    Raises:
        ParameterError: a value is out of range, or contradicts another.

    References:
        McMahan, Ramage, Talwar, Zhang, 2018 (the module has it). arXiv:1710.06963, section 2.
    """

    clients: int
    noise_multiplier: float
    max_update_norm: float
    rounds: int
    sampling: Sampling = "poisson"
    sample_rate: float | None = None
    cohort: int | None = None
    max_weight: float = 1.0
    expected_weight: float = 1.0
    adaptive_clipping: AdaptiveClipping | None = None
    relation: str = "add_or_remove"

    def __post_init__(self) -> None:
        _set = object.__setattr__  # frozen: numbers are brought to plain Python types once, here
        _set(self, "clients", arguments.positive_whole("clients", self.clients, remedy="Count the clients."))
        _set(self, "rounds", arguments.steps(self.rounds, "rounds"))
        _set(self, "noise_multiplier", arguments.noise_scale("noise_multiplier", self.noise_multiplier))
        for name in ("max_update_norm", "max_weight", "expected_weight"):
            value = arguments.real(name, getattr(self, name), remedy="Give a number such as 1.0.")
            _refuse_outside(name, value)
            _set(self, name, value)
        _set(self, "relation", NeighboringRelation.of(self.relation).value)
        if self.sampling not in get_args(Sampling):
            raise ParameterError(f"sampling must be one of {get_args(Sampling)}, got {self.sampling!r}.")
        self._settle_the_sampling()
        if self.adaptive_clipping is not None:
            if not isinstance(self.adaptive_clipping, AdaptiveClipping):
                raise ParameterError(
                    f"adaptive_clipping must be an AdaptiveClipping, got {self.adaptive_clipping!r}. "
                    "Give AdaptiveClipping(quantile=0.5), or None for a fixed norm."
                )
            _ = self.update_noise_multiplier  # refuses a bit that spends more than there is
        PRVAccountant(relation=self.neighbours).compose(self.event())  # has a proof

    def _settle_the_sampling(self) -> None:
        wanted = {"poisson": "sample_rate", "fixed_size": "cohort", "all": None}[self.sampling]
        for name in ("sample_rate", "cohort"):
            given = getattr(self, name) is not None
            if given != (name == wanted):
                raise ParameterError(
                    f"sampling={self.sampling!r} {'has no' if given else 'needs a'} {name}, got "
                    f"sample_rate={self.sample_rate!r}, cohort={self.cohort!r}. Give sample_rate with 'poisson', "
                    "cohort with 'fixed_size', neither with 'all'."
                )
        if self.sample_rate is not None:
            object.__setattr__(self, "sample_rate", PoissonClients(self.sample_rate).rate)
        if self.cohort is not None:
            object.__setattr__(self, "cohort", FixedSizeClients(self.cohort).size)
            if self.cohort > self.clients:
                raise ParameterError(f"cohort must be at most clients = {self.clients}, got {self.cohort}.")

    # ── what a round does ───────────────────────────────────────────────────────────────────────────

    @property
    def neighbours(self) -> NeighboringRelation:
        """The relation."""
        return NeighboringRelation(self.relation)

    @property
    def relation_phrase(self) -> str:
        """The relation as reports say it: 'adding or removing one client'."""
        return self.neighbours.phrase.replace("example", "client")

    @property
    def steps(self) -> int:
        """Releases, as a run's ledger counts them: the rounds."""
        return self.rounds

    @property
    def client_sampling(self) -> ClientSampling:
        """Who draws a round's clients."""
        if self.sample_rate is not None:
            return PoissonClients(self.sample_rate)
        return EveryClient() if self.cohort is None else FixedSizeClients(self.cohort)

    @property
    def expected_cohort(self) -> float:
        """Clients in a round: q N, m or N."""
        if self.sample_rate is not None:
            return self.sample_rate * self.clients
        return float(self.clients if self.cohort is None else self.cohort)

    @property
    def denominator(self) -> float:
        """What the noisy sum is divided by, whoever replied: expected cohort times expected weight."""
        return self.expected_cohort * self.expected_weight

    @property
    def update_noise_multiplier(self) -> float:
        """z of the sum of updates: noise_multiplier, or with adaptive clipping a little more."""
        if self.adaptive_clipping is None:
            return self.noise_multiplier
        return self.adaptive_clipping.update_noise_multiplier(
            noise_multiplier=self.noise_multiplier, cohort=self.expected_cohort
        )

    @property
    def bit_noise(self) -> float | None:
        """Standard deviation of the noise on the sum of the "not clipped" bits; None without adaptive clipping."""
        if self.adaptive_clipping is None:
            return None
        return self.adaptive_clipping.bit_noise(noise_multiplier=self.noise_multiplier, cohort=self.expected_cohort)

    # ── what it costs ───────────────────────────────────────────────────────────────────────────────

    @property
    def amplified(self) -> bool:
        """Whether the claim counts on nobody knowing who took part."""
        if self.cohort is None:
            return self.sample_rate is not None and self.sample_rate < 1
        if self.neighbours is NeighboringRelation.ADD_OR_REMOVE:
            return False
        most = self.clients - 1 if self.neighbours is NeighboringRelation.REPLACE_ONE else self.clients // 2
        return self.cohort <= most

    def event(self, rounds: int = 1) -> Event:
        """The privacy event of one round, or of so many rounds."""
        event = self._round(self.noise_multiplier)
        return event if rounds == 1 else event * rounds

    def _round(self, noise_multiplier: float) -> Event:
        if self.sample_rate is not None:
            return PoissonSampled(self.sample_rate, Gaussian(noise_multiplier))
        if self.cohort is None:
            return Gaussian(noise_multiplier)
        if self.amplified:
            return SampledWithoutReplacement(self.cohort, self.clients, Gaussian(noise_multiplier))
        by_two = self.neighbours is NeighboringRelation.ADD_OR_REMOVE
        return Gaussian(noise_multiplier / 2 if by_two else noise_multiplier)

    def epsilon(self, delta: float) -> float:
        """An upper bound on the epsilon of all rounds at `delta`, for the unit of one client."""
        return self.interval(delta).upper

    def interval(self, delta: float) -> Interval:
        """A lower and an upper bound on the plan's epsilon at `delta`."""
        bounds = self._interval(self.noise_multiplier, delta)
        self._warn_if_delta_is_large(delta)
        return bounds

    def _interval(self, noise_multiplier: float, delta: float) -> Interval:
        return (
            PRVAccountant(relation=self.neighbours).compose(self._round(noise_multiplier) * self.rounds).interval(delta)
        )

    def calibrated(self, *, epsilon: float, delta: float) -> ClientLevelPlan:
        """The same plan with the least noise multiplier (to 1e-5 relative) that keeps it within (epsilon, delta).

        Guarantee: `plan.calibrated(epsilon=e, delta=d).epsilon(d) <= e`.

        Args:
            epsilon, delta: the budget.

        Raises:
            ParameterError: no noise is enough, or with adaptive clipping the bits' fixed noise is too little for it.
        """
        budget, delta = arguments.epsilon(epsilon), arguments.delta(delta)
        if self.cohort is None:
            noise = accountants.noise_multiplier(
                epsilon=budget,
                delta=delta,
                sample_rate=1.0 if self.sample_rate is None else self.sample_rate,
                steps=self.rounds,
                relation=self.neighbours,
            )
        else:
            noise = self._least_noise(budget, delta)
        self._warn_if_delta_is_large(delta)
        return replace(self, noise_multiplier=noise)

    def _least_noise(self, epsilon: float, delta: float) -> float:
        """Where epsilon, which falls as the noise grows, meets the budget; from above, and checked there."""

        def beyond(log_noise: float) -> float:
            spent = self._interval(math.exp(log_noise), delta).upper
            return math.log(min(max(spent, _LEAST_EPSILON), 1 / _LEAST_EPSILON) / max(epsilon, _LEAST_EPSILON))

        low, high = 0.0, 0.0
        while beyond(high) > 0:
            low, high = high, high + 1
            if high > math.log(_MOST_NOISE):
                raise ParameterError(
                    f"epsilon {epsilon!r} is out of reach at delta {delta!r}: noise_multiplier {_MOST_NOISE:g} still "
                    "spends more. Plan fewer rounds, or a larger epsilon or delta."
                )
        while low >= high or beyond(low) <= 0:
            low, high = low - 1, low
            if low < -math.log(_MOST_NOISE):
                return math.exp(high)
        noise = math.exp(optimize.brentq(beyond, low, high, xtol=_TOLERANCE / 4))
        while self._interval(noise, delta).upper > epsilon:
            noise *= 1 + _TOLERANCE / 2
        return noise

    def _warn_if_delta_is_large(self, delta: float) -> None:
        if delta >= 1 / self.clients:
            warnings.warn(
                f"delta = {delta:g} is not below 1/N = {1 / self.clients:g} for {self.clients} clients: a mechanism "
                "that publishes one client's data outright would meet it. Choose a smaller delta.",
                PrivacyWarning,
                stacklevel=3,
            )

    # ── JSON ────────────────────────────────────────────────────────────────────────────────────────

    def to_json(self) -> str:
        """The plan as JSON, with its schema."""
        return json.dumps({"schema": _SCHEMA, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> ClientLevelPlan:
        """The plan that `to_json` wrote.

        Raises:
            ParameterError: not such a text, or with fields missing or unknown.
        """
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, TypeError) as error:
            raise ParameterError(f"Not a plan: the text is not JSON ({error}).") from error
        if not isinstance(values, dict) or values.pop("schema", None) != _SCHEMA:
            raise ParameterError(f"Not a plan of client-level privacy: expected a JSON object of schema {_SCHEMA!r}.")
        _refuse_other_fields(values, cls)
        adaptive = values["adaptive_clipping"]
        if adaptive is not None:
            if not isinstance(adaptive, dict):
                raise ParameterError(f"Not a plan: adaptive_clipping is {adaptive!r}.")
            _refuse_other_fields(adaptive, AdaptiveClipping)
            values["adaptive_clipping"] = AdaptiveClipping(**adaptive)
        return cls(**values)

    def __str__(self) -> str:
        return (
            f"{self.rounds:,} rounds; each {self._drawing}, clips each one's update to L2 norm "
            f"{self.max_update_norm:g}{self._adapting}, weighs it by at most {self.max_weight:g} and adds Gaussian "
            f"noise of {self.update_noise_multiplier:.6g} times the product to the sum, which is divided by "
            f"{self.denominator:g} whoever replies; {self._accounting}; neighbouring federations differ by "
            f"{self.relation_phrase}."
        )

    @property
    def _drawing(self) -> str:
        if self.sample_rate is not None:
            return f"draws every one of {self.clients:,} clients independently with probability {self.sample_rate:.6g}"
        if self.cohort is not None:
            return f"draws {self.cohort:,} of {self.clients:,} clients, all such cohorts being equally likely"
        return f"asks all of {self.clients:,} clients"

    @property
    def _adapting(self) -> str:
        if self.adaptive_clipping is None:
            return ""
        return (
            f" in the first round ({self.adaptive_clipping}, by bits with noise {self.bit_noise:.6g}; both together "
            f"have noise multiplier {self.noise_multiplier:.6g})"
        )

    @property
    def _accounting(self) -> str:
        if self.amplified:
            return "amplified by sampling, which holds as long as nobody learns who took part"
        if self.cohort is not None and self.neighbours is NeighboringRelation.ADD_OR_REMOVE:
            return (
                "not amplified by sampling: a client that joins a cohort of a fixed size keeps another one out, which "
                "moves the sum by two bounds"
            )
        return "not amplified by sampling"


def _refuse_outside(name: str, value: float) -> None:
    low, high = NORM_RANGE
    if not low <= value <= high:
        raise ParameterError(f"{name} must be in [{low:g}, {high:g}], got {value!r}. Give a number near 1.")


def _refuse_other_fields(values: dict[str, object], kind: type) -> None:
    known = {f.name for f in fields(kind)}
    if set(values) != known:
        raise ParameterError(
            f"Not a plan: missing fields {sorted(known - set(values))}, unknown fields {sorted(set(values) - known)}."
        )
