"""Whether the other side treats rows one by one: asked with made-up rows, before any private one is sent.

    result = probe_rows(lambda rows, labels: channel_request(rows, labels), shape=(392,), classes=10)

If a batch normalisation, a contrastive term or a mean stands behind the cut, the gradient of one row depends on the
others, and what one example moves on this side is no longer one clipped gradient. So a made-up batch goes over twice
with one row changed, and the gradients of all other rows must stay. It costs no privacy: the rows are noise.

It finds mistakes, not malice. A probe is known as one to whoever answers it: its packets say so, since no step may
follow. A party can answer probes well and mix in training; when they are asked changes nothing. It also says nothing of
batches larger than the made-up one. A claim that must hold against such a server needs noise on the rows
(`CutRelease`), whose claim does not depend on what comes back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpdl.errors import ExampleMixingError, LossError, ModelError, ParameterError
from dpdl.secure_random import RandomStream

__all__ = ["ProbeResult", "Send", "probe_rows"]

# Given rows [n, *shape] and their labels [n] (None without classes): the gradient of the summed loss, row by row.
Send = Callable[[Tensor, Tensor | None], Tensor]

_ATTEMPTS = 3  # made-up batches of which one has to show gradients

# Differences below this part of the largest gradient are the kernels' rounding; the effect of one of eight rows on the
# others through a batch's statistics is a part in ten.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What came back.

    Attributes:
        batches: made-up batches sent.
        difference: the largest change of another row's gradient, over the largest gradient.
    """

    batches: int
    difference: float


def probe_rows(
    send: Send,
    shape: tuple[int, ...],
    *,
    classes: int | None = None,
    rows: int = 8,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    stream: RandomStream | None = None,
    number: int = 0,
) -> ProbeResult:
    """Send made-up batches, change one row, and see whether the others' gradients stay.

    Args:
        send: the other side's forward and backward, with the same random numbers (dropout) and weights each time, and
            without a step.
        shape: of one row.
        classes: how many labels there are, if labels go along; they are made up, too.
        rows: of a made-up batch, at least 4.
        scale: L2 norm of most rows; that to which rows are clipped, so that these look like them.
        dtype: of the rows.
        stream: where rows come from; by default the operating system.
        number: of this probe in the stream.

    Returns:
        What was seen.

    Guarantee:
        None against malice: a party that knows a probe when it sees one answers it well.

    Raises:
        ExampleMixingError: another row's gradient moved, or answers differ for the same batch.
        LossError: gradients shrink with the batch: the loss is a mean.
        ModelError: what came back is not a finite gradient for each row, or is zero whatever was sent, which shows
            nothing.
        ParameterError: an argument is out of range.
    """
    if rows < 4 or not scale > 0 or dtype not in _TOLERANCE:
        raise ParameterError(
            f"A probe needs rows >= 4, a scale > 0 and float32 or float64, got {rows}, {scale} and {dtype}."
        )
    made = _MadeUp(shape, classes, scale, dtype, (stream or RandomStream.from_os()).child("probe"), number)
    asked = _Asked(send)
    for _ in range(_ATTEMPTS):
        batch, labels = made.rows(rows), made.labels(rows)
        first = asked(batch, labels)
        if _with_gradients(first) > 1:
            break
    size = first.abs().max().item()
    bound = _TOLERANCE[dtype] * size
    if (again := (asked(batch, labels) - first).abs().max().item()) > bound:
        raise ExampleMixingError(
            f"The other side's gradients of the same made-up rows differ by {again:.3g} from one call to the next. It "
            "draws random numbers (dropout), keeps state from batches, or takes steps: answer probes with fixed random "
            "numbers and without a step."
        )
    largest = 0.0
    for change in (1.0, 100.0, 0.0):
        place = made.place(rows)
        others = torch.arange(rows) != place
        changed, relabelled = batch.clone(), None if labels is None else labels.clone()
        changed[place] = made.rows(1)[0] * change
        if relabelled is not None:
            relabelled[place] = made.labels(1)[0]  # type: ignore[index]
        moved = (asked(changed, relabelled) - first)[others].abs().max().item()
        if moved > bound:
            raise ExampleMixingError(
                f"One made-up row was changed, and the gradients of others moved by {moved:.3g}, where the largest is "
                f"{size:.3g}. The part behind the cut mixes examples (batch normalisation, a contrastive or normalised "
                "loss): one example would move what all others send back. Replace it (dpdl.check names it on that "
                "side, dpdl.fix replaces BatchNorm), or use a loss that is a sum over examples. Nothing private was "
                "sent."
            )
        largest = max(largest, moved)
    _refuse_means(asked, batch, labels, first, bound)
    if _with_gradients(first) <= 1:  # at the end: where only the batch's worst row has one, the halves have told
        raise ModelError(
            f"The other side's gradients of {_ATTEMPTS} batches of made-up rows are zero in all rows but one at most. "
            "Zero stays zero whatever rows do to each other, so this shows nothing. A head whose weights start at zero "
            "sends nothing back: start it from small random ones."
        )
    return ProbeResult(batches=asked.count, difference=largest / size)


