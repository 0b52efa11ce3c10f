"""The framework's random state (dropout and the like): kept, replayed, or left untouched.

This is not the noise: that comes from `dpdl.secure_random`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["RandomState", "isolated_randomness"]


class RandomState:
    """The state of torch's generators for the CPU and one device, at one moment."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def has_moved(self) -> bool:
        """Whether random numbers were drawn since."""
        if not torch.equal(self._cpu, torch.get_rng_state()):
            return True
        return self._cuda is not None and not torch.equal(self._cuda, torch.cuda.get_rng_state(self._device))

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, random numbers come again as they came from this moment on; afterwards, as if nothing was."""
        with isolated_randomness(self._device):
            torch.set_rng_state(self._cpu)
            if self._cuda is not None:
                torch.cuda.set_rng_state(self._cuda, self._device)
            yield


@contextmanager
def isolated_randomness(device: torch.device) -> Iterator[None]:
    """Draws inside leave no trace in torch's generators."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
