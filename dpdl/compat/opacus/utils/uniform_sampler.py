"""Poisson sampling as a batch sampler."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from dpdl.compat.opacus.errors import NotOfferedError
from dpdl.compat.opacus.randomness import Randomness
from dpdl.errors import ParameterError
from dpdl.sampling import PoissonSampler

__all__ = ["DistributedUniformWithReplacementSampler", "UniformWithReplacementSampler"]

_WHOLE = 1e-9  # a quotient this near to a whole number is that number


class UniformWithReplacementSampler(Sampler[list[int]]):
    """Batches that each example joins by its own coin (the name is Opacus's: nothing is drawn twice in a batch).

    Args:
        num_samples: n > 0, examples in the dataset.
        sample_rate: q in (0, 1].
        generator: the script's own source of randomness; None for the operating system (or torch's seed, if set).
        steps: batches in a pass; None for 1 / sample_rate, as whole.
        secure: draw from the operating system whatever was seeded.

    Raises:
        ParameterError: a number is out of range.
    """

    def __init__(
        self,
        *,
        num_samples: int,
        sample_rate: float,
        generator: torch.Generator | None = None,
        steps: int | None = None,
        secure: bool = False,
    ) -> None:
        if not num_samples > 0:
            raise ParameterError(f"num_samples must be > 0, got {num_samples}: the dataset is empty.")
        if not 0 < sample_rate <= 1:
            raise ParameterError(f"sample_rate must be in (0, 1], got {sample_rate}.")
        self.num_samples = num_samples
        self.sample_rate = sample_rate
        self.generator = generator
        self.steps = int(1 / sample_rate * (1 + _WHOLE)) if steps is None else steps
        self._randomness = Randomness(generator, secure=secure)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        sampler = PoissonSampler(self.num_samples, self.sample_rate, self._randomness.next_stream("sampled batches"))
        for step in range(self.steps):
            yield sampler.draw(step).tolist()


class DistributedUniformWithReplacementSampler(Sampler[int]):
    """The name; making one is refused.

    Raises:
        NotOfferedError: always.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise NotOfferedError(
            "This facade runs in one process. For several, use dpdl.make_private, the library's own interface."
        )
