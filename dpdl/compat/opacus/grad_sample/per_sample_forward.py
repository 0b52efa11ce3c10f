"""One module's forward, whose backwards leave per-sample gradients in `p.grad_sample`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dpdl.compat.opacus.errors import AccumulationError, BufferError
from dpdl.compat.opacus.grad_sample.record import GradSample, NormSample, PerSampleRecord
from dpdl.compat.opacus.turn import Part, Turn
from dpdl.execution import Execution, LossReduction
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.boundary import Passage
from dpdl.per_sample.engine import FrozenCall
from dpdl.per_sample.isolation import find_batch_norms
from dpdl.per_sample.runner import PerSampleRunner, plain_arguments

__all__ = ["PerSampleForward"]


class PerSampleForward:
    """Runs a module for per-sample gradients.

    Args:
        module: the plain module.
        batch_first: whether tensors carry the examples on their first axis, or on their second.
        loss_reduction: how the loss combines examples.
        keep: hold gradients after the optimizer has summed them.
        norms: offer each parameter's norms, `p._norm_sample`.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        batch_first: bool,
        loss_reduction: LossReduction,
        keep: bool = True,
        norms: bool = False,
    ) -> None:
        findings = find_batch_norms(module)
        if findings:
            listed = "; ".join(str(finding) for finding in findings)
            raise BufferError(f"{listed} ModuleValidator.fix(module) replaces them.")
        self.module = module
        self.batch_first = batch_first
        self.loss_reduction = loss_reduction
        self.enabled = True
        self.may_accumulate = True
        self.turn: Turn | None = None
        self.after_delivery: Callable[[], None] = lambda: None
        self._keep = keep
        self._norms = norms
        run = module if batch_first else _BatchSecond(module)
        self._runner = PerSampleRunner(run, Execution(loss_reduction=loss_reduction))
        self._forwards = 0
        # Weakly: p.grad_sample holds it, and zero_grad() is to free it.
        self._record: weakref.ReferenceType[PerSampleRecord] | None = None
        for p in self.trainable().values():
            _attach(p, None)

    @property
    def runner(self) -> PerSampleRunner:
        """Engine and checks."""
        return self._runner

    @property
    def last_record(self) -> PerSampleRecord | None:
        """Of the last group of forwards that has gone backward."""
        return None if self._record is None else self._record()

    def trainable(self) -> dict[str, Tensor]:
        """The parameters that get per-sample gradients, by their names in what is run."""
        held = None if self.turn is None else self.turn.held
        return {
            name: p
            for name, p in self._runner.module.named_parameters()
            if p.requires_grad and (held is None or id(p) in held)
        }

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], plain: Callable[..., Any]) -> Any:
        """The module's output.

        Args:
            args, kwargs: as the script calls the model.
            plain: the module's own forward.
        """
        args, kwargs = plain_arguments(args, kwargs)
        if not self.enabled or not torch.is_grad_enabled() or not self.trainable():
            return plain(*args, **kwargs)
        if not self.module.training and not self._trains_in_eval_mode(args, kwargs):
            return plain(*args, **kwargs) if self.turn is None else FrozenCall(self.module, {}).run({}, args, kwargs)
        if not self.batch_first:
            args, kwargs = _swapped(args), _swapped(kwargs)
        size = None if self.turn is None else self.turn.size
        batch = ExampleBatch.from_call(args, kwargs, size=size if size == _rows(args, kwargs) else None)
        self._forwards += 1
        number, part = self._forwards, None if self.turn is None else self.turn.part

        def deliver(passage: Passage) -> None:
            self._deliver(passage, number, part)

        return self._runner.forward(batch, self.trainable(), deliver)

    def join(self, turn: Turn, *, after_delivery: Callable[[], None], poisson: bool) -> None:
        """Become part of a private run.

        Args:
            turn: which batch is open.
            after_delivery: called at each backward.
            poisson: whether batches are sampled, so that each must have a step of its own.
        """
        self.turn = turn
        self.after_delivery = after_delivery
        self.may_accumulate = not poisson
        self._record = None
        for p in self.trainable().values():
            p.__dict__["grad_sample"] = None

    def begin_batch(self, batch: Any, size: int) -> Any:
        """The batch as it is handed out: now and then followed to the loss, which is then checked."""
        return self._runner.begin_batch(batch, size) if self.enabled else batch

    def forget(self) -> None:
        """Let go of the last group of forwards."""
        self._record = None

    def _trains_in_eval_mode(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if self.turn is None or self.turn.size is None:
            return False
        return (_rows(args, kwargs) if self.batch_first else _columns(args, kwargs)) == self.turn.size

    def _deliver(self, passage: Passage, number: int, part: Part | None) -> None:
        """A backward has come; the gradients of the outputs are added to `passage` after this returns."""
        if self.turn is not None:
            self.turn.refuse_foreign(passage.size, part)
        if passage.is_used_up:
            raise AccumulationError(
                "backward() came a second time through an output whose per-sample gradients were computed after the "
                "first. Add up the losses, and call backward() once."
            )
        record = self.last_record
        together = record is not None and (number <= record.forwards or (part is not None and record.batch is part))
        if record is None or not together or not self._is_attached(record):
            record = self._new_record(passage, part)
        elif record.size != passage.size or record.batch is not part:
            raise AccumulationError(
                f"Two forward passes before one backward had {record.size} and {passage.size} examples; per-sample "
                "gradients of both cannot be added. Call backward() after each forward."
            )
        record.add(passage)
        self.after_delivery()
        if self._is_plain(record):
            torch.autograd.Variable._execution_engine.queue_callback(lambda: _add_to_grad(record, self.loss_reduction))

    def _new_record(self, passage: Passage, part: Part | None) -> PerSampleRecord:
        parameters = {name: p for name, p in self.trainable().items() if name in passage.trainable}
        held = (getattr(p, "grad_sample", None) for p in parameters.values())
        waiting = next((grad_sample for grad_sample in held if grad_sample is not None), None)
        if waiting is not None and not self.may_accumulate:
            done = isinstance(waiting, GradSample) and waiting.record.processed
            raise AccumulationError(
                "p.grad_sample still holds the gradients of the last step. Call optimizer.zero_grad() after each step."
                if done
                else "backward() on a second batch before optimizer.step(): Poisson-sampled batches cannot be added "
                "up into one step, whose sampling nobody accounts for. Call optimizer.step() and zero_grad() for each "
                "batch; to save memory use BatchMemoryManager."
            )
        record = PerSampleRecord(
            parameters, size=passage.size, forwards=self._forwards, batch=part, keep=self._keep or part is None
        )
        for p in parameters.values():
            _attach(p, GradSample.made(record, p))
            if self._norms:
                p.__dict__["_norm_sample"] = NormSample.made(record, p)
        self._record = weakref.ref(record)
        return record

    def _is_attached(self, record: PerSampleRecord) -> bool:
        for p in record.parameters.values():
            held = getattr(p, "grad_sample", None)
            last = held[-1] if isinstance(held, list) else held
            return isinstance(last, GradSample) and last.record is record and not record.processed
        return False

    def _is_plain(self, record: PerSampleRecord) -> bool:
        """Whether no private optimizer will use the gradients: then `p.grad` is what it always is."""
        return self.turn is None and not any(hasattr(p, "summed_grad") for p in record.parameters.values())


def _attach(parameter: Any, grad_sample: GradSample | None) -> None:
    """Add to what the parameter holds: nothing, one batch's gradients, or a list of several batches'."""
    held = getattr(parameter, "grad_sample", None)
    if grad_sample is None or held is None:
        parameter.grad_sample = grad_sample
    elif isinstance(held, list):
        held.append(grad_sample)
    else:
        parameter.grad_sample = [held, grad_sample]


def _add_to_grad(record: PerSampleRecord, loss_reduction: LossReduction) -> None:
    """What plain autograd would have added to `p.grad`."""
    if not record.size:
        return
    mean = loss_reduction == "mean"
    with torch.no_grad():
        sums = record.norms_and_sum(lambda norms: torch.full_like(norms, 1 / record.size if mean else 1.0))
        for name, p in record.parameters.items():
            p.grad = sums[name].to(p.dtype) if p.grad is None else p.grad + sums[name].to(p.dtype)


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    return next((t.shape[0] for t in _tensors(args, kwargs)), None)


def _columns(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    return next((t.shape[1] for t in _tensors(args, kwargs) if t.ndim > 1), None)


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim > 0)


def _swapped(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.transpose(0, 1) if isinstance(leaf, Tensor) and leaf.ndim > 1 else leaf, tree)


class _BatchSecond(nn.Module):
    """A module that takes examples on the second axis, called with them on the first."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, as it is."""
        return self.module(*_swapped(args), **_swapped(kwargs))
