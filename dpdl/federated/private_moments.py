"""A client's moments of its features, released once through its ledger.

    moments = PrivateMoments("h1", images, lower=[0.0], upper=[1.0], noise_multiplier=20.0, ledger="h1.ledger")
    answer = moments.release().to_dict()                       # plain values: the reply to a query

Statistics of raw data are a release like any other, and forgotten more often than any: a scaler that was fitted before
private training tells who was in it. Here the client records one Gaussian mechanism in its ledger, and then draws the
noise (`noisy_moments` says of what, `normalisation` what becomes of it).

Private: the features. Public: bounds, number of features, the noisy moments.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from accountants import Gaussian, arguments
from dpdl.checkpoint_format import read_tree
from dpdl.errors import CheckpointError, DataError, ParameterError
from dpdl.federated.client_settings import checked_name
from dpdl.federated.durable_file import write_durably
from dpdl.federated.noisy_moments import LABEL, SQUARES, NoisyMoments, joint_sensitivity, of_count, refuse_no_bounds
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from dpdl.noise import gaussian_mechanism
from dpdl.process_lock import ProcessLock
from dpdl.secure_random import RandomStream
from dpdl.types import ClippedSum

__all__ = ["PrivateMoments"]

_GRID = 2.0**24  # z and z^2 are whole multiples of its reciprocal: sums of fewer than 2^29 records are exact in float64
_MOST_RECORDS = 1 << 28
_SCHEMA = "dpdl.federated.kept_moments/1"


class PrivateMoments:
    """A client's moments, released once: whoever asks again gets the same, which costs nothing.

    Args:
        name: the client's.
        features: the records, shape [N, d] or [N, d, ...] (values of axis 1 are features; an image's pixels are values
            of its channel), any real dtype; or parts of them, to be read one after another (a list, a loader). N may
            be 0.
        lower, upper: the features' public bounds; values beyond are clipped.
        noise_multiplier: > 0, the noise's standard deviation over the joint sensitivity. 0 releases the moments as they
            are; epsilon is then infinite.
        ledger: the ledger of these records, or its file's path.
        federation: what for; told in the ledger.
        insecure_seed: for reproducible noise; whoever knows it can remove the noise.
        kept: a file in which what was released outlives the process; by default it ends with this object, and another
            one releases, and spends, anew.

    Guarantee:
        What `release` returns is one Gaussian mechanism of noise_multiplier, recorded before the noise is drawn, for
        whatever relation the ledger is of.

    Raises:
        ParameterError: an argument is out of range, or what is kept was released with other ones.
        CheckpointError: what is kept cannot be read.
    """

    def __init__(
        self,
        name: str,
        features: Tensor | Iterable[Tensor],
        *,
        lower: Sequence[float],
        upper: Sequence[float],
        noise_multiplier: float,
        ledger: Ledger | LedgerFile | str | os.PathLike[str],
        federation: str = "federation",
        insecure_seed: int | None = None,
        kept: str | os.PathLike[str] | None = None,
    ) -> None:
        checked_name(name)
        checked_name(federation, of="federation")
        if not isinstance(features, Iterable) or isinstance(features, (str, bytes)):
            raise ParameterError(f"features must be a tensor, or parts of one, got {type(features).__name__}.")
        if isinstance(features, Iterator):
            raise ParameterError(
                "features is an iterator, which is empty the second time it is read. Give a tensor, a list of tensors "
                "or a loader."
            )
        self.name = name
        self._features = features
        self._lower, self._upper = _bounds("lower", lower), _bounds("upper", upper)
        refuse_no_bounds(self._lower, self._upper)
        self._event = Gaussian(noise_multiplier)
        seed = insecure_seed
        stream = RandomStream.from_os() if seed is None else RandomStream.from_insecure_seed(seed)
        self._stream = stream.child(LABEL).child(name).child(federation)
        if not isinstance(ledger, (str, os.PathLike, Ledger, LedgerFile)):
            raise ParameterError(f"ledger must be a Ledger, a LedgerFile or the path of one, got {ledger!r}.")
        if kept is not None and not isinstance(kept, (str, os.PathLike)):
            raise ParameterError(f"kept must be the path of a file, got {kept!r}. Leave it out to keep nothing.")
        self.ledger = ledger if isinstance(ledger, (Ledger, LedgerFile)) else LedgerFile(ledger)
        self.run = f"{federation}/{LABEL}"
        self._lock = ProcessLock()
        self.kept = None if kept is None else Path(kept).absolute()
        self._released = self._read()

    @property
    def released(self) -> NoisyMoments | None:
        """What has been released, if it has; no data is read, and nothing is spent."""
        return self._released

    def release(self) -> NoisyMoments:
        """Record the release, draw the noise, keep what may leave, and return it.

        Raises:
            CheckpointError: it could not be kept; it is spent, and does not leave.
            BudgetExceededError: it would overspend; the data was read, and nothing of it has left.
            DataError: records have another number of features than there are bounds, or values that are not finite
                (clean or leave out those records). Nothing was recorded. **The message is for the data's owner**: that
                it comes, depends on the data.
        """
        with self._lock:
            if self._released is None:
                drawn = self._draw()
                self._keep(drawn)
                self._released = drawn
            return self._released

    def _keep(self, moments: NoisyMoments) -> None:
        if self.kept is None:
            return
        try:
            write_durably({"schema": _SCHEMA, "run": self.run, "moments": moments.to_dict()}, self.kept)
        except (OSError, RuntimeError) as error:  # torch has its own, for a full disk
            raise CheckpointError(f"Moments could not be kept in {self.kept}: {error}. They do not leave.") from error

    def _read(self) -> NoisyMoments | None:
        if self.kept is None or not self.kept.exists():
            return None
        tree = read_tree(self.kept, named=self.kept)
        if not isinstance(tree, dict) or tree.get("schema") != _SCHEMA:
            raise CheckpointError(f"{self.kept} has no moments in it, of schema {_SCHEMA}. Name another file.")
        moments = NoisyMoments.from_dict(tree["moments"])
        now = (self.run, self.name, self._lower, self._upper, self._event.noise_multiplier)
        before = (tree["run"], moments.client, moments.lower, moments.upper, moments.noise_multiplier)
        if now != before:
            raise ParameterError(
                f"{self.kept} has what was released as {before}, and this is {now}: it would be another release, and "
                "another expense. Give the same federation, name, bounds and noise; or, to spend again, another file."
            )
        return moments

    def _draw(self) -> NoisyMoments:
        d = len(self._lower)
        total = _sums(self._features, self._lower, self._upper, client=self.name)
        number = self.ledger.record(self._event, label=LABEL, run=self.run, branch=self._stream.name)
        noisy = gaussian_mechanism(
            ClippedSum(
                tensors={"moments": total}, sensitivity=joint_sensitivity(d), examples=0, clipped=0, non_finite=0
            ),
            noise_multiplier=self._event.noise_multiplier,
            stream=self._stream,
            step=number,  # each release in the ledger has noise of its own
        ).tensors["moments"]
        return NoisyMoments(
            client=self.name,
            lower=self._lower,
            upper=self._upper,
            count=noisy[0].item() / of_count(d),
            sums=tuple(noisy[1 : d + 1].tolist()),
            squares=tuple((noisy[d + 1 :] / SQUARES).tolist()),
            noise_multiplier=self._event.noise_multiplier,
        )


def _bounds(name: str, values: Sequence[float]) -> tuple[float, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ParameterError(f"{name} must be numbers, one for each feature, got {values!r}.")
    return tuple(arguments.reals(name, list(values), remedy="Give one number for each feature.").tolist())


def _sums(
    features: Tensor | Iterable[Tensor], lower: tuple[float, ...], upper: tuple[float, ...], *, client: str
) -> Tensor:
    """The sum of the records' vectors v, shape [2 d + 1], float64."""
    d = len(lower)
    low, high = (torch.tensor(bound, dtype=torch.float64) for bound in (lower, upper))
    half = (high - low) / 2
    count = 0
    total = torch.zeros(2, d, dtype=torch.float64)
    for part in [features] if isinstance(features, Tensor) else features:
        _refuse_what_has_no_moments(part, d, client=client)
        values = _by_feature(part.detach().to("cpu", torch.float64))
        z = ((values - (low + half).view(1, d, 1)) / half.view(1, d, 1)).clamp(-1, 1)
        total[0] += _on_grid(z.mean(-1)).sum(0)
        total[1] += _on_grid(z.square().mean(-1)).sum(0)
        count += len(part)
    if count > _MOST_RECORDS:
        raise DataError(f"Client {client!r} has {count} records; sums of more than {_MOST_RECORDS} would be rounded.")
    return torch.cat(
        [torch.tensor([of_count(d) * count], dtype=torch.float64), total[0], SQUARES * (total[1] - count / 2)]
    )


