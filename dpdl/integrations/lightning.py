"""Private training with Lightning's `Trainer.fit`; evaluation, schedulers, loggers and checkpoints stay Lightning's.

private = dpdl.make_private(net, torch.optim.SGD(net.parameters(), lr=0.1), loader, plan)
module = Classifier(private)           # calls private.model, returns private.optimizer from configure_optimizers
callback = private_training(private, delta=1e-5)
Trainer(callbacks=[callback]).fit(module, callback.loader)

The module's training_step calls the private model on the batch, and returns the loss; Lightning hands
`optimizer.step` a closure, which the private optimizer takes. Lightning's checkpoints hold the optimizer's state, and
with it plan, ledger and position. What Lightning would do besides (accumulate batches, clip, wrap the module for
several processes) is refused before the first batch.

Private inputs: the batches, the training loss, and every metric of training data that the module logs. Public: epsilon.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np

from accountants import arguments
from dpdl.errors import ParameterError, WrapError
from dpdl.integrations.logical_batches import LogicalBatches
from dpdl.private import Private

__all__ = ["private_training"]

PACKAGES = ("lightning.pytorch", "pytorch_lightning")  # two names of one library
ONE_PROCESS = ("SingleDeviceStrategy",)


def private_training(private: Private, *, delta: float, log_as: str = "epsilon") -> Any:
    """A callback that holds Lightning to a private run, logs epsilon after each epoch, and stops with the plan.

    Args:
        private: what `make_private` returned.
        delta: at which epsilon is logged.
        log_as: the metric's name.

    Returns:
        A `Callback`, for the Trainer of `lightning` or of `pytorch_lightning`. Fit on its `loader`, which gives one
        batch for each step.

    Guarantee:
        That of `make_private`: it steps through its optimizer alone, and the epsilon in the logs is an upper bound.

    Raises:
        WrapError: `private` is something else.
        ImportError: neither package is installed.
    """
    if not isinstance(private, Private):
        raise WrapError(f"private must be what make_private returned, got {type(private).__name__}.")
    kind = type("PrivateTraining", (_PrivateTraining, _callback()), {})
    return kind(private, arguments.delta(delta), log_as)


def _callback() -> type:
    """Lightning's base class of callbacks."""
    for package in PACKAGES:
        if importlib.util.find_spec(package.partition(".")[0]) is not None:
            found: type = importlib.import_module(package).Callback
            return found
    raise ImportError("Lightning is not installed. Install dpdl[lightning].")


class _PrivateTraining:
    """The hooks; mixed into the installed package's Callback."""

    def __init__(self, private: Private, delta: float, log_as: str) -> None:
        self.private = private
        self.loader = LogicalBatches(private)
        self.delta = delta
        self.log_as = log_as

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Before anything is trained: what cannot work."""
        _refuse_settings(trainer, pl_module, limit=self.private.loader.max_physical_batch_size)
        optimizers = trainer.optimizers
        if len(optimizers) != 1 or optimizers[0] is not self.private.optimizer:
            names = ", ".join(type(optimizer).__name__ for optimizer in optimizers) or "none"
            raise WrapError(
                f"configure_optimizers of {type(pl_module).__name__} returned another optimizer ({names}) than the "
                "private one, which would train nothing. Return private.optimizer."
            )
        if not any(module is self.private.model for module in pl_module.modules()):
            raise WrapError(
                f"The private model is not a part of {type(pl_module).__name__}. Set it as an attribute of the module "
                "(self.net = private.model) and call that in training_step."
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Lightning knows its loader only now; nothing of it was trained on."""
        if trainer.train_dataloader is not self.loader:
            raise WrapError(
                f"Trainer.fit was given a {type(trainer.train_dataloader).__name__} that is not the callback's loader. "
                "Call trainer.fit(module, callback.loader), or return that from train_dataloader()."
            )

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Train on the other parts of the logical batch; Lightning's own step ends the last one."""
        for part in self.loader.other_parts():
            batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(part))
            output = trainer.strategy.training_step(batch, trainer.fit_loop.epoch_loop.batch_idx)
            trainer.strategy.backward(output["loss"] if isinstance(output, Mapping) else output, optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let Lightning finish in good order when the plan's last step is taken."""
        if self.private.optimizer.steps_taken >= self.private.optimizer.plan.steps:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """What was spent so far."""
        pl_module.log(self.log_as, _no_less(self.private.optimizer.epsilon(self.delta)))


def _refuse_settings(trainer: Any, pl_module: Any, *, limit: int | None) -> None:
    strategy = type(trainer.strategy).__name__
    refusals = (
        (
            not pl_module.automatic_optimization,
            "automatic_optimization=False",
            "Leave it True; private.optimizer is stepped once for each batch.",
        ),
        (
            trainer.accumulate_grad_batches != 1,
            f"accumulate_grad_batches={trainer.accumulate_grad_batches}",
            "Each batch is sampled for one step; make the plan's batches larger instead.",
        ),
        (
            bool(trainer.gradient_clip_val),
            f"gradient_clip_val={trainer.gradient_clip_val}",
            "Gradients are clipped for each example, by the plan's max_grad_norm; leave it out.",
        ),
        (
            trainer.overfit_batches > 0,
            f"overfit_batches={trainer.overfit_batches}",
            "It replaces the sampling that the plan accounts for; leave it out.",
        ),
        (
            limit is not None and getattr(trainer.precision_plugin, "scaler", None) is not None,
            f"a gradient scaler (precision={trainer.precision!r}) and Execution(max_physical_batch_size={limit})",
            'The scaler knows of one part for each step; use precision="bf16-mixed".',
        ),
        (
            strategy not in ONE_PROCESS,
            f"strategy {strategy} ({trainer.world_size} processes)",
            'Use Trainer(devices=1, strategy="auto"); for several processes, a loop of your own in torch.distributed.',
        ),
    )
    for refused, what, remedy in refusals:
        if refused:
            raise ParameterError(f"Lightning cannot train privately with {what}. {remedy}")


def _no_less(epsilon: float) -> float:
    """Loggers keep float32: the next one that is not below an upper bound."""
    rounded = np.float32(epsilon)
    return float(rounded if float(rounded) >= epsilon else np.nextafter(rounded, np.float32(np.inf)))
