"""What the engines are held to: time of a private step over the plain step, one thread, by model.

The floor is a plain step plus one normal for each parameter. A target is what a mature implementation of the
known methods reaches; a stretch is what would need something better.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FIRST_STEP", "MEMORY", "OVERHEAD_MILLISECONDS", "TIME", "Target"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A ratio to the plain step, which smaller is better.

    Attributes:
        target: to be reached.
        stretch: to be hoped for.
    """

    target: float
    stretch: float


TIME = {
    "mnist": Target(target=1.08, stretch=1.00),
    "mnist-512": Target(target=1.08, stretch=1.00),
    "logistic": Target(target=1.10, stretch=1.03),
    "mlp": Target(target=1.25, stretch=1.15),
    "cifar": Target(target=1.15, stretch=1.05),
    "wrn": Target(target=1.20, stretch=1.08),
    "wrn-ws": Target(target=1.30, stretch=1.12),
    "vit": Target(target=1.25, stretch=1.10),
    "vit-raw": Target(target=1.25, stretch=1.10),
    "gpt": Target(target=1.20, stretch=1.08),
    "gpt-tied": Target(target=1.20, stretch=1.08),
    "lstm": Target(target=1.40, stretch=1.15),
}

MEMORY = Target(target=1.3, stretch=1.1)  # peak over the weights and the batch
FIRST_STEP = 10.0  # plain steps
OVERHEAD_MILLISECONDS = 2.0  # of a step of 100 small layers with one example, besides the plain step
