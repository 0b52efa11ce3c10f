"""One real architecture made tiny: how to build it, what to feed it, which output its loss is taken of."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from tests.oracles.one_at_a_time import cast

N = 3  # examples in every batch: few, and equal to no other axis of the inputs

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class ZooModel:
    """An architecture, a batch of inputs, an output.

    Attributes:
        name: unique within its library; the seed of the weights.
        family: the table's group: "decoder", "vision", ...
        build: makes the module. Random numbers are seeded by the caller.
        batch: N to the model's keyword arguments, batch first; floats are float64.
        output: name (or position) of the output tensor that the loss is taken of; None: the output is a tensor.
        axis: where that tensor carries the batch.
        mode: "train" with every dropout at rate 0, which is what a user trains, unless the notes say why not.
        default: among the representatives that run in every test run; the others are marked slow.
        refused: part of the reason for which no engine may take it; empty: some engine has to.
        float32_inside: parts of it are computed in float32 and cannot be widened.
        notes: what was changed in the model, or is special about it.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    output: str | int | None = "last_hidden_state"
    axis: int = 0
    mode: Literal["train", "eval"] = "train"
    default: bool = False
    refused: str = ""
    float32_inside: bool = False
    notes: str = ""

    def module(self, dtype: torch.dtype = torch.float64, *, rounded_to: torch.dtype = torch.float64) -> nn.Module:
        """The same weights at every call, none of them at a special value such as 0 or 1.

        In float64 the module computes all its parts in float64; in other dtypes it runs as it is.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(self.name.encode()))
            model = self.build().double()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.is_floating_point():
                        parameter.add_(0.05 * torch.randn_like(parameter))
        for child in model.modules():
            if isinstance(child, nn.modules.dropout._DropoutNd):
                child.p = 0.0
            for rate in ("drop_prob", "drop_rate"):  # stochastic depth, and functional dropout in a model's own forward
                if isinstance(getattr(child, rate, None), float):
                    setattr(child, rate, 0.0)
        model = model.to(rounded_to).to(dtype).train(self.mode == "train")
        return Whole(model, widened=dtype == torch.float64)

    def inputs(self, dtype: torch.dtype = torch.float64, *, rounded_to: torch.dtype = torch.float64) -> Batch:
        """N examples."""
        return {name: cast(cast(tensor, rounded_to), dtype) for name, tensor in self.batch(N).items()}

    def tensor_of(self, output: Any) -> Tensor:
        """The output that the loss is taken of, batch first."""
        tensor = output if self.output is None else output[self.output]
        return tensor.movedim(self.axis, 0)

    def loss(self, output: Any, cotangents: Tensor) -> Tensor:
        """Mean over examples of <output of the example, its cotangent>: every output position counts, each differently.

        Divided by the root of the number of positions, so that gradients are of the order of one.
        """
        tensor = self.tensor_of(output)
        products = (tensor * cotangents).reshape(tensor.shape[0], -1)
        return products.sum(1).mean() / math.sqrt(products.shape[1])

    def cotangents(self, output: Any) -> Tensor:
        """Fixed standard normals, shaped as the output."""
        return normal(*self.tensor_of(output).shape, seed=7).to(self.tensor_of(output).dtype)


class Whole(nn.Module):
    """The model, which if `widened` computes nothing in less than float64.

    Many models compute some parts in float32, whatever their dtype is, for the sake of training in half precision.
    In a comparison in float64 that would hide all errors below 1e-7 behind rounding.
    """

    def __init__(self, model: nn.Module, *, widened: bool) -> None:
        super().__init__()
        self.model = model
        self.widened = widened
        for child in model.modules() if widened else []:
            if child.__dict__.get("dtype") is torch.float32:  # that in which a router computes
                child.dtype = torch.float64

    def forward(self, **inputs: Tensor) -> Any:
        """The model's output."""
        with float32_is_float64() if self.widened else nullcontext():
            return self.model(**inputs)


@contextmanager
def float32_is_float64() -> Iterator[None]:
    """Inside, the name `torch.float32` means float64."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("float32", "float"):
            patch.setattr(torch, name, torch.float64)
        patch.setattr(Tensor, "float", Tensor.double)
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Fixed standard normals, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    """Fixed numbers in [0, 1), float64."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(*shape: int, vocabulary: int, seed: int = 0) -> Tensor:
    """Fixed integers in [5, vocabulary): the first few are often padding and other special tokens."""
    return torch.randint(5, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def with_group_norm(model: nn.Module) -> nn.Module:
    """The model with each batch normalisation, which mixes examples, replaced by a group normalisation.

    Two groups, so that one position is enough. An activation that is part of the normalisation (timm) is kept.
    """
    for child in list(model.modules()):
        for name, norm in child.named_children():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                group_norm: nn.Module = nn.GroupNorm(math.gcd(2, norm.num_features), norm.num_features, eps=norm.eps)
                activation = getattr(norm, "act", None)
                setattr(child, name, nn.Sequential(group_norm, activation) if activation is not None else group_norm)
    return model


def parameter_count(model: nn.Module) -> int:
    """Numbers to train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
