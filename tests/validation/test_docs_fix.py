"""The guide to `dpdl.check` and `dpdl.fix`: its tables name what there is."""

from __future__ import annotations

import re
from pathlib import Path

import dpdl
from dpdl import validation

GUIDE = Path(__file__).parents[2] / "docs" / "fix.md"


def test_the_functions_that_it_names_are_public() -> None:
    text = GUIDE.read_text()
    named = set(re.findall(r"`(\w+_norm\w*|instance_\w+|replace_modules|fix|check)\(", text))
    assert {"batch_norm_to_group_norm", "batch_norm_to_layer_norm", "batch_norm_to_instance_norm"} <= named
    assert named <= set(validation.__all__)
    assert {name for name in validation.__all__ if name.startswith(("batch_norm_to", "instance_norm"))} <= named


def test_what_it_shows_is_under_its_public_name() -> None:
    assert dpdl.fix is validation.fix
    assert dpdl.fix_report is validation.fix_report
