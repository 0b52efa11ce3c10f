"""Per-sample gradients in `p.grad_sample`, computed by the engines of `dpdl.per_sample`."""

from dpdl.compat.opacus.grad_sample.grad_sample_module import (
    GradSampleHooks,
    GradSampleModule,
    create_or_accumulate_grad_sample,
)
from dpdl.compat.opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
    GradSampleHooksFastGradientClipping,
    GradSampleModuleFastGradientClipping,
)
from dpdl.compat.opacus.grad_sample.gsm_base import AbstractGradSampleHooks, AbstractGradSampleModule
from dpdl.compat.opacus.grad_sample.gsm_exp_weights import GradSampleModuleExpandedWeights
from dpdl.compat.opacus.grad_sample.gsm_no_op import GradSampleHooksNoOp, GradSampleModuleNoOp
from dpdl.compat.opacus.grad_sample.utils import (
    get_gsm_class,
    prepare_module,
    register_grad_sampler,
    register_norm_sampler,
    wrap_model,
)

__all__ = [
    "AbstractGradSampleHooks",
    "AbstractGradSampleModule",
    "GradSampleHooks",
    "GradSampleHooksFastGradientClipping",
    "GradSampleHooksNoOp",
    "GradSampleModule",
    "GradSampleModuleExpandedWeights",
    "GradSampleModuleFastGradientClipping",
    "GradSampleModuleNoOp",
    "create_or_accumulate_grad_sample",
    "get_gsm_class",
    "prepare_module",
    "register_grad_sampler",
    "register_norm_sampler",
    "wrap_model",
]
