"""The private optimizer: turns a clipped sum into noise-protected gradients for any torch optimizer.

what backwards brought ─▶ clipped sum ─▶ ledger (spent from here on) ─▶ + noise ─▶ / expected batch size ─▶ p.grad
─▶ inner step
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, SupportsIndex, overload

import torch
from torch import Tensor, nn

from accountants import Gaussian
from dpdl.errors import CheckpointError, ModelError, PrivacyError, StepError, WrapError
from dpdl.ledger import Ledger
from dpdl.noise.gaussian import gaussian_mechanism
from dpdl.optim.loss_scale import LossScale
from dpdl.optim.saved_state import refuse_unfit_state
from dpdl.per_sample.engine import accumulation_dtype
from dpdl.placement import Copies, Placement
from dpdl.plan import PrivacyPlan
from dpdl.privacy_report import PrivacyReport
from dpdl.ranks import Ranks
from dpdl.reporting import report_of
from dpdl.run_state import RunState
from dpdl.turns import Turns
from dpdl.types import ClippedSum, NoisyGradient

__all__ = ["Diagnostics", "PrivateOptimizer"]

_STATE_KEY = "dpdl"


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """Counts over the run so far. Private: they are computed from the data without noise.

    Attributes:
        examples: examples that were in a batch, with repetition.
        clipped: of these, how many had their gradient scaled down.
        non_finite: of these, how many were left out for a NaN or infinite gradient.
    """

    examples: int = 0
    clipped: int = 0
    non_finite: int = 0


@dataclass(frozen=True, kw_only=True)
class _Saved:
    """A saved state, read: the wrapped optimizer's, the run's, its notes, and what tells it from others."""

    inner: dict[str, Any]
    run: RunState
    notes: list[str]
    digest: str


class PrivateOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose gradients are clipped, summed and noised: DP-SGD, arXiv:1607.00133.

    Made by `make_private`, which has the guarantee. Parameter groups and state are the wrapped optimizer's own, so
    learning-rate schedulers work on it. `step()` closes the private loader's current batch; the weights move when it
    completes a logical batch. After that step, until the next backward, `p.grad` holds the noisy average that was
    applied.

    `torch.amp.GradScaler` works on it: the scale is taken out before clipping. No step is skipped for an overflow,
    and the scaler is told of none: see `LossScale`.

    Args:
        inner: any optimizer that steps from `p.grad`.
        model: the plain module.
        plan: what the run is held to.
        turns: brings the clipped sums.
        run: ledger, random streams and position.
        ranks: the processes that train together.
        accumulate_dtype: the least precise dtype of sums and noise.
        notes: what the report should say besides.
        on_load: called after a saved state was loaded.
        placement: where the parameters are; by default whole on every rank.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler hands over its scale, and skips no step

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        *,
        model: nn.Module,
        plan: PrivacyPlan,
        turns: Turns,
        run: RunState,
        ranks: Ranks,
        accumulate_dtype: torch.dtype,
        notes: Callable[[], list[str]],
        on_load: Callable[[], None],
        placement: Placement | None = None,
    ) -> None:
        self._ready = False
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner
        self._plan = plan
        self._earlier_notes: list[str] = []
        self._share_inner_state()
        self._model = model
        self._turns = turns
        self._run = run
        self._ranks = ranks
        self._placement = placement or Copies(ranks)
        self._accumulate_dtype = accumulate_dtype
        self._notes = notes
        self._on_load = on_load
        self._released: dict[str, Tensor] = {}
        self._stepping = False
        self.diagnostics = Diagnostics()
        self._loss_scale = LossScale()
        turns.at_backward(self._mark_backward)
        inner.register_step_pre_hook(self._refuse_direct_step)
        inner.register_load_state_dict_post_hook(lambda _: self._share_inner_state())
        self._ready = True

    # ── stepping ────────────────────────────────────────────────────────────────────────────────────

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Close the current batch; at the end of a logical batch, release its noisy gradient and update.

        All that backwards have brought for the batch is added up for each example, and clipped once, here.

        Args:
            closure: computes the loss and calls backward (as Lightning passes it).

        Raises:
            StepError: no batch is open, its backward is missing, or gradients came from elsewhere.
            PlanExhaustedError: the plan has no step left.
            BudgetExceededError: the ledger's budget has no room for one more.
        """
        try:
            return self._step(closure)
        except BaseException:
            # A gradient scaler sets these and multiplies with what it finds; it would not remove them now.
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            raise

    def _step(self, closure: Callable[[], float] | None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._agree_to_step()
        with self._placement.whole():
            clipped = self._turns.close(loss_scale=self._loss_scale.taken(getattr(self, "grad_scale", None)))
        self._loss_scale.unmark()
        if clipped is not None:
            self._release(clipped)
        return loss

    def _agree_to_step(self) -> None:
        """Raise unless the step may be taken, by this rank and all others; rank 0 asks the dataset's budget."""
        refused: PrivacyError | None = None
        self._placement.settle()
        try:
            self._turns.refuse_unready()
            self._placement.refuse_loss_scale(given="grad_scale" in self.__dict__)
            self._refuse_unknown_parameters()
            self._refuse_foreign_gradients()
            self._refuse_nothing_to_train()
            self._run.refuse_overspending()
        except PrivacyError as error:
            refused = error
        if refused is not None or self.completes_a_batch:
            self._ranks.agree("a step", {} if self._ranks.size == 1 else self._where(), refused=refused)

    def _where(self) -> dict[str, Any]:
        """What must be the same on all ranks before their sums are added up."""
        trained = [(name, str(p.dtype), list(p.shape)) for name, p in self.trainable().items()]
        digest = hashlib.sha256(json.dumps(trained).encode()).hexdigest()[:16]
        return {**self._run.facts(), "set of trained parameters": digest}

    def _release(self, clipped: ClippedSum) -> None:
        clipped = self._placement.total(self._with_unused(clipped))
        step = self._run.next_step()  # recorded as spent before anything leaves
        self._count(clipped)
        if self._ranks.is_first:
            noisy = gaussian_mechanism(
                clipped,
                noise_multiplier=self.plan.noise_multiplier,
                stream=self._run.noise,
                step=step,
                reuse=True,
            )
        else:
            noisy = NoisyGradient(tensors=clipped.tensors, event=Gaussian(self.plan.noise_multiplier))
        noisy = self._placement.from_first(noisy)
        parameters = dict(self._model.named_parameters())
        for name in self._released.keys() - noisy.tensors.keys():
            parameters[name].grad = None  # frozen since: an old gradient must not be applied again
        self._released.clear()
        torch._foreach_div_(list(noisy.tensors.values()), float(self.plan.expected_batch_size))
        for name, average in noisy.tensors.items():
            parameters[name].grad = self._released[name] = average.to(parameters[name].dtype)
        self._stepping = True
        try:
            self.inner.step()
        finally:
            self._stepping = False
            self._placement.end_step()

    def _with_unused(self, clipped: ClippedSum) -> ClippedSum:
        """Zeros for parameters that no example used: they get their noise like all others."""
        tensors = {
            name: clipped.tensors[name]
            if name in clipped.tensors
            else torch.zeros(p.shape, dtype=accumulation_dtype(p.dtype, self._accumulate_dtype), device=p.device)
            for name, p in self.trainable().items()
        }
        return ClippedSum(
            tensors=tensors,
            sensitivity=clipped.sensitivity,
            examples=clipped.examples,
            clipped=clipped.clipped,
            non_finite=clipped.non_finite,
        )

    def _count(self, clipped: ClippedSum) -> None:
        so_far = self.diagnostics
        self.diagnostics = Diagnostics(
            examples=so_far.examples + clipped.examples,
            clipped=so_far.clipped + clipped.clipped,
            non_finite=so_far.non_finite + clipped.non_finite,
        )

    @property
    def completes_a_batch(self) -> bool:
        """Whether the next `step()` releases and updates: no further part of the logical batch is to come."""
        part = self._turns.open_part
        return part is None or part.last

    @property
    def is_on_first_rank(self) -> bool:
        """Whether this process keeps the files of a data-parallel run; True for a process on its own."""
        return self._ranks.is_first

    def another_step_fits(self) -> bool:
        """Whether all budgets have room for one more step, as of now: in a data-parallel run as rank 0 knows."""
        return self._ranks.first_says("what fits", self._run.another_step_fits)

    def _mark_backward(self) -> None:
        if self._placement.takes_loss_scales and not self._loss_scale.is_marked:
            self._loss_scale.mark(self.trainable(), self._released)

    def trainable(self) -> dict[str, Tensor]:
        """The parameters that are trained privately, by name in the model, as of now."""
        held = {id(p) for group in self.inner.param_groups for p in group["params"]}
        return {n: p for n, p in self._model.named_parameters() if p.requires_grad and id(p) in held}

    # ── refusals ────────────────────────────────────────────────────────────────────────────────────

    def _refuse_direct_step(self, *_: Any) -> None:
        if not self._stepping:
            raise StepError(
                f"{type(self.inner).__name__}.step() was called on the optimizer that make_private wrapped. "
                "It would update without noise. Call step() on the optimizer that make_private returned."
            )

    def _refuse_unknown_parameters(self) -> None:
        known = {id(p) for p in self._model.parameters()}
        for index, group in enumerate(self.inner.param_groups):
            for position, p in enumerate(group["params"]):
                if id(p) not in known:
                    raise StepError(
                        f"Parameter {position} of the optimizer's group {index} (shape {tuple(p.shape)}) is not "
                        "part of the private model, so its gradients would not be protected. Make it part of "
                        "the model before make_private, or give it an optimizer of its own."
                    )

    def _refuse_foreign_gradients(self) -> None:
        held = {id(p) for group in self.inner.param_groups for p in group["params"]}
        for name, p in self._model.named_parameters():  # frozen ones too: the inner step would move them
            foreign = id(p) in held and p.grad is not None and p.grad is not self._released.get(name)
            if (
                foreign and p.grad is not None and bool(self._placement.part_here(p.grad).any())
            ):  # zeros are what zero_grad(set_to_none=False) leaves
                raise StepError(
                    f"Parameter '{name}' has a gradient that did not come from the private model: the plain "
                    "module was called, or another loss reaches it. Call optimizer.zero_grad() to drop that "
                    "gradient, then the model that make_private returned, and backward()."
                )

    def _refuse_nothing_to_train(self) -> None:
        if not self.trainable():
            raise ModelError(
                "Every parameter of the optimizer is frozen: the step would release nothing, and spend. Unfreeze some "
                "with requires_grad_(True), before the forward pass."
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: parameters must be known when the optimizer is made private.

        Raises:
            WrapError: always.
        """
        if self._ready:
            raise WrapError(
                "add_param_group on a private optimizer: the new parameters would not be part of what was "
                "checked. Build the optimizer with all its groups, then call make_private; freeze a group with "
                "requires_grad_(False) until it is its turn."
            )
        super().add_param_group(param_group)

    def __deepcopy__(self, memo: dict[int, Any]) -> PrivateOptimizer:
        raise _no_copies()

    def __copy__(self) -> PrivateOptimizer:
        raise _no_copies()

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        raise _no_copies()

    # ── what was spent ──────────────────────────────────────────────────────────────────────────────

    @property
    def plan(self) -> PrivacyPlan:
        """What the run is held to. It cannot be exchanged."""
        return self._plan

    @property
    def ledger(self) -> Ledger:
        """What has been released so far."""
        return self._run.ledger

    @property
    def steps_taken(self) -> int:
        """Training steps released so far."""
        return self._run.steps_taken

    def epsilon(self, delta: float) -> float:
        """An upper bound on the epsilon spent so far at `delta`; 0.0 before the first step."""
        spent = self._run.ledger.epsilon(delta)
        self.plan.warn_if_delta_is_large(delta)
        return spent

    def report(self, delta: float) -> PrivacyReport:
        """What may be claimed of the run so far at `delta`; prints as a sentence."""
        notes = tuple(self._all_notes())
        parameters = sum(p.numel() for group in self.inner.param_groups for p in group["params"])
        report = report_of(
            self.plan, self._run.ledger, delta=delta, parameters=parameters, secure=self._run.secure, notes=notes
        )
        self.plan.warn_if_delta_is_large(delta)
        return report

    # ── torch.optim.Optimizer ───────────────────────────────────────────────────────────────────────

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop `p.grad`, and what backwards have brought for the current batch since its last step.

        Forward passes are kept, and so is what earlier parts of a logical batch have added up.
        """
        self.inner.zero_grad(set_to_none=set_to_none)
        if set_to_none:
            self._released.clear()  # their memory is needed for the next ones
        self._turns.drop()

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, and under "dpdl" the plan, ledger and position of the run.

        Plain values and tensors: `torch.load(..., weights_only=True)` reads it. No key of a secure
        generator is in it.

        A logical batch that is half done is left out: nothing of it was released.
        """
        private = {
            "plan": self.plan.to_json(),
            "optimizer": type(self.inner).__name__,
            "notes": self._all_notes(),
            **self._run.state_dict(),
        }
        return {**self._placement.full_state(self.inner), _STATE_KEY: private}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state: spending is remembered, noise is never reused.

        Raises:
            CheckpointError: it is not a private optimizer's state, or was saved under another plan.
        """
        saved: _Saved | None = None
        refused: PrivacyError | None = None
        try:
            saved = self._read(state_dict)
        except PrivacyError as error:
            refused = error
        self._ranks.agree(
            "loading a saved state", {} if saved is None else {"saved state": saved.digest}, refused=refused
        )
        assert saved is not None
        if saved.run.secure:
            saved.run.take_key(self._ranks.shared_key())
        elsewhere = self._ranks.first_says("what the ledger has", lambda: self._run.elsewhere(saved.run))
        self._run.become(saved.run, elsewhere=elsewhere)
        # From here on nothing is refused.
        self.inner.load_state_dict(self._placement.own_state(saved.inner, self.inner))
        self._share_inner_state()
        self._earlier_notes = saved.notes
        self._turns.abandon()
        self._released.clear()
        self._on_load()

    def _read(self, state_dict: Mapping[str, Any]) -> _Saved:
        state = dict(state_dict)
        private: Any = state.pop(_STATE_KEY, None)
        run = RunState.of_saved(private, plan=self.plan)
        self._run.refuse_resuming(run)
        refuse_unfit_state(state, private.get("optimizer"), self.inner)
        notes = private.get("notes")
        if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
            raise CheckpointError("The saved run is damaged: it has no notes.")
        told = json.dumps({name: value for name, value in private.items() if name != "notes"}, default=str)
        return _Saved(inner=state, run=run, notes=notes, digest=hashlib.sha256(told.encode()).hexdigest()[:16])

    def _all_notes(self) -> list[str]:
        return list(dict.fromkeys([*self._earlier_notes, *self._notes()]))

    def _share_inner_state(self) -> None:
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state

    def __repr__(self) -> str:
        return f"PrivateOptimizer({self.inner!r})"


def _no_copies() -> WrapError:
    return WrapError(
        "A private optimizer cannot be copied or pickled: two of them would draw the same noise and keep separate "
        "ledgers of one dataset. Save state_dict(), or use dpdl.save_checkpoint."
    )
