"""The weights of one layer and direction of a recurrent network, and how their gradients are reported.

Axes: t position, b sequence, i input, h hidden, p output of the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["OnProducts", "Weights"]

OnProducts = Callable[[int, Tensor | None, Tensor], None]
"""Called as (position among the flat weights, a [t, b, i] or None for a bias, g [t, b, o])."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Constants for autograd, and where they stand among the flat weights.

    Args:
        input: [gates * h, i].
        hidden: [gates * h, p].
        input_bias: [gates * h], or None.
        hidden_bias: [gates * h], or None.
        projection: [p, h] for an LSTM that projects its output, or None.
        position: position of `input`; the others that are there follow, in torch's order, which is that above.
    """

    input: Tensor
    hidden: Tensor
    input_bias: Tensor | None
    hidden_bias: Tensor | None
    projection: Tensor | None
    position: int

    @property
    def biases(self) -> Tensor | None:
        """Sum of the two biases, for cells that only ever add them."""
        if self.input_bias is None or self.hidden_bias is None:
            return None
        return self.input_bias + self.hidden_bias

    def pre_activate(self, rows: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Write rows W_input^T + bias, [rows, gates * h], to `out`."""
        if bias is None:
            torch.mm(rows, self.input.t(), out=out)
        else:
            torch.addmm(bias, rows, self.input.t(), out=out)

    def report(self, on_products: OnProducts, inputs: tuple[Tensor, Tensor], hidden: tuple[Tensor, Tensor]) -> None:
        """Hand out the products of both matrices and, where there are any, of their biases.

        Args:
            on_products: who takes them.
            inputs: (a, g) of `input`.
            hidden: (a, g) of `hidden`.
        """
        pairs = [inputs, hidden]
        for offset, (a, g) in enumerate(pairs):
            on_products(self.position + offset, a.detach(), g)  # a layer's inputs may have a graph behind them
        if self.input_bias is not None:
            for offset, (_, g) in enumerate(pairs, start=2):
                on_products(self.position + offset, None, g)

    def report_projection(self, on_products: OnProducts, a: Tensor, g: Tensor) -> None:
        """Hand out the products of `projection`."""
        on_products(self.position + (2 if self.input_bias is None else 4), a, g)
