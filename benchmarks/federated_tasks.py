"""The tasks on which federations are timed: images, clients, local steps.

A task is given in numbers, so that every library runs it under its own process with the same examples.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dpdl.data import ImageData, load

__all__ = ["TASKS", "Task", "images"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one round is.

    Attributes:
        clients: all of them take part.
        examples: of each client.
        steps: local steps of each client.
        batch_size: of a local step.
        model: a name that `dpdl.models.build_model` knows.
        rounds: timed, after one that is not.
    """

    clients: int
    examples: int
    steps: int
    batch_size: int
    model: str
    rounds: int


LEARNING_RATE = 0.1
MAX_UPDATE_NORM = 1.0
MAX_GRAD_NORM = 1.0
NOISE_MULTIPLIER = 1.0

TASKS = {
    # the tutorials' network: what training costs
    "cnn": Task(clients=10, examples=400, steps=6, batch_size=64, model="papernot-cnn", rounds=5),
    # a round of many clients with one small step each: what a client costs besides
    "many": Task(clients=200, examples=20, steps=1, batch_size=20, model="logistic", rounds=5),
}


def images() -> ImageData:
    """MNIST from DPDL_DATA, or the embedded digits."""
    folder = os.environ.get("DPDL_DATA")
    return load(Path(folder) / "mnist" if folder else None)
