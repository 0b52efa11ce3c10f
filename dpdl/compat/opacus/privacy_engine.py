"""`PrivacyEngine`: Opacus's way into a private run, on this library's parts.

A run of `dpdl.make_private` is held to a plan that names its steps. Opacus's scripts name none: here each release is
charged to the engine's accountant before its noise is drawn, with the noise multiplier that is then used, and epsilon
is that of what happened.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import accountants
from dpdl.compat.opacus import checkpoint
from dpdl.compat.opacus.accountants import IAccountant, create_accountant
from dpdl.compat.opacus.accountants.utils import get_noise_multiplier
from dpdl.compat.opacus.charge import FixedCharge, PoissonCharge
from dpdl.compat.opacus.data_loader import DPDataLoader, FixedDataLoader, PrivateBatches
from dpdl.compat.opacus.errors import NotOfferedError
from dpdl.compat.opacus.grad_sample import AbstractGradSampleModule
from dpdl.compat.opacus.optimizers import DPOptimizer, get_optimizer_class
from dpdl.compat.opacus.preparation import (
    private_module,
    refuse_foreign_parameters,
    refuse_mixing,
    refuse_several_processes,
)
from dpdl.compat.opacus.turn import Turn
from dpdl.compat.opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from dpdl.compat.opacus.validators import ModuleValidator
from dpdl.errors import ParameterError, PrivacyWarning, WrapError
from dpdl.uniform_loader import uniform_loader_sizes

__all__ = ["PrivacyEngine"]

_owners: weakref.WeakKeyDictionary[nn.Module, weakref.ReferenceType[PrivacyEngine]] = weakref.WeakKeyDictionary()


class PrivacyEngine:
    """Makes runs private, and accounts for all that it made, which must be on one dataset.

    Args:
        accountant: "prv" (certified, the default), "rdp" or "gdp" (an estimate).
        secure_mode: take all randomness from the operating system, whatever was seeded. Without it that is so too, as
            long as neither `torch.manual_seed` nor a generator of the script's own asks for a reproducible run.

    Example:
        >>> engine = PrivacyEngine()
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loader = DataLoader([torch.ones(2)] * 20, batch_size=4)
        >>> model, optimizer, loader = engine.make_private(module=model, optimizer=optimizer, data_loader=loader,
        ...                                                noise_multiplier=1.0, max_grad_norm=1.0)
        >>> engine.get_epsilon(1e-5)
        0.0
    """

    def __init__(self, *, accountant: str = "prv", secure_mode: bool = False) -> None:
        self.accountant: IAccountant = create_accountant(mechanism=accountant)
        self.secure_mode = secure_mode
        self.dataset: Any = None

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Any = None,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float | list[float],
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        rand_on_empty: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Couple a model, its optimizer and a loader.

        Args:
            module: a module that keeps examples apart.
            optimizer: built from the module's parameters.
            criterion: for ghost mode, a loss module; None for cross entropy.
            data_loader: over the private data.
            noise_multiplier: noise standard deviation over the sensitivity.
            max_grad_norm: C; a list for "per_layer".
            batch_first: whether tensors carry examples on their first axis, or on their second.
            loss_reduction: "mean" or "sum".
            poisson_sampling: draw each batch by independent coins. If False the loader's own batches are taken, and
                every pass counts as a Gaussian release without amplification, for neighbours in which one example is
                replaced by nothing ("zero_out").
            clipping: "flat" or "per_layer".
            noise_generator: makes the noise reproducible.
            grad_sample_mode: "hooks", "functorch", "ew", "ghost" (same numbers), or "no_op".
            wrap_model: put a module around the model; or take over its forward, until `cleanup()` of what is returned.
            rand_on_empty: refused.
            kwargs: for the optimizer class.

        Returns:
            (module, optimizer, loader); in ghost mode (module, optimizer, criterion, loader).

        Raises:
            ModelError, LoaderError, WrapError, ParameterError: see `dpdl.errors`; nothing was changed.
        """
        if noise_generator is not None and self.secure_mode:
            raise ParameterError("noise_generator makes noise reproducible, which secure_mode=True forbids. Drop one.")
        if rand_on_empty:
            raise NotOfferedError(
                "rand_on_empty=True would put a random example in place of an empty batch: one example more or less "
                "would then move the sum by twice max_grad_norm. Leave it out: empty batches work in every mode."
            )
        ghost = grad_sample_mode == "ghost"
        optimizer_class = get_optimizer_class(clipping, distributed=False, grad_sample_mode=grad_sample_mode)
        plain = module._module if isinstance(module, AbstractGradSampleModule) else module
        inner = optimizer.original_optimizer if isinstance(optimizer, DPOptimizer) else optimizer
        self._refuse_owned(plain)
        refuse_several_processes(plain)
        refuse_foreign_parameters(plain, inner)
        refuse_mixing(plain)
        loader, sample_rate, expected = self._private_loader(data_loader, poisson_sampling=poisson_sampling)
        drawn = isinstance(loader, DPDataLoader)
        wrapped = private_module(
            module,
            grad_sample_mode=grad_sample_mode,
            batch_first=batch_first,
            loss_reduction=loss_reduction,
            wrap_model=wrap_model,
            max_grad_norm=max_grad_norm,
        )
        try:
            loss = nn.CrossEntropyLoss(reduction=loss_reduction) if criterion is None else criterion
            ghost_loss = DPLossFastGradientClipping(wrapped, None, loss, loss_reduction) if ghost else None
            private = optimizer_class(
                inner,
                noise_multiplier=noise_multiplier,
                max_grad_norm=max_grad_norm,
                expected_batch_size=expected,
                loss_reduction=loss_reduction,
                generator=noise_generator,
                secure_mode=self.secure_mode,
                **kwargs,
            )
        except BaseException:
            if not isinstance(module, AbstractGradSampleModule):
                wrapped.cleanup()
            raise
        # From here on nothing is refused.
        self._note_dataset(data_loader)
        turn = Turn(
            held={id(p) for group in inner.param_groups for p in group["params"]}, drop_partial=private.drop_partial
        )
        wrapped.per_sample.join(turn, after_delivery=private.mark_backward, poisson=drawn)
        loader.join(turn, begin_batch=wrapped.per_sample.begin_batch)
        private.turn = turn
        private.own_gradients = grad_sample_mode == "no_op"
        private.charge = PoissonCharge(self.accountant, sample_rate) if drawn else FixedCharge(self.accountant, turn)
        _owners[plain] = weakref.ref(self)
        if ghost_loss is None:
            return wrapped, private, loader
        ghost_loss.optimizer = private
        return wrapped, private, ghost_loss, loader

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Any = None,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float | list[float],
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        **kwargs: Any,
    ) -> Any:
        """`make_private` with the least noise that keeps `epochs` passes within a budget.

        Args:
            target_epsilon, target_delta: the budget.
            epochs: passes over the loader. More may be taken; they cost more.
            others: as in `make_private`.

        Guarantee:
            After `epochs` passes `get_epsilon(target_delta)` is at most target_epsilon. Of "gdp" that is an
            estimate, and no bound.
        """
        if len(self.accountant) > 0:
            warnings.warn(
                "The engine has spent something already; the noise is chosen as if it had not, so that the total will "
                "be above target_epsilon.",
                PrivacyWarning,
                stacklevel=2,
            )
        size, batch_size, steps = uniform_loader_sizes(data_loader)
        sample_rate, releases = (min(batch_size, size) / size, epochs * steps) if poisson_sampling else (1.0, epochs)
        return self.make_private(
            module=module,
            optimizer=optimizer,
            criterion=criterion,
            data_loader=data_loader,
            noise_multiplier=self._noise(target_epsilon, target_delta, sample_rate, releases),
            max_grad_norm=max_grad_norm,
            batch_first=batch_first,
            loss_reduction=loss_reduction,
            poisson_sampling=poisson_sampling,
            clipping=clipping,
            noise_generator=noise_generator,
            grad_sample_mode=grad_sample_mode,
            wrap_model=wrap_model,
            **kwargs,
        )

    def _noise(self, epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
        if self.accountant.mechanism() == "prv":
            return accountants.noise_multiplier(epsilon=epsilon, delta=delta, sample_rate=sample_rate, steps=steps)
        return get_noise_multiplier(
            target_epsilon=epsilon,
            target_delta=delta,
            sample_rate=sample_rate,
            steps=steps,
            accountant=self.accountant.mechanism(),
        )

    def get_epsilon(self, delta: float) -> float:
        """Epsilon of all releases of all runs of this engine so far, at `delta`; 0.0 before the first.

        An upper bound, unless the accountant is "gdp", which estimates.
        """
        return self.accountant.get_epsilon(delta)

    # ── validation ──────────────────────────────────────────────────────────────────────────────────

    def is_compatible(self, *, module: nn.Module, optimizer: Any = None, data_loader: Any = None) -> bool:
        """Whether `ModuleValidator` finds nothing wrong with the module.

        Args:
            module: the model, plain or wrapped.
            optimizer, data_loader: not looked at; Opacus has them here.
        """
        return ModuleValidator.is_valid(module)

    def validate(self, *, module: nn.Module, optimizer: Any = None, data_loader: Any = None) -> None:
        """Raise what `ModuleValidator` finds wrong with the module.

        Args:
            module, optimizer, data_loader: as in `is_compatible`.

        Raises:
            UnsupportedModuleError: naming each part.
        """
        ModuleValidator.validate(module, strict=True)

    @classmethod
    def get_compatible_module(cls, module: nn.Module) -> nn.Module:
        """A copy of the module with what cannot be private replaced.

        Raises:
            UnsupportedModuleError: something cannot be replaced.
        """
        return ModuleValidator.fix_and_validate(module)

    # ── checkpoints ─────────────────────────────────────────────────────────────────────────────────

    def save_checkpoint(
        self,
        *,
        path: Any,
        module: nn.Module,
        optimizer: DPOptimizer | None = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        checkpoint_dict: dict[str, Any] | None = None,
        module_state_dict_kwargs: dict[str, Any] | None = None,
        torch_save_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Save weights under plain names, optimizer, schedules, and what was spent. See `checkpoint`.

        Args:
            path: as torch.save takes it.
            module: the private model.
            optimizer: the private optimizer, if its state is to be kept.
            noise_scheduler, grad_clip_scheduler: schedules, if there are any.
            checkpoint_dict: what to save besides.
            module_state_dict_kwargs: for `module.state_dict`.
            torch_save_kwargs: for torch.save.
        """
        checkpoint.save(
            path,
            checkpoint.Saved(
                module=module,
                accountant=self.accountant,
                optimizer=optimizer,
                noise_scheduler=noise_scheduler,
                grad_clip_scheduler=grad_clip_scheduler,
            ),
            extra=checkpoint_dict or {},
            module_kwargs=module_state_dict_kwargs or {},
            torch_kwargs=torch_save_kwargs or {},
        )

    def load_checkpoint(
        self,
        *,
        path: Any,
        module: nn.Module,
        optimizer: DPOptimizer | None = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        module_load_dict_kwargs: dict[str, Any] | None = None,
        torch_load_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Go on from a saved run; returns what was saved besides. See `checkpoint`.

        Args:
            path, module, optimizer, noise_scheduler, grad_clip_scheduler: as in `save_checkpoint`.
            module_load_dict_kwargs: for `module.load_state_dict`.
            torch_load_kwargs: for torch.load.
        """
        return checkpoint.load(
            path,
            checkpoint.Saved(
                module=module,
                accountant=self.accountant,
                optimizer=optimizer,
                noise_scheduler=noise_scheduler,
                grad_clip_scheduler=grad_clip_scheduler,
            ),
            module_kwargs=module_load_dict_kwargs or {},
            torch_kwargs=torch_load_kwargs or {},
        )

    # ── inside ──────────────────────────────────────────────────────────────────────────────────────

    def _private_loader(
        self, data_loader: DataLoader[Any], *, poisson_sampling: bool
    ) -> tuple[PrivateBatches, float, float]:
        """The loader, each example's chance to be in a batch, and the expected batch size."""
        if isinstance(data_loader, DPDataLoader):  # draws by coins whatever is asked for
            size = len(data_loader.dataset)  # type: ignore[arg-type]  # known to be sized
            return copy.copy(data_loader), data_loader.sample_rate, data_loader.sample_rate * size
        source = data_loader.source if isinstance(data_loader, FixedDataLoader) else data_loader
        size, batch_size, _ = uniform_loader_sizes(source)
        if poisson_sampling:
            private = DPDataLoader.from_data_loader(source, secure=self.secure_mode)
            return private, private.sample_rate, min(batch_size, size)
        warnings.warn(
            "poisson_sampling=False: the loader's own batches are taken, and sampling amplifies nothing. Each pass "
            "over the data counts as one Gaussian release, which holds for neighbouring datasets in which one "
            "example is replaced by nothing; Opacus reports the far smaller epsilon of Poisson sampling here.",
            PrivacyWarning,
            stacklevel=3,
        )
        return FixedDataLoader(source), 1.0, batch_size

    def _note_dataset(self, data_loader: DataLoader[Any]) -> None:
        if self.dataset is None:
            self.dataset = data_loader.dataset
        elif self.dataset is not data_loader.dataset:
            warnings.warn(
                "This engine has accounted for another dataset object. It adds up what is spent on one dataset: for "
                "other data make another PrivacyEngine. If both objects stand for the same data, this is fine.",
                PrivacyWarning,
                stacklevel=3,
            )

    def _refuse_owned(self, module: nn.Module) -> None:
        owner = _owners.get(module)
        if owner is not None and owner() is not self:
            raise WrapError(
                "The module is part of a run of another PrivacyEngine, which alone knows what was spent on it. Go on "
                "with that engine, or start anew with copy.deepcopy of the plain module."
            )
