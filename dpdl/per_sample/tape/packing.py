"""Packed sequences: which example is at which place of a packing, remembered from how it was made.

`pack_padded_sequence` sorts the examples by length: it selects rows by an index, and packs what it has selected. Both
calls are seen. A recurrent layer is then given the packing's batch sizes, the same tensor, from which the order is
found again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Packings", "is_packed"]

_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}


def is_packed(function: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a call is a recurrent layer's on packed sequences: (data, batch sizes, states, weights, ...)."""
    return function in _RECURRENT and len(args) > 3 and isinstance(args[3], (list, tuple))


class Packings:
    """The packings that a forward pass has made."""

    def __init__(self) -> None:
        # By identity; the tensors are held, so that identities stay good.
        self._selected: dict[int, tuple[Tensor, Tensor]] = {}
        self._orders: dict[int, tuple[Tensor, Tensor | None]] = {}

    def see(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Take note of a call that selects or packs."""
        name = getattr(function, "__name__", "")
        if name == "index_select" and len(args) == 3:
            self._selected[id(result)] = (result, args[2])
        elif name == "_pack_padded_sequence":
            selected = self._selected.get(id(args[0]))
            self._orders[id(result[1])] = (result[1], None if selected is None else selected[1])

    def order(self, batch_sizes: Tensor) -> Tensor | None:
        """Which example is at each place, [n]; None: each at its own.

        Raises:
            KeyError: the packing was not made in this pass.
        """
        return self._orders[id(batch_sizes)][1]

    def orders_by(self, index: Tensor) -> bool:
        """Whether an index was used to bring examples into the order of a packing."""
        return any(order is index for _, order in self._orders.values())
