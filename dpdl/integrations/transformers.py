"""Private fine-tuning with the Hugging Face `Trainer`: a mixin in front of it, or of a subclass of your own.

class PrivateTrainer(PrivateTraining, transformers.Trainer): pass

args = TrainingArguments(..., per_device_train_batch_size=64, max_grad_norm=0.0)
trainer = PrivateTrainer(model, args, train_dataset=data, plan=plan, delta=1e-5)
trainer.train()
print(trainer.private.optimizer.report(delta=1e-5))

The model stays the plain one; saving, evaluation and prediction are the Trainer's own. While it trains, batches are
drawn by the plan, the loss is computed outside of the model, so that the fast engine can run it, and each optimizer
step is a private one. Checkpoints hold the optimizer's state, and with it plan, ledger and position.

The loss: `compute_loss_func(outputs, labels)`, if the Trainer was given one; else, for the library's classifiers with
one label for each example, what the model itself would take. All others compute their loss themselves, example by
example (engines vmap and loop), which is slower. In all cases: the mean over examples of each one's own loss.

Private inputs: train_dataset, and the training loss that the Trainer logs. Public: epsilon, learning rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from accountants import arguments
from dpdl.errors import CheckpointError, ParameterError, WrapError
from dpdl.execution import Execution
from dpdl.integrations.logical_batches import LogicalBatches
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from dpdl.plan import PrivacyPlan
from dpdl.private import Private, make_private

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # whichever Trainer stands behind the mixin

__all__ = ["PrivateTraining"]


class PrivateTraining(_Trainer):
    """A mixin that turns a Hugging Face Trainer into a private one.

    Args:
        model, args, others, named: the Trainer's own arguments.
        plan: the guarantee; `PrivacyPlan.for_loader(DataLoader(data, batch_size=...), ...)` makes one, with
            `per_device_train_batch_size` as batch size.
        delta: at which epsilon is logged.
        execution: speed and memory.
        ledger: where the dataset's releases add up, as for `make_private`.

    Raises:
        ParameterError: the training arguments ask for what a private run cannot do.
        WrapError: plan is no PrivacyPlan.
    """

    def __init__(
        self,
        model: Any,
        args: Any,
        *others: Any,
        plan: PrivacyPlan,
        delta: float,
        execution: Execution | None = None,
        ledger: Ledger | LedgerFile | None = None,
        **named: Any,
    ) -> None:
        if not isinstance(plan, PrivacyPlan):
            raise WrapError(f"plan must be a PrivacyPlan, got {type(plan).__name__}.")
        if model is None:
            raise WrapError("model must be a module. model_init makes one for each trial, each of which is a run.")
        _refuse_settings(args)
        super().__init__(model, args, *others, **named)
        args.ignore_data_skip = True  # the private loader knows its own place
        self.delta = arguments.delta(delta)
        self._plan = plan
        self._execution = execution
        self._ledger = ledger
        self._private: Private | None = None

    # ── the run ─────────────────────────────────────────────────────────────────────────────────────

    @property
    def private(self) -> Private:
        """Model, optimizer and loader of the private run; made when they are first needed."""
        if self._private is None:
            model = self.accelerator.prepare_model(self.model, evaluation_mode=True)  # device, autocast; no DDP
            optimizer = super().create_optimizer()
            self._private = make_private(
                model, optimizer, self._plain_loader(), self._plan, execution=self._execution, ledger=self._ledger
            )
            self.optimizer = self._private.optimizer
            self._batches = LogicalBatches(self._private)
        return self._private

    def _plain_loader(self) -> DataLoader[Any]:
        """What the Trainer would load, before accelerate replaced its sampler."""
        prepared = super().get_train_dataloader()
        return DataLoader(
            prepared.dataset,
            batch_size=self.args.train_batch_size,
            collate_fn=_PlainBatches(prepared.collate_fn),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            drop_last=self.args.dataloader_drop_last,
            worker_init_fn=prepared.worker_init_fn,
        )

    def get_train_dataloader(self) -> Any:
        """The private loader; a logical batch counts as one, in however many parts it comes.

        Raises:
            ParameterError: the training arguments ask for more steps than the plan has.
        """
        loader = self.private.loader
        asked = self.args.max_steps if self.args.max_steps > 0 else math.ceil(self.args.num_train_epochs * len(loader))
        if asked > self._plan.steps:
            raise ParameterError(
                f"The training arguments ask for {asked} steps (max_steps={self.args.max_steps}, "
                f"num_train_epochs={self.args.num_train_epochs:g}, {len(loader)} steps an epoch), and the plan has "
                f"{self._plan.steps}. Set max_steps={self._plan.steps}, or make a plan with more steps."
            )
        return self._batches

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The private optimizer."""
        return self.optimizer if self._private is not None else self.private.optimizer

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        return self.private.model if training else self.model

    # ── a step ──────────────────────────────────────────────────────────────────────────────────────

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward, for all parts of the logical batch; the Trainer's optimizer step ends the last one.

        Args:
            model: the private model, or what the Trainer made of it.
            inputs: one part of a logical batch.
            num_items_in_batch: the Trainer's count; not used, as the plan's expected batch size divides.

        Returns:
            The loss of this part, a scalar.

        Raises:
            CheckpointError: training was resumed without the optimizer that knows what was spent.
        """
        self._refuse_forgotten_spending()
        loss: Tensor = super().training_step(model, inputs)
        for part in self._batches.other_parts():
            loss = super().training_step(model, part)
        return loss  # of the last part; the Trainer logs it

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over examples of each one's own loss, from the model's outputs where that is known how.

        Args:
            model, inputs: as in `training_step`.
            return_outputs: return the outputs too, as a pair.
            num_items_in_batch: the Trainer's, outside of training; in training each example has its own loss.
        """
        if self._private is None or model is not self._private.model:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.get("labels")
        if self.compute_loss_func is None and not (_classifies(self.model) and _is_one_label_each(labels)):
            return super().compute_loss(model, inputs, return_outputs)  # the model's own loss, example by example
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=None)
        else:
            config: Any = getattr(self.model, "config", None)
            numbers = getattr(config, "problem_type", None) == "regression"
            loss = _one_label_loss(outputs.logits, labels, numbers, smoothing=self.args.label_smoothing_factor)
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> None:
        return None  # there is no gradient before the step, and its norm would be private

    def _refuse_forgotten_spending(self) -> None:
        """A checkpoint without its optimizer would start a new ledger under trained weights."""
        known = self.private.optimizer.steps_taken
        if self.state.global_step > known:
            raise CheckpointError(
                f"Training resumed at step {self.state.global_step}, but the ledger knows of {known}: the checkpoint "
                "has no optimizer state (save_only_model?), and what was spent would be forgotten. Resume from one "
                "that has."
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, with epsilon among the `logs`."""
        if self._private is not None and "loss" in logs:
            logs = {**logs, "epsilon": self._private.optimizer.epsilon(self.delta)}
        super().log(logs, *args, **kwargs)


class _PlainBatches:
    """A collator whose batches are dicts, which the checks of the loss can follow."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        return dict(self._collate(examples))


def _classifies(model: Any) -> bool:
    """Whether it is one of the library's classifiers of whole examples, whose loss is known; by its class, as adapted
    ones are called alike."""
    name = type(model).__name__
    return "Classification" in name and "TokenClassification" not in name


def _is_one_label_each(labels: Any) -> bool:
    return isinstance(labels, Tensor) and (labels.ndim == 1 or (labels.ndim == 2 and labels.is_floating_point()))


def _one_label_loss(logits: Tensor, labels: Tensor, numbers: bool, *, smoothing: float) -> Tensor:
    """As the library's classifiers: a class, several classes at once, or numbers (one output, or `numbers`)."""
    if numbers or logits.shape[-1] == 1:
        return F.mse_loss(logits.reshape(labels.shape), labels.to(logits.dtype))
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels)
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)


