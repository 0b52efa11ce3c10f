"""Small tables of numbers that scikit-learn carries: breast cancer, wine, digits.

Columns are brought to [-1, 1] by ranges that stand here, in place of the usual mean and standard deviation: those would
be measured on the private records, and what is measured must be accounted. The ranges are round numbers around what the
data sets' published descriptions name; for a table of your own take them from what is known of its columns.

References:
    UCI Machine Learning Repository: Breast Cancer Wisconsin (Diagnostic); Wine; Optical Recognition of Handwritten
    Digits. As packaged by Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 12, 2011.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dpdl.errors import DataError, ParameterError
from dpdl.tradeoff.task import Task

__all__ = ["TABLES", "load_table"]

ONE_IN_TEST = 5  # every fifth record of a class is held out

Ranges = tuple[tuple[float, float], ...]

_BREAST_CANCER: Ranges = (
    # mean of the nuclei: radius, texture, perimeter, area, smoothness, compactness, concavity, concave points,
    # symmetry, fractal dimension
    *((5, 30), (5, 45), (40, 200), (100, 2000), (0.05, 0.17), (0, 0.3), (0, 0.4), (0, 0.2), (0.1, 0.3), (0.05, 0.1)),
    # standard error, of the same
    *((0, 2), (0, 4), (0, 15), (0, 200), (0, 0.02), (0, 0.1), (0, 0.15), (0, 0.04), (0, 0.06), (0, 0.015)),
    # largest
    *((5, 36), (10, 50), (50, 250), (150, 3000), (0.07, 0.22), (0, 1), (0, 1.2), (0, 0.3), (0.15, 0.6), (0.05, 0.2)),
)
_WINE: Ranges = (
    # alcohol, malic acid, ash, alkalinity of ash, magnesium, phenols, flavanoids, nonflavanoid phenols,
    # proanthocyanins, colour, hue, OD280/OD315, proline
    *((11, 15), (0, 6), (1, 4), (10, 30), (70, 160), (0, 4), (0, 5), (0, 1), (0, 4), (0, 13), (0.4, 1.8), (1, 4)),
    (200, 1700),
)
_DIGITS: Ranges = ((0, 16),) * 64  # 8 x 8 pixels in 17 greys

TABLES: dict[str, Ranges] = {"breast-cancer": _BREAST_CANCER, "wine": _WINE, "digits": _DIGITS}


def load_table(name: str) -> Task:
    """A table by name, every fifth record of a class held out.

    Returns:
        Inputs of shape [N, 1, 1, columns], in [-1, 1].

    Raises:
        ParameterError: no table of that name.
        DataError: scikit-learn is not installed.
    """
    if name not in TABLES:
        raise ParameterError(f"table must be one of {', '.join(TABLES)}, got {name!r}.")
    try:
        from sklearn import datasets  # optional: the extra "tables"
    except ImportError as error:
        raise DataError(
            f"The tables come with scikit-learn, which cannot be imported ({error}). Install it with "
            "pip install 'dpdl[tables]', or name images with --data."
        ) from error
    bunch = getattr(datasets, f"load_{name.replace('-', '_')}")()
    labels = np.asarray(bunch.target, dtype=np.int64)
    inputs = in_range(torch.from_numpy(np.asarray(bunch.data, dtype=np.float64)), TABLES[name])
    held_out = np.zeros(len(labels), dtype=bool)
    for label in range(len(bunch.target_names)):
        held_out[np.flatnonzero(labels == label)[ONE_IN_TEST - 1 :: ONE_IN_TEST]] = True
    test = torch.from_numpy(held_out)
    return Task(
        train_inputs=inputs[~test],
        train_labels=torch.from_numpy(labels)[~test],
        test_inputs=inputs[test],
        test_labels=torch.from_numpy(labels)[test],
        classes=len(bunch.target_names),
        name=f"the table {name}",
    )


def in_range(values: Tensor, ranges: Ranges) -> Tensor:
    """Columns brought from their ranges to [-1, 1], and cut off there; [N, columns] to [N, 1, 1, columns], float32."""
    low, high = torch.tensor(ranges, dtype=torch.float64).T
    scaled: Tensor = (2 * (values - low) / (high - low) - 1).clamp(-1, 1)
    return scaled.float().view(len(values), 1, 1, len(ranges))
