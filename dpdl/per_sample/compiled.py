"""Compiled modules: what they do inside is hidden from what takes gradients example by example."""

from __future__ import annotations

import torch
from torch import nn

from dpdl.errors import ModelError

__all__ = ["refuse_compiled"]


def refuse_compiled(module: nn.Module) -> None:
    """Raise if a module, or one inside of it, was compiled by torch.compile or torch.jit.

    The tape records each operation as Python calls it, and vmap transforms it: a compiled graph shows neither. Run
    through them it would be traced anew for each kind of batch, and be slower than the plain module.
    """
    for path, child in module.named_modules():
        where = f"module '{path}'" if path else "the model"
        if isinstance(child, torch.jit.ScriptModule):
            raise ModelError(
                f"{where} is compiled by torch.jit ({type(child).__name__}), which hides its operations from the "
                "private step. Pass the plain module that it was made from."
            )
        wrapper = hasattr(child, "_orig_mod")  # torch._dynamo's OptimizedModule; importing it takes seconds
        if wrapper or child._compiled_call_impl is not None:
            raise ModelError(
                f"{where} is compiled by torch.compile, which hides its operations from the private step. Pass the "
                "plain module (model._orig_mod, or before model.compile()), and compile a copy for evaluation."
            )
