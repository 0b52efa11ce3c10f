"""The weights of one layer and direction of a recurrent network, and how their gradients are reported.

Axes: t position, b sequence, i input, h hidden, o output of a weight, p output of the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["OnProducts", "Products", "Weights"]


@dataclass(frozen=True, kw_only=True)
class Products:
    """What some weights of one layer and direction receive, all from the same gradient.

    sum_t g[t, b] outer a[t, b] is the gradient of sequence b for a matrix with operand a, sum_t g[t, b] for a bias.
    All may be views with any strides, and none is to be written to.

    Attributes:
        g: gradient of what the matrices produce, [t, b, o].
        operands: for each matrix its position among the flat weights, and what it was multiplied by, [t, b, i].
        biases: positions of the biases.
    """

    g: Tensor
    operands: tuple[tuple[int, Tensor], ...]
    biases: tuple[int, ...] = ()


OnProducts = Callable[[Products], None]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Constants for autograd, and where they stand among the flat weights.

    Attributes:
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
    def bias_positions(self) -> tuple[int, ...]:
        """Positions of the input's and the hidden bias, where there are any."""
        return () if self.input_bias is None else (self.position + 2, self.position + 3)

    @property
    def projection_position(self) -> int:
        """Position of `projection`."""
        return self.position + 2 + len(self.bias_positions)

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
