"""Tables: brought into range by constants, so that no record's input depends on another record."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch

from dpdl.errors import DataError, ParameterError
from dpdl.tradeoff.tables import TABLES, in_range, load_table


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_in_range_and_split_by_class(name: str) -> None:
    pytest.importorskip("sklearn")
    task = load_table(name)
    both = torch.cat([task.train_inputs, task.test_inputs])
    assert both.shape[1:] == (1, 1, len(TABLES[name]))
    assert both.min() >= -1
    assert both.max() <= 1
    inside = (both.abs() < 1).float().mean()
    assert inside > 0.9 or name == "digits", "ranges cut off more than a tenth"
    share = task.test_labels.bincount() / torch.cat([task.train_labels, task.test_labels]).bincount()
    assert all(0.18 < float(part) < 0.2001 for part in share)


def test_ranges_are_constants() -> None:
    values = torch.tensor([[0.0, 5.0], [10.0, 5.0], [99.0, -1.0]], dtype=torch.float64)
    ranges = ((0, 10), (4, 8))
    expected = [[-1.0, -0.5], [1.0, -0.5], [1.0, -1.0]]
    assert in_range(values, ranges).view(3, 2).tolist() == expected
    assert in_range(values[:1], ranges).view(1, 2).tolist() == expected[:1]


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError("No module named 'sklearn'")
        return whole(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"dpdl\[tables\]"):
        load_table("wine")


def test_an_unknown_table_is_refused() -> None:
    with pytest.raises(ParameterError, match="table must be one of"):
        load_table("iris")
