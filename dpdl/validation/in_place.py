"""In-place modules (`ReLU(inplace=True)`) made to work on copies, where running the model shows that they must be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dpdl.errors import PrivacyError
from dpdl.per_sample import per_sample_norms
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.randomness import isolated_randomness

__all__ = ["make_out_of_place_if_needed"]


def make_out_of_place_if_needed(model: nn.Module, batch: ExampleBatch, inputs: Any) -> list[nn.Module]:
    """Try a private gradient; if it fails, and does not without in-place modules, leave these out of place.

    The engines take in-place operations as they are. What fails is what plain autograd cannot do either: to overwrite
    a value that the backward of an earlier operation needs.

    Args:
        model: its modules' `inplace` is switched off, or left as it was.
        batch: the examples.
        inputs: the same as the user gave them.

    Returns:
        The modules that were switched.
    """
    in_place = [module for module in model.modules() if getattr(module, "inplace", None) is True]
    if not in_place or _has_gradients(model, batch, inputs):
        return []
    for module in in_place:
        module.inplace = False  # type: ignore[assignment]  # a plain attribute
    if _has_gradients(model, batch, inputs):
        return in_place
    for module in in_place:
        module.inplace = True  # type: ignore[assignment]
    return []


def _has_gradients(model: nn.Module, batch: ExampleBatch, inputs: Any) -> bool:
    if not any(p.requires_grad for p in model.parameters()):
        return True  # nothing goes back
    with isolated_randomness(batch.device):
        try:
            per_sample_norms(model, _mean_of_squares, inputs, None)
        except (PrivacyError, RuntimeError):  # the latter: autograd's, of overwritten values
            return False
    return True


def _mean_of_squares(outputs: Any, _: None) -> Tensor:
    """Some loss that reaches every output; a mean over examples wherever these are."""
    leaves = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())]
    return torch.stack([leaf.abs().square().mean() for leaf in leaves]).sum()
