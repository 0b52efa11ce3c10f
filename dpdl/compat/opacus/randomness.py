"""Where a facade run's randomness comes from: the operating system, unless the script asked to be reproducible.

Opacus draws noise and batches from torch's generators, and its scripts are made reproducible with
`torch.manual_seed` or a generator of their own. That is honoured, and warned of: whoever knows the seed can subtract
the noise. A script that seeds nothing, or sets `secure_mode=True`, gets keys from the operating system.
"""

from __future__ import annotations

import warnings

import torch

from dpdl.errors import PrivacyWarning
from dpdl.secure_random import RandomStream

__all__ = ["Randomness"]

# torch seeds itself with 53 bits from the operating system; seeds that people choose are smaller.
_SMALLEST_OWN_SEED = 2**40
_SEED_AT_IMPORT = torch.initial_seed()
_WORD = 2**62


class Randomness:
    """Streams for one use, such as noise.

    Args:
        generator: the script's own generator; None for none.
        secure: take keys from the operating system whatever was seeded.
    """

    def __init__(self, generator: torch.Generator | None, *, secure: bool) -> None:
        self.generator = generator
        self._secure = secure
        self._warned = False

    @property
    def is_secure(self) -> bool:
        """Whether the next stream's key will come from the operating system."""
        return self._secure or (self.generator is None and not _torch_was_seeded())

    def next_stream(self, use: str) -> RandomStream:
        """A stream that no other call gets; the same again only if the same generator is seeded alike again."""
        if self.is_secure:
            return RandomStream.from_os().child(use)
        if not self._warned:
            self._warned = True
            source = "a torch.Generator of the script" if self.generator is not None else "torch.manual_seed"
            warnings.warn(
                f"In this private run {use} can be reproduced: it follows {source}. Whoever knows the seed can "
                "subtract the noise, so the claim holds only against those who do not. Before you publish, run with "
                "PrivacyEngine(secure_mode=True); no further package is needed.",
                PrivacyWarning,
                stacklevel=4,
            )
        device = "cpu" if self.generator is None else self.generator.device
        high, low = torch.randint(_WORD, (2,), generator=self.generator, device=device).tolist()
        return RandomStream.from_insecure_seed(high * _WORD + low).child(use)


def _torch_was_seeded() -> bool:
    seed = torch.initial_seed()
    return seed != _SEED_AT_IMPORT or seed < _SMALLEST_OWN_SEED
