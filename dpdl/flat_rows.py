"""Many tensors as a few long ones: what is done to all of them is then done once.

Models have many small tensors, and each call of torch costs microseconds, each message between processes more.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["FlatRows"]


class FlatRows:
    """A copy of tensors, laid end to end: one row for each device and dtype, by name within it.

    Args:
        tensors: by name. The order in which they come does not matter.

    Attributes:
        rows: 1-D tensors, to be changed in place.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        names: dict[tuple[str, str], list[str]] = {}
        for name in sorted(tensors):
            kind = (str(tensors[name].device), str(tensors[name].dtype))
            names.setdefault(kind, []).append(name)
        self._names = [names[kind] for kind in sorted(names)]
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.rows = [torch.cat([tensors[name].detach().reshape(-1) for name in row]) for row in self._names]

    def tensors(self) -> dict[str, Tensor]:
        """Views of the rows as they are now, by name, in the shapes that came."""
        found: dict[str, Tensor] = {}
        for row, names in zip(self.rows, self._names, strict=True):
            parts = row.split([self._shapes[name].numel() for name in names])
            found |= {name: part.view(self._shapes[name]) for name, part in zip(names, parts, strict=True)}
        return found
