"""Values that a careless program, a broken file or an attacker might hand over, as hypothesis strategies."""

from __future__ import annotations

import copy
import json
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

__all__ = ["ODD", "RAW", "changed", "often"]

ODD_NUMBERS = (
    *(0, -1, 1, 2, 0.0, -0.0, 0.5, 1.0, 1.5, -0.5, 1e-320, 1e-12, 1e12, 1e308, -1e308, 2**31, 2**63, 2**64, 10**400),
    *(math.nan, math.inf, -math.inf, True, False),
)
ODD_SCALARS = (
    *(np.float32(0.5), np.float64("nan"), np.int64(3), np.uint8(3), np.bool_(True), np.float16(1e-8)),
    *(torch.tensor(0.5), torch.tensor(3), torch.tensor(math.nan), torch.tensor(True), torch.ones(3), torch.zeros(0)),
    *(np.ones(2), np.array(2.0), Decimal("0.5"), Fraction(1, 3), 1j),
)
ODD_OBJECTS = (None, "", "1", "nan", "flat", b"1", (), (1,), [], [0.5], {}, {"a": 1}, object(), int, len, ...)

# Sampled by number: hypothesis would take 1, 1.0 and True for one value.
_ALL = (*ODD_NUMBERS, *ODD_SCALARS, *ODD_OBJECTS)
ODD: st.SearchStrategy[Any] = st.integers(0, len(_ALL) - 1).map(_ALL.__getitem__)

_PLAIN = (*ODD_NUMBERS, None, "", "1", "flat", [], [0.5], {}, {"a": 1})
RAW: st.SearchStrategy[Any] = st.integers(0, len(_PLAIN) - 1).map(_PLAIN.__getitem__)


def often(sound: st.SearchStrategy[Any], odd: st.SearchStrategy[Any] = ODD) -> st.SearchStrategy[Any]:
    """A sound value four times in five, so that several in a row are sound often enough."""
    return st.integers(0, 4).flatmap(lambda n: odd if n == 0 else sound)


def changed(data: st.DataObject, tree: Any, *, odd: st.SearchStrategy[Any] = RAW) -> Any:
    """A copy of nested dicts and lists with one thing in it exchanged, left out, added or given twice."""
    tree = copy.deepcopy(tree)
    place = data.draw(st.sampled_from(list(_places(tree))), label="where")
    container = tree
    for key in place[:-1]:
        container = container[key]
    key = place[-1]
    way = data.draw(st.sampled_from(("exchange", "leave out", "add", "double")), label="how")
    if way == "exchange":
        container[key] = data.draw(odd, label="by")
    elif way == "leave out":
        del container[key]
    elif isinstance(container, dict):
        container[f"{key}2"] = copy.deepcopy(container[key])
    else:
        container.append(copy.deepcopy(container[key]))
    return tree


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Any:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from _places(value, (*path, key))


def as_json(values: Any) -> str:
    """Texts of numbers that JSON has not are as Python writes them: NaN, Infinity."""
    return json.dumps(values)
