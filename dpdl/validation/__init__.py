"""Whether a model can be trained privately, found out by running it; and what can be done where not."""

from dpdl.validation.check import Check, check
from dpdl.validation.conversions import (
    batch_norm_to_group_norm,
    batch_norm_to_instance_norm,
    batch_norm_to_layer_norm,
    default_num_groups,
    freeze_norm,
    instance_norm_without_statistics,
)
from dpdl.validation.fix import fix, fix_report
from dpdl.validation.frozen_batch_norm import FrozenBatchNorm
from dpdl.validation.repair_report import Change, Conversion, FixReport, ModeChanges
from dpdl.validation.replacement import replace_modules

__all__ = [
    "Change",
    "Check",
    "Conversion",
    "FixReport",
    "FrozenBatchNorm",
    "ModeChanges",
    "batch_norm_to_group_norm",
    "batch_norm_to_instance_norm",
    "batch_norm_to_layer_norm",
    "check",
    "default_num_groups",
    "fix",
    "fix_report",
    "freeze_norm",
    "instance_norm_without_statistics",
    "replace_modules",
]
