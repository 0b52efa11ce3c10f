"""A federation that trains an image classifier, from settings: what `dpdl federated` and the benchmarks run.

| scheme | what protects | unit | against |
| --- | --- | --- | --- |
| none | nothing | | |
| record | DP-SGD at each client | record | everybody but the client itself |
| client | clipped updates, noise at the server | client | who gets the model; not the server |
| local | clipped updates, noise at each client | client | everybody but the client itself |
| both | record and client | record, client | as above |
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import accountants
from accountants import arguments
from dpdl.budget import Budget
from dpdl.claims import AdversaryReport
from dpdl.data import ImageData
from dpdl.errors import ParameterError
from dpdl.federated.accountable import AccountableClient
from dpdl.federated.client import DPClient
from dpdl.federated.client_level_plan import ClientLevelPlan
from dpdl.federated.client_sampling import ClientSampling, EveryClient, PoissonClients
from dpdl.federated.client_settings import inventory_of
from dpdl.federated.global_weights import GlobalWeights
from dpdl.federated.inventory import UNPROTECTED, Inventory
from dpdl.federated.local_updates import LocalUpdateDP
from dpdl.federated.messages import Client
from dpdl.federated.partition import Part, dirichlet, iid, shards
from dpdl.federated.plain_client import PlainClient
from dpdl.federated.report import federated_report
from dpdl.federated.runner import Evaluation, accuracy_on
from dpdl.federated.server import FederatedServer
from dpdl.federated.server_optimizers import FedAvg
from dpdl.federated.virtual_clients import VirtualClients
from dpdl.ledger_file import LedgerFile
from dpdl.models import build_model

__all__ = ["FederationSettings", "ImageFederation", "PartitionName", "Scheme", "build_federation"]

Scheme = Literal["none", "record", "client", "local", "both"]
PartitionName = Literal["iid", "dirichlet", "shards"]


@dataclass(frozen=True, kw_only=True)
class FederationSettings:
    """All that a federated run depends on, besides its data.

    Attributes:
        scheme: what is protected, and by whom; see the module.
        clients: how many.
        rounds: how many.
        client_rate: the probability that a client is in a round; 1 asks all of them.
        partition: how the examples are spread over the clients.
        alpha: of "dirichlet".
        shards_per_client: of "shards".
        minimum: the fewest examples of a client.
        model: a name that `dpdl.models.build_model` knows.
        local_steps: of a client in a round.
        batch_size: expected examples in a local step.
        lr, momentum: of the clients' SGD.
        server_lr: what the server multiplies the mean update by.
        epsilon: the budget of the scheme's own guarantee (with "both", of a record), over all rounds; or
        noise_multiplier: its noise. One of the two is None. A client's noise is computed as if it were in every round:
            it does not know how often it will be asked.
        client_epsilon: with "both", the budget of a client.
        delta: at which epsilons are computed and reported.
        max_grad_norm: C of DP-SGD.
        max_update_norm: S, to which a client's update is clipped.
        seed: of the partition and the first weights; protects nothing.
        insecure_seed: reproducible noise and sampling, for research only.
    """

    scheme: Scheme = "record"
    clients: int = 5
    rounds: int = 20
    client_rate: float = 1.0
    partition: PartitionName = "iid"
    alpha: float = 1.0
    shards_per_client: int = 2
    minimum: int = 1
    model: str = "auto"
    local_steps: int = 10
    batch_size: int = 64
    lr: float = 0.25
    momentum: float = 0.0
    server_lr: float = 1.0
    epsilon: float | None = 8.0
    noise_multiplier: float | None = None
    client_epsilon: float = 8.0
    delta: float = 1e-5
    max_grad_norm: float = 0.5
    max_update_norm: float = 1.0
    seed: int = 0
    insecure_seed: int | None = None

    def __post_init__(self) -> None:
        if self.scheme not in get_args(Scheme):
            raise ParameterError(f"scheme must be one of {get_args(Scheme)}, got {self.scheme!r}.")
        if self.partition not in get_args(PartitionName):
            raise ParameterError(f"partition must be one of {get_args(PartitionName)}, got {self.partition!r}.")
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ParameterError(
                f"Give epsilon or noise_multiplier, one of them None; got {self.epsilon!r} and "
                f"{self.noise_multiplier!r}. Each determines the other."
            )
        for name in ("clients", "rounds", "shards_per_client", "minimum", "local_steps", "batch_size"):
            arguments.positive_whole(name, getattr(self, name), remedy="Give a whole number such as 10.")
        for name in ("lr", "server_lr", "max_grad_norm", "max_update_norm", "client_epsilon"):
            _refuse_unless_positive(name, getattr(self, name))
        arguments.delta(self.delta)
        if self.epsilon is not None:
            _refuse_unless_positive("epsilon", self.epsilon)
        if self.noise_multiplier is not None:
            arguments.noise_scale("noise_multiplier", self.noise_multiplier)
            if self.scheme == "local":
                _refuse_unless_positive("noise_multiplier", self.noise_multiplier)
        if not 0 < self.client_rate <= 1:
            raise ParameterError(f"client_rate must be in (0, 1], got {self.client_rate}. 1 asks every client.")
        if not 0 <= self.momentum < 1:
            raise ParameterError(f"momentum must be in [0, 1), got {self.momentum}.")


@dataclass(frozen=True, kw_only=True)
class ImageFederation:
    """Server, clients and test, ready for `run_federated`.

    Attributes:
        server: with the first weights.
        clients: by name, made when they are asked for.
        evaluate: accuracy on the test images.
        plan: the server's, if it adds noise.
        sizes: examples of each client.
        ledgers: the folder that has them.
        sends: what each client's replies carry.
    """

    server: FederatedServer
    clients: VirtualClients
    evaluate: Evaluation
    plan: ClientLevelPlan | None
    sizes: tuple[int, ...]
    ledgers: Path
    sends: Inventory

    def report(self, asked: Iterable[str], delta: float) -> AdversaryReport:
        """What is promised to whom, at `delta`, if these clients were asked, in whatever process."""
        names = list(dict.fromkeys(asked))
        clients = [self.clients[name] for name in names]
        return federated_report(
            server=self.server, clients=clients, delta=delta, inventories=dict.fromkeys(names, self.sends)
        )

    def spent(self, asked: Iterable[str], delta: float) -> dict[str, float]:
        """By client, an upper bound on what its ledger holds; infinite for one that keeps none."""
        found: dict[str, float] = {}
        for name in asked:
            client = self.clients[name]
            found[name] = client.epsilon(delta) if isinstance(client, AccountableClient) else math.inf
        return found

    def left_off(self) -> dict[str, AccountableClient]:
        """Clients with rounds that were begun and not answered, on which their owner has not said a word."""
        known = {name: self.clients[name] for name in self.clients if _ledger_file(self.ledgers, name).exists()}
        return {
            name: client
            for name, client in known.items()
            if isinstance(client, AccountableClient) and client.unanswered.new
        }


def build_federation(settings: FederationSettings, data: ImageData, *, ledgers: Path) -> ImageFederation:
    """The federation that the settings describe.

    Args:
        settings: what to train, and what to protect.
        data: the training images are spread over the clients, the test images are the server's.
        ledgers: a folder for the ledgers, one a client and one for the server; made if need be.

    Raises:
        ParameterError: a setting is out of range.
        LedgerError: there is a ledger of another run in the folder.
    """
    parts = _parts(settings, data)
    plan = _server_plan(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        channels, height, width = data.train_images.shape[1:]
        model = build_model(settings.model, in_channels=channels, image_size=(height, width), classes=len(data.classes))
    sampling: ClientSampling = EveryClient() if settings.client_rate == 1 else PoissonClients(settings.client_rate)
    server = FederatedServer(
        model,
        sampling=sampling if plan is None else None,
        optimizer=FedAvg(learning_rate=settings.server_lr),
        plan=plan,
        ledger=None if plan is None else LedgerFile(_ledger(ledgers, "server")),
        insecure_seed=settings.insecure_seed,
    )
    make = _MakeClient(settings, data, parts, ledgers, model)
    return ImageFederation(
        server=server,
        clients=VirtualClients(make, settings.clients),
        evaluate=accuracy_on(model, data.test_images, data.test_labels),
        plan=plan,
        sizes=tuple(len(part) for part in parts),
        ledgers=ledgers,
        sends=_in_the_clear(settings, model),
    )


class _MakeClient:
    """Makes a client from its index."""

    def __init__(
        self, settings: FederationSettings, data: ImageData, parts: list[Part], ledgers: Path, model: nn.Module
    ) -> None:
        self.settings = settings
        self.data = data
        self.parts = parts
        self.ledgers = ledgers
        self.model = model

    def __call__(self, index: int, number: int) -> Client:
        name = f"client-{index}"
        s = self.settings
        if s.scheme in ("record", "both"):
            return self._record_level(name, index)
        client = self._plain(name, index)
        if s.scheme != "local":
            return client
        noise = s.noise_multiplier
        if noise is None:
            noise = _noise(s.epsilon, s.delta, 1.0, s.rounds, "replace_one")
        ledger = LedgerFile(_ledger(self.ledgers, name), relation="replace_one", budget=self._budget)
        return LocalUpdateDP(
            client,
            max_update_norm=s.max_update_norm,
            noise_multiplier=noise,
            ledger=ledger,
            insecure_seed=s.insecure_seed,
        )

    @property
    def _budget(self) -> Budget | None:
        s = self.settings
        return None if s.epsilon is None else Budget(epsilon=s.epsilon, delta=s.delta)

    def _record_level(self, name: str, index: int) -> DPClient:
        s = self.settings
        size = len(self.parts[index])
        batch_size = min(s.batch_size, size)
        noise = s.noise_multiplier
        if noise is None:
            noise = _noise(s.epsilon, s.delta, batch_size / size, s.rounds * s.local_steps, "add_or_remove")
        return DPClient(
            name,
            self._make_model,
            self._dataset(index),
            F.cross_entropy,
            optimizer=self._optimizer,
            noise_multiplier=noise,
            max_grad_norm=s.max_grad_norm,
            batch_size=batch_size,
            ledger=LedgerFile(_ledger(self.ledgers, name), budget=self._budget),
            steps=s.local_steps,
            insecure_seed=s.insecure_seed,
        )

    def _plain(self, name: str, index: int) -> PlainClient:
        s = self.settings
        return PlainClient(
            name,
            self._make_model,
            self._dataset(index),
            F.cross_entropy,
            optimizer=self._optimizer,
            batch_size=min(s.batch_size, len(self.parts[index])),
            steps=s.local_steps,
            insecure_seed=s.insecure_seed,
        )

    def _make_model(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def _dataset(self, index: int) -> TensorDataset:
        part = torch.from_numpy(self.parts[index])
        return TensorDataset(self.data.train_images[part], self.data.train_labels[part])

    @property
    def _optimizer(self) -> Callable[..., torch.optim.Optimizer]:
        return functools.partial(torch.optim.SGD, lr=self.settings.lr, momentum=self.settings.momentum)


def _parts(settings: FederationSettings, data: ImageData) -> list[Part]:
    labels, clients, minimum, seed = data.train_labels, settings.clients, settings.minimum, settings.seed
    if settings.partition == "dirichlet":
        return dirichlet(labels, clients, alpha=settings.alpha, minimum=minimum, seed=seed)
    if settings.partition == "shards":
        return shards(labels, clients, per_client=settings.shards_per_client, minimum=minimum, seed=seed)
    return iid(len(labels), clients, minimum=minimum, seed=seed)


def _server_plan(settings: FederationSettings) -> ClientLevelPlan | None:
    if settings.scheme not in ("client", "both"):
        return None
    epsilon = settings.client_epsilon if settings.scheme == "both" else settings.epsilon
    noise = 1.0 if settings.noise_multiplier is None or settings.scheme == "both" else settings.noise_multiplier
    everybody = settings.client_rate == 1
    plan = ClientLevelPlan(
        clients=settings.clients,
        noise_multiplier=noise,
        max_update_norm=settings.max_update_norm,
        rounds=settings.rounds,
        sampling="all" if everybody else "poisson",
        sample_rate=None if everybody else settings.client_rate,
    )
    return plan if epsilon is None else plan.calibrated(epsilon=epsilon, delta=settings.delta)


def _in_the_clear(settings: FederationSettings, model: nn.Module) -> Inventory:
    """What nothing covers in a client's reply: all of the update, of clients that add no noise."""
    if settings.scheme == "local" or (settings.scheme in ("record", "both") and settings.noise_multiplier != 0):
        return Inventory()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return inventory_of(GlobalWeights(model, trained), mechanism=UNPROTECTED, metrics=(), weight=1.0)


def _ledger(folder: Path, name: str) -> Path:
    """Where a ledger goes. The folder is made with the first: a run that is refused before it leaves none."""
    folder.mkdir(parents=True, exist_ok=True)
    return _ledger_file(folder, name)


def _ledger_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.ledger"


def _refuse_unless_positive(name: str, value: float) -> None:
    if arguments.non_negative(name, value, remedy="Give a number such as 1.0.") == 0:
        raise ParameterError(f"{name} must be > 0, got {value!r}.")


@functools.cache  # many clients have the same number of examples
def _noise(epsilon: float | None, delta: float, sample_rate: float, steps: int, relation: str) -> float:
    assert epsilon is not None
    return accountants.noise_multiplier(
        epsilon=epsilon, delta=delta, sample_rate=sample_rate, steps=steps, relation=relation
    )
