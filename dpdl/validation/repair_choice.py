"""Which conversion `dpdl.fix` takes for a module, and what it says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from dpdl.errors import ModelError
from dpdl.validation.conversions import (
    MIN_VALUES_PER_GROUP,
    batch_norm_to_group_norm,
    batch_norm_to_instance_norm,
    batch_norm_to_layer_norm,
    freeze_norm,
    instance_norm_without_statistics,
)
from dpdl.validation.frozen_batch_norm import FrozenBatchNorm
from dpdl.validation.repair_report import Conversion
from dpdl.validation.replacement import Replacement

__all__ = ["BatchNormChoice", "RepairChoice"]

BatchNormChoice = Literal["group", "layer", "instance", "frozen"]


@dataclass(frozen=True, kw_only=True)
class RepairChoice:
    """The user's choice, applied to one module after the other.

    Attributes:
        batch_norm, num_groups: as in `dpdl.fix`.
        model_trains: whether the model is in training mode. What is in eval mode then is frozen for good.
        shapes: of the inputs of each module on the example batch; empty without one.
    """

    batch_norm: BatchNormChoice
    num_groups: int | None
    model_trains: bool
    shapes: Mapping[nn.Module, list[torch.Size]] = field(default_factory=dict)

    def replacement_of(self, module: nn.Module) -> nn.Module:
        """What comes in a module's place; the module itself if it may stay.

        Raises:
            ModelError: nothing can come in its place, or what does would be a constant.
            ParameterError: `num_groups` does not divide its channels.
        """
        assert isinstance(module, _NormBase)
        has_statistics = module.running_mean is not None
        frozen = has_statistics and self.model_trains and not module.training
        if isinstance(module, _InstanceNorm):
            if not has_statistics and not module.track_running_stats:
                return module
            return freeze_norm(module) if frozen else instance_norm_without_statistics(module)
        assert isinstance(module, _BatchNorm)
        if frozen or self.batch_norm == "frozen":
            return freeze_norm(module)
        replacement = self._of_batch_norm(module)
        if self._values_per_statistic(module, replacement) == 1:
            raise ModelError(
                f"{type(replacement).__name__} in place of {type(module).__name__}({module.num_features}) would "
                f"normalise single values, here of inputs shaped {self._example_shape(module)}, and give a constant. "
                "Choose fewer groups, or another batch_norm= for this model."
            )
        return replacement

    def conversion(self, each: Replacement) -> Conversion:
        """What is to be reported of a replacement."""
        module, norm = each.module, each.replacement
        parts: tuple[str, ...] = ()
        if isinstance(norm, nn.Sequential):
            parts = tuple(name for name, _ in norm.named_children() if name != "norm")
            norm = norm[0]
        assert isinstance(module, _NormBase)
        return Conversion(
            paths=each.paths,
            before=in_one_line(module),
            after=in_one_line(each.replacement),
            carried_over=(*_carried_over(module, norm), *parts),
            note=self._note(module, norm),
        )

    def _of_batch_norm(self, module: _BatchNorm) -> nn.Module:
        if self.batch_norm == "layer":
            return batch_norm_to_layer_norm(module)
        if self.batch_norm == "instance":
            return batch_norm_to_instance_norm(module)
        return batch_norm_to_group_norm(module, self.num_groups, positions=self._positions(module))

    def _positions(self, module: nn.Module) -> int | None:
        """The fewest places at which a channel has values on the example batch; None if that is not known."""
        return min((math.prod(shape[2:]) for shape in self.shapes.get(module, [])), default=None)

    def _example_shape(self, module: nn.Module) -> list[int]:
        fewest = self._positions(module)
        return next(list(shape) for shape in self.shapes[module] if math.prod(shape[2:]) == fewest)

    def _values_per_statistic(self, module: _NormBase, replacement: nn.Module) -> int | None:
        positions = self._positions(module)
        if positions is None or isinstance(replacement, FrozenBatchNorm):
            return None
        each = module.num_features // replacement.num_groups if isinstance(replacement, nn.GroupNorm) else 1
        return each * positions

    def _note(self, module: _NormBase, norm: nn.Module) -> str:
        if isinstance(norm, FrozenBatchNorm):
            mean, variance = norm.running_mean, norm.running_var
            initial = not mean.any() and bool((variance == 1).all())
            unused = "; they are the initial ones, so that it only scales and shifts" if initial else ""
            return f"running statistics stay as they are, and must come from public data{unused}"
        values = self._values_per_statistic(module, norm)
        if values is not None and values < MIN_VALUES_PER_GROUP and isinstance(module, _BatchNorm):
            several = isinstance(norm, nn.GroupNorm) and norm.num_groups > 1
            return f"each statistic is of {values} values only" + (": consider fewer groups" if several else "")
        if values is None and isinstance(module, nn.BatchNorm1d):
            if isinstance(norm, nn.InstanceNorm1d):
                return "takes inputs [N, C, L], not [N, C]"
            if isinstance(norm, nn.GroupNorm) and norm.num_groups == module.num_features:
                return "of inputs [N, C] it makes a constant; give an example batch"
        return ""


def in_one_line(module: nn.Module) -> str:
    """As it prints, containers too."""
    return " ".join(repr(module).split())


def _carried_over(module: _NormBase, norm: nn.Module) -> tuple[str, ...]:
    names = {"weight": "scale", "bias": "shift"}
    carried = [words for name, words in names.items() if getattr(module, name) is not None]
    if carried:
        like = next(p for p in (module.weight, module.bias) if p is not None)
        trains = "trained" if like.requires_grad else "not trained"
        carried += [str(like.dtype).removeprefix("torch."), f"on {like.device}", trains]
    if isinstance(norm, FrozenBatchNorm):
        carried.append("running statistics")
    return (*carried, "epsilon", "training mode" if module.training else "eval mode")
