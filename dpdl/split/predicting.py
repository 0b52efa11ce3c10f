"""What may be asked of a network: looked at before a row crosses a cut, since each that does is a release."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dpdl.errors import DataError, ParameterError
from dpdl.split.party import Party

__all__ = ["columns_to_predict", "refuse_unknown_rows"]


def columns_to_predict(party: Party, columns: object) -> dict[str, Tensor]:
    """The driver's columns, if they are what its parts read.

    Args:
        party: the driver.
        columns: by name; a tensor, if there is one.

    Raises:
        ParameterError: columns are missing, or rows are not shaped as the party's own.
    """
    wanted = party.owns_columns(labels=False)
    if not wanted or party.columns is None:
        raise ParameterError(
            f"'{party.name}' has no columns that feed a part. Ask by rows=, numbers that all parties have."
        )
    if isinstance(columns, Tensor) and len(wanted) == 1:
        columns = {wanted[0]: columns}
    if not isinstance(columns, Mapping) or set(columns) != set(wanted):
        got = sorted(map(str, columns)) if isinstance(columns, Mapping) else type(columns).__name__
        raise ParameterError(f"predict needs the columns {sorted(wanted)}, got {got}.")
    like = party.columns.rows(torch.arange(0))
    for name in wanted:
        rows, own = columns[name], like[name]
        if not isinstance(rows, Tensor) or rows.shape[1:] != own.shape[1:] or rows.ndim == 0 or rows.dtype != own.dtype:
            got = f"{tuple(rows.shape)} of {rows.dtype}" if isinstance(rows, Tensor) else type(rows).__name__
            raise ParameterError(
                f"Column '{name}' to predict must be rows of shape {tuple(own.shape[1:])} of {own.dtype}, as "
                f"'{party.name}' has them, a batch [n, ...]; got {got}."
            )
    if len({len(columns[name]) for name in wanted}) > 1:
        raise ParameterError(f"Columns to predict have the same rows, got {[len(columns[name]) for name in wanted]}.")
    return dict(columns)


def refuse_unknown_rows(rows: object, *, size: int) -> None:
    """Raise unless these are numbers of rows.

    Raises:
        ParameterError: they are no whole numbers, [n].
        DataError: there are no such rows.
    """
    if not isinstance(rows, Tensor) or rows.ndim != 1 or rows.dtype != torch.int64:
        got = f"{tuple(rows.shape)} of {rows.dtype}" if isinstance(rows, Tensor) else type(rows).__name__
        raise ParameterError(f"rows to predict must be numbers [n] of torch.int64, got {got}.")
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < size:
        raise DataError(f"Rows are numbered from 0 to {size - 1}; got {int(rows.min())} to {int(rows.max())}.")
