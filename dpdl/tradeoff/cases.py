"""The trainings that `dpdl sweep` knows: images, as they are or by fixed features, and tables of numbers.

A case is a value, and a function of a `Point`: it can be sent to another process, which reads the data once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from dpdl.data import load
from dpdl.errors import ParameterError
from dpdl.models import MODEL_NAMES, build_model
from dpdl.tradeoff.features import oriented_gradients
from dpdl.tradeoff.point import Outcome, Point
from dpdl.tradeoff.tables import load_table
from dpdl.tradeoff.task import Task
from dpdl.training import accuracy_of

__all__ = ["WEIGHTS", "Case", "Features"]

Features = Literal["oriented-gradients", "none"]
WEIGHTS = "model.pt"
MOMENTUM = 0.9
_FEATURE_NORM = 10.0  # L2, of one image's features: what suits the learning rates of models on pixels


@dataclass(frozen=True, kw_only=True)
class Case:
    """Train a model of `dpdl.models` with SGD and momentum 0.9, and score its accuracy on held-out records.

    Attributes:
        data: images, as `dpdl.data.load` reads them; None for the demo digits.
        table: a table of `dpdl.tradeoff.tables` instead of images.
        features: of images: "oriented-gradients" (fixed, computed from each image alone) or "none", the pixels.
        model: a name that `dpdl.models.build_model` knows.

    Raises:
        ParameterError: a name that is not known, or options that exclude each other.
    """

    data: str | None = None
    table: str | None = None
    features: Features = "oriented-gradients"
    model: str = "logistic"

    def __post_init__(self) -> None:
        if self.features not in get_args(Features):
            raise ParameterError(f"features must be one of {get_args(Features)}, got {self.features!r}.")
        if self.model not in MODEL_NAMES:
            raise ParameterError(f"model must be one of {', '.join(MODEL_NAMES)}, got {self.model!r}.")
        if self.table is not None and self.data is not None:
            raise ParameterError("Give data (images) or table, not both.")
        if self.table is not None and self.model not in ("logistic", "mlp"):
            raise ParameterError(f"model {self.model!r} is for images; for a table give 'logistic' or 'mlp'.")

    def task(self) -> Task:
        """The data, read once in each process."""
        return _task(self)

    def __call__(self, point: Point) -> Outcome:
        """Carry out one run; its weights are saved where the point has a folder."""
        task = self.task()
        _, channels, height, width = task.train_inputs.shape
        plain = build_model(self.model, in_channels=channels, image_size=(height, width), classes=task.classes)
        sgd = torch.optim.SGD(plain.parameters(), lr=0.5 if point.lr is None else point.lr, momentum=MOMENTUM)
        data = DataLoader(TensorDataset(task.train_inputs, task.train_labels), batch_size=point.batch_size)
        model, optimizer, loader = point.make_private(plain, sgd, data)
        while optimizer.steps_taken < point.plan.steps:
            for inputs, labels in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
        if point.folder is not None:
            torch.save(plain.state_dict(), point.folder / WEIGHTS)
        device = torch.device("cpu")
        accuracy = accuracy_of(plain, task.test_inputs, task.test_labels, device=device)
        return Outcome(score=accuracy, report=optimizer.report(point.delta))


@functools.lru_cache(maxsize=1)
def _task(case: Case) -> Task:
    if case.table is not None:
        return load_table(case.table)
    images = load(case.data)
    train, test = images.train_images, images.test_images
    if case.features == "oriented-gradients":
        train, test = (_FEATURE_NORM * oriented_gradients(part) for part in (train, test))
    return Task(
        train_inputs=train,
        train_labels=images.train_labels,
        test_inputs=test,
        test_labels=images.test_labels,
        classes=len(images.classes),
        name=images.name,
    )
