"""The runs that `benchmarks.split_accuracy` compares: each trains, and tells what the server was sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpdl
from accountants import NeighboringRelation
from dpdl.claims import AdversaryReport
from dpdl.data import load
from dpdl.ledger import Ledger
from dpdl.secure_random import RandomStream
from dpdl.split.clip import Clip, JointClip
from dpdl.split.cut_release import CutRelease
from dpdl.split.door import Once, ReleaseDoor
from dpdl.split.labels import MemoizedRandomizedResponse
from dpdl.split.nopeek import NoPeek, NoPeekOutlet
from dpdl.split.outlet import Leaving, Outlet, as_they_are
from dpdl.split.part_training import PartTraining
from dpdl.split.row_cache import RowCache
from dpdl.split.row_noise import clip_rows, noised_rows
from dpdl.split.session import SplitRun
from dpdl.split.topologies import vanilla

PRIVATE, PUBLIC, TEST = 6000, 2000, 2000
BATCH = 128
DELTA = 1e-5
EPOCHS = 8
SIGMA, CLIP, PRIVATE_RATE = 1.0, 1.0, 1.0  # noise multiplier, clipping norm, learning rate of SGD with noise
PLAIN_RATE = 0.05
ONCE_WIDTH, ONCE_NORM, ONCE_EPOCHS, ONCE_RATE = 8, 1.0, 16, 0.005
ENCODER_EPOCHS, ENCODER_BATCH = 20, 64
ONCE_NOISE = (0.5, 1.0, 2.0)
LABEL_EPSILON = 5.0
ALPHAS = (1.0, 5.0)
SEED = 0


def sum_of_losses(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="sum")


@dataclass(frozen=True, kw_only=True)
class Images:
    """Who has which images: shapes [n, 1, 28, 28] in [-1, 1], labels [n]."""

    private: tuple[Tensor, Tensor]
    public: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(kw_only=True)
class Trained:
    """One run, and what the server saw.

    Attributes:
        report: of the run; None where nobody sends or trains on anything private.
        sent: numbers of private images to the rows that the server was sent of them.
        released: any images to rows as the client would send them, for the attacker's own.
        accuracy: of those who have both parts, on test images.
        accuracy_sent: of the server, on test images whose rows are released like all others.
    """

    report: AdversaryReport | None
    accuracy: float
    accuracy_sent: float
    sent: Callable[[Tensor], Tensor] | None = None
    released: Callable[[Tensor], Tensor] | None = None
    note: str = ""


def bottom_392() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 4, stride=4), nn.Tanh(), nn.Flatten())


def top_of(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, 10))


def split_images(path: str) -> Images:
    data = load(path)
    order = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(SEED))
    mine, theirs = order[:PRIVATE], order[PRIVATE : PRIVATE + PUBLIC]
    pixels = data.train_images * 2 - 1
    return Images(
        private=(pixels[mine], data.train_labels[mine]),
        public=(pixels[theirs], data.train_labels[theirs]),
        test=(data.test_images[:TEST] * 2 - 1, data.test_labels[:TEST]),
    )


def plan_of(epochs: int, *, sigma: float, norm: float) -> dpdl.PrivacyPlan:
    return dpdl.PrivacyPlan(
        sample_rate=BATCH / PRIVATE,
        expected_batch_size=BATCH,
        steps=epochs * PRIVATE // BATCH,
        noise_multiplier=sigma,
        max_grad_norm=norm,
        dataset_size=PRIVATE,
    )


def trained_both(
    images: Images,
    epochs: int,
    *,
    sigma: float = 0.0,
    joint: bool = False,
    alpha: float | None = None,
) -> Trained:
    """Client and server both train; rows leave as they are."""
    torch.manual_seed(SEED)
    bottom, top = bottom_392(), top_of(392)
    private = sigma > 0
    plan = plan_of(epochs, sigma=sigma, norm=CLIP if private else float("inf"))
    rate = PRIVATE_RATE if private else PLAIN_RATE
    x, y = images.private
    outlet: Outlet = as_they_are
    if alpha is not None:
        outlet = NoPeekOutlet(NoPeek(alpha=alpha), inputs=lambda numbers: x[numbers], plan=plan)
    clip: Clip | None = JointClip(max_grad_norm=CLIP) if joint else None
    momentum = 0.0 if private else 0.9
    optimizers = {
        name: torch.optim.SGD(part.parameters(), lr=rate, momentum=momentum)
        for name, part in (("client", bottom), ("server", top))
    }
    graph = vanilla(bottom, top, sum_of_losses)
    run = SplitRun(graph, optimizers, {"x": x, "y": y}, plan, clip=clip, release={"client": outlet})
    run.run()
    accuracy = accuracy_of(nn.Sequential(bottom, top), *images.test)
    return Trained(
        report=run.report(DELTA),
        accuracy=accuracy,
        accuracy_sent=accuracy,
        sent=lambda numbers: output(bottom, x[numbers]),
        released=lambda pixels: output(bottom, pixels),
        note="" if alpha is None else str(outlet),
    )


def public_encoder(images: Images) -> nn.Module:
    """A bottom trained on public images alone, eight numbers wide."""
    torch.manual_seed(SEED)
    encoder = nn.Sequential(bottom_392(), nn.Linear(392, 64), nn.Tanh(), nn.Linear(64, ONCE_WIDTH), nn.Tanh())
    whole = nn.Sequential(encoder, nn.Linear(ONCE_WIDTH, 10))
    optimizer = torch.optim.Adam(whole.parameters(), lr=1e-3)
    x, y = images.public
    for _ in range(ENCODER_EPOCHS):
        for rows in torch.randperm(PUBLIC).split(ENCODER_BATCH):
            optimizer.zero_grad()
            F.cross_entropy(whole(x[rows]), y[rows]).backward()
            optimizer.step()
    return encoder.requires_grad_(False).eval()


def principal_components(images: Images) -> nn.Module:
    """The first components of public images, whose labels nobody knows."""
    pixels = images.public[0].flatten(1)
    mean = pixels.mean(dim=0)
    components = torch.linalg.svd(pixels - mean, full_matrices=False).Vh[:ONCE_WIDTH]
    linear = nn.Linear(components.shape[1], ONCE_WIDTH)
    with torch.no_grad():
        linear.weight.copy_(components)
        linear.bias.copy_(-components @ mean)
    return nn.Sequential(nn.Flatten(), linear).requires_grad_(False).eval()


def top_of_released() -> nn.Module:
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(ONCE_WIDTH, 64), nn.ReLU(), nn.Linear(64, 10))


def public_alone(images: Images, encoder: nn.Module) -> Trained:
    """The same encoder and top, on labelled public images: what nobody's privacy pays for."""
    top = top_of_released()
    optimizer = torch.optim.SGD(top.parameters(), lr=ONCE_RATE, momentum=0.9)
    x, y = images.public
    rows = clip_rows(output(encoder, x), max_norm=ONCE_NORM)
    for _ in range(ONCE_EPOCHS * PRIVATE // PUBLIC):  # as many steps as with private rows
        for batch in torch.randperm(PUBLIC).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(top(rows[batch]), y[batch]).backward()
            optimizer.step()
    test_x, test_y = images.test
    accuracy = accuracy_of(top, clip_rows(output(encoder, test_x), max_norm=ONCE_NORM), test_y)
    return Trained(report=None, accuracy=accuracy, accuracy_sent=accuracy)


def released_once(images: Images, epochs: int, noise: float, encoder: nn.Module) -> Trained:
    """A frozen public encoder; each row leaves once, clipped and noised, and the server trains on what it has."""
    release = CutRelease(max_norm=ONCE_NORM, noise_multiplier=noise, mode="release_once")
    top = top_of_released()
    plan = plan_of(epochs, sigma=0.0, norm=float("inf"))
    x, y = images.private
    door = ReleaseDoor(
        activations=release,
        labels=MemoizedRandomizedResponse(epsilon=LABEL_EPSILON, classes=10),
        training=PartTraining.frozen(),
        ledger=Ledger(relation=NeighboringRelation.REPLACE_ONE),
        stream=RandomStream.from_os(),
        once=Once(encoder=encoder, inputs=lambda numbers: x[numbers], cache=RowCache()),
    )
    optimizers = {"server": torch.optim.SGD(top.parameters(), lr=ONCE_RATE, momentum=0.9)}
    graph = vanilla(encoder, top, sum_of_losses)
    run = SplitRun(graph, optimizers, {"x": x, "y": y}, plan, release={"client": door})
    run.run()
    attackers_noise = RandomStream.from_os()

    def as_released(pixels: Tensor) -> Tensor:
        rows = output(encoder, pixels)
        child = attackers_noise.child(f"{len(pixels)} rows")
        return noised_rows(rows, max_norm=ONCE_NORM, noise_multiplier=noise, stream=child, number=0)

    def as_sent(numbers: Tensor) -> Tensor:
        """Out of the cache; rows that no batch has drawn are released now, like all others."""
        leaving = Leaving(
            content="activations",
            name="bottom",
            sender="client",
            receivers=("server",),
            rows=output(encoder, x[numbers]),
            row_numbers=numbers,
            purpose="train",
            step=plan.steps,
            session="measurement",
        )
        return door(leaving).rows

    test_x, test_y = images.test
    return Trained(
        report=run.report(DELTA),
        accuracy=accuracy_of(top, clip_rows(output(encoder, test_x), max_norm=ONCE_NORM), test_y),
        accuracy_sent=accuracy_of(top, as_released(test_x), test_y),
        sent=as_sent,
        released=as_released,
    )


def output(module: nn.Module, rows: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = module(rows)
    return found


def accuracy_of(module: nn.Module, rows: Tensor, labels: Tensor) -> float:
    return float((output(module, rows).argmax(dim=1) == labels).double().mean())


def cases(images: Images, epochs: int) -> dict[str, Callable[[], Trained]]:
    """What is compared, by name."""
    encoders = {"public labels": public_encoder(images), "no labels": principal_components(images)}
    once = once_epochs(epochs)
    found: dict[str, Callable[[], Trained]] = {
        "not trained": partial(trained_both, images, 0),
        "vanilla, no privacy": partial(trained_both, images, epochs),
    }
    for alpha in ALPHAS:
        found[f"NoPeek, alpha {alpha:g} (heuristic)"] = partial(trained_both, images, epochs, alpha=alpha)
    found["part clipping"] = partial(trained_both, images, epochs, sigma=SIGMA)
    found["joint clipping"] = partial(trained_both, images, epochs, sigma=SIGMA, joint=True)
    found["public images alone"] = partial(public_alone, images, encoders["public labels"])
    for kind, encoder in encoders.items():
        for noise in ONCE_NOISE:
            name = f"release_once {noise:g}, {kind}"
            found[name] = partial(released_once, images, once, noise, encoder)
    return found


def once_epochs(epochs: int) -> int:
    return max(1, round(epochs * ONCE_EPOCHS / EPOCHS))