def _refuse_settings(args: Any) -> None:
    sampling = getattr(args, "train_sampling_strategy", "random")
    layerwise = any(word in str(args.optim).lower() for word in ("lomo", "layerwise"))
    refusals = (
        (args.gradient_accumulation_steps != 1, f"gradient_accumulation_steps={args.gradient_accumulation_steps}",
         "Set per_device_train_batch_size to the plan's batch; Execution(max_physical_batch_size=...) to what fits."),
        (args.max_grad_norm > 0, f"max_grad_norm={args.max_grad_norm:g}",
         "Gradients are clipped for each example, by the plan's max_grad_norm. Set max_grad_norm=0.0 here."),
        (sampling not in ("random", "sequential") or getattr(args, "group_by_length", False),  # its name before v5
         f"train_sampling_strategy={sampling!r} (group_by_length)",
         "The plan draws examples whatever their length. Set it to 'random'."),
        (args.fp16, "fp16=True", "Use bf16=True, which needs no loss scale."),
        (args.torch_compile, "torch_compile=True", "Compile a copy for prediction."),
        (args.auto_find_batch_size, "auto_find_batch_size=True", "Set Execution(max_physical_batch_size=...)."),
        (bool(args.fsdp) or bool(args.deepspeed), "fsdp or deepspeed", "Use one device."),
        (args.world_size > 1 or args.n_gpu > 1, f"{max(args.world_size, args.n_gpu)} devices",
         "Make one visible (CUDA_VISIBLE_DEVICES); for several, write the loop in torch.distributed."),
        (layerwise, f"optim={args.optim!s}", "It steps inside of backward. Use adamw_torch."),
    )  # fmt: skip
    for refused, what, remedy in refusals:
        if refused:
            raise ParameterError(f"A Trainer cannot train privately with {what}. {remedy}")
