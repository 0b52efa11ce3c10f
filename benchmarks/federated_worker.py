"""Times the rounds of one library on one task, in a process of its own, and prints them as JSON.

    python -m benchmarks.federated_worker dpdl none cnn
    PEER/bin/python -m benchmarks.federated_worker pfl client cnn     # a Python that has pfl

pfl (Granqvist et al., pfl-research: Simulation Framework for Accelerating Research in Private Federated Learning, 2024,
arXiv:2404.06430) runs its own `SimulatedBackend`, federated averaging and central Gaussian mechanism.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.federated_tasks import (
    LEARNING_RATE,
    MAX_GRAD_NORM,
    MAX_UPDATE_NORM,
    NOISE_MULTIPLIER,
    TASKS,
    Task,
    images,
)
from dpdl.data import ImageData
from dpdl.models import build_model

Clock = tuple[float, float]  # process CPU time, elapsed time


def clock() -> Clock:
    return time.process_time(), time.perf_counter()


def dpdl_rounds(scheme: str, task: Task, data: ImageData) -> list[Clock]:
    """The clock at the end of each round; the first round is not to be counted."""
    from dpdl.federated.image_federation import FederationSettings, build_federation
    from dpdl.federated.runner import run_federated

    settings = FederationSettings(
        scheme=scheme,  # type: ignore[arg-type]
        clients=task.clients,
        rounds=task.rounds + 2,  # `stop` is not asked after the last one
        model=task.model,
        local_steps=task.steps,
        batch_size=task.batch_size,
        lr=LEARNING_RATE,
        epsilon=None,
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=MAX_GRAD_NORM,
        max_update_norm=MAX_UPDATE_NORM,
    )
    ends: list[Clock] = []

    def note() -> bool:
        ends.append(clock())
        return False

    with tempfile.TemporaryDirectory() as folder:
        federation = build_federation(settings, data, ledgers=Path(folder))
        run_federated(
            federation.server,
            federation.clients,
            rounds=settings.rounds,
            every=settings.rounds,
            progress=False,
            stop=note,
        )
    return ends


def pfl_rounds(scheme: str, task: Task, data: ImageData) -> list[Clock]:
    """The same of pfl: "none", or "client" for clipping and noise at the server."""
    from pfl.aggregate.simulate import SimulatedBackend  # type: ignore[import-not-found]  # optional peer
    from pfl.algorithm.base import NNAlgorithmParams  # type: ignore[import-not-found]
    from pfl.algorithm.federated_averaging import FederatedAveraging  # type: ignore[import-not-found]
    from pfl.callback.base import TrainingProcessCallback  # type: ignore[import-not-found]
    from pfl.data.dataset import Dataset  # type: ignore[import-not-found]
    from pfl.data.federated_dataset import FederatedDataset  # type: ignore[import-not-found]
    from pfl.data.sampling import get_user_sampler  # type: ignore[import-not-found]
    from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams  # type: ignore[import-not-found]
    from pfl.metrics import Metrics, Weighted  # type: ignore[import-not-found]
    from pfl.model.pytorch import PyTorchModel  # type: ignore[import-not-found]
    from pfl.privacy.gaussian_mechanism import GaussianMechanism  # type: ignore[import-not-found]
    from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism  # type: ignore[import-not-found]

    class Classifier(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(self.network(inputs), labels)

        def metrics(self, inputs: Tensor, labels: Tensor) -> dict[str, Any]:
            return {"loss": Weighted(self.loss(inputs, labels).item() * len(labels), len(labels))}

    ends: list[Clock] = []

    class Note(TrainingProcessCallback):  # type: ignore[misc]
        def after_central_iteration(self, *_: object, **__: object) -> tuple[bool, Metrics]:
            ends.append(clock())
            return False, Metrics()

    module = Classifier(build_model(task.model, in_channels=1, image_size=(28, 28), classes=10))
    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0))

    def user(index: int) -> Any:
        rows = slice(index * task.examples, (index + 1) * task.examples)
        return Dataset(raw_data=[data.train_images[rows], data.train_labels[rows]])

    sampler = get_user_sampler("minimize_reuse", list(range(task.clients)))
    mechanism = GaussianMechanism(MAX_UPDATE_NORM, NOISE_MULTIPLIER)
    backend = SimulatedBackend(
        training_data=FederatedDataset(user, sampler),
        val_data=FederatedDataset(user, sampler),
        postprocessors=[CentrallyAppliedPrivacyMechanism(mechanism)] if scheme == "client" else [],
    )
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=task.rounds + 1,
            evaluation_frequency=task.rounds + 1,  # the first round, which is not counted, evaluates
            train_cohort_size=task.clients,
            val_cohort_size=None,
        ),
        backend,
        model,
        NNTrainHyperParams(
            local_learning_rate=LEARNING_RATE,
            local_num_epochs=None,
            local_num_steps=task.steps,
            local_batch_size=task.batch_size,
        ),
        NNEvalHyperParams(local_batch_size=None),
        callbacks=[Note()],
    )
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=("dpdl", "pfl"))
    parser.add_argument("scheme", choices=("none", "record", "client", "local", "both"))
    parser.add_argument("task", choices=TASKS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = TASKS[arguments.task]
    ends = {"dpdl": dpdl_rounds, "pfl": pfl_rounds}[arguments.library](arguments.scheme, task, images())
    spans = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(ends)]
    assert len(spans) == task.rounds, (len(spans), task.rounds)
    json.dump({"cpu": [cpu for cpu, _ in spans], "elapsed": [elapsed for _, elapsed in spans]}, sys.stdout)


if __name__ == "__main__":
    main()
