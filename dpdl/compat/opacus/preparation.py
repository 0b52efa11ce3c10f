"""What `PrivacyEngine.make_private` looks at before anything is changed."""

from __future__ import annotations

import torch
from torch import nn

from dpdl.compat.opacus.errors import ForeignParametersError
from dpdl.compat.opacus.grad_sample import AbstractGradSampleHooks, AbstractGradSampleModule, get_gsm_class
from dpdl.compat.opacus.grad_sample.utils import prepare_module
from dpdl.compat.opacus.validators import ModuleValidator
from dpdl.compat.opacus.validators.errors import UnsupportedModuleError
from dpdl.compat.opacus.validators.known_modules import BATCH_NORMS, INSTANCE_NORMS
from dpdl.errors import ModelError, ParameterError

__all__ = ["private_module", "refuse_foreign_parameters", "refuse_mixing", "refuse_several_processes"]


def private_module(
    module: nn.Module,
    *,
    grad_sample_mode: str,
    batch_first: bool,
    loss_reduction: str,
    wrap_model: bool,
    max_grad_norm: float | list[float],
) -> AbstractGradSampleHooks:
    """The module with per-sample gradients: as it is if it has them already.

    Args: as in `PrivacyEngine.make_private`.

    Raises:
        ParameterError: it has them already, and otherwise than is asked for.
    """
    if isinstance(module, AbstractGradSampleModule):
        same = (module.batch_first, module.loss_reduction) == (batch_first, loss_reduction)
        if not same or type(module) is not get_gsm_class(grad_sample_mode):
            raise ParameterError(
                f"The module is a {type(module).__name__} already, with batch_first={module.batch_first} and "
                f"loss_reduction={module.loss_reduction!r}, which is not what was asked for. Give the plain module: "
                "module.to_standard_module()."
            )
        return module
    more = {"max_grad_norm": max_grad_norm} if grad_sample_mode == "ghost" else {}
    return prepare_module(
        module,
        grad_sample_mode,
        wrap_model,
        batch_first=batch_first,
        loss_reduction=loss_reduction,
        **more,
    )


def refuse_mixing(module: nn.Module) -> None:
    """Raise for normalisations that `ModuleValidator` refuses; what else mixes examples is found when it runs."""
    errors = [
        f"{path or 'the model'}: {error}"
        for path, part in module.named_modules()
        if isinstance(part, BATCH_NORMS + INSTANCE_NORMS) and part.training
        for error in ModuleValidator.VALIDATORS[type(part)](part)
    ]
    if errors:
        raise UnsupportedModuleError("\n".join(errors))


def refuse_foreign_parameters(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise if the optimizer holds parameters that the module does not.

    Raises:
        ForeignParametersError: naming the first of them.
    """
    known = {id(p) for p in module.parameters()}
    for index, group in enumerate(optimizer.param_groups):
        for position, p in enumerate(group["params"]):
            if id(p) not in known:
                raise ForeignParametersError(
                    f"Module parameters are different than optimizer Parameters: parameter {position} of group {index} "
                    f"(shape {tuple(p.shape)}) is not the module's. Build the optimizer from module.parameters(), "
                    "after ModuleValidator.fix."
                )


def refuse_several_processes(module: nn.Module) -> None:
    """Raise for modules that spread a batch over devices or processes.

    Raises:
        ModelError: naming it.
    """
    for path, part in module.named_modules():
        if isinstance(part, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise ModelError(
                f"{path or 'the model'} is a {type(part).__name__}, inside of which gradients cannot be taken example "
                "by example. Pass the plain module; for several processes use dpdl.make_private."
            )
