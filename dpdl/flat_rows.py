"""Many tensors as a few long ones: what is done to all of them is then done once.

Models have many small tensors, and each call of torch costs microseconds, each message between processes more.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

import torch
from torch import Tensor

__all__ = ["FlatRows"]

LONG = 1 << 16  # numbers; from here on what is done to a tensor takes longer than the calls for it


class FlatRows:
    """Tensors laid end to end, by device, dtype and name.

    Args:
        tensors: by name. The order in which they come does not matter.
        reuse: whether long ones may be used up: they are a row each, as they are, in place of a copy. The rows one
            after another hold the same numbers either way.

    Attributes:
        rows: 1-D tensors, to be changed in place. Each has one device and dtype; without `reuse` there is one for each.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, reuse: bool = False) -> None:
        def kind(name: str) -> tuple[str, str]:
            return str(tensors[name].device), str(tensors[name].dtype)

        def place(name: str) -> tuple[tuple[str, str], str]:
            long = reuse and tensors[name].numel() >= LONG and tensors[name].is_contiguous()
            return kind(name), name if long else ""

        self._names = [list(row) for _, row in groupby(sorted(tensors, key=lambda n: (kind(n), n)), key=place)]
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.rows = []
        for names in self._names:
            flats = [tensors[name].detach().reshape(-1) for name in names]
            self.rows.append(flats[0] if place(names[0])[1] else torch.cat(flats))

    def tensors(self) -> dict[str, Tensor]:
        """Views of the rows as they are now, by name, in the shapes that came."""
        found: dict[str, Tensor] = {}
        for row, names in zip(self.rows, self._names, strict=True):
            parts = row.split([self._shapes[name].numel() for name in names])
            found |= {name: part.view(self._shapes[name]) for name, part in zip(names, parts, strict=True)}
        return found
