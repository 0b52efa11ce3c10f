"""Layers that Opacus replaces torch's by; here they are torch's."""

from dpdl.compat.opacus.layers.dp_multihead_attention import DPMultiheadAttention, SequenceBias
from dpdl.compat.opacus.layers.dp_rnn import DPGRU, DPLSTM, DPRNN

__all__ = ["DPGRU", "DPLSTM", "DPRNN", "DPMultiheadAttention", "SequenceBias"]
