"""`PrivacyWrapper`: deepee's three calls round a normal loop, driving this library's parts.

    model = PrivacyWrapper(net, num_replicas=B, L2_clip=1.0, noise_multiplier=1.0, watchdog=watchdog)
    optimizer = torch.optim.SGD(model.wrapped_model.parameters(), lr=0.1)
    ...
    loss = criterion(model(x), y)             # forward:  per-sample gradients are prepared
    loss.backward()                           #           p.grad stays empty
    model.clip_and_accumulate()               # clipped:  the sum is held aside, with its sensitivity
    model.noise_gradient()                    # noised:   recorded in the ledger, then p.grad is set
    optimizer.step()
    model.prepare_next_batch()

What deepee keeps in flags and attributes passes here as values: a `ClippedSum` with its sensitivity, a release in a
`Ledger`. docs/compat_deepee.md lists what differs.
"""

from __future__ import annotations

import logging
import math
import weakref
from enum import IntEnum
from functools import partial
from typing import Any, Literal, SupportsIndex

import torch
from torch import Tensor, nn

from accountants import Event, Gaussian, arguments
from dpdl.clipping import flat_weights
from dpdl.compat.deepee.errors import OrderError
from dpdl.compat.deepee.guard import StepGuard
from dpdl.compat.deepee.per_sample_wrapper import PerSampleGradientWrapper
from dpdl.compat.deepee.replicated_forward import (
    ReplicatedForward,
    number_of_replicas,
    refuse_models_that_cannot,
    trainable_of,
)
from dpdl.compat.deepee.watchdog import RELATION, PrivacyWatchdog
from dpdl.errors import ParameterError, WrapError
from dpdl.execution import Execution
from dpdl.ledger import Ledger
from dpdl.noise import gaussian_mechanism
from dpdl.per_sample.boundary import Passage
from dpdl.per_sample.engine import accumulation_dtype
from dpdl.secure_random import RandomStream
from dpdl.turns import Turns
from dpdl.types import ClippedSum

__all__ = ["PerSampleGradientWrapper", "PrivacyWrapper"]

_logger = logging.getLogger("dpdl.compat.deepee")

# A model's spending outlives its wrapper: the next wrapper of the same model goes on with it.
_ledgers: weakref.WeakKeyDictionary[nn.Module, Ledger] = weakref.WeakKeyDictionary()


class _Done(IntEnum):
    """How far the current step has come."""

    NOTHING = 0
    FORWARD = 1
    CLIPPED = 2
    NOISED = 3


_UNDONE = {
    _Done.NOTHING: None,
    _Done.FORWARD: "after model.forward() and before clip_and_accumulate() and noise_gradient()",
    _Done.CLIPPED: "after clip_and_accumulate() and before noise_gradient()",
    _Done.NOISED: None,
}


