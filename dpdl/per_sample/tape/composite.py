"""Operations that are looked into: made of other torch operations, each of which has its own rule.

Torch functions that are written in Python. Inside of one torch switches a function mode off, so a weight that it uses
would not be seen. Its body runs again with torch's own test for overrides answering no: its inner calls then reach
the mode one by one. And a few compiled functions, written out here.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["body_of"]


@functools.cache
def body_of(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """A function that does the same, its calls visible to the mode; None if `function` cannot be looked into."""
    if function in _WRITTEN_OUT:
        return _WRITTEN_OUT[function]
    if not isinstance(function, types.FunctionType):
        return None
    if function.__module__ not in ("torch.nn.functional", "torch.functional", "torch._tensor", "torch.autograd"):
        return None
    if "__class__" in function.__code__.co_freevars:
        return None  # calls super(), which would come back here
    blind: dict[str, Any] = {
        name: _never
        for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
        if name in function.__globals__
    }
    if not blind:
        return None
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **blind},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _never(*_: Any) -> bool:
    return False


def _addmm(bias: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = torch.matmul(first, second)
    product = product if alpha == 1 else product * alpha
    if beta == 0:
        return product
    return product + (bias if beta == 1 else bias * beta)


def _lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    h, c = hx
    i, f, g, o = (F.linear(input, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    of_input, of_state = F.linear(input, w_ih, b_ih), F.linear(hx, w_hh, b_hh)
    (r, z, n), (state_r, state_z, state_n) = of_input.chunk(3, -1), of_state.chunk(3, -1)
    reset, update = (r + state_r).sigmoid(), (z + state_z).sigmoid()
    new = (n + reset * state_n).tanh()
    return new + update * (hx - new)


def _simple_cell(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def cell(
        input: Tensor,
        hx: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor:
        return activation(F.linear(input, w_ih, b_ih) + F.linear(hx, w_hh, b_hh))

    return cell


_WRITTEN_OUT: dict[Any, Callable[..., Any]] = {
    torch.addmm: _addmm,
    torch.Tensor.addmm: _addmm,
    torch.baddbmm: _addmm,
    torch.Tensor.baddbmm: _addmm,
    torch.lstm_cell: _lstm_cell,
    torch.gru_cell: _gru_cell,
    torch.rnn_tanh_cell: _simple_cell(torch.tanh),
    torch.rnn_relu_cell: _simple_cell(torch.relu),
}