def _with_gradients(rows: Tensor) -> int:
    """How many rows' gradients are not zero."""
    return int(rows.flatten(1).any(1).sum())


def _refuse_means(asked: _Asked, batch: Tensor, labels: Tensor | None, first: Tensor, bound: float) -> None:
    """Either half of the batch: gradients of a sum stay what they were.

    Either, since of a maximum over the batch the half that has it looks well.
    """
    half = len(batch) // 2
    for part in (slice(0, half), slice(half, None)):
        fewer = asked(batch[part], None if labels is None else labels[part])
        kept = first[part]
        if (fewer - kept).abs().max().item() <= bound:
            continue
        times = len(batch) / len(kept)
        if (fewer / times - kept).abs().max().item() <= bound:
            raise LossError(
                f"The gradients of {len(kept)} rows are {times:g} times what they are among {len(batch)}: the loss "
                "behind the cut is a mean. Rows are clipped one by one: use the sum, reduction='sum'. Nothing private "
                "was sent."
            )
        raise ExampleMixingError(
            f"The gradients of {len(kept)} made-up rows change when {len(batch) - len(kept)} others come along. The "
            "part behind the cut depends on the batch; it must treat examples one by one, and sum their losses. "
            "Nothing private was sent."
        )


class _Asked:
    """The other side, its answers checked."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.count = 0

    def __call__(self, rows: Tensor, labels: Tensor | None) -> Tensor:
        self.count += 1
        gradients = self._send(rows.clone(), None if labels is None else labels.clone())
        if not isinstance(gradients, Tensor) or gradients.shape != rows.shape:
            got = tuple(gradients.shape) if isinstance(gradients, Tensor) else type(gradients).__name__
            raise ModelError(
                f"For made-up rows of shape {tuple(rows.shape)} the other side sent back {got}: a gradient for each "
                "row is needed, in the same shape."
            )
        if not bool(torch.isfinite(gradients).all()):
            raise ModelError(
                "The other side's gradients of made-up rows are not all finite. Rows are normal with the scale that "
                "was given: choose one nearer to what the part expects."
            )
        return gradients.detach().to("cpu", torch.float64)


class _MadeUp:
    """Rows, labels and places from a stream: torch's own generator is left alone."""

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int | None,
        scale: float,
        dtype: torch.dtype,
        stream: RandomStream,
        number: int,
    ) -> None:
        self._shape, self._classes, self._scale, self._dtype = shape, classes, scale, dtype
        self._words = stream
        self._number = number
        self._used = 0

    def rows(self, count: int) -> Tensor:
        size = math.prod(self._shape)
        uniform = torch.from_numpy(self._next(12 * count * size).astype("float64")) / 2.0**64
        normal = uniform.reshape(12, -1).sum(0) - 6  # near enough: nothing rests on it
        return (normal * self._scale / math.sqrt(size)).reshape(count, *self._shape).to(self._dtype)

    def labels(self, count: int) -> Tensor | None:
        if self._classes is None:
            return None
        return torch.tensor([int(word) * self._classes >> 64 for word in self._next(count)])

    def place(self, rows: int) -> int:
        return int(self._next(1)[0]) * rows >> 64

    def _next(self, count: int) -> NDArray[np.uint64]:
        words = self._words.words(count, message=self._number, start=self._used)
        self._used += count
        return words