def _by_feature(part: Tensor) -> Tensor:
    """[N, d, ...] to [N, d, values]."""
    return part.flatten(2) if part.dim() > 2 else part.unsqueeze(-1)


def _on_grid(values: Tensor) -> Tensor:
    """Rounded so that they add up exactly: neighbours' sums differ by what the record adds, and by nothing else."""
    return torch.round(values * _GRID) / _GRID


def _refuse_what_has_no_moments(part: Tensor, features: int, *, client: str) -> None:
    if not isinstance(part, Tensor) or part.dim() < 2 or part.shape[1] != features or part.is_complex():
        got = f"{part.dtype} of shape {list(part.shape)}" if isinstance(part, Tensor) else repr(type(part).__name__)
        raise DataError(
            f"features of client {client!r} must be real, of shape [N, {features}, ...] as there are {features} "
            f"bounds, got {got}."
        )
    if math.prod(part.shape[2:]) == 0:
        raise DataError(f"features of client {client!r} have no values: shape {list(part.shape)}.")
    if part.is_floating_point() and not bool(torch.isfinite(part).all()):
        bad = _by_feature(torch.isfinite(part).logical_not()).any(-1)
        at = sorted(set(bad.nonzero()[:, 1].tolist()))
        raise DataError(
            f"{int(bad.any(1).sum())} records of client {client!r} have values that are not finite (features "
            f"{at[:8]}). Clean them or leave them out; which, must not depend on other records. Nothing was released."
        )
