"""A chain over gRPC: the hop in the middle asks for a client that is another one, and has to be named for that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpdl.errors import ChannelError
from dpdl.plan import PrivacyPlan
from dpdl.split.certificates import make_certificates
from dpdl.split.client import SplitClient
from dpdl.split.graph import SplitGraph
from dpdl.split.replay import ReplayGuard
from dpdl.split.server import SplitServer
from dpdl.split.tls import MutualTLS
from dpdl.split.topologies import chain

pytest.importorskip("grpc", reason="grpcio is not installed: pip install 'dpdl[split]'")
from dpdl.split.grpc_channel import GrpcChannel, serve

PARTIES = ("clinic", "hub", "lab")
PLAN = PrivacyPlan(
    sample_rate=0.2, expected_batch_size=8, steps=2, noise_multiplier=1.0, max_grad_norm=1.0, dataset_size=40
)


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="sum")


def graph_of(party: str) -> SplitGraph:
    own = [nn.Linear(width, 4) if party == name else None for name, width in zip(PARTIES, (5, 4, 4), strict=True)]
    return chain(own, loss if party == "lab" else None, parties=PARTIES)


def sgd(graph: SplitGraph) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for part in graph.parts if part.module for p in part.module.parameters()], lr=0.1)


@contextmanager
def clinic(folder: Path, *, relays: tuple[str, ...]) -> Iterator[SplitClient]:
    """The driver of three parties, each with a certificate of its own."""
    make_certificates(folder, clients=["clinic", "hub"])
    graphs = {party: graph_of(party) for party in PARTIES}
    data = {"y": torch.randint(4, (40,))}
    lab = SplitServer(graphs["lab"], "lab", plan=PLAN, optimizer=sgd(graphs["lab"]), data=data, driver="clinic")
    tls = MutualTLS.of(folder, "server")
    with serve("localhost:0", ReplayGuard(lab.handle, relays=relays), tls=tls) as behind:
        further = GrpcChannel.connect(behind.address, tls=MutualTLS.of(folder, "hub"))
        hub = SplitServer(graphs["hub"], "hub", plan=PLAN, optimizer=sgd(graphs["hub"]), channels={"lab": further})
        with serve("localhost:0", ReplayGuard(hub.handle), tls=tls) as server:
            line = GrpcChannel.connect(server.address, tls=MutualTLS.of(folder, "clinic"))
            yield SplitClient(
                graphs["clinic"],
                "clinic",
                plan=PLAN,
                optimizer=sgd(graphs["clinic"]),
                data={"x": torch.randn(40, 5)},
                channels={"hub": line},
            )
            line.close()
        further.close()


def test_a_hop_that_is_not_named_is_refused_with_the_remedy_and_nothing_is_spent(tmp_path: Path) -> None:
    with clinic(tmp_path, relays=()) as client:
        with pytest.raises(ChannelError, match=r"request of 'hub'.*for the client 'clinic'.*ReplayGuard\(relays="):
            client.step()
        assert client.steps_taken == 0


def test_a_hop_that_is_named_asks_for_the_driver(tmp_path: Path) -> None:
    with clinic(tmp_path, relays=("hub",)) as client:
        client.run()
        assert client.steps_taken == 2
