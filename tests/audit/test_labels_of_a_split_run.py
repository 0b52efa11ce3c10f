"""Label inference in a real split run: what a feature holder reads off returned gradients, and noise on them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpdl
from accountants import NeighboringRelation
from dpdl.audit import LabelInference, infer_labels
from dpdl.ledger import Ledger
from dpdl.secure_random import RandomStream
from dpdl.split.channel import Handler, Packet, Value
from dpdl.split.direct_channel import DirectChannel
from dpdl.split.door import ReleaseDoor
from dpdl.split.gradient_release import GradientRelease
from dpdl.split.outlet import Departed, Leaving
from dpdl.split.part_training import PartTraining
from dpdl.split.session import SplitRun
from dpdl.split.topologies import vanilla

N, STEPS = 300, 12


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="sum")


class Curious:
    """A feature holder who keeps what comes back, and the numbers of its rows."""

    def __init__(self) -> None:
        self.numbers: list[Tensor] = []
        self.gradients: list[Tensor] = []

    def outlet(self, leaving: Leaving) -> Departed:
        if leaving.purpose == "train":
            assert leaving.row_numbers is not None
            self.numbers.append(leaving.row_numbers)
        return Departed(rows=leaving.rows)

    def channel(self, handler: Handler) -> DirectChannel:
        curious = self

        class Listening(DirectChannel):
            def request(
                self, kind: str, header: Mapping[str, Value], tensors: Mapping[str, Tensor], *, timeout: float
            ) -> Packet:
                reply = super().request(kind, header, tensors, timeout=timeout)
                if kind == "step" and "d/bottom" in reply.tensors:
                    curious.gradients.append(reply.tensors["d/bottom"].clone())
                return reply

        return Listening(handler)


def inferred(release: GradientRelease | None) -> LabelInference:
    generator = torch.Generator().manual_seed(0)
    y = (torch.rand(N, generator=generator) < 0.15).long()
    x = torch.randn(N, 6, generator=generator) + y[:, None]
    torch.manual_seed(1)
    bottom, top = nn.Sequential(nn.Linear(6, 5), nn.Tanh()), nn.Linear(5, 2)
    plan = dpdl.PrivacyPlan(
        sample_rate=0.5,
        expected_batch_size=N / 2,
        steps=STEPS,
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        dataset_size=N,
    )
    curious = Curious()
    doors: dict[str, object] = {"client": curious.outlet}
    if release is not None:
        doors["server"] = ReleaseDoor(
            gradients=release,
            training=PartTraining.unprotected(),
            ledger=Ledger(relation=NeighboringRelation.REPLACE_ONE),
            stream=RandomStream.from_os(),
        )
    optimizers = {
        "client": torch.optim.SGD(bottom.parameters(), lr=0.5),
        "server": torch.optim.SGD(top.parameters(), lr=0.5),
    }
    graph = vanilla(bottom, top, loss, labels_of="server")
    SplitRun(graph, optimizers, {"x": x, "y": y}, plan, driver="client", release=doors, connect=curious.channel).run()  # type: ignore[arg-type]
    rows, numbers = torch.cat(curious.gradients), torch.cat(curious.numbers)
    assert len(rows) == len(numbers) > N
    return infer_labels(rows, y[numbers] == 1)


def test_gradients_as_they_are_give_labels_away_and_noised_ones_do_not() -> None:
    naked = inferred(None)
    assert naked.cosine > 0.95
    assert naked.leak > 0.95
    noised = inferred(GradientRelease(max_norm=0.1, noise_multiplier=20.0))
    assert noised.leak < 0.6
