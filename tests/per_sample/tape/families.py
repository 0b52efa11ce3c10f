"""One small model for each kind of rule, its contribution to the model's gradients not to be overlooked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.per_sample.tape.against_autograd import Numbers, Using


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model with parameters of one rule only.

    Attributes:
        build: makes the module.
        shape: of one example.
        vocabulary: for tokens; 0 if the input is real.
        parameter: one whose name a refusal must show.
        derived: its norms are taken after pulling back.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    vocabulary: int = 0
    parameter: str
    derived: bool = False

    def module(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build().double()

    def inputs(self, n: int) -> Tensor:
        numbers = Numbers()
        if self.vocabulary:
            return numbers.tokens(n, *self.shape, vocabulary=self.vocabulary)
        return numbers(n, *self.shape)


def _scaled(norm: nn.Module) -> nn.Module:
    for seed, p in enumerate(norm.parameters()):
        p.data = 1 + Numbers(seed)(*p.shape).to(p.dtype) / 2
    return norm


def _token(m: Any, x: Tensor) -> Tensor:
    z = x.clone()
    z[:, 0] = m.token
    return z.sin() * z.sum(1, keepdim=True)


def _in_place(m: Any, x: Tensor) -> Tensor:
    z = x.clone()
    z += m.shift
    z *= m.shift
    return z.sin()


def _windows(m: Any, x: Tensor) -> Tensor:
    """[T, N, 4] flattened: an example's rows lie apart."""
    rows = x.transpose(0, 1).flatten(0, 1)
    output: Tensor = torch.tanh(m.layer(rows)).unflatten(0, (-1, len(x))).transpose(0, 1)
    return output


def _tied(m: Any, x: Tensor) -> Tensor:
    return F.linear(torch.tanh(m.table(x)), m.table.weight)


FAMILIES: dict[str, Family] = {
    "linear": Family(build=lambda: nn.Linear(4, 3), shape=(5, 4), parameter="weight"),
    "linear, one position": Family(build=lambda: nn.Linear(4, 3), shape=(4,), parameter="weight"),
    "matmul": Family(build=lambda: Using(lambda m, x: x @ m.w, w=Numbers()(4, 3)), shape=(5, 4), parameter="w"),
    "einsum": Family(
        build=lambda: Using(lambda m, x: torch.einsum("nti,tio->nto", x, m.w), w=Numbers()(5, 4, 3)),
        shape=(5, 4),
        parameter="w",
    ),
    "rows apart": Family(build=lambda: Using(_windows, layer=nn.Linear(4, 3)), shape=(5, 4), parameter="layer.weight"),
    "convolution": Family(build=lambda: nn.Conv2d(2, 3, 3), shape=(2, 5, 5), parameter="weight"),
    "grouped convolution": Family(
        build=lambda: nn.Conv1d(4, 4, 2, groups=2, bias=False), shape=(4, 5), parameter="weight"
    ),
    "depthwise convolution": Family(
        build=lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), shape=(4, 5, 5), parameter="weight"
    ),
    "transposed convolution": Family(build=lambda: nn.ConvTranspose2d(2, 3, 3), shape=(2, 4, 4), parameter="weight"),
    "embedding": Family(build=lambda: nn.Embedding(6, 3), shape=(5,), vocabulary=6, parameter="weight"),
    "embedding bag": Family(build=lambda: nn.EmbeddingBag(6, 3), shape=(5,), vocabulary=6, parameter="weight"),
    "tied embedding": Family(
        build=lambda: Using(_tied, table=nn.Embedding(6, 3)), shape=(5,), vocabulary=6, parameter="table.weight"
    ),
    "layer norm": Family(build=lambda: _scaled(nn.LayerNorm(4)), shape=(5, 4), parameter="weight"),
    "RMS norm": Family(build=lambda: _scaled(nn.RMSNorm(4)), shape=(5, 4), parameter="weight"),
    "group norm": Family(build=lambda: _scaled(nn.GroupNorm(2, 4)), shape=(4, 3), parameter="weight"),
    "instance norm": Family(build=lambda: _scaled(nn.InstanceNorm1d(4, affine=True)), shape=(4, 3), parameter="weight"),
    "batch norm": Family(build=lambda: _scaled(nn.BatchNorm1d(4)).eval(), shape=(4, 3), parameter="weight"),
    "scale": Family(build=lambda: Using(lambda m, x: x * m.w, w=Numbers()(4)), shape=(5, 4), parameter="w"),
    "positions": Family(
        build=lambda: Using(lambda m, x: (x + m.w).sin(), w=Numbers()(5, 4)), shape=(5, 4), parameter="w"
    ),
    "assignment": Family(build=lambda: Using(_token, token=Numbers()(4)), shape=(5, 4), parameter="token"),
    "in place": Family(build=lambda: Using(_in_place, shift=Numbers()(4)), shape=(5, 4), parameter="shift"),
    "expanded": Family(
        build=lambda: Using(
            lambda m, x: torch.cat([m.token.expand(len(x), 1, 4), x], 1).cumsum(1).sin(), token=Numbers()(1, 1, 4)
        ),
        shape=(5, 4),
        parameter="token",
    ),
    "repeated": Family(
        build=lambda: Using(
            lambda m, x: torch.cat([m.token.repeat(len(x), 1, 1), x], 1).cumsum(1).sin(), token=Numbers()(1, 1, 4)
        ),
        shape=(5, 4),
        parameter="token",
        derived=True,
    ),
    "by vmap": Family(
        build=lambda: Using(lambda m, x: (1 + x.square()) ** m.w, w=Numbers()(4) / 2), shape=(5, 4), parameter="w"
    ),
    "LSTM": Family(
        build=lambda: Using(lambda m, x: m.rnn(x)[0], rnn=nn.LSTM(4, 3, batch_first=True)),
        shape=(5, 4),
        parameter="rnn.weight_ih_l0",
    ),
    "GRU": Family(
        build=lambda: Using(lambda m, x: m.rnn(x)[0], rnn=nn.GRU(4, 3, batch_first=True)),
        shape=(5, 4),
        parameter="rnn.weight_hh_l0",
    ),
    "LSTM cell": Family(
        build=lambda: Using(lambda m, x: m.cell(x, m.cell(x.sin()))[0], cell=nn.LSTMCell(4, 4)),
        shape=(4,),
        parameter="cell.weight_ih",
    ),
    "attention": Family(
        build=lambda: Using(
            lambda m, x: m.attention(x, x, x)[0], attention=nn.MultiheadAttention(4, 2, batch_first=True)
        ),
        shape=(5, 4),
        parameter="attention.in_proj_weight",
    ),
    "a layer twice": Family(
        build=lambda: Using(lambda m, x: m.layer(torch.tanh(m.layer(x))), layer=nn.Linear(4, 4)),
        shape=(5, 4),
        parameter="layer.weight",
    ),
    "derived": Family(
        build=lambda: Using(lambda m, x: F.linear(x, m.w.exp()), w=Numbers()(3, 4)),
        shape=(5, 4),
        parameter="w",
        derived=True,
    ),
    "views": Family(
        build=lambda: Using(lambda m, x: F.linear(x, m.w[:2]) * F.linear(x, m.w[2:]), w=Numbers()(4, 4)),
        shape=(5, 4),
        parameter="w",
    ),
    "overlapping views": Family(
        build=lambda: Using(lambda m, x: F.linear(x, m.w[:3]) * F.linear(x, m.w[1:]), w=Numbers()(4, 4)),
        shape=(5, 4),
        parameter="w",
        derived=True,
    ),
}
