"""One party's parts in one step: from per-sample gradients to the clipped sum that its noise goes to.

With part clipping each piece is clipped as it comes. With joint clipping the pieces wait for the rows' weights, which
need the norms of all parties: `norms` goes out, weights come back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dpdl.clipping import flat_weights
from dpdl.errors import ChannelError
from dpdl.per_sample.engine import PerSampleGradients, accumulation_dtype
from dpdl.split.clip import Clip, JointClip, PartClip
from dpdl.types import ClippedSum

__all__ = ["ClippedParts", "joined_norms", "joint_weights"]


class ClippedParts:
    """What the parts of one party add to one step.

    Args:
        clip: how rows are clipped.
        sensitivity: C, that all parts of all parties together are bounded by: what the noise is scaled to.
    """

    def __init__(self, clip: Clip, *, sensitivity: float) -> None:
        self._clip = clip
        self._sensitivity = sensitivity
        self._sums: dict[str, Tensor] = {}
        self._pieces: dict[str, list[PerSampleGradients]] = {}
        self._norms: dict[str, list[Tensor]] = {}
        self._counts = {"clipped": 0, "non_finite": 0}

    def add(self, part: str, piece: PerSampleGradients) -> None:
        """The per-sample gradients of some of the rows of a part, in order."""
        norms = piece.norms()
        if isinstance(self._clip, PartClip):
            self._add(part, piece, norms, flat_weights(norms, max_grad_norm=self._clip.of(part)))
        else:
            self._pieces.setdefault(part, []).append(piece)
            self._norms.setdefault(part, []).append(norms)

    def _add(self, part: str, piece: PerSampleGradients, norms: Tensor, weights: Tensor) -> None:
        self._counts["non_finite"] += int((~torch.isfinite(norms)).sum())
        self._counts["clipped"] += int(((weights > 0) & (weights < 1)).sum())
        for name, tensor in piece.weighted_sum(weights).items():
            key = f"{part}/{name}"
            self._sums[key] = self._sums[key] + tensor if key in self._sums else tensor

    def norms(self) -> Tensor | None:
        """The norm of each row over all of this party's parts, shape [N]; None before any piece, or with part clip."""
        return joined_norms([torch.cat(parts) for parts in self._norms.values()])

    def take_weights(self, weights: Tensor) -> None:
        """The rows' weights, shape [N], from `joint_weights`: the waiting pieces are added up.

        Raises:
            ChannelError: they are not this step's.
        """
        own = self.norms()
        if own is None:
            return
        if weights.shape != own.shape or not bool(((weights >= 0) & (weights <= 1)).all()):
            raise ChannelError(f"The rows' weights must be {len(own)} numbers in [0, 1], got {tuple(weights.shape)}.")
        assert isinstance(self._clip, JointClip)
        # A weight from elsewhere may shorten a row further, and never leave it longer than C.
        safe = torch.minimum(weights.to(own), flat_weights(own, max_grad_norm=self._clip.max_grad_norm))
        for part, pieces in self._pieces.items():
            begin = 0
            for piece, norms in zip(pieces, self._norms[part], strict=True):
                self._add(part, piece, norms, safe[begin : begin + len(norms)].to(norms))
                begin += len(norms)
        self._pieces, self._norms = {}, {}

    def total(
        self, trainable: Mapping[str, Mapping[str, Tensor]], *, rows: int, accumulate_dtype: torch.dtype
    ) -> ClippedSum:
        """The sum, with zeros for parameters that no row has used: they get their noise like all others.

        Args:
            trainable: part to its parameters.
            rows: N.
            accumulate_dtype: the least precise dtype of the sum.
        """
        tensors = {}
        for part, parameters in trainable.items():
            for name, p in parameters.items():
                found = self._sums.get(f"{part}/{name}")
                dtype = accumulation_dtype(p.dtype, accumulate_dtype)
                tensors[f"{part}/{name}"] = torch.zeros_like(p, dtype=dtype).detach() if found is None else found
        return ClippedSum(tensors=tensors, sensitivity=self._sensitivity, examples=rows, **self._counts)


def joined_norms(norms: Sequence[Tensor]) -> Tensor | None:
    """The norm of each row over what several norms are of, in the least precise of their dtypes; None of none."""
    if not norms:
        return None
    narrowest = min((n.dtype for n in norms), key=lambda dtype: torch.finfo(dtype).bits)
    return torch.stack([n.detach().cpu().double().square() for n in norms]).sum(0).sqrt().to(narrowest)


def joint_weights(norms: Tensor, *, max_grad_norm: float) -> Tensor:
    """Weights that bring each row's gradient over all parts to norm at most max_grad_norm; 0 where not finite."""
    return flat_weights(norms, max_grad_norm=max_grad_norm)
