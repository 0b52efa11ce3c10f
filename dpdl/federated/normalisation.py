"""One mean and standard deviation over clients, from the noisy moments that each has released.

    found = combined_moments(NoisyMoments.from_dict(answer) for answer in answers)
    found.apply(images)                                        # every client: (x - mean) / std

Post-processing: it costs nothing, and whoever has the clients' moments can do it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from dpdl.errors import DataError, ParameterError
from dpdl.federated.noisy_moments import NoisyMoments, is_finite

__all__ = ["Normalisation", "combined_moments"]

_WIDTH = 1 / 16  # of the uniform part of the noise, in standard deviations (`dpdl.noise.normals`)
_ROUNDED = 2.0**-24  # by how much a record's values are rounded, in half-ranges (`dpdl.federated.private_moments`)


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """One mean and one standard deviation for each feature, over all clients' records: what `combined_moments` finds.

    Guarantee:
        It is computed from what the clients have released, and from public bounds: whoever has it learns no more than
        from those, and `apply` may be used on any data. That it is accurate is a matter of `accuracy`.

    Attributes:
        mean, std: by feature, in the features' own unit.
        count: of records, as far as it is known.
        clients: who took part.
        lower, upper: the bounds to which values were clipped.
        variance_floor: the least variance, in units of the squared half-range.
        noise: standard deviation of the noise in count, in each sum and in each of the squares, of all clients.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    count: float
    clients: tuple[str, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    variance_floor: float
    noise: tuple[float, float, float]

    def accuracy(self, probability: float = 0.95) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """How far mean and std may be from those of the clipped records.

        A union bound over the 2 d + 1 normals that were drawn; with S, n and m = S / n the true sum, count and mean of
        z, and e their noise, the noisy mean is off by (e_S - m e_n) / (n + e_n).

        Args:
            probability: with which both bounds hold for all features together, in (0, 1).

        Returns:
            For each feature the largest error of its mean, and of its std (against the true one, or the floor where
            that is smaller). They say nothing of what clipping to the bounds, or a client that lies, has changed.

        Raises:
            ParameterError: probability is not in (0, 1).
        """
        if not 0 < probability < 1:
            raise ParameterError(f"probability must be in (0, 1), got {probability!r}.")
        failing = (1 - probability) / (2 * len(self.mean) + 1)
        normals = NormalDist().inv_cdf(1 - failing / 2) + _WIDTH
        in_count, in_sum, in_square = (std * normals / self.count for std in self.noise)
        of_mean, of_std = [], []
        for low, high, mean, std in zip(self.lower, self.upper, self.mean, self.std, strict=True):
            half = (high - low) / 2
            size = abs((mean - low) / half - 1)
            error = min(2.0, in_sum + in_count)  # as |m| <= 1
            if in_count < 1:  # or, as |m| is at most the noisy mean's and the error
                error = min(error, (in_sum + size * in_count) / (1 - in_count))
            of_square = error * min(2.0, 2 * size + error)
            of_variance = min(1.0, in_square + in_count / 2 + of_square) + _ROUNDED
            of_mean.append(half * (error + _ROUNDED))
            of_std.append(min(half, half * half * of_variance / std))  # |s' - s| = |v' - v| / (s' + s)
        return tuple(of_mean), tuple(of_std)

    def apply(self, features: Tensor) -> Tensor:
        """(x - mean) / std of records, shape [N, d] or [N, d, ...]; floating point.

        Raises:
            ParameterError: axis 1 is not as long as there are features.
        """
        if features.dim() < 2 or features.shape[1] != len(self.mean):
            raise ParameterError(
                f"features must have shape [N, {len(self.mean)}, ...], got {list(features.shape)}. For one record, "
                "give record.unsqueeze(0)."
            )
        kept = features if features.is_floating_point() else features.to(torch.get_default_dtype())
        shape = (1, -1, *[1] * (features.dim() - 2))
        mean, std = (torch.tensor(values, dtype=kept.dtype, device=kept.device) for values in (self.mean, self.std))
        return (kept - mean.view(shape)) / std.view(shape)


def combined_moments(moments: Iterable[NoisyMoments], *, variance_floor: float = 1e-4) -> Normalisation:
    """One mean and standard deviation from what clients have released; post-processing, which costs nothing.

    Every record counts the same, at whatever client. mean = S / n, variance = Q / n - mean^2, brought back to where it
    can be: the mean within its bounds, the variance between `variance_floor` and 1 squared half-range.

    Args:
        moments: one of each client.
        variance_floor: in (0, 1], in units of the squared half-range: a feature that is divided by less than
            sqrt(variance_floor) of its half-range would be mostly noise.

    Raises:
        ParameterError: there are none, two of one client, of other bounds; or variance_floor is out of range.
        DataError: the noisy counts add up to less than one record.
    """
    given = tuple(moments)
    for one in given:
        if not isinstance(one, NoisyMoments):
            raise ParameterError(f"moments must be NoisyMoments, got {one!r}. Read it with NoisyMoments.from_dict.")
    if not given:
        raise ParameterError("moments is empty: no client has released any.")
    if not (is_finite(variance_floor) and 0 < variance_floor <= 1):
        raise ParameterError(f"variance_floor must be in (0, 1], got {variance_floor!r}.")
    clients = tuple(one.client for one in given)
    for name in clients:
        if clients.count(name) > 1:
            raise ParameterError(f"Client {name!r} is there more than once; its records would count twice.")
    first = given[0]
    for one in given:
        if (one.lower, one.upper) != (first.lower, first.upper):
            raise ParameterError(
                f"Client {one.client!r} has the bounds {one.lower} and {one.upper}, client {first.client!r} "
                f"{first.lower} and {first.upper}: their sums are of other things. Give all clients the same."
            )
    count = math.fsum(one.count for one in given)
    if not count >= 1:
        raise DataError(
            f"The noisy counts of {len(given)} clients add up to {count:.3g} records: there is no mean of so few. Use "
            "less noise, or more clients."
        )
    means, stds = [], []
    for j, (low, high) in enumerate(zip(first.lower, first.upper, strict=True)):
        half = (high - low) / 2
        mean = min(1.0, max(-1.0, math.fsum(one.sums[j] for one in given) / count))
        square = math.fsum(one.squares[j] for one in given) / count + 0.5
        variance = min(1.0, max(variance_floor, square - mean * mean))
        means.append(low + half + half * mean)
        stds.append(half * math.sqrt(variance))
    in_count, in_sum, in_square = (math.sqrt(math.fsum(one.noise[kind] ** 2 for one in given)) for kind in range(3))
    return Normalisation(
        mean=tuple(means),
        std=tuple(stds),
        count=count,
        clients=clients,
        lower=first.lower,
        upper=first.upper,
        variance_floor=variance_floor,
        noise=(in_count, in_sum, in_square),
    )
