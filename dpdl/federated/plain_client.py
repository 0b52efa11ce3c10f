"""A client without differential privacy: federated averaging as it was, to compare with, or to wrap in `LocalUpdateDP`.

    client = PlainClient("ward 3", model, dataset, F.cross_entropy, optimizer=partial(SGD, lr=0.1), batch_size=32,
                         steps=20)

Its updates can be inverted into its data. Whatever it sends is listed as UNPROTECTED.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from accountants import arguments
from dpdl.claims import AdversaryReport, Claim
from dpdl.errors import ModelError, ParameterError
from dpdl.federated.client_report import ADVERSARIES
from dpdl.federated.client_settings import (
    EXAMPLES,
    MAX_STEPS,
    checked_flag,
    checked_metrics,
    checked_name,
    framework_randomness,
    inventory_of,
    loader_over,
    own_model,
    own_steps,
    refuse_no_function,
    round_stream,
    steps_of,
)
from dpdl.federated.global_weights import GlobalWeights
from dpdl.federated.inventory import UNPROTECTED, Inventory
from dpdl.federated.local_run import MakeOptimizer
from dpdl.federated.local_steps import LossFunction, Train, pull_to_start, take_steps
from dpdl.federated.messages import FitReply, FitRequest, Refusal, Scalar
from dpdl.federated.refusals import refusal_of
from dpdl.process_lock import ProcessLock
from dpdl.sampling import by_rows
from dpdl.secure_random import RandomStream

__all__ = ["PlainClient"]


class PlainClient:
    """Local training on shuffled batches.

    Args:
        name, model, dataset, loss_fn, optimizer: as of `DPClient`.
        batch_size: records in a batch.
        steps: local steps a round, unless the request says.
        proximal: FedProx's mu (arXiv:1812.06127).
        train: your own loop, `train(model, optimizer, loader, steps)`.
        insecure_seed: makes batches and dropout a function of (seed, name, federation, round).
        send_buffers: whether changes of buffers leave, too.
        metrics: names of numbers to send: "loss", "examples", or what `train` returns.
        weight: in the server's mean, such as the number of records.
        max_steps: a request for more local steps is refused.

    Guarantee:
        None.

    Raises:
        ParameterError, LoaderError: arguments out of range. What is wrong with a model is said at the first round.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module | Callable[[], nn.Module],
        dataset: Dataset[Any],
        loss_fn: LossFunction,
        *,
        optimizer: MakeOptimizer,
        batch_size: int,
        steps: int | None = None,
        proximal: float = 0.0,
        train: Train | None = None,
        insecure_seed: int | None = None,
        send_buffers: bool = False,
        metrics: Sequence[str] = (),
        weight: float = 1.0,
        max_steps: int = MAX_STEPS,
    ) -> None:
        self.name = checked_name(name)
        self._make_model = own_model(model)
        self._dataset = dataset
        self._batch_size = arguments.positive_whole("batch_size", batch_size, remedy="Give a number of records.")
        loader_over(dataset, self._batch_size)
        refuse_no_function("loss_fn", loss_fn, remedy="Give one of outputs and targets: F.cross_entropy.")
        self._loss_fn = loss_fn
        refuse_no_function("optimizer", optimizer, remedy="Give functools.partial(torch.optim.SGD, lr=0.1).")
        self._optimizer = optimizer
        self._steps, self._max_steps = own_steps(steps, max_steps)
        self._proximal = arguments.non_negative("proximal", proximal, remedy="Give FedProx's mu, or 0.")
        if train is not None:
            refuse_no_function("train", train, remedy="Give train(model, optimizer, loader, steps), or leave it out.")
        self._train = train
        if insecure_seed is not None:
            RandomStream.from_insecure_seed(insecure_seed)  # or refused
        self._seed = insecure_seed
        self._send_buffers = checked_flag("send_buffers", send_buffers)
        self._metrics = checked_metrics(metrics, own_loop=train is not None)
        self._weight = arguments.non_negative("weight", weight, remedy="Give a number such as len(dataset).")
        self._module: nn.Module | None = None
        self._weights: GlobalWeights | None = None
        self._modes: list[tuple[nn.Module, bool]] = []
        self._inventory = Inventory()
        self._one_at_a_time = ProcessLock()
        self._begun = False

    @property
    def metrics(self) -> tuple[str, ...]:
        """What it sends besides the update, by name."""
        return self._metrics

    @property
    def unprotected(self) -> tuple[str, ...]:
        """As `metrics`: all of it is sent as it is."""
        return self._metrics

    def answer(self, request: FitRequest) -> FitReply | Refusal:
        """Train as the request says and reply; errors become refusals."""
        with self._one_at_a_time:
            self._begun = False
            try:
                return self._fit(request)
            except Exception as error:  # a user's model, data and loop may raise anything, and a server has to count it
                return refusal_of(error, request, client=self.name, begun=self._begun)

    def report(self, delta: float) -> AdversaryReport:
        """NO GUARANTEE, against everybody; `delta` is that of the claims there are not."""
        arguments.delta(delta)
        why = "its updates are sent without clipping or noise"
        return AdversaryReport(
            title=f"Client '{self.name}'",
            adversaries=ADVERSARIES,
            claims=tuple(Claim(against=adversary, unit="record", because=why) for adversary in ADVERSARIES),
        )

    def _fit(self, request: FitRequest) -> FitReply:
        steps = steps_of(request, self._steps, at_most=self._max_steps)
        module, weights = self._ready()
        weights.refuse_unfit(request.state)
        self._begun = True
        weights.load(request.state)
        for child, mode in self._modes:
            child.training = mode
        module.zero_grad(set_to_none=True)
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = self._optimizer(parameters)
        if self._proximal:
            pull_to_start(optimizer, parameters, strength=self._proximal)
        randomness = round_stream(self._seed, self.name, request)
        order = torch.Generator().manual_seed(int(randomness.child("order").words(1, message=0)[0] >> 1))
        dataset, collate = by_rows(self._dataset, None) if self._train is None else (self._dataset, None)
        loader: DataLoader[Any] = DataLoader(
            dataset, batch_size=self._batch_size, shuffle=True, generator=order, collate_fn=collate
        )
        device = parameters[0].device
        with framework_randomness(randomness, device):
            if self._train is None:
                found: Mapping[str, Scalar] = take_steps(
                    module, optimizer, loader, steps, loss_fn=self._loss_fn, device=device
                )
            else:
                found = self._train(module, optimizer, loader, steps) or {}
        return FitReply(
            client=self.name,
            round=request.round,
            update=weights.update(request.state),
            base=request.state,
            tied=weights.tied,
            releases=self._inventory,
            weight=self._weight,
            metrics=self._told(found),
        )

    def _ready(self) -> tuple[nn.Module, GlobalWeights]:
        """The model, made at the first request."""
        if self._module is None or self._weights is None:
            module = self._make_model()
            trained = [name for name, p in module.named_parameters() if p.requires_grad]
            if not trained:
                raise ModelError("The model has no parameter that requires a gradient: nothing would be trained.")
            weights = GlobalWeights(module, trained, with_buffers=self._send_buffers)
            self._inventory = inventory_of(weights, mechanism=UNPROTECTED, metrics=self._metrics, weight=self._weight)
            self._weights = weights
            self._modes = [(child, child.training) for child in module.modules()]
            self._module = module
        return self._module, self._weights

    def _told(self, found: Mapping[str, Scalar]) -> dict[str, Scalar]:
        known = {**found, EXAMPLES: len(self._dataset)}  # type: ignore[arg-type]  # sized, as its loader was
        for name in self._metrics:
            if name not in known:
                raise ParameterError(f"The metric {name!r} was asked for, and train returned {sorted(found)}.")
        return {name: known[name] for name in self._metrics}

    def __repr__(self) -> str:
        return f"PlainClient({self.name!r})"
