"""What `dpdl.fix` did to a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dpdl.per_sample.isolation import Finding

__all__ = ["Change", "Conversion", "FixReport", "ModeChanges"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """How far numbers moved.

    Attributes:
        max_abs: the largest absolute change of a value.
        relative: that, divided by the largest absolute value before; of two zeros, 0.
    """

    max_abs: float
    relative: float

    def __str__(self) -> str:
        return f"{self.max_abs:.2g} ({self.relative:.2g} of the largest value)"


@dataclass(frozen=True, kw_only=True)
class ModeChanges:
    """How far an output moved, on the example batch.

    Attributes:
        eval: in eval mode.
        train: in training mode, random numbers (dropout) being the same.
    """

    eval: Change
    train: Change

    def __str__(self) -> str:
        return f"{self.eval} in eval mode, {self.train} in training mode"


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """One module that was replaced.

    Attributes:
        paths: where it is registered; several for one that is shared. "" is the model itself.
        before, after: what was there, and what is there now, as they print.
        carried_over: what of it lives on, such as "scale" and "shift".
        note: what to know about it; "" if nothing.
        change: of this module's own output, given the input that it had before; None without an example batch, or if
            the model did not call it.
    """

    paths: tuple[str, ...]
    before: str
    after: str
    carried_over: tuple[str, ...]
    note: str = ""
    change: ModeChanges | None = None

    def __str__(self) -> str:
        places = " = ".join(f"'{path}'" if path else "the model itself" for path in self.paths)
        lines = [
            f"{places}: {self.before} -> {self.after}",
            f"carried over: {', '.join(self.carried_over) or 'nothing'}",
        ]
        if self.change is not None:
            lines.append(f"its output moved by {self.change}")
        if self.note:
            lines.append(f"note: {self.note}")
        return "\n    ".join(lines)


@dataclass(frozen=True, kw_only=True)
class FixReport:
    """What `dpdl.fix` did; prints as a list.

    Attributes:
        conversions: the modules that were replaced.
        not_folded: path of each frozen normalisation that was to be folded and stays, to the reason.
        change: of the model's output; None without an example batch.
        remaining: what `dpdl.check` still finds on the example batch; None without one.
    """

    conversions: tuple[Conversion, ...]
    not_folded: Mapping[str, str] = field(default_factory=dict)
    change: ModeChanges | None = None
    remaining: tuple[Finding, ...] | None = None

    def __str__(self) -> str:
        lines = [f"{len(self.conversions)} replaced."] if self.conversions else ["Nothing was replaced."]
        lines += [f"  - {conversion}" for conversion in self.conversions]
        lines += [f"'{path}' is not folded: {reason}." for path, reason in self.not_folded.items()]
        if self.change is not None:
            lines.append(f"The model's output moved by {self.change}.")
        if self.remaining is None:
            lines.append("Not run: give an example batch to see by how much its output moved, and what remains.")
        elif self.remaining:
            lines += ["Not repaired:", *(f"  - {finding}" for finding in self.remaining)]
        else:
            lines.append("Examples are kept apart now.")
        return "\n".join(lines)
