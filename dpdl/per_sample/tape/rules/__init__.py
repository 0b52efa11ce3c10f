"""Which rule knows which torch operation."""

from __future__ import annotations

from typing import Any

from dpdl.per_sample.tape.rules import (
    assignment,
    attention,
    contractions,
    convolution,
    elementwise,
    embedding,
    normalisation,
    recurrent,
)
from dpdl.per_sample.tape.rules.rule import Rule

__all__ = ["RULES"]

RULES: dict[Any, Rule] = {
    **assignment.RULES,
    **attention.RULES,
    **contractions.RULES,
    **convolution.RULES,
    **elementwise.RULES,
    **embedding.RULES,
    **normalisation.RULES,
    **recurrent.RULES,
}
