"""A client's model in private training, coupled anew for each round and checked once.

`make_private` couples a model, an optimizer and a loader for one run, with one plan, one key and one ledger. A round of
federated learning is such a run: its own plan (that many steps and no more), its own key, its own name in the client's
ledger. Making all of it anew costs a millisecond, but for one part: the engine, which is tried and checked on the first
batch that it sees, at the price of some ten steps. So the model and its `PerSampleRunner` stay, and the rest is new.

That the runner stays is sound. It holds no sums and no gradients from batch to batch, only how calls of the model are
computed, which depends on shapes and not on the weights; these are exchanged in place between steps, as an optimizer
does. Its later checks (of the loss, and of whole batches for examples that reach each other) go on over rounds, by
the number of batches since the client was made: the 8th, 16th, 32nd, ...

What it cannot know: checks see the weights of the day. A model whose examples meet only under some weights (a gate
that is zero at first) passes under the others, and here the weights are the server's. A client that does not know its
own architecture sets Execution(engine="vmap"), which computes each example by itself, whatever the weights.

State of the local optimizer (momentum, Adam's moments) begins anew with each round. It is made of noisy gradients, so
keeping it would cost no privacy; but the weights that it was about are gone, replaced by the mean over clients, and
an answer would depend on which rounds this very process has seen, killed or not, in one process or under Flower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from accountants import NeighboringRelation
from dpdl.account import Account
from dpdl.clipping import flat_weights
from dpdl.execution import Execution
from dpdl.ledger import Ledger
from dpdl.loader import PrivateLoader
from dpdl.model import PrivateModel
from dpdl.optim import PrivateOptimizer
from dpdl.per_sample.runner import PerSampleRunner
from dpdl.plan import PrivacyPlan
from dpdl.private import Private, make_private
from dpdl.ranks import Ranks
from dpdl.run_state import RunState
from dpdl.secure_random import RandomStream
from dpdl.turns import Turns

__all__ = ["LocalRun", "MakeOptimizer"]

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class LocalRun:
    """One client's model, loader and plan, from which rounds are made.

    Args:
        module: the client's own model; nobody else trains it.
        make_optimizer: given parameters, makes their optimizer.
        loader: an ordinary loader over the client's data.
        plan: of one step; how many there are is said for each round.
        execution: speed and memory.

    Raises:
        PrivacyError: whatever `make_private` refuses; no data has been touched.
    """

    def __init__(
        self,
        module: nn.Module,
        make_optimizer: MakeOptimizer,
        loader: DataLoader[Any],
        plan: PrivacyPlan,
        execution: Execution,
    ) -> None:
        self.module = module
        self._make_optimizer = make_optimizer
        self._loader = loader
        self._plan = plan
        self._execution = replace(execution, data_parallel=False)  # a client is one process
        first = make_private(module, self._optimizer(), loader, plan, execution=self._execution)
        self.trained = tuple(first.optimizer.trainable())
        self._modes = [(child, child.training) for child in module.modules()]
        self._runner = PerSampleRunner(module, self._execution)

    def begin(
        self, *, steps: int, account: Account, run_name: str, randomness: RandomStream
    ) -> tuple[Private, torch.optim.Optimizer, RunState]:
        """A round: the private three, the optimizer within, and how far it has come.

        Args:
            steps: how many there will be, at most.
            account: the client's ledger, which records each before its noise is drawn.
            run_name: the round's, in that ledger.
            randomness: the round's own key.
        """
        for child, mode in self._modes:
            child.training = mode  # a training loop may have evaluated last
        self.module.zero_grad(set_to_none=True)
        plan, ranks = replace(self._plan, steps=steps), Ranks()
        own = Ledger(relation=NeighboringRelation(plan.relation), within=account, run=run_name)
        run = RunState(plan, randomness=randomness, ledger=own)
        turns = Turns(clip=partial(flat_weights, max_grad_norm=plan.max_grad_norm), sensitivity=plan.max_grad_norm)
        loader = PrivateLoader(
            self._loader,
            plan=plan,
            steps_per_pass=math.ceil(len(self._loader.dataset) / plan.expected_batch_size),  # type: ignore[arg-type]
            max_physical_batch_size=self._execution.max_physical_batch_size,
            turns=turns,
            run=run,
            share=ranks.share,
            begin_batch=self._runner.begin_batch,
        )
        inner = self._optimizer()
        optimizer = PrivateOptimizer(
            inner,
            model=self.module,
            plan=plan,
            turns=turns,
            run=run,
            ranks=ranks,
            accumulate_dtype=self._execution.accumulate_dtype,
            notes=lambda: self._runner.notes,
            on_load=loader.resume_pass,
        )
        model = PrivateModel(self.module, runner=self._runner, turns=turns, trainable=optimizer.trainable)
        return Private(model, optimizer, loader), inner, run

    @property
    def notes(self) -> list[str]:
        """What a report should say of how gradients were computed."""
        return self._runner.notes

    def parameters(self) -> dict[str, Tensor]:
        """Those that are trained, by name."""
        everything = dict(self.module.named_parameters())
        return {name: everything[name] for name in self.trained}

    def _optimizer(self) -> torch.optim.Optimizer:
        return self._make_optimizer([p for p in self.module.parameters() if p.requires_grad])
