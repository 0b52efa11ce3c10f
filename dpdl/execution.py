"""How a plan is carried out: speed and memory, never the guarantee.

The one field that touches the guarantee says so in its name: `insecure_seed` makes noise and
sampling reproducible by anyone who knows the seed, and every report then states it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from dpdl.errors import ParameterError

__all__ = ["EngineName", "Execution", "LossReduction"]

EngineName = Literal["auto", "vmap", "tape", "loop"]
LossReduction = Literal["mean", "sum"]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Choices of speed and memory for a private run.

    Attributes:
        engine: who computes per-sample gradients. `loop`: one example at a time, the oracle.
            `vmap`: vectorised by `torch.func`. `tape`: one plain forward, recorded operation by operation.
            `auto`: tape; vmap for models that it cannot take, and loop for those that vmap cannot either
            (the report says so).
        max_physical_batch_size: the most examples in one forward pass. A larger logical batch comes
            from the loader in several parts; `optimizer.step()` updates at the last one. None: no limit.
        accumulate_dtype: the least precise dtype in which clipped gradients and noise are added.
            float32 or float64.
        self_check: on the first batch, compare the engine with one-at-a-time autograd on a few
            examples, look for modules that mix examples, and check the loss's reduction. Without it the claim
            rests on the model and loss being right in this; the report then says so.
        compile: reserved for engines that can be compiled; none of this version's can.
        loss_reduction: how the training loop's loss combines examples: "mean" or "sum".
        chunk_size: examples whose per-sample gradients `vmap` holds at once. None: chosen from the
            number of parameters.
        data_parallel: where `torch.distributed` runs several processes, they train one model together, each on
            its share of every batch. False: this process trains on its own.
        insecure_seed: a seed that makes noise and sampling reproducible. Whoever knows it can
            subtract the noise: for research and tests only.

    Raises:
        ParameterError: a value is out of range or not supported.
    """

    engine: EngineName = "auto"
    max_physical_batch_size: int | None = None
    accumulate_dtype: torch.dtype = torch.float32
    self_check: bool = True
    compile: bool = False
    loss_reduction: LossReduction = "mean"
    chunk_size: int | None = None
    data_parallel: bool = True
    insecure_seed: int | None = None

    def __post_init__(self) -> None:
        if self.engine not in get_args(EngineName):
            raise ParameterError(f"engine must be one of {get_args(EngineName)}, got {self.engine!r}.")
        for name in ("self_check", "compile", "data_parallel"):
            if type(getattr(self, name)) is not bool:
                raise ParameterError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        if self.compile:
            raise ParameterError("compile=True: no engine of this version can be compiled. Leave it False.")
        if self.loss_reduction not in get_args(LossReduction):
            raise ParameterError(
                f'loss_reduction must be "mean" or "sum", got {self.loss_reduction!r}. '
                "Reduce the loss over examples before calling backward()."
            )
        for name in ("max_physical_batch_size", "chunk_size"):
            value = _integer_or_none(getattr(self, name))
            object.__setattr__(self, name, value)
            if value is not None and (type(value) is not int or value < 1):
                raise ParameterError(f"{name} must be a positive integer or None, got {value!r}.")
        if self.accumulate_dtype not in (torch.float32, torch.float64):
            raise ParameterError(
                f"accumulate_dtype must be torch.float32 or torch.float64, got {self.accumulate_dtype}. "
                "Narrower types would round the noise and the sum that it protects."
            )
        object.__setattr__(self, "insecure_seed", _integer_or_none(self.insecure_seed))
        if self.insecure_seed is not None and (type(self.insecure_seed) is not int or self.insecure_seed < 0):
            raise ParameterError(f"insecure_seed must be a non-negative integer or None, got {self.insecure_seed!r}.")


def _integer_or_none(value: object) -> object:
    """A numpy integer as a plain one; anything else as it is, for the caller to refuse."""
    return int(value) if isinstance(value, np.integer) else value
