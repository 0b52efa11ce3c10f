"""Feature-space hijacking: a server that trains the client's network for its own ends [1].

    python examples/fsha/fsha.py --data MNIST_FOLDER --steps 800     # the four IDX files; default: embedded digits
    python examples/fsha/fsha.py --noise-multiplier 1.0               # the client trains with differential privacy

The client is honest code of this library, with all of its checks. The server answers every step as agreed, row by row,
but its loss is not the one that was promised: it tells the client's activations from those of a pilot network of the
server's own, and the client, following the gradient, makes them alike. What undoes the pilot then undoes the client.

What to learn from it:

- The probe for rows that meet does not notice, and cannot: the hijacking loss keeps rows apart.
- Noise on the client's weights (DP-SGD) does not end it; the claim against the server is NO GUARANTEE all along.
- What helps is noise on the activations themselves (`CutRelease`), or a client part that does not train.

References:
    [1] Pasquini, Ateniese, Bernaschi, Unleashing the Tiger: Inference Attacks on Split Learning, CCS 2021.
        arXiv:2012.02670, section 3 (equations 1 to 3).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import dpdl
from dpdl.audit import A_FAILURE_PROVES_NOTHING, recovered_variance
from dpdl.claims import AdversaryReport
from dpdl.data import load
from dpdl.split.channel import Handler, Packet
from dpdl.split.direct_channel import DirectChannel
from dpdl.split.graph import Head, Part, SplitGraph
from dpdl.split.session import SplitRun

PIXELS = 14 * 14
WIDTH = 16 * 4 * 4  # numbers that a row has at the cut
BATCH = 64
PRIVATE, PUBLIC = 2000, 2000
PENALTY = 1.0  # on the discriminator's slope at the pilot's rows, which keeps the contest steady


def client_part() -> nn.Module:
    """What the client believes to be the first layers of a classifier. The server knows its output's shape."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.Flatten()
    )


def pilot() -> nn.Module:
    """The server's own network to the same feature space."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 5, stride=2, padding=2),
        nn.LeakyReLU(),
        nn.Conv2d(12, 16, 3, stride=2, padding=1),
        nn.Flatten(),
    )


def inverse() -> nn.Module:
    """From the feature space back to pixels."""
    return nn.Sequential(nn.Linear(WIDTH, 256), nn.ReLU(), nn.Linear(256, PIXELS), nn.Sigmoid())


def discriminator() -> nn.Module:
    """Large where rows look like the pilot's."""
    return nn.Sequential(
        nn.Linear(WIDTH, 128), nn.LeakyReLU(0.2), nn.Linear(128, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1)
    )


def hijack(outputs: Tensor, labels: Tensor) -> Tensor:
    """The loss that the server really has: rows are to pass for the pilot's. A row-wise sum; labels are not used."""
    return F.softplus(-outputs).sum()


