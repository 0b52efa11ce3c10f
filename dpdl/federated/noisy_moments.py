"""What a client releases for normalisation: noisy count, sums and sums of squares of its records' features.

A feature's public bounds [l, u] give its midpoint and half-range h. With z = (x - midpoint) / h, clipped to [-1, 1],
and d features, one record adds to the client's sums the vector

    v = (d^(1/4), z_1, ..., z_d, 2^(1/2) (z_1^2 - 1/2), ..., 2^(1/2) (z_d^2 - 1/2)),

whose entries are, up to fixed factors, count, sum and sum of squares. Since t + 2 (t - 1/2)^2, t = z^2, is convex and
largest at t = 1, adding or removing a record moves the sums by at most

    |v|_2 <= sqrt(d^(1/2) + 3 d / 2),

attained by a record at its bounds: the exact joint sensitivity. All entries get noise of noise_multiplier times that.
The factors are those that make the sum of the results' variances least: from Cauchy's inequality, each the fourth root
of (what its noise does to the results) over (its largest square).

Where a record has several values of a feature, as an image has pixels of a channel, z and z^2 are their means over the
record; the bound holds as before, since (mean z)^2 <= mean z^2 <= 1.

Public: everything here. The bounds must come from knowledge of the domain (pixels lie in [0, 1]), never from the data.

References:
    [1] Dwork and Roth, The Algorithmic Foundations of Differential Privacy, 2014, appendix A (Gaussian mechanism).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from accountants import arguments
from dpdl.errors import ParameterError
from dpdl.federated.inventory import UNPROTECTED, Inventory, Release

__all__ = ["LABEL", "SQUARES", "NoisyMoments", "is_finite", "joint_sensitivity", "of_count", "refuse_no_bounds"]

LABEL = "normalisation"  # in ledgers
SQUARES = math.sqrt(2)  # the factor before z^2 - 1/2
_SCHEMA = "dpdl.moments/1"


@dataclass(frozen=True, kw_only=True)
class NoisyMoments:
    """What one client has released: noisy count, sums and centred sums of squares, in units of the half-range.

    Attributes:
        client: whose.
        lower, upper: the public bounds, one for each feature.
        count: of records, with noise; may be negative.
        sums: of z, by feature, with noise.
        squares: of z^2 - 1/2, by feature, with noise.
        noise_multiplier: the noise's standard deviation over the joint sensitivity; 0 is no noise, and no privacy.

    Raises:
        ParameterError: a value is not finite, or there are not as many of a kind as bounds.
    """

    client: str
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    count: float
    sums: tuple[float, ...]
    squares: tuple[float, ...]
    noise_multiplier: float

    def __post_init__(self) -> None:
        if not isinstance(self.client, str) or not self.client:
            raise ParameterError(f"client of moments must be a name, got {self.client!r}.")
        refuse_no_bounds(self.lower, self.upper)
        arguments.noise_scale("noise_multiplier", self.noise_multiplier)
        for name in ("sums", "squares"):
            values = getattr(self, name)
            if len(values) != len(self.lower) or not all(is_finite(value) for value in values):
                raise ParameterError(
                    f"{name} of the moments of client {self.client!r} must be {len(self.lower)} finite numbers, got "
                    f"{values!r}. Leave the client out, or ask it again."
                )
        if not is_finite(self.count):
            raise ParameterError(
                f"count of the moments of client {self.client!r} must be finite, got {self.count!r}. Leave the client "
                "out, or ask it again."
            )

    @property
    def noise(self) -> tuple[float, float, float]:
        """Standard deviation of the noise in count, in each of the sums, and in each of the squares."""
        std = self.noise_multiplier * joint_sensitivity(len(self.lower))
        return std / of_count(len(self.lower)), std, std / SQUARES

    @property
    def releases(self) -> Inventory:
        """What leaves, and what covers it."""
        how = f"Gaussian noise of {self.noise_multiplier:g} times the joint sensitivity, in the ledger ({LABEL!r})"
        if self.noise_multiplier == 0:
            how = UNPROTECTED
        shape = (len(self.lower),)
        return Inventory(
            (
                Release(name="number of records", kind="count", mechanism=how),
                Release(name="sums", kind="metric", mechanism=how, shape=shape),
                Release(name="sums of squares", kind="metric", mechanism=how, shape=shape),
            )
        )

    def to_dict(self) -> dict[str, str | float | list[float]]:
        """Plain values, as messages carry them."""
        return {
            "schema": _SCHEMA,
            "client": self.client,
            "lower": list(self.lower),
            "upper": list(self.upper),
            "count": self.count,
            "sums": list(self.sums),
            "squares": list(self.squares),
            "noise_multiplier": self.noise_multiplier,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NoisyMoments:
        """What `to_dict` wrote, after whatever carried it.

        Raises:
            ParameterError: it is damaged, or something else.
        """
        if not isinstance(values, Mapping) or values.get("schema") != _SCHEMA:
            raise ParameterError(f"Not a client's moments: {values!r}. Give what NoisyMoments.to_dict wrote.")
        try:
            return cls(
                client=values["client"],
                count=values["count"],
                noise_multiplier=values["noise_multiplier"],
                **{name: tuple(values[name]) for name in ("lower", "upper", "sums", "squares")},
            )
        except (KeyError, TypeError) as error:
            raise ParameterError(
                f"Not a client's moments ({error!r}): {values!r}. Give what NoisyMoments.to_dict wrote."
            ) from error


def joint_sensitivity(features: int) -> float:
    """By how much a record can move the client's sums in L2 norm, all of them together: see the module."""
    return math.sqrt(math.sqrt(features) + 1.5 * features)


def of_count(features: int) -> float:
    """The factor before the count."""
    return math.sqrt(math.sqrt(features))


def refuse_no_bounds(lower: tuple[float, ...], upper: tuple[float, ...]) -> None:
    """Raise unless these are bounds."""
    if not lower or len(lower) != len(upper):
        raise ParameterError(f"lower and upper must have one bound for each feature, got {lower!r} and {upper!r}.")
    for j, (low, high) in enumerate(zip(lower, upper, strict=True)):
        if not (is_finite(low) and is_finite(high) and is_finite((high - low) / 2) and (high - low) / 2 > 0):
            raise ParameterError(
                f"lower and upper must be finite numbers with lower < upper, got {low!r} and {high!r} for feature {j}. "
                "Take them from what is known of the domain, never from the data."
            )


def is_finite(value: object) -> TypeGuard[float]:
    """Whether this is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
