"""What `serve` and `join` train: the tanh network of `dpdl train`, cut after its convolutions, and its terms.

Both commands take the same settings, and each makes the manifest from its own: what differs is found by the handshake,
and never trained with. The number of records is one of the settings, and so public.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from torch import Tensor

from dpdl.errors import ParameterError
from dpdl.models.papernot_cnn import papernot_cnn
from dpdl.plan import PrivacyPlan
from dpdl.split.graph import SplitGraph
from dpdl.split.manifest import SignedManifest, read_private_key, read_public_key
from dpdl.split.manifest_of_run import manifest_of
from dpdl.split.topologies import vanilla

__all__ = [
    "BYE",
    "CLIENT",
    "SERVER",
    "add_settings",
    "graph_of",
    "key_of",
    "optimizer_of",
    "plan_of",
    "signed_of",
]

CLIENT, SERVER = "client", "server"
BYE = "bye"  # the client's last request
_LAYERS_OF_CLIENT = 7  # of papernot_cnn: two convolutions with their tanh and pooling, and the flattening
_CUT = (512,)  # [32 channels, 4, 4] of a 28 x 28 image
_CLASSES = 10


def add_settings(add: Callable[..., object]) -> None:
    """The arguments that both commands have, and that must be the same at both."""
    add("--address", default="localhost:50051", metavar="HOST:PORT", help="of the server (default: %(default)s)")
    add("--certificates", type=Path, default=Path("certificates"), metavar="DIR", help="this party's keys, made by "
        "dpdl split certificates (default: %(default)s)")  # fmt: skip
    add("--records", type=int, default=4000, metavar="N", help="size of the data (default: %(default)s, the digits)")
    add("--batch-size", type=int, default=64, metavar="N", help="expected records in a step (default: %(default)s)")
    add("--epochs", type=float, default=5.0, help="(default: %(default)s)")
    add("--noise-multiplier", type=float, default=1.1, metavar="SIGMA", help="(default: %(default)s)")
    add("--max-grad-norm", type=float, default=1.0, metavar="C", help="of both parts together (default: %(default)s)")
    add("--delta", type=float, default=1e-5, help="(default: %(default)s)")
    add("--lr", type=float, default=2e-3, help="of this party's Adam (default: %(default)s)")


def plan_of(arguments: argparse.Namespace) -> PrivacyPlan:
    """The plan that the settings say.

    Raises:
        ParameterError: a setting is out of range.
    """
    if not 0 < arguments.batch_size <= arguments.records or not 0 < arguments.epochs < math.inf:
        raise ParameterError(
            f"--batch-size must be from 1 to --records and --epochs above 0, got {arguments.batch_size}, "
            f"{arguments.records} and {arguments.epochs}."
        )
    return PrivacyPlan(
        sample_rate=arguments.batch_size / arguments.records,
        expected_batch_size=arguments.batch_size,
        steps=max(1, round(arguments.epochs * arguments.records / arguments.batch_size)),
        noise_multiplier=arguments.noise_multiplier,
        max_grad_norm=arguments.max_grad_norm,
        dataset_size=arguments.records,
    )


def graph_of(party: str) -> SplitGraph:
    """The network as one party has it: its own layers, and only the shape of the rest."""
    network = papernot_cnn(classes=_CLASSES)
    if party == CLIENT:
        return vanilla(network[:_LAYERS_OF_CLIENT], None, None)
    return vanilla(None, network[_LAYERS_OF_CLIENT:], _summed)


def optimizer_of(graph: SplitGraph, party: str, lr: float) -> torch.optim.Optimizer:
    """Adam over a party's own parameters."""
    modules = [part.module for part in graph.parts if part.party == party and part.module is not None]
    return torch.optim.Adam([p for module in modules for p in module.parameters()], lr=lr)


def signed_of(graph: SplitGraph, plan: PrivacyPlan, delta: float, folder: Path, party: str) -> SignedManifest:
    """The run's manifest, signed with the party's key in the folder of certificates."""
    rows = {"bottom": torch.empty(0, *_CUT), "y": torch.empty(0, dtype=torch.int64)}
    terms = manifest_of(graph, plan, topology="vanilla", rows=rows, deltas={"model consumers": delta})
    return terms.sign(read_private_key(folder / f"{party}.signing.key"), party=party)


def key_of(folder: Path, party: str) -> dict[str, Ed25519PublicKey]:
    """The other party's key to check signatures with, by its name."""
    return {party: read_public_key(folder / f"{party}.signing.pub")}


def _summed(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="sum")
