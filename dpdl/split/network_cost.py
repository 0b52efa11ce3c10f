"""How much arithmetic a network that is cut takes at each side, and what crosses: counted on the network itself.

    network = measure_network([bottom, top], parties=("client", "server"), example=torch.zeros(1, 1, 28, 28))

torch's flop counter counts convolutions, matrix products and attention, forwards and backwards, each multiplication and
each addition; what it does not know (activations, norms, pooling) counts as nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dpdl.errors import ModelError, ParameterError

__all__ = ["NetworkCost", "PieceCost", "Side", "measure_network"]

Side = Literal["client", "server"]

_ROWS = 2  # rows that the arithmetic is counted on: batch normalisation refuses one


@dataclass(frozen=True, kw_only=True)
class PieceCost:
    """A stretch of the network that one side computes.

    Attributes:
        side: who.
        state: numbers in its parameters and floating point buffers: what travels when weights do.
        trains: whether any parameter is trained.
        flops: of one record, forwards and backwards, multiplications and additions each counted.
        shape: of one row of its output.
    """

    side: Side
    state: int
    trains: bool
    flops: float
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class NetworkCost:
    """A network that is cut into stretches, from data to loss; sides take turns."""

    pieces: tuple[PieceCost, ...]

    @property
    def state(self) -> int:
        """N: numbers in the whole network's weights."""
        return sum(piece.state for piece in self.pieces)

    @property
    def client_state(self) -> int:
        """Numbers in the weights of the client's stretches."""
        return sum(piece.state for piece in self.pieces if piece.side == "client")

    def flops(self, side: Side | None = None) -> float:
        """Of one record, forwards and backwards, at one side or in all."""
        return sum(piece.flops for piece in self.pieces if side in (None, piece.side))

    @property
    def labels_stay(self) -> bool:
        """Whether the last stretch, and with it the loss, is the client's: a U-shape."""
        return self.pieces[-1].side == "client"

    def crossings(self) -> list[tuple[str, Side, tuple[int, ...]]]:
        """All that crosses in one step, in order: name on the way, who sends, shape of one row."""
        names = [("bottom", "middle", "top")[i] if i < 3 else f"part {i + 1}" for i in range(len(self.pieces))]
        cuts = list(zip(names, self.pieces[:-1], strict=False))
        forwards = [(f"z/{name}", piece.side, piece.shape) for name, piece in cuts]
        back: list[tuple[str, Side, tuple[int, ...]]] = [
            (f"d/{name}", "server" if piece.side == "client" else "client", piece.shape)
            for number, (name, piece) in enumerate(cuts)
            if any(before.trains for before in self.pieces[: number + 1])
        ]
        return forwards + back[::-1]


def measure_network(modules: Sequence[nn.Module], *, parties: Sequence[Side], example: Tensor) -> NetworkCost:
    """Run each stretch on two rows, forwards and backwards, and count.

    Copies are run: weights, buffers, gradients and torch's random numbers stay as they are.

    Args:
        modules: the stretches, from data to the output that the loss judges.
        parties: "client" or "server" for each, taking turns, the first the client's.
        example: one record or more, shape [n, ...]; values do not matter, where the modules' parameters are.

    Raises:
        ParameterError: the parties do not take turns, or there is no row.
        ModelError: a stretch does not return one tensor with rows first.
    """
    _refuse_parties(modules, parties)
    if example.ndim < 1 or len(example) < 1:
        raise ParameterError(f"example must hold at least one row, got shape {tuple(example.shape)}.")
    rows = example[:1].expand(_ROWS, *example.shape[1:]).clone()
    pieces, reached = [], False
    devices = [example.device] if example.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for number, (module, side) in enumerate(zip(modules, parties, strict=True), start=1):
            trains = any(p.requires_grad for p in module.parameters())
            rows, flops = _counted(copy.deepcopy(module), rows, number=number, needed=reached)
            shape = tuple(rows.shape[1:])
            reached |= trains
            state = sum(t.numel() for t in module.state_dict().values() if t.is_floating_point())
            pieces.append(PieceCost(side=side, state=state, trains=trains, flops=flops, shape=shape))
    return NetworkCost(pieces=tuple(pieces))


def _counted(module: nn.Module, rows: Tensor, *, number: int, needed: bool) -> tuple[Tensor, float]:
    """The output, and the arithmetic of a row; `needed`: whether the gradient of the input is computed, too."""
    inputs = rows.detach()
    if inputs.is_floating_point():
        inputs.requires_grad_(needed)
    counter = FlopCounterMode(display=False)
    with torch.enable_grad(), counter:
        outputs = module(inputs)
        if not isinstance(outputs, Tensor) or outputs.ndim == 0 or len(outputs) != len(rows):
            got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ModelError(
                f"Stretch {number} returned {got} for {len(rows)} rows: one tensor, rows first, is needed."
            )
        if outputs.requires_grad:
            outputs.backward(torch.ones_like(outputs))
    return outputs.detach(), counter.get_total_flops() / len(rows)


def _refuse_parties(modules: Sequence[nn.Module], parties: Sequence[str]) -> None:
    expected = ["client" if number % 2 == 0 else "server" for number in range(len(modules))]
    if list(parties) != expected or len(modules) < 2:
        raise ParameterError(
            f"parties must take turns, the client first ('client', 'server', ...), one for each of {len(modules)} "
            f"modules, at least two; got {list(parties)}. Put modules of one side that follow each other into one "
            "nn.Sequential."
        )
