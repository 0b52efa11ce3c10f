"""Recurrent layers under Opacus's names. They are torch's own: the engines take those as they are.

State dicts, arguments and outputs are torch's; weights move both ways.
"""

from __future__ import annotations

from torch import nn

__all__ = ["DPGRU", "DPLSTM", "DPRNN"]


class DPRNN(nn.RNN):
    """`torch.nn.RNN`."""


class DPGRU(nn.GRU):
    """`torch.nn.GRU`."""


class DPLSTM(nn.LSTM):
    """`torch.nn.LSTM`, with `proj_size` too."""
