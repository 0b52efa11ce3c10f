"""The settings of a sweep as its journal holds them, checked for kind before `dpdl sweep --resume` goes by them.

A journal is a file: it may be damaged, of another version, or of a sweep that a program of its own began. Whether the
values suit each other is asked where they are used, as of those that are given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from accountants import arguments
from dpdl.errors import CheckpointError
from dpdl.tradeoff.cases import Case
from dpdl.tradeoff.grid import Grid

__all__ = ["refuse_damaged_settings"]

_LISTS = ("epsilons", "max_grad_norms", "batch_sizes", "lrs", "seeds", "baseline_lrs")
_LARGEST = 1e300  # of any number: whole numbers in JSON know no bound, floats do


def refuse_damaged_settings(asked: Mapping[str, Any], where: object) -> None:
    """Check that settings are of the kinds that `dpdl sweep` wrote.

    Args:
        asked: as the journal holds them.
        where: of the journal, for the error.

    Raises:
        CheckpointError: one is missing, unknown, or of another kind; or they are not of the command.
    """
    if "case" not in asked and "train" in asked:
        raise CheckpointError(
            f"The sweep in {where} was begun by dpdl.sweep with a function of its own ({_shown(asked, 'train')}), "
            "which the command does not have. Go on with it there, by resume=True."
        )
    names = {field.name for field in fields(Grid)} | {"select", "train", "case"}
    if set(asked) != names:
        missing, unknown = sorted(names - set(asked)), sorted(set(asked) - names)
        raise _damaged(where, f"missing {missing}, unknown {unknown}")
    for name in asked:
        if not _of_its_kind(name, asked[name]):
            raise _damaged(where, f"{name} is {_shown(asked, name)}")


def _of_its_kind(name: str, value: object) -> bool:
    if name in _LISTS:
        return isinstance(value, list) and all(_is_number(each) for each in value)
    match name:
        case "plans":
            return value == []  # the command takes none
        case "settings":
            return isinstance(value, dict)
        case "case":
            known = {field.name for field in fields(Case)}
            return isinstance(value, dict) and set(value) == known and all(_is_text(each) for each in value.values())
        case "select":
            return value is None or _is_law(value)
        case _:
            return isinstance(value, bool) or _is_text(value) or _is_number(value)


def _is_law(value: object) -> bool:
    if not isinstance(value, dict) or set(value) != {"mean", "shape"}:
        return False
    return _is_number(value["mean"]) and (value["shape"] == "inf" or _is_number(value["shape"]))


def _is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST


def _shown(asked: Mapping[str, Any], name: str) -> str:
    return arguments.shown(asked[name])


def _damaged(where: object, what: str) -> CheckpointError:
    return CheckpointError(f"The settings in {where} are damaged: {what}. Start anew in another output.")
