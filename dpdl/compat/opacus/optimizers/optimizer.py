"""`DPOptimizer`: clips what `p.grad_sample` holds, adds noise, and lets the wrapped optimizer step.

    p.grad_sample ─▶ clip_and_accumulate: p.summed_grad ─▶ charged ─▶ add_noise: p.grad ─▶ scale_grad ─▶ inner step

As in Opacus each stage is a method, and noise and clipping norm are attributes that schedulers change. What a release
spends is told to the accountant before noise is drawn, with the noise multiplier that is then used.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any, SupportsIndex, overload

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dpdl.clipping import flat_weights
from dpdl.compat.opacus.errors import AccumulationError
from dpdl.compat.opacus.grad_sample.record import GradSample, PerSampleRecord
from dpdl.compat.opacus.optimizers.held_gradients import mark_processed, named, plain, refuse_processed
from dpdl.compat.opacus.optimizers.noise import _generate_noise
from dpdl.compat.opacus.randomness import Randomness
from dpdl.compat.opacus.turn import Turn
from dpdl.errors import ParameterError, PrivacyWarning, StepError, WrapError
from dpdl.noise.gaussian import gaussian_mechanism
from dpdl.optim.loss_scale import LossScale
from dpdl.per_sample.engine import accumulation_dtype
from dpdl.per_sample.materialized import MaterializedGradients
from dpdl.types import ClippedSum

__all__ = ["DPOptimizer", "_generate_noise"]

_guards: weakref.WeakKeyDictionary[torch.optim.Optimizer, RemovableHandle] = weakref.WeakKeyDictionary()


class DPOptimizer(torch.optim.Optimizer):
    """A private optimizer around another.

    Parameter groups and state are the wrapped optimizer's own. Alone it makes no claim: `PrivacyEngine.make_private`
    couples it with a loader and an accountant.

    Args:
        optimizer: any optimizer that steps from `p.grad`.
        noise_multiplier: >= 0, noise standard deviation over the sensitivity.
        max_grad_norm: > 0, the norm to which each example's gradient is clipped.
        expected_batch_size: what the sum is divided by under "mean"; None only under "sum".
        loss_reduction: "mean" or "sum".
        generator: the script's own source of noise; None for the operating system (or torch's seed, if it was set).
        secure_mode: noise from the operating system whatever was seeded.

    Raises:
        ParameterError: a value is out of range.
        WrapError: an optimizer that cannot be private.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler hands over its scale, and skips no step

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: Any,
        expected_batch_size: float | None,
        loss_reduction: str = "mean",
        generator: torch.Generator | None = None,
        secure_mode: bool = False,
    ) -> None:
        _refuse(optimizer)
        if loss_reduction not in ("mean", "sum"):
            raise ParameterError(f'loss_reduction must be "mean" or "sum", got {loss_reduction!r}.')
        if loss_reduction == "mean" and not (expected_batch_size is not None and expected_batch_size > 0):
            raise ParameterError(
                f'expected_batch_size must be > 0 for loss_reduction="mean", got {expected_batch_size!r}: it is what '
                "the noisy sum is divided by."
            )
        if not noise_multiplier >= 0:
            raise ParameterError(f"noise_multiplier must be >= 0, got {noise_multiplier}.")
        self.check_max_grad_norm(max_grad_norm)
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.original_optimizer = optimizer
        self.noise_multiplier = noise_multiplier
        self.max_grad_norm = max_grad_norm
        self.loss_reduction = loss_reduction
        self.expected_batch_size = expected_batch_size
        self.generator = generator
        self.secure_mode = secure_mode
        self.step_hook: Callable[[DPOptimizer], None] | None = None
        self.turn: Turn | None = None
        self.charge: Callable[[float], None] = lambda noise_multiplier: None
        self.own_gradients = False  # the script computes p.grad_sample itself, and may leave a p.grad beside it
        self._randomness = Randomness(generator, secure=secure_mode)
        self._secure_noise = self._randomness.next_stream("noise") if self._randomness.is_secure else None
        self._secure_releases = 0
        self._loss_scale = LossScale()
        self._step_skip_queue: list[bool] = []
        self._is_last_step_skipped = False
        self._sensitivity = 0.0
        self._accumulated = 1
        self._released: dict[int, Tensor] = {}
        self._stepping = False
        self._share_inner_state()
        self.sensitivity()  # fails if clipping does not fit the parameters
        if (earlier := _guards.pop(optimizer, None)) is not None:
            earlier.remove()  # another DPOptimizer was made of the same one before; this one goes on
        _guards[optimizer] = optimizer.register_step_pre_hook(self._refuse_direct_step)
        optimizer.register_load_state_dict_post_hook(lambda _: self._share_inner_state())
        for p in self.params:
            p.summed_grad = None

    # ── what scripts read ───────────────────────────────────────────────────────────────────────────

    @property
    def params(self) -> list[Any]:
        """The parameters that are trained."""
        return [p for group in self.original_optimizer.param_groups for p in group["params"] if p.requires_grad]

    @property
    def grad_samples(self) -> list[Tensor]:
        """Per-sample gradients of each parameter, batches that were accumulated one after another, [N, *shape].

        Raises:
            AccumulationError: a parameter has none.
        """
        return [torch.cat([plain(part) for part in self._held(p)]) for p in self.params]

    @property
    def accumulated_iterations(self) -> int:
        """Batches that have gone backward since the last step.

        Raises:
            AccumulationError: parameters have gradients of different numbers of batches.
        """
        counts = {len(self._held(p)) for p in self.params if getattr(p, "grad_sample", None) is not None}
        if len(counts) > 1:
            raise AccumulationError(
                f"Some parameters have gradients of {min(counts)} batches, others of {max(counts)}. Call "
                "optimizer.zero_grad() before each backward()."
            )
        return counts.pop() if counts else self._accumulated

    def attach_step_hook(self, fn: Callable[[DPOptimizer], None]) -> None:
        """Call `fn` at each release, before the wrapped optimizer steps. The engine's accountant is told besides."""
        self.step_hook = fn

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Say with `do_skip` whether the next step only accumulates, for a logical batch in several parts."""
        self._step_skip_queue.append(do_skip)

    # ── the stages ──────────────────────────────────────────────────────────────────────────────────

    def clip_and_accumulate(self) -> None:
        """Clip gradients one by one, and add their sum to `p.summed_grad`. Errors as for `accumulated_iterations`."""
        scale = self._loss_scale.taken(getattr(self, "grad_scale", None))
        self._loss_scale.unmark()
        self._sensitivity = max(self._sensitivity, self.sensitivity())
        for index in range(self.accumulated_iterations if self._has_gradients() else 0):
            self._accumulate(self._clipped([self._held(p)[index] for p in self.params], scale))
        for p in self.params:
            for part in self._held(p) if getattr(p, "grad_sample", None) is not None else []:
                mark_processed(part)

    def sensitivity(self) -> float:
        """By how much one example can move the sum, as an L2 norm."""
        return float(self.max_grad_norm)

    def check_max_grad_norm(self, max_grad_norm: Any) -> None:
        """Raise a ParameterError unless this optimizer can clip to `max_grad_norm`."""
        if isinstance(max_grad_norm, (list, tuple)) or not max_grad_norm > 0:
            raise ParameterError(
                f"max_grad_norm must be a number > 0, got {max_grad_norm!r}. For one per parameter set "
                'clipping="per_layer".'
            )

    def clip_record(self, record: PerSampleRecord, loss_scale: float) -> list[Tensor]:
        """The sum of clipped gradients of a `record` of all parameters, shaped as they are; over `loss_scale`."""
        bound = float(self.max_grad_norm)
        sums = record.norms_and_sum(lambda norms: flat_weights(norms, max_grad_norm=bound), loss_scale=loss_scale)
        names = {id(p): name for name, p in record.parameters.items()}
        return [sums[names[id(p)]] for p in self.params] if sums else self._zeros()

    def clip_tensors(self, gradients: list[Tensor]) -> list[Tensor]:
        """The sum of clipped gradients, each [N, *shape], in the order of the parameters."""
        rows = MaterializedGradients(tensors=named(gradients), accumulate_dtype=torch.float32)
        weights = flat_weights(rows.norms(), max_grad_norm=float(self.max_grad_norm))
        return list(rows.weighted_sum(weights).values())

    def add_noise(self) -> None:
        """Put the noisy sum into `p.grad`."""
        if self._secure_noise is not None and self._randomness.is_secure:
            stream, step = self._secure_noise, self._secure_releases
            self._secure_releases += 1
        else:
            stream, step = self._randomness.next_stream("noise"), 0
        sums = [
            p.summed_grad if p.summed_grad is not None else z for p, z in zip(self.params, self._zeros(), strict=True)
        ]
        clipped = ClippedSum(tensors=named(sums), sensitivity=self._sensitivity, examples=0, clipped=0, non_finite=0)
        noisy = gaussian_mechanism(clipped, noise_multiplier=self.noise_multiplier, stream=stream, step=step)
        for p, total in zip(self.params, noisy.tensors.values(), strict=True):
            p.grad = total.to(p.dtype)

    def scale_grad(self) -> None:
        """Divide `p.grad` by the expected batch size, if the loss is a mean."""
        if self.loss_reduction == "mean":
            assert self.expected_batch_size is not None
            for p in self.params:
                p.grad = p.grad / (self.expected_batch_size * self._accumulated)

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """All that comes before the wrapped optimizer's step; False if that is skipped, to accumulate.

        `closure` is Opacus's; `step` calls it.

        Raises:
            StepError: no batch is open, it has brought no gradients, or gradients came from elsewhere.
        """
        if not self.params:
            return True
        self._refuse_unready()
        self._accumulated = self.accumulated_iterations if self._has_gradients() else 1
        skip = self._skips()
        if not skip:
            self._refuse_foreign_gradients()
        self.clip_and_accumulate()
        if self.turn is not None:
            self.turn.close()
        self._is_last_step_skipped = skip
        if skip:
            return False
        self.charge(self.noise_multiplier)  # recorded as spent before anything leaves
        self.add_noise()
        self.scale_grad()
        self._released = {id(p): p.grad for p in self.params}
        self._sensitivity = 0.0
        if self.step_hook is not None:
            self.step_hook(self)
        return True

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Release the batch's noisy gradient and update; or, for a part of a logical batch, only add it up.

        Args:
            closure: computes the loss and calls backward; its loss is returned.

        Raises:
            StepError: as `pre_step`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.pre_step():
            self._stepping = True
            try:
                self.original_optimizer.step()
            finally:
                self._stepping = False
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget `p.grad` and `p.grad_sample`; and what a logical batch has added up so far, unless it goes on."""
        for p in self.params:
            p.grad_sample = None
            if not self._is_last_step_skipped:
                p.summed_grad = None
        if not self._is_last_step_skipped:
            self._sensitivity = 0.0
        self.original_optimizer.zero_grad(set_to_none)

    def drop_partial(self) -> None:
        """Forget a logical batch that was not completed; nothing of it was released."""
        self._is_last_step_skipped = False
        self._step_skip_queue.clear()
        self.zero_grad()

    def mark_backward(self) -> None:
        """A backward has come: leave what lets a gradient scaler's scale be found out."""
        if not self._loss_scale.is_marked:
            named = {str(index): p for index, p in enumerate(self.params)}
            self._loss_scale.mark(
                named, {n: self._released[id(p)] for n, p in named.items() if id(p) in self._released}
            )

    # ── inside ──────────────────────────────────────────────────────────────────────────────────────

    def _clipped(self, parts: list[Any], loss_scale: float) -> list[Tensor]:
        record = parts[0].record if isinstance(parts[0], GradSample) else None
        lazy = record is not None and all(isinstance(part, GradSample) and part.record is record for part in parts)
        if record is not None and lazy and record.covers(self.params):
            return self.clip_record(record, loss_scale)
        self._warn_of_own_gradients(parts)
        if len({len(part) for part in parts}) > 1:
            raise AccumulationError(
                f"p.grad_sample of different parameters is of {sorted({len(part) for part in parts})} examples. Set "
                "them all from the same batch."
            )
        return self.clip_tensors([plain(part) / loss_scale for part in parts])

    def _warn_of_own_gradients(self, parts: list[Any]) -> None:
        if self.turn is not None and not self.own_gradients and not all(isinstance(p, GradSample) for p in parts):
            self.own_gradients = True
            warnings.warn(
                "p.grad_sample was set by the script. Row n of it must depend on example n of the batch alone; that is "
                "not checked.",
                PrivacyWarning,
                stacklevel=6,
            )

    def _accumulate(self, sums: list[Tensor]) -> None:
        for p, total in zip(self.params, sums, strict=True):
            p.summed_grad = total if p.summed_grad is None else p.summed_grad + total

    def _zeros(self) -> list[Tensor]:
        return [torch.zeros_like(p, dtype=accumulation_dtype(p.dtype, torch.float32)).detach() for p in self.params]

    def _skips(self) -> bool:
        if self._step_skip_queue:
            return self._step_skip_queue.pop(0)
        return self.turn is not None and self.turn.part is not None and not self.turn.part.last

    def _has_gradients(self) -> bool:
        return any(getattr(p, "grad_sample", None) is not None for p in self.params)

    def _held(self, p: Any) -> list[Tensor]:
        held = getattr(p, "grad_sample", None)
        if held is None:
            raise AccumulationError(
                f"A parameter of shape {tuple(p.shape)} has no per-sample gradient. Wrap the model in GradSampleModule "
                "(make_private does), call it in training mode, and call backward() before step()."
            )
        return held if isinstance(held, list) else [held]

    def _refuse_unready(self) -> None:
        if not self._has_gradients() and not self._open_batch_is_empty():
            self._held(self.params[0])
        for p in self.params:
            for part in self._held(p) if getattr(p, "grad_sample", None) is not None else []:
                refuse_processed(part)
        if self.turn is None:
            return
        if self.turn.part is None:
            raise StepError("optimizer.step() without a private batch. Iterate over the loader of make_private.")
        if self.turn.part.closed and not self._has_gradients():
            raise StepError("optimizer.step() was called twice for one batch. Each batch is good for one step.")
        self._refuse_several_passes()

    def _refuse_several_passes(self) -> None:
        assert self.turn is not None
        passes = {
            part.record.batch.number_of_pass
            for p in self.params[:1]
            for part in (self._held(p) if getattr(p, "grad_sample", None) is not None else [])
            if isinstance(part, GradSample) and part.record.batch is not None
        }
        if len(passes) > 1:
            raise AccumulationError(
                "Gradients of several passes over the data were accumulated into one step: an example may be in it "
                "more than once. Call optimizer.step() and zero_grad() at least once a pass."
            )

    def _open_batch_is_empty(self) -> bool:
        return self.turn is not None and self.turn.size == 0 and not self.turn.part.closed  # type: ignore[union-attr]

    def _refuse_direct_step(self, *_: Any) -> None:
        if not self._stepping:
            raise StepError(
                f"{type(self.original_optimizer).__name__}.step() was called on the optimizer that a DPOptimizer "
                "wraps. It would update without noise. Call step() on the DPOptimizer."
            )

    def _refuse_foreign_gradients(self) -> None:
        if self.own_gradients:
            return
        for group in self.original_optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad is not self._released.get(id(p)) and bool(p.grad.any()):
                    raise StepError(
                        f"A parameter of shape {tuple(p.shape)} has a gradient that did not come from the private "
                        "model: the plain module was called, or another loss reaches it. Call optimizer.zero_grad() "
                        "before backward(), and the model that make_private returned."
                    )

    # ── torch.optim.Optimizer ───────────────────────────────────────────────────────────────────────

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state. `PrivacyEngine.save_checkpoint` saves the private part besides."""
        return self.original_optimizer.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """Load the wrapped optimizer's state."""
        self.original_optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise a WrapError once the optimizer is private."""
        if hasattr(self, "original_optimizer"):
            raise WrapError(
                "add_param_group on a DPOptimizer: the run is over the parameters that make_private was given. Build "
                "the optimizer with all its groups first; freeze with requires_grad_(False) what comes later."
            )
        super().add_param_group(param_group)

    def _share_inner_state(self) -> None:
        self.param_groups = self.original_optimizer.param_groups
        self.state = self.original_optimizer.state

    def __deepcopy__(self, memo: dict[int, Any]) -> DPOptimizer:
        raise _no_copies()

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        raise _no_copies()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.original_optimizer!r})"


def _refuse(optimizer: object) -> None:
    if isinstance(optimizer, DPOptimizer) or not isinstance(optimizer, torch.optim.Optimizer):
        raise WrapError(f"optimizer must be a plain torch.optim.Optimizer, got {type(optimizer).__name__}.")
    if isinstance(optimizer, (torch.optim.LBFGS, torch.optim.SparseAdam)):
        raise WrapError(
            f"{type(optimizer).__name__} cannot be private: it evaluates the loss several times a step, or needs "
            "sparse gradients. Use SGD or Adam."
        )


def _no_copies() -> WrapError:
    return WrapError(
        "A DPOptimizer cannot be copied or pickled: two of them would draw the same noise and spend from one account. "
        "Save it with PrivacyEngine.save_checkpoint."
    )
