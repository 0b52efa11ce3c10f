"""`dpdl.fix`: replaces the modules that keep a model from being trained privately, and keeps its function."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from dpdl.errors import ModelError, ParameterError, WrapError
from dpdl.model import PrivateModel
from dpdl.validation.check import check
from dpdl.validation.folding import Folding, plan_folding
from dpdl.validation.in_place import make_out_of_place_if_needed
from dpdl.validation.measurement import changes_between, example_rows, input_shapes, outputs_by_mode
from dpdl.validation.repair_choice import BatchNormChoice, RepairChoice, in_one_line
from dpdl.validation.repair_report import Conversion, FixReport
from dpdl.validation.replacement import (
    Replacement,
    apply_replacements,
    modules_and_paths,
    plan_replacements,
    refuse_models_that_cannot_change,
)

__all__ = ["fix", "fix_report"]

logger = logging.getLogger(__name__)
_reports: WeakKeyDictionary[nn.Module, FixReport] = WeakKeyDictionary()

Conversions = dict[tuple[str, ...], Conversion]  # by the paths of what was replaced


def fix(
    model: nn.Module,
    example_batch: Any = None,
    *,
    batch_norm: BatchNormChoice = "group",
    num_groups: int | None = None,
    fold: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """Replace normalisations that mix examples or keep statistics; carry scale, shift and all else over.

        model = dpdl.fix(model)                        # then build the optimizer, then make_private
        print(dpdl.fix_report(model))

    - BatchNorm1d, 2d, 3d and SyncBatchNorm become what `batch_norm` says.
    - One that is in eval mode while the model is in training mode is taken to be frozen for good and becomes a
      `FrozenBatchNorm`, which computes the same, bit for bit, in either mode.
    - InstanceNorm with running statistics becomes one without; frozen in that way, a `FrozenBatchNorm`.
    - Classes made from these keep what they do after normalising (dropout, activation).
    - With an example batch: in-place modules that stand in the way of gradients are switched to copies.

    torch's own RNN, LSTM, GRU, MultiheadAttention and in-place operations are trained as they are. What else mixes
    examples is not repaired, but named in the report, if there is an example batch.

    Args:
        model: any module. It may be in any mode, on any device.
        example_batch: inputs as for `dpdl.check`, at least two examples. Their shapes decide on the number of groups;
            their values reach the report and never the model.
        batch_norm: "group", "layer" (one group: layer normalisation of channels and positions), "instance" (a group for
            each channel), or "frozen" (running statistics as they are, for pretrained models; they must be public).
        num_groups: for "group"; must divide the channels of each. None: the largest divisor up to 32 that leaves
            each group 16 values.
        fold: also fold frozen normalisations into the convolution or linear layer before them, where neither is trained
            and nothing else sees the difference. Needs an example batch.
        inplace: change `model` itself. By default a copy is changed, and `model` stays as it was.

    Returns:
        The model. Only if it is itself a batch normalisation is that another object with `inplace=True`. Parameters
        of a copy are new: build the optimizer after this.

    Guarantee:
        None by itself: `make_private` checks the model that it is given.

    Raises:
        ParameterError: an unknown choice, a `num_groups` that does not divide the channels, fewer than two examples.
        ModelError: a module has hooks or parametrizations that would be lost, has no shape yet, is of a class that does
            more than normalise, or would become a constant; the model is compiled or wrapped, or cannot be copied.
        WrapError: the model is private already.

    Nothing is changed where an error is raised.
    """
    _refuse_wrong_arguments(model, batch_norm, num_groups, fold=fold, has_batch=example_batch is not None)
    batch = None if example_batch is None else example_rows(example_batch)
    refuse_models_that_cannot_change(model)
    model = model if inplace else _copy(model)
    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    shapes = {} if batch is None else input_shapes(model, norms, batch)
    choice = RepairChoice(batch_norm=batch_norm, num_groups=num_groups, model_trains=model.training, shapes=shapes)
    planned = plan_replacements(model, lambda _, module: choice.replacement_of(module), (_BatchNorm, _InstanceNorm))
    conversions: Conversions = {each.paths: choice.conversion(each) for each in planned}
    if batch is None:
        return _reported(apply_replacements(model, planned), FixReport(conversions=tuple(conversions.values())))

    before, changes = outputs_by_mode(model, batch, {each.module: each.replacement for each in planned})
    for each in planned:
        conversions[each.paths] = replace(conversions[each.paths], change=changes.get(each.module))
    fixed, done = model, list(planned)
    switched: list[nn.Module] = []
    not_folded: dict[str, str] = {}
    try:
        fixed = apply_replacements(model, planned)
        if fold:
            foldings = plan_folding(fixed, batch)
            folded = [each for folding in foldings for each in folding.replacements]
            done += folded
            fixed = apply_replacements(fixed, folded)
            conversions.update(_foldings(conversions, foldings))
            not_folded = {folding.paths[0]: folding.reason for folding in foldings if folding.reason}
        remaining = check(fixed, example_batch).findings
        if not remaining:
            switched = make_out_of_place_if_needed(fixed, batch, example_batch)
            conversions.update(_switches(fixed, switched))
        after, _ = outputs_by_mode(fixed, batch)
        change = changes_between(before, after)
    except BaseException:
        for module in switched:
            module.inplace = True  # type: ignore[assignment]  # a plain attribute
        undo = [Replacement(paths=e.paths, module=e.replacement, replacement=e.module) for e in reversed(done)]
        apply_replacements(model, undo)
        raise
    report = FixReport(
        conversions=tuple(conversions.values()), not_folded=not_folded, change=change, remaining=remaining
    )
    return _reported(fixed, report)


def fix_report(model: nn.Module) -> FixReport:
    """What the last `dpdl.fix` did to a model that it returned.

    Args:
        model: the model, or the private model made from it. Copies of it have no report.

    Raises:
        ParameterError: the model did not come from `dpdl.fix` in this process.
    """
    report = _reports.get(model.module if isinstance(model, PrivateModel) else model)
    if report is None:
        raise ParameterError(
            f"There is no report about this {type(model).__name__}: it did not come from dpdl.fix in this process. "
            "Pass what dpdl.fix returned, not a copy of it."
        )
    return report


def _refuse_wrong_arguments(
    model: object, batch_norm: object, num_groups: object, *, fold: bool, has_batch: bool
) -> None:
    if isinstance(model, PrivateModel):
        raise WrapError("The model is private already. Fix the plain module, then make that private.")
    if not isinstance(model, nn.Module):
        raise WrapError(f"model must be a Module, got {type(model).__name__}.")
    if batch_norm not in get_args(BatchNormChoice):
        choices = ", ".join(repr(choice) for choice in get_args(BatchNormChoice))
        raise ParameterError(f"batch_norm must be one of {choices}, got {batch_norm!r}.")
    if num_groups is not None and batch_norm != "group":
        raise ParameterError(
            f'num_groups is for batch_norm="group", got num_groups={num_groups!r} with batch_norm={batch_norm!r}. '
            "Leave one of them out."
        )
    if fold and not has_batch:
        raise ParameterError("fold=True needs an example_batch, to see which layers meet. Pass one.")


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            f"The model ({type(model).__name__}) cannot be copied: {error} Change it where it is, with inplace=True."
        ) from error


def _foldings(conversions: Mapping[tuple[str, ...], Conversion], foldings: list[Folding]) -> Conversions:
    """The conversions that folding adds, and those that it takes further."""
    told: Conversions = {}
    for folding in foldings:
        if not folding.replacements:
            continue
        layer, norm = folding.replacements
        after = f"folded into '{folding.into}' ({in_one_line(layer.replacement)})"
        around = tuple(path.removesuffix(".norm") for path in folding.paths)  # of a class with parts behind
        if folding.paths in conversions:
            told[folding.paths] = replace(conversions[folding.paths], after=after)
        elif around in conversions:
            told[around] = replace(conversions[around], after=f"{after}, its parts remain")
        else:
            told[folding.paths] = Conversion(
                paths=folding.paths,
                before=in_one_line(norm.module),
                after=after,
                carried_over=("scale", "shift", "running statistics"),
            )
    return told


def _switches(model: nn.Module, switched: list[nn.Module]) -> Conversions:
    return {
        paths: Conversion(
            paths=paths,
            before=f"{type(module).__name__}(inplace=True)",
            after=in_one_line(module),
            carried_over=("everything else",),
            note="in place, it overwrote values that a backward needs",
        )
        for paths, module in modules_and_paths(model)
        if any(module is each for each in switched)
    }


def _reported(model: nn.Module, report: FixReport) -> nn.Module:
    _reports[model] = report
    logger.info("%s", report)
    return model
