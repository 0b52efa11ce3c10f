"""What is trained on what: the same for one process, a simulation and a deployment. Nothing here knows of Flower."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from dpdl.data.detect import load
from dpdl.federated.client import DPClient
from dpdl.federated.client_level_plan import ClientLevelPlan
from dpdl.federated.partition import iid
from dpdl.federated.server import FederatedServer

Settings = Mapping[str, bool | int | float | str]

torch.set_num_threads(1)  # sums in one order, wherever a client happens to run


def data_of(settings: Settings) -> tuple[TensorDataset, TensorDataset]:
    """Training and test data: ten clusters of points, or real MNIST."""
    if settings["data"] == "mnist":
        images = load(Path(os.environ["DPDL_DATA"]) / "mnist")
        train = TensorDataset(images.train_images, images.train_labels)
        return train, TensorDataset(images.test_images, images.test_labels)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 32, generator=generator)
    labels = torch.arange(4000) % 10
    points = centres[labels] + 0.8 * torch.randn(4000, 32, generator=generator)
    return TensorDataset(points[:3000], labels[:3000]), TensorDataset(points[3000:], labels[3000:])


def model_of(settings: Settings) -> nn.Module:
    """A convolutional net for images, a small dense one for points; always the same first weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if settings["data"] == "mnist":
            return nn.Sequential(
                nn.Conv2d(1, 16, 8, stride=2, padding=3),
                nn.Tanh(),
                nn.MaxPool2d(2, 1),
                nn.Conv2d(16, 32, 4, stride=2),
                nn.Tanh(),
                nn.MaxPool2d(2, 1),
                nn.Flatten(),
                nn.Linear(32 * 4 * 4, 32),
                nn.Tanh(),
                nn.Linear(32, 10),
            )
        return nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))


def make_client(index: int, number: int, *, settings: Settings, ledger: Path) -> DPClient:
    """Client `index` of `number`: its part of the data, its noise, its ledger."""
    train, _ = data_of(settings)
    seed = int(settings["insecure-seed"])
    return DPClient(
        f"client-{index}",
        partial(model_of, settings),
        Subset(train, iid(len(train), number)[index].tolist()),
        F.cross_entropy,
        optimizer=partial(torch.optim.SGD, lr=float(settings["learning-rate"])),
        noise_multiplier=float(settings["noise-multiplier"]),
        max_grad_norm=float(settings["max-grad-norm"]),
        batch_size=int(settings["batch-size"]),
        steps=int(settings["steps"]),
        ledger=ledger,
        insecure_seed=seed if seed >= 0 else None,
    )


def make_server(settings: Settings) -> FederatedServer:
    """The global model, with client-level noise if the settings ask for it."""
    noise, seed = float(settings["client-noise-multiplier"]), int(settings["insecure-seed"])
    plan = None
    if noise > 0:
        plan = ClientLevelPlan(
            clients=int(settings["clients"]),
            sampling="all",
            rounds=int(settings["rounds"]),
            noise_multiplier=noise,
            max_update_norm=float(settings["max-update-norm"]),
        )
    return FederatedServer(model_of(settings), plan=plan, insecure_seed=seed if seed >= 0 else None)


def accuracy(settings: Settings, state: Mapping[str, Tensor]) -> float:
    """Of the global model on test data, which no client's guarantee covers."""
    model = model_of(settings)
    model.load_state_dict(dict(state))
    inputs, labels = data_of(settings)[1].tensors
    with torch.no_grad():
        return (model(inputs).argmax(1) == labels).float().mean().item()


def write_outcome(settings: Settings, server: FederatedServer, **more: object) -> None:
    """Accuracy, and a digest of every bit of the weights, to print and to keep."""
    digest = hashlib.sha256()
    for name, values in server.state.items():
        digest.update(name.encode() + values.contiguous().numpy().tobytes())
    outcome = {
        "rounds": server.round,
        "accuracy": round(accuracy(settings, server.state), 4),
        "state": digest.hexdigest()[:16],
        **more,
    }
    sys.stdout.write(f"outcome {json.dumps(outcome)}\n")
    if settings["outcome"]:
        Path(str(settings["outcome"])).write_text(json.dumps(outcome))