class PrivacyWrapper(nn.Module):
    """Makes the gradients of any module private, example by example, for any optimizer of `wrapped_model.parameters()`.

    In eval mode, or without gradients, it evaluates the module; a backward gives parameters nothing then.

    Args:
        base_model: the module; wrapped, not copied.
        num_replicas: B, the size of every training batch.
        L2_clip: C > 0, to which the gradient of each example's own loss is clipped.
        noise_multiplier: s >= 0; the sum of a batch gets noise of standard deviation s C. At 0 nothing is private.
        secure_rng: accepted; noise is from a cryptographic generator anyway.
        seed: makes noise reproducible for whoever knows it: for experiments only.
        watchdog: reports, and holds the training to its budget.

    Attributes:
        wrapped_model: the module.
        models: `num_replicas` times the module.
        ledger: all releases made from this module; replacing one example.
        execution: engine, checks and the loss's reduction ("mean" unless set otherwise).

    Guarantee:
        The weights after any number of releases satisfy `current_epsilon`, for replacing one example. Amplification by
        sampling is claimed of batches that a watchdog's loader drew, and of no others.

    Raises:
        WrapError: not a module, or its parameters are another wrapped model's.
        BadModuleError: the model keeps statistics or mixes examples.
        ParameterError: a number out of range, or a seed together with secure_rng.
    """

    def __init__(
        self,
        base_model: nn.Module,
        num_replicas: int,
        L2_clip: float,
        noise_multiplier: float,
        secure_rng: bool = False,
        seed: int | None = None,
        watchdog: PrivacyWatchdog | None = None,
    ) -> None:
        super().__init__()
        refuse_models_that_cannot(base_model)
        if watchdog is not None and not isinstance(watchdog, PrivacyWatchdog):
            raise ParameterError(f"watchdog must be a PrivacyWatchdog or None, got {type(watchdog).__name__}.")
        if seed is not None and secure_rng:
            raise ParameterError("Setting a seed is incompatible with the secure_rng option. Leave one of them out.")
        self.num_replicas = number_of_replicas(num_replicas)
        self.L2_clip = _clip_norm(L2_clip)
        self.noise_multiplier = arguments.noise_scale("noise_multiplier", noise_multiplier)
        self.secure_rng = secure_rng
        self.seed = seed
        stream = RandomStream.from_os() if seed is None else RandomStream.from_insecure_seed(seed)
        self._noise = stream.child("noise")
        self.wrapped_model = base_model
        self.input_size = getattr(base_model, "input_size", None)
        self._done = _Done.NOTHING
        self._steps_taken = 0
        self._clipped: ClippedSum | None = None
        self._average_over = 1
        self._turns: Turns | None = None
        self._execution = Execution()
        self._forward = self._new_forward()
        self._trained = trainable_of(base_model)
        self._guard = StepGuard(base_model, pending=lambda: _UNDONE[self._done])
        self.ledger = _ledgers.setdefault(base_model, Ledger(relation=RELATION))
        self.releases_before = self.ledger.releases
        self.watchdog = watchdog
        if watchdog is not None:
            watchdog.wrapper = self
        if self.noise_multiplier == 0:
            _logger.warning("noise_multiplier is 0: nothing is private, and every epsilon is infinite.")
        if seed is not None:
            _logger.warning("seed=%d: whoever knows it can remove the noise. Leave it out for any real data.", seed)

    # ── one step ────────────────────────────────────────────────────────────────────────────────────

    def forward(self, x: Tensor) -> Any:
        """The module's output for `num_replicas` examples, [B, ...].

        Raises:
            OrderError: the step before is not complete.
            ParameterError: another number of examples.
            ModelError: the module mixes examples, or no engine can run it.
        """
        if not self.training or not torch.is_grad_enabled():
            return self._forward.evaluate(x)
        if not self._guard.is_in_charge:
            raise OrderError("Another PrivacyWrapper has taken over this model. Go on with that one.")
        if self._done is not _Done.NOTHING:
            raise OrderError(
                "model.forward() must be called after model.clip_and_accumulate(), model.noise_gradient() and "
                "model.prepare_next_batch() of the batch before. To drop that batch, call model.update_clones()."
            )
        self._forward.refuse_other_sizes(x)
        turns = Turns(clip=partial(flat_weights, max_grad_norm=self.L2_clip), sensitivity=_clip_norm(self.L2_clip))
        turns.open(size=self.num_replicas, last=True)
        part = turns.take(self.num_replicas)

        def deliver(passage: Passage) -> None:
            turns.deliver(part, passage)

        with self._guard.probed():
            output = self._forward.run(x, deliver)
        self._turns, self._done = turns, _Done.FORWARD
        return output

    def clip_and_accumulate(self, reduce: Literal["mean", "sum"] = "mean") -> None:
        """Clip each example's gradient and add them up; the sum is held aside until it has its noise.

        Args:
            reduce: whether `noise_gradient()` gives the noisy sum, or that divided by the batch size.

        Raises:
            ParameterError: another `reduce`.
            OrderError: no forward, no backward, or parameters were frozen or unfrozen without `update_clones()`.
        """
        if reduce not in ("mean", "sum"):
            raise ParameterError(f"'reduce' must be one of 'mean' or 'sum', got {reduce!r}.")
        if self._done is not _Done.FORWARD or self._turns is None:
            raise OrderError(
                "model.clip_and_accumulate() must be called after model.forward(), once, and before "
                "model.noise_gradient() and model.prepare_next_batch()."
            )
        self._refuse_changed_parameters()
        part = self._turns.open_part
        if part is not None and not part.delivered:
            raise OrderError(
                "No gradients have been calculated yet! model.clip_and_accumulate() must be called after .backward() "
                "was called on a loss of the model's output."
            )
        with self._guard.probed():
            self._clipped = self._turns.close()
        self._average_over = self.num_replicas if reduce == "mean" else 1
        self._done = _Done.CLIPPED

    def noise_gradient(self) -> None:
        """Record the release, add noise of standard deviation `noise_multiplier * L2_clip` to the sum, set `p.grad`.

        Raises:
            OrderError: clip_and_accumulate() was not called.
            PrivacyBudgetExhausted: the watchdog refuses the release; nothing has left.
        """
        if self._done is not _Done.CLIPPED or self._clipped is None:
            raise OrderError(
                "model.noise_gradient() must be called after model.forward() and model.clip_and_accumulate(), once, "
                "and before model.prepare_next_batch()."
            )
        sigma = arguments.noise_scale("noise_multiplier", self.noise_multiplier)
        event: Event = Gaussian(sigma)
        if self.watchdog is not None:
            event = self.watchdog.event_of_release(sigma, self.num_replicas)
            self.watchdog.before_release(event)
        step = self.ledger.releases
        self.ledger.record(event)  # spent from here on, whatever happens
        with torch.no_grad():
            noisy = gaussian_mechanism(
                self._with_unused(self._clipped), noise_multiplier=sigma, stream=self._noise, step=step
            )
            self._guard.release(
                {n: (noisy.tensors[n] / self._average_over).to(p.dtype) for n, p in self._trained.items()}
            )
        self._clipped = self._turns = None
        self._done = _Done.NOISED

    def prepare_next_batch(self, return_privacy_spent: bool = False) -> float | None:
        """Close the step and let the watchdog report it.

        Args:
            return_privacy_spent: whether to return `current_epsilon`; it takes computing.

        Raises:
            OrderError: noise_gradient() was not called.
            PrivacyBudgetExhausted: the watchdog finds no room for another step.
        """
        if self._done is not _Done.NOISED:
            raise OrderError(
                "model.prepare_next_batch() must be called after model.forward(), model.clip_and_accumulate() and "
                "model.noise_gradient()."
            )
        self._steps_taken += 1
        self._done = _Done.NOTHING
        if self.watchdog is not None:
            self.watchdog.inform(self._steps_taken)
            return self.current_epsilon if return_privacy_spent else None
        return None

    def _with_unused(self, clipped: ClippedSum) -> ClippedSum:
        """Zeros for parameters that no example used: they get their noise like all others."""
        dtype = self._execution.accumulate_dtype
        tensors = {
            name: clipped.tensors[name]
            if name in clipped.tensors
            else torch.zeros_like(p, dtype=accumulation_dtype(p.dtype, dtype))
            for name, p in self._trained.items()
        }
        return ClippedSum(
            tensors=tensors,
            sensitivity=clipped.sensitivity,
            examples=clipped.examples,
            clipped=clipped.clipped,
            non_finite=clipped.non_finite,
        )

    def _refuse_changed_parameters(self) -> None:
        now = {n: p.shape for n, p in self.wrapped_model.named_parameters() if p.requires_grad}
        then = {n: p.shape for n, p in self._trained.items()}
        if now != then:
            names = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
            raise OrderError(
                f"The parameters to train are not those of before: {names}. Did you change the model without calling "
                "update_clones()? Call it, then forward and backward again."
            )

    @property
    def _forward_succesful(self) -> bool:
        return self._done >= _Done.FORWARD

    @property
    def _clip_succesful(self) -> bool:
        return self._done >= _Done.CLIPPED

    @property
    def _noise_succesful(self) -> bool:
        return self._done >= _Done.NOISED

    # ── the model ───────────────────────────────────────────────────────────────────────────────────

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The replicas: all of them are the module."""
        return (self.wrapped_model,) * self.num_replicas

    def parameters(self, recurse: bool = True) -> Any:
        """The wrapped module's parameters."""
        return self.wrapped_model.parameters(recurse)

    def update_clones(self) -> None:
        """Take the model as it is now: after freezing, unfreezing or exchanging parts. A batch under way is dropped."""
        trained = trainable_of(self.wrapped_model)
        if self._done is not _Done.NOISED:
            self._done, self._turns, self._clipped = _Done.NOTHING, None, None
        self._trained = trained
        self._forward = self._new_forward()
        self._guard.watch()

    @property
    def execution(self) -> Execution:
        """Engine, checks and the loss's reduction. It can be set between steps.

        Raises:
            OrderError: set in the middle of a step.
            ParameterError: set to one with `insecure_seed` or `max_physical_batch_size`, which have other names here.
        """
        return self._execution

    @execution.setter
    def execution(self, execution: Execution) -> None:
        if self._done is not _Done.NOTHING:
            raise OrderError("execution can be set between steps only, after prepare_next_batch().")
        for name, instead in (
            ("insecure_seed", "PrivacyWrapper(seed=...)"),
            ("max_physical_batch_size", "num_replicas"),
        ):
            if getattr(execution, name) is not None:
                raise ParameterError(f"{name} of an Execution is not used here. Use {instead}.")
        self._execution = execution
        self._forward = self._new_forward()

    def _new_forward(self) -> ReplicatedForward:
        return ReplicatedForward(self.wrapped_model, self.num_replicas, execution=self._execution, checks_loss=True)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # deepee saves the module and as many copies as there are replicas, all equal.
        for key in [key for key in state_dict if key.startswith(f"{prefix}models.")]:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        raise WrapError(
            "A PrivacyWrapper cannot be copied or pickled: two of them would draw the same noise and keep separate "
            "ledgers of one data set. Copy or save model.wrapped_model or its state_dict(), and "
            "model.ledger.to_json()."
        )

    # ── what was spent ──────────────────────────────────────────────────────────────────────────────

    @property
    def current_epsilon(self) -> float:
        """An upper bound on the epsilon spent so far, at the watchdog's delta.

        Raises:
            ParameterError: no watchdog is attached.
        """
        if self.watchdog is None:
            raise ParameterError(
                "To calculate epsilon, a PrivacyWatchdog must be attached: PrivacyWrapper(..., watchdog=watchdog). "
                "Without one, model.ledger.epsilon(delta) claims no amplification by sampling."
            )
        return self.watchdog.calc_epsilon(self.ledger.releases - self.releases_before)

    def resume_from(self, ledger: Ledger) -> None:
        """Go on with a saved run's ledger, so that its spending is not forgotten and no seeded noise is used twice.

        Args:
            ledger: `Ledger.from_json` of the saved `model.ledger.to_json()`.

        Raises:
            OrderError: this wrapper has released something already.
            ParameterError: the ledger is of another neighbouring relation.
        """
        if self.ledger.releases or self._done is not _Done.NOTHING:
            raise OrderError(f"resume_from() comes before the first step; {self.ledger.releases} were taken.")
        if ledger.relation is not RELATION:
            raise ParameterError(
                f"The ledger is for {ledger.relation.phrase}, a PrivacyWrapper's for {RELATION.phrase}."
            )
        self.ledger = _ledgers[self.wrapped_model] = ledger
        self._steps_taken, self.releases_before = ledger.releases, 0


def _clip_norm(value: object) -> float:
    norm = arguments.real("L2_clip", value, remedy="Give the norm to clip gradients to.")
    if not 0 < norm < math.inf:
        raise ParameterError(
            f"L2_clip must be > 0 and finite, got {norm}. To train without clipping, leave the model unwrapped."
        )
    return norm