class Hijacker:
    """The server's own training, on public images and on whatever arrives.

    Args:
        public: its images, shape [n, 1, 14, 14], in [0, 1].
        seed: of initial weights.
    """

    def __init__(self, public: Tensor, *, seed: int) -> None:
        self._public = public
        torch.manual_seed(seed)
        self.pilot, self.inverse, self.discriminator = pilot(), inverse(), discriminator()
        self._shaping = torch.optim.Adam([*self.pilot.parameters(), *self.inverse.parameters()], lr=2e-3)
        self._telling = torch.optim.Adam(self.discriminator.parameters(), lr=1e-3, betas=(0.5, 0.99))

    def around(self, honest: Handler) -> Handler:
        """The agreed protocol, with an ear at the door."""

        def handle(packet: Packet) -> Packet:
            rows = packet.tensors.get("z/bottom")
            if packet.kind == "step" and rows is not None and len(rows):
                self.learn(rows)
            return honest(packet)

        return handle

    def learn(self, rows: Tensor) -> None:
        """One step of all three networks on a batch of the client's rows."""
        x = self._public[torch.randint(len(self._public), (len(rows),))]
        own = self.pilot(x)
        self._shaping.zero_grad()
        F.mse_loss(self.inverse(own), x.flatten(1)).backward()
        self._shaping.step()
        own = own.detach().requires_grad_()
        told = self.discriminator(own)
        (slope,) = torch.autograd.grad(told.sum(), own, create_graph=True)
        self._telling.zero_grad()
        loss = F.softplus(-told).mean() + F.softplus(self.discriminator(rows)).mean()
        (loss + PENALTY / 2 * slope.square().sum(dim=1).mean()).backward()
        self._telling.step()

    def recovered(self, rows: Tensor) -> Tensor:
        """Images from rows, shape [n, 196]."""
        with torch.no_grad():
            images: Tensor = self.inverse(rows)
        return images


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of it.

    Attributes:
        before, after: share of the private images' variance that the server recovers, at the beginning and the end.
        report: what the client may claim.
    """

    before: float
    after: float
    report: AdversaryReport

    def __str__(self) -> str:
        return (
            f"recovered variance of private images: {self.before:.1%} before, {self.after:.1%} after "
            f"({A_FAILURE_PROVES_NOTHING})\n{self.report}"
        )


def attack(
    private: tuple[Tensor, Tensor],
    public: Tensor,
    *,
    steps: int,
    noise_multiplier: float = 0.0,
    seed: int = 0,
    progress: Callable[[int, float], None] = lambda step, recovered: None,
    every: int = 100,
) -> Outcome:
    """Run a client with a hijacking server.

    Args:
        private: the client's images, shape [n, 1, 14, 14], in [0, 1], and labels.
        public: the server's images of the same kind, others.
        steps: of training.
        noise_multiplier: of the client's DP-SGD; 0 to train without.
        seed: of initial weights.
        progress: told (steps done, recovered variance), every so many steps.
        every: how many.
    """
    x, y = private
    hijacker = Hijacker(public, seed=seed)
    bottom = client_part()
    graph = SplitGraph(
        parts=(
            Part(name="bottom", module=bottom, party="client", inputs=("x",)),
            Part(name="top", module=hijacker.discriminator, party="server", inputs=("bottom",), trains=False),
        ),
        heads=(Head(name="loss", party="server", part="top", loss_fn=hijack, labels="y"),),
        columns={"x": "client", "y": "client"},
    )
    plan = dpdl.PrivacyPlan(
        sample_rate=BATCH / len(x),
        expected_batch_size=BATCH,
        steps=steps,
        noise_multiplier=noise_multiplier,
        max_grad_norm=1.0,
        dataset_size=len(x),
    )
    optimizer = torch.optim.Adam(bottom.parameters(), lr=1e-3)
    run = SplitRun(
        graph,
        {"client": optimizer},
        {"x": x, "y": y},
        plan,
        connect=lambda handler: DirectChannel(hijacker.around(handler)),
    )

    def recovered() -> float:
        with torch.no_grad():
            rows = bottom(x)
        return recovered_variance(x.flatten(1), hijacker.recovered(rows))

    before = recovered()
    while (left := steps - run.steps_taken) > 0:
        run.run(min(every, left))
        progress(run.steps_taken, recovered())
    return Outcome(before=before, after=recovered(), report=run.report(delta=1e-5))


def small_images(path: str | None) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Private images with labels, and public ones: half the resolution."""
    data = load(path)
    order = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(0))
    half = min(PRIVATE, len(order) // 2)
    images = F.avg_pool2d(data.train_images[order[: half + PUBLIC]], 2)
    return (images[:half], data.train_labels[order[:half]]), images[half:]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of MNIST's four IDX files; default: embedded digits")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--noise-multiplier", type=float, default=0.0, help="of the client's DP-SGD")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights")
    arguments = parser.parse_args()
    private, public = small_images(arguments.data)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    outcome = attack(
        private,
        public,
        steps=arguments.steps,
        noise_multiplier=arguments.noise_multiplier,
        seed=arguments.seed,
        progress=lambda step, recovered: console.print(f"step {step}: {recovered:.1%}"),
    )
    console.print(str(outcome))


if __name__ == "__main__":
    main()
